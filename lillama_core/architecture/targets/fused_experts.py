"""What targets of fused experts have in common: how maps are shown, replaced, taken apart and made dense again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import OnRows, TargetModule, is_close
from lillama_core.architecture.targets.expert_layouts import READ, has_known_layout
from lillama_core.architecture.targets.expert_modules import (
    arguments_of,
    as_stored,
    dense_linear,
    fused_bias,
    fused_weight,
    in_order,
    parts_of,
)
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format


class ObservedForward:
    """Replaces the ``forward`` of a dense experts module: runs it expert by expert, and passes on its maps' tensors."""

    def __init__(self, target: FusedExperts, module: nn.Module) -> None:
        self.run = partial(target.run_dense, module)
        self.own = partial(type(module).forward, module)
        self.arguments = arguments_of(module)
        self.what = f"the experts {target.name!r} are a {type(module).__name__}"
        self.checked = False
        self.observers: list[tuple[OnRows | None, OnRows | None]] = []

    def __call__(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        found = self.run(self.show, in_order(self.arguments, tensors, named))
        if not self.checked:
            # What the class computes is its own affair: see that it is this.
            with torch.no_grad():
                expected = self.own(*tensors, **named)
            if found.shape != expected.shape or not is_close(found, expected):
                raise LillamaError(
                    f"{self.what} that gives something else than its matrices and its gate do, one expert after the"
                    f" other; leave it dense with --exclude"
                )
            self.checked = True
        return found

    def show(self, map_: TargetLinear, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        for on_input, on_output in self.observers:
            if on_input is not None:
                on_input(map_, rows)
            if on_output is not None:
                on_output(map_, output)
        return output


Show = Callable[[TargetLinear, torch.Tensor, torch.Tensor], torch.Tensor]
"""Passes the rows [n, in] and the output [n, out] of a map to the observers, and returns the output."""


class FusedExperts(TargetModule):
    """What `ExpertsTarget` and `SharedExpertsTarget` have in common."""

    low_rank: type[nn.Module]
    """The module that takes the place of the dense one."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        wanted: Callable[[str], bool] = lambda name: True,
        token_fraction: float = 1.0,
    ) -> None:
        super().__init__(name, ())
        self.every = {m.name: replace(m, token_fraction=token_fraction) for m in self.all_maps(module)}
        self.maps = tuple(m for m in self.every.values() if wanted(m.name))

    @classmethod
    def at(cls, name: str, module: nn.Module) -> TargetModule:
        if not isinstance(module, cls.low_rank) and not has_known_layout(module):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, whose layout is not known: {READ}")
        return cls(name, module)

    def all_maps(self, module: nn.Module) -> list[TargetLinear]:
        """Every map of the module, dense or low rank."""
        raise NotImplementedError

    def dense_weight(self, module: nn.Module, map_: TargetLinear) -> torch.Tensor:
        """W [out, in] of a map of the dense module, a view if possible."""
        raise NotImplementedError

    def dense_bias(self, module: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        """The bias [out] of a map of the dense module, a view, or None."""
        return None

    def run_dense(self, module: nn.Module, show: Show, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return what the dense module gives for ``call``, computed map by map, with ``show`` called for each."""
        raise NotImplementedError

    def place(self, map_: TargetLinear) -> str:
        """The path of a map's module within the low-rank module."""
        raise NotImplementedError

    def replacement(self, dense: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
        """The low-rank module for ``dense`` with ``layers`` by map name, complete."""
        raise NotImplementedError

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module = block.get_submodule(self.name)
        if not isinstance(module, self.low_rank):
            return self.dense_weight(module, map_)
        weight = self.layer(block, map_).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        module = block.get_submodule(self.name)
        if not isinstance(module, self.low_rank):
            return self.dense_bias(module, map_)
        bias = getattr(self.layer(block, map_), "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        module: Any = block.get_submodule(self.name)
        if isinstance(module, self.low_rank):
            raise LillamaError(f"the experts {self.name!r} are low rank already: there is no dense map to observe")
        forward = module.__dict__.get("forward")
        if not isinstance(forward, ObservedForward):
            forward = module.forward = ObservedForward(self, module)
        observer = (on_input, on_output)
        forward.observers.append(observer)
        try:
            yield
        finally:
            forward.observers.remove(observer)
            if not forward.observers:
                del module.__dict__["forward"]

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        own = {name: layer for name, layer in layers.items() if name in self.every}
        if not own:
            return
        module = block.get_submodule(self.name)
        if not isinstance(module, self.low_rank):
            requires_grad = all(p.requires_grad for p in module.parameters())
            dense = {
                name: dense_linear(self.dense_weight(module, map_), requires_grad, self.dense_bias(module, map_))
                for name, map_ in self.every.items()
                if name not in own
            }
            module = self.replacement(module, {**dense, **own}).train(module.training)
            parent, _, child = self.name.rpartition(".")
            setattr(block.get_submodule(parent), child, module)
        for name, layer in own.items():
            module.set_submodule(self.place(self.every[name]), layer)

    def separate(self, block: nn.Module) -> None:
        layers = {n: dense_linear(self.weight(block, m), False, self.bias(block, m)) for n, m in self.every.items()}
        self.replace(block, layers)

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(self.path_of(map_))

    def path_of(self, map_: TargetLinear) -> str:
        return f"{self.name}.{self.place(map_)}"

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        module, found = dense.get_submodule(self.name), {}
        for part, fused in parts_of(module).items():
            whole = fused_weight(module, part)
            weight = self.whole_weight(block, part, tuple(whole.shape[1:]))
            if len(whole) > len(weight):
                weight = torch.cat([weight, block.get_parameter(f"{self.name}.rest").detach()])
            found[f"{self.name}.{fused}"] = as_stored(module, weight)
            if fused_bias(module, part) is not None:
                found[f"{self.name}.{fused}_bias"] = self.whole_bias(block, part, whole.shape[1])
        return found

    def idle(self, block: nn.Module) -> list[torch.Tensor]:
        module = block.get_submodule(self.name)
        if isinstance(module, self.low_rank):
            return []
        return [fused_weight(module, part)[len(fused_weight(module, "down")) :] for part in parts_of(module)]

    def whole_weight(self, block: nn.Module, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return what the low-rank module stands for of all experts' ``part``, [E, *shape]."""
        raise NotImplementedError

    def whole_bias(self, block: nn.Module, part: str, size: int) -> torch.Tensor:
        """Likewise of their biases, [E, size]."""
        raise NotImplementedError

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # Each fused parameter's name goes to a matrix of its first map: two dimensions instead of three.
        found, parts = [], set()
        for map_ in self.every.values():
            part = self.place(map_).partition("_map")[0]
            if part not in parts:
                inner = (
                    format_.stored_as_weight(map_.out_features, map_.in_features) + "." if map_.name in ranks else ""
                )
                found.append((f"{self.name}.{part}_proj", f"{self.name}.{self.place(map_)}.{inner}weight"))
            parts.add(part)
        return found
