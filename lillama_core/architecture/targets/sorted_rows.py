"""Stacked matrices as targets: rows that come sorted by expert, each run of which is multiplied by its own matrix.

Such a module says of itself ``num_experts``, ``output_size`` and ``input_size``, holds a weight of that shape,
[e, o, i], and nothing else, and is called with rows [n, i] and the number of rows for each expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import MapChoice, lies_within, matches_any
from lillama_core.architecture.targets.stacked import StackedTarget
from lillama_core.errors import LillamaError


class SortedMaps(nn.Module):
    """A linear module, dense or low rank, for each expert: rows [n, i], and how many each expert has, -> [n, o]."""

    def __init__(self, maps: list[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        parts = rows.split(list(sizes), dim=0)
        return torch.cat([map_(part) for map_, part in zip(self.maps, parts, strict=True)])


class SortedTarget(StackedTarget):
    """Stacked matrices without biases; their maps are ``<name>.0``, ``<name>.1`` …, of one group."""

    kind = "sorted"
    low_rank = SortedMaps
    maps_are = "experts"

    def __init__(self, name: str, module: Any, token_fraction: float = 1.0) -> None:
        super().__init__(name, module, name, token_fraction)

    @staticmethod
    def accepts(module: Any) -> bool:
        """Whether ``module`` says of itself that it is such a stack."""
        said = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
        if None in said:
            return False
        held = {name: tuple(tensor.shape) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        return held == {"weight": said} and len(inspect.signature(module.forward).parameters) == 2

    @classmethod
    def at(cls, name: str, module: nn.Module) -> SortedTarget:
        if not isinstance(module, SortedMaps) and not cls.accepts(module):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a stack of matrices for sorted rows")
        return cls(name, module)

    @staticmethod
    def matrices(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        return weight

    @staticmethod
    def rows(call: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        rows, sizes = call
        found: tuple[torch.Tensor, ...] = rows.split(list(sizes), dim=0)
        return found

    @staticmethod
    def together(outputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(outputs)


def sorted_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """The stacks of matrices for sorted rows of a block, in module order.

    ``only``, ``exclude`` and ``choice`` as in `linear_targets`; they name a module, which takes all of its maps, or
    maps (``mlp.input_linear.*``), of which any is enough to take, or to leave, all.
    """
    choice = choice or MapChoice()

    def wanted(name: str) -> bool:
        def named(patterns: tuple[str, ...]) -> bool:
            return matches_any(name, patterns) or any(lies_within(pattern, name) for pattern in patterns)

        own = (not only or named(only)) and not named(exclude)
        return (own or named(choice.include)) and not named(choice.exclude)

    found = [(n, m) for n, m in block.named_modules() if SortedTarget.accepts(m)]
    return [SortedTarget(n, m, _fraction_used(block, n, m)) for n, m in found if wanted(n)]


def _fraction_used(block: nn.Module, name: str, module: Any) -> float:
    """The fraction of the experts that a token is sent to; 1 where no ``top_k`` stands beside them."""
    beside = block.get_submodule(name.rpartition(".")[0]).modules()
    said = (getattr(other, "top_k", None) for other in beside)
    return min(1.0, next((k for k in said if isinstance(k, int)), module.num_experts) / module.num_experts)
