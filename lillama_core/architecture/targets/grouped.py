"""Grouped projections as targets, on request: one matrix that holds a map for each group of features.

Such a module is a subclass of ``nn.Linear`` that says its number of groups as ``n_groups``. Its weight [g o, i] are g
matrices [o, i], one below the other; each multiplies its own group of x [..., g, i], and what they give is [..., g, o].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import OnRows, TargetModule, is_close
from lillama_core.architecture.targets.expert_modules import dense_linear
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, is_asked_for
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, dense_weight


class GroupMaps(nn.Module):
    """A linear module, dense or low rank, for each group: [..., g, i] -> [..., g, o]."""

    def __init__(self, maps: list[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([map_(x[..., g, :]) for g, map_ in enumerate(self.maps)], -2)


class GroupedTarget(TargetModule):
    """A grouped projection without a bias; its maps are ``<name>.0``, ``<name>.1`` …"""

    kind = "grouped"

    def __init__(self, name: str, module: Any) -> None:
        if isinstance(module, GroupMaps):
            layers: list[Any] = list(module.maps)
            shapes = [(layer.out_features, layer.in_features) for layer in layers]
        else:
            rows, columns = module.weight.shape
            shapes = [(rows // module.n_groups, columns)] * module.n_groups
        super().__init__(name, tuple(TargetLinear(f"{name}.{g}", *shape) for g, shape in enumerate(shapes)))

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` says of itself that it is a grouped projection."""
        groups = getattr(module, "n_groups", None)
        if not isinstance(module, nn.Linear) or not isinstance(groups, int) or groups < 1:
            return False
        return module.bias is None and module.weight.shape[0] % groups == 0

    @classmethod
    def at(cls, name: str, module: nn.Module) -> GroupedTarget:
        if not cls.accepts(module) and not isinstance(module, GroupMaps):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a grouped projection without a bias")
        return cls(name, module)

    def _number(self, map_: TargetLinear) -> int:
        return int(self.local_name(map_))

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module: Any = block.get_submodule(self.name)
        if isinstance(module, GroupMaps):
            module, number = module.maps[self._number(map_)], 0
        else:
            number = self._number(map_)
        weight: torch.Tensor = module.weight[number * map_.out_features : (number + 1) * map_.out_features]
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        return None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            (x,) = inputs
            found = []
            for g, map_ in enumerate(self.maps):
                rows = x[..., g, :]
                found.append(nn.functional.linear(rows, self.weight(block, map_)))
                if on_input is not None:
                    on_input(map_, rows)
                if on_output is not None:
                    on_output(map_, found[-1])
            together = torch.stack(found, -2)
            # What the class computes is its own affair: see that it is this.
            if together.shape != output.shape or not is_close(together, output):
                raise LillamaError(
                    f"{self.name!r} is a {type(module).__name__} that gives something else than a map for each of its"
                    f" {len(self.maps)} groups does; leave it dense with --exclude {self.name}"
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
        if not isinstance(module, GroupMaps):
            needs = all(p.requires_grad for p in module.parameters())
            dense = [dense_linear(self.weight(block, map_), needs) for map_ in self.maps]
            block.set_submodule(self.name, module := GroupMaps(list(dense)).train(module.training))
        for number, layer in own.items():
            module.maps[number] = layer

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(f"{self.name}.maps.{self._number(map_)}")

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        weights = [dense_weight(self.layer(block, map_)) for map_ in self.maps]
        return {f"{self.name}.weight": torch.cat(weights)}

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # The matrix of the first group, which has other rows or columns than that of all.
        first = self.maps[0]
        stored = format_.stored_as_weight(first.out_features, first.in_features) + "." if first.name in ranks else ""
        return [(f"{self.name}.weight", f"{self.name}.maps.0.{stored}weight")]


def grouped_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """The grouped projections of a block that ``only`` or ``choice.include`` name, in module order; never any others.

    They are named as modules, which takes all of their maps. ``exclude`` and ``choice.exclude`` as in `linear_targets`.
    """
    named = (only, exclude, choice or MapChoice())
    found = [(n, m) for n, m in block.named_modules() if GroupedTarget.accepts(m)]
    return [GroupedTarget(n, m) for n, m in found if is_asked_for(n, *named)]
