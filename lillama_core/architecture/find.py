"""From a model's config to the architecture that describes it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, find_blocks
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.errors import UserError, nearest
from lillama_core.models.loading import count_parameters, meta_model
from lillama_core.models.unclaimed import no_plugin


def find_architecture(
    config: Any, name: str | Architecture | None = None, trust_remote_code: bool = False
) -> Architecture:
    """The architecture named ``name`` (``auto``: found in the model itself), or the one that claims its model type.

    An architecture instead of a name is taken as it is: one under test need not be installed. Raises UserError that
    lists the nearest when there is none, and that names both when two plugins claim one.
    """
    from lillama_registry import registry

    if isinstance(name, Architecture):
        return name
    if name == "auto":
        from lillama_core.architecture.auto import discover

        return discover(config, trust_remote_code)
    found = registry()
    model_type = str(getattr(config, "model_type", ""))
    claiming: list[Architecture] = found.architectures_for(model_type)
    if name is not None:
        named = [a for a in found.architectures if name in (a.name, found.plugin_of(a).name)]
        if not named:
            known = sorted({n for a in found.architectures for n in (a.name, found.plugin_of(a).name)} | {"auto"})
            raise UserError(f"no architecture named {name!r} (there are: {', '.join(known)}){nearest(name, known)}")
        claiming = found.architectures_for(model_type, named)
        if not claiming:
            named = [a for a in named if not a.fallback] or named
            return next((a for a in named if _fits(a, config)), named[0])
    if len(claiming) > 1:
        plugins = [found.plugin_of(a) for a in claiming]
        owners = " and ".join(f"{p.name!r} ({p.distribution} {p.version})" for p in plugins)
        raise UserError(
            f"model type {model_type!r} is claimed by the plugins {owners}; choose with --architecture"
            f" {' or --architecture '.join(p.name for p in plugins)}"
        )
    if not claiming:
        raise no_plugin(model_type)
    return claiming[0]


def _fits(architecture: Architecture, config: Any) -> bool:
    """Whether a model of ``config`` has its blocks where ``architecture`` says."""
    try:
        find_blocks(architecture, meta_model(config, architecture))
    except UserError:
        return False
    return True


def blocks_of(
    architecture: Architecture, model: nn.Module, selected: tuple[str, ...], choice: MapChoice | None = None
) -> tuple[dict[str, list[Block]], int]:
    """The blocks to compress, and the parameters that a reduction is a fraction of.

    That is the whole model, or the selected stacks when some are selected.
    """
    blocks = find_blocks(architecture, model, selected, choice)
    if not selected:
        return blocks, count_parameters(model)
    modules = [model.get_submodule(architecture.stacks[name]) for name in blocks]
    return blocks, sum(count_parameters(m) for m in modules)
