"""Stacked matrices as targets: rows that come sorted by expert, each run of which is multiplied by its own matrix.

Such a module says of itself ``num_experts``, ``output_size`` and ``input_size``, holds a weight of that shape,
[e, o, i], and nothing else, and is called with rows [n, i] and the number of rows for each expert.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import OnRows, TargetModule, is_close
from lillama_core.architecture.targets.expert_modules import dense_linear
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, lies_within, matches_any
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, dense_weight


class SortedMaps(nn.Module):
    """A linear module, dense or low rank, for each expert: rows [n, i], and how many each expert has, -> [n, o]."""

    def __init__(self, maps: list[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        parts = rows.split(list(sizes), dim=0)
        return torch.cat([map_(part) for map_, part in zip(self.maps, parts, strict=True)])


class SortedTarget(TargetModule):
    """Stacked matrices without biases; their maps are ``<name>.0``, ``<name>.1`` …, of one group."""

    kind = "sorted"

    def __init__(self, name: str, module: Any, token_fraction: float = 1.0) -> None:
        if isinstance(module, SortedMaps):
            layers: list[Any] = list(module.maps)
            shapes = [(layer.out_features, layer.in_features) for layer in layers]
        else:
            experts, out_features, in_features = module.weight.shape
            shapes = [(out_features, in_features)] * experts
        maps = [TargetLinear(f"{name}.{e}", *shape, name, token_fraction) for e, shape in enumerate(shapes)]
        super().__init__(name, tuple(maps))

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

    def _number(self, map_: TargetLinear) -> int:
        return int(self.local_name(map_))

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module: Any = block.get_submodule(self.name)
        number = self._number(map_)
        if isinstance(module, SortedMaps):
            layer: Any = module.maps[number]
            weight: torch.Tensor = layer.weight
        else:
            weight = module.weight[number]
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        return None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            rows, sizes = inputs
            found = []
            for map_, part in zip(self.maps, rows.split(list(sizes), dim=0), strict=True):
                found.append(nn.functional.linear(part, self.weight(block, map_)))
                if len(part) and on_input is not None:
                    on_input(map_, part)
                if len(part) and on_output is not None:
                    on_output(map_, found[-1])
            together = torch.cat(found)
            # What the class computes is its own affair: see that it is this.
            if together.shape != output.shape or not is_close(together, output):
                raise LillamaError(
                    f"{self.name!r} is a {type(module).__name__} that gives something else than a map for each of its"
                    f" {len(self.maps)} experts does; leave it dense with --exclude {self.name}"
                )
            return together

        handle = block.get_submodule(self.name).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        own = {self._number(map_): layers[map_.name] for map_ in self.maps if map_.name in layers}
        if not own:
            return
        module = block.get_submodule(self.name)
        if not isinstance(module, SortedMaps):
            needs = all(p.requires_grad for p in module.parameters())
            dense = [dense_linear(self.weight(block, map_), needs) for map_ in self.maps]
            block.set_submodule(self.name, module := SortedMaps(list(dense)).train(module.training))
        for number, layer in own.items():
            module.maps[number] = layer

    def separate(self, block: nn.Module) -> None:
        self.replace(block, {map_.name: dense_linear(self.weight(block, map_), False) for map_ in self.maps})

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(f"{self.name}.maps.{self._number(map_)}")

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        return {f"{self.name}.weight": torch.stack([dense_weight(self.layer(block, map_)) for map_ in self.maps])}

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # The matrix of the first expert: two dimensions instead of three.
        first = self.maps[0]
        stored = format_.stored_as_weight(first.out_features, first.in_features) + "." if first.name in ranks else ""
        return [(f"{self.name}.weight", f"{self.name}.maps.0.{stored}weight")]


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
