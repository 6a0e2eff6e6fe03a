"""What an architecture tells the core: where its stacks of blocks and its linear maps live."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lillama_core.errors import UserError, nearest
from lillama_core.evaluation import Evaluation
from lillama_core.experts import find_sites
from lillama_core.maps import LinearMap, MapChoice
from lillama_core.modality import Modality, Text
from lillama_core.sites import Site


class Architecture:
    """The description of a family of models; a plugin subclasses or instantiates it.

    The smallest useful one states ``model_types`` and ``stacks``; everything else has a default that works
    for a model whose blocks hold ``nn.Linear`` modules and pass one hidden stream from block to block.
    """

    name: str = ""
    """What ``--architecture`` takes; defaults to the class name in lower case."""
    model_types: tuple[str, ...] = ()
    """Values of ``config.model_type`` that this architecture claims."""
    stacks: Mapping[str, str] = {}
    """Name of a stack -> path of its ``nn.ModuleList`` from the model, in the order of the forward pass."""
    maps: tuple[str, ...] = ()
    """Paths from the block of the linear maps to compress (``*`` matches one component); empty: all of them."""
    exclude: tuple[str, ...] = ()
    """Paths from the block of linear maps to leave alone."""
    optional: tuple[str, ...] = ()
    """Paths from the block of linear maps that are compressed only when the user includes them by name."""
    pinned: tuple[str, ...] = ()
    """Paths from the block of modules that decide (a router): while a student block learns, they decide as the
    teacher's did."""
    modality: Modality = Text()
    """What the models are fed."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers auto class that loads the models."""
    evaluation: Evaluation = Evaluation()
    remarks: tuple[str, ...] = ()
    """Lines that the user is told before a run: what was found rather than declared."""
    tiny_config: Mapping[str, Any] = {}
    """Settings of the config that make a tiny model for tests, where shrinking the usual dimensions does not."""

    def __init__(
        self,
        *,
        name: str | None = None,
        model_types: tuple[str, ...] | None = None,
        stacks: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name or self.name or type(self).__name__.lower()
        if model_types is not None:
            self.model_types = model_types
        if stacks is not None:
            self.stacks = stacks

    def sites(self, block: nn.Module, choice: MapChoice) -> list[Site]:
        """The modules of ``block`` that are swapped, in module order."""
        return find_sites(block, self.maps, (*self.exclude, *self.optional), choice)

    def call_block(
        self, block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run one block on ``hidden`` [batch, length, width] with its recorded other arguments."""
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def adapt(self, model: nn.Module) -> None:
        """Choose how the modules of ``model`` run, when it was loaded: dense, or compressed, or without its head.

        For models that pick a kernel, or read a module's weight instead of calling it. What the model computes and
        what is saved must stay the same.
        """

    def between_blocks(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the model does to the hidden stream after block ``index``; nothing, for most."""
        return hidden


@dataclass(frozen=True)
class Block:
    """One block of a stack, by position."""

    stack: str
    index: int
    path: str
    """Path of the block from the model: ``model.layers.3``; empty for the model itself."""
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}"

    @property
    def maps(self) -> list[LinearMap]:
        return [m for site in self.sites for m in site.maps]

    def full_name(self, map_: LinearMap) -> str:
        """The map's path from the model."""
        return f"{self.path}.{map_.name}" if self.path else map_.name


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
        blocks = [
            Block(name, i, f"{path}.{i}", tuple(architecture.sites(module, choice or MapChoice())))
            for i, module in enumerate(modules)
        ]
        if not any(block.sites for block in blocks):
            raise UserError(f"no linear map found in the {name} blocks of {type(model).__name__}")
        found[name] = blocks
    return found


def dense_blocks(architecture: Architecture, model: nn.Module, stack: str) -> list[Block]:
    """The blocks of a stack of which no map is chosen."""
    path = architecture.stacks[stack]
    return [Block(stack, i, f"{path}.{i}", ()) for i, _ in enumerate(model.get_submodule(path).children())]


def safe_file_stem(name: str) -> str:
    """A block's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
