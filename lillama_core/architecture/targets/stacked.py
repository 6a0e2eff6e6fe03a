"""What targets have in common whose maps lie in one weight, side by side: how they are shown, replaced, made dense."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import OnRows, TargetModule, is_close
from lillama_core.architecture.targets.expert_modules import dense_linear
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, dense_weight


class StackedTarget(TargetModule):
    """One weight of several maps without biases, ``<name>.0``, ``<name>.1`` …, each for rows of its own."""

    low_rank: type[nn.Module]
    """The module that takes the place of the dense one: made of a list of modules, which it holds as ``maps``."""
    maps_are: str
    """What there is a map for each of, in the plural."""

    def __init__(self, name: str, module: Any, group: str | None = None, token_fraction: float = 1.0) -> None:
        if isinstance(module, self.low_rank):
            layers: Any = module.maps
            shapes = [(layer.out_features, layer.in_features) for layer in layers]
        else:
            count, *shape = self.matrices(module).shape
            shapes = [(shape[0], shape[1])] * count
        maps = [TargetLinear(f"{name}.{i}", *shape, group, token_fraction) for i, shape in enumerate(shapes)]
        super().__init__(name, tuple(maps))

    @staticmethod
    @abstractmethod
    def matrices(module: Any) -> torch.Tensor:
        """Return the weight of the dense ``module`` as a view [maps, out, in]."""

    @staticmethod
    @abstractmethod
    def rows(call: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        """Return the rows [..., in] of each map, of the arguments that the module is called with."""

    @staticmethod
    @abstractmethod
    def together(outputs: list[torch.Tensor]) -> torch.Tensor:
        """Return what the module gives, of what each map gives for its rows."""

    def _number(self, map_: TargetLinear) -> int:
        return int(self.local_name(map_))

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module: Any = block.get_submodule(self.name)
        if not isinstance(module, self.low_rank):
            return self.matrices(module)[self._number(map_)]
        weight = self.layer(block, map_).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        return None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            found = []
            for map_, rows in zip(self.maps, self.rows(inputs), strict=True):
                found.append(nn.functional.linear(rows, self.weight(block, map_)))
                if rows.numel() and on_input is not None:
                    on_input(map_, rows)
                if rows.numel() and on_output is not None:
                    on_output(map_, found[-1])
            together = self.together(found)
            # What the class computes is its own affair: see that it is this.
            if together.shape != output.shape or not is_close(together, output):
                raise LillamaError(
                    f"{self.name!r} is a {type(module).__name__} that gives something else than a map for each of its"
                    f" {len(self.maps)} {self.maps_are} does; leave it dense with --exclude {self.name}"
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
        module: Any = block.get_submodule(self.name)
        if not isinstance(module, self.low_rank):
            needs = all(p.requires_grad for p in module.parameters())
            dense = [dense_linear(self.weight(block, map_), needs) for map_ in self.maps]
            block.set_submodule(self.name, module := self.low_rank(dense).train(module.training))
        for number, layer in own.items():
            module.maps[number] = layer

    def separate(self, block: nn.Module) -> None:
        self.replace(block, {map_.name: dense_linear(self.weight(block, map_), False) for map_ in self.maps})

    def path_of(self, map_: TargetLinear) -> str:
        return f"{self.name}.maps.{self._number(map_)}"

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(self.path_of(map_))

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        path = f"{self.name}.weight"
        weights = torch.stack([dense_weight(self.layer(block, map_)) for map_ in self.maps])
        return {path: weights.reshape(dense.get_parameter(path).shape)}

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # The matrix of the first map, whose shape is not that of all together.
        first = self.maps[0]
        stored = format_.stored_as_weight(first.out_features, first.in_features) + "." if first.name in ranks else ""
        return [(f"{self.name}.weight", f"{self.path_of(first)}.{stored}weight")]
