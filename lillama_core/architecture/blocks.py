"""Find the blocks of a model, and in each the linear maps that an architecture declares."""

from __future__ import annotations

from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.linear import plain_modules
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.errors import UserError, nearest


def find_blocks(
    architecture: Architecture,
    model: nn.Module,
    selected: tuple[str, ...] = (),
    choice: MapChoice | None = None,
) -> dict[str, list[Block]]:
    """The blocks of each stack of ``model``, which may live on the meta device.

    Raises UserError for an unknown name in ``selected``, and when a declared path does not lead to a list of blocks
    with linear maps.
    """
    for name in selected:
        if name not in architecture.stacks:
            known = list(architecture.stacks)
            raise UserError(
                f"no stack named {name!r} in architecture {architecture.name!r}"
                f" (it has: {', '.join(known)}){nearest(name, known)}"
            )
    found: dict[str, list[Block]] = {}
    for name, path in architecture.stacks.items():
        try:
            modules = model.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"architecture {architecture.name!r} expects the {name} blocks at {path!r},"
                f" but {type(model).__name__} has no such module"
            ) from None
        if not isinstance(modules, nn.ModuleList) or len(modules) == 0:
            raise UserError(f"{path!r} of {type(model).__name__} is not a non-empty list of blocks")
        if selected and name not in selected:
            continue
        blocks = []
        for i, of in enumerate(architecture.block_paths(model, name)):
            module = model.get_submodule(of)
            targets = tuple(architecture.targets(module, choice or MapChoice()))
            blocks.append(Block(name, i, of, targets, plain_modules(module)))
        if not any(block.targets for block in blocks):
            raise UserError(f"no linear map found in the {name} blocks of {type(model).__name__}")
        found[name] = blocks
    return found


def dense_blocks(architecture: Architecture, model: nn.Module, stack: str) -> list[Block]:
    """The blocks of a stack of which no map is chosen."""
    return [Block(stack, i, path, ()) for i, path in enumerate(architecture.block_paths(model, stack))]


def check_apart(architecture: Architecture, model: nn.Module) -> None:
    """Raise UserError where a weight of ``model`` is in several blocks, or in a block and elsewhere.

    Blocks are compressed one at a time, each with factors of its own, and read and written apart.
    """
    stacks = architecture.stacks.values()
    blocks = tuple(f"{path}.{n}." for path in stacks for n, _ in model.get_submodule(path).named_children())
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and any(one.startswith(blocks) for one in (name, other)):
            raise UserError(
                f"{other} and {name} are one weight: models whose blocks share weights cannot be compressed"
            )
