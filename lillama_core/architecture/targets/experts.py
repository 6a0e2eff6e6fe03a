"""Experts fused into three-dimensional parameters: each expert's matrices as maps, and where they are found.

What such a module computes is at the head of `expert_layouts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture.targets.base import OnRows, TargetModule
from lillama_core.architecture.targets.expert_layouts import (
    BIASES,
    FUSED,
    READ,
    as_stored,
    fused_bias,
    fused_weight,
    has_known_layout,
    is_fused,
)
from lillama_core.architecture.targets.expert_modules import (
    LowRankExperts,
    SharedExperts,
    dense_linear,
    gate_of,
    run_experts,
)
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, lies_within, matches_any
from lillama_core.errors import LillamaError, UserError
from lillama_core.formats.base import Format, dense_weight


class _ObservedForward:
    """Replaces the ``forward`` of a dense experts module: runs it expert by expert, and passes on its maps' tensors."""

    def __init__(self, target: _FusedExperts, module: nn.Module) -> None:
        self.run = partial(target.run_dense, module)
        self.observers: list[tuple[OnRows | None, OnRows | None]] = []

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.run(self.show, hidden_states, top_k_index, top_k_weights)

    def show(self, map_: TargetLinear, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        for on_input, on_output in self.observers:
            if on_input is not None:
                on_input(map_, rows)
            if on_output is not None:
                on_output(map_, output)
        return output


Show = Callable[[TargetLinear, torch.Tensor, torch.Tensor], torch.Tensor]
"""Passes the rows [n, in] and the output [n, out] of a map to the observers, and returns the output."""


class _FusedExperts(TargetModule):
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

    def run_dense(
        self, module: nn.Module, show: Show, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the output [T, H] of the dense module, computed map by map, with ``show`` called for each."""
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
        if not isinstance(forward, _ObservedForward):
            forward = module.forward = _ObservedForward(self, module)
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
        return block.get_submodule(f"{self.name}.{self.place(map_)}")

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        module, found = dense.get_submodule(self.name), {}
        for part, fused in FUSED.items():
            found[f"{self.name}.{fused}"] = as_stored(module, self.whole_weight(block, part))
            if fused_bias(module, part) is not None:
                biases = [self.bias(block, map_) for map_ in self.every.values() if self._in(map_, part)]
                found[f"{self.name}.{BIASES[part]}"] = torch.stack([b.detach() for b in biases if b is not None])
        return found

    def _in(self, map_: TargetLinear, part: str) -> bool:
        return self.place(map_).startswith(f"{part}_map")

    def whole_weight(self, block: nn.Module, part: str) -> torch.Tensor:
        """Return what the low-rank module stands for of all experts' ``part``, [E, out, in]."""
        raise NotImplementedError

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # Each fused parameter's name goes to a matrix of its first map: two dimensions instead of three.
        found = []
        for part, fused in FUSED.items():
            map_ = next(m for m in self.every.values() if self._in(m, part))
            inner = format_.stored_as_weight(map_.out_features, map_.in_features) + "." if map_.name in ranks else ""
            found.append((f"{self.name}.{fused}", f"{self.name}.{self.place(map_)}.{inner}weight"))
        return found


class ExpertsTarget(_FusedExperts):
    """Fused experts whose matrices are maps one by one: ``gate_up.<e>`` [2I, H] and ``down.<e>`` [H, I].

    A map sees the tokens that are routed to its expert. Its group is the same matrix of all experts of the layer.
    """

    kind = "experts"
    low_rank = LowRankExperts

    def all_maps(self, module: nn.Module) -> list[TargetLinear]:
        maps = []
        for part in FUSED:
            if isinstance(module, LowRankExperts):
                layers: Any = module.get_submodule(f"{part}_maps")
                shapes = [(layer.out_features, layer.in_features) for layer in layers]
            else:
                experts, out_features, in_features = fused_weight(module, part).shape
                shapes = [(out_features, in_features)] * experts
            group = f"{self.name}.{part}"
            maps += [TargetLinear(f"{group}.{e}", out, in_, group) for e, (out, in_) in enumerate(shapes)]
        return maps

    def _part(self, map_: TargetLinear) -> tuple[str, int]:
        part, number = self.local_name(map_).split(".")
        return part, int(number)

    def dense_weight(self, module: nn.Module, map_: TargetLinear) -> torch.Tensor:
        part, number = self._part(map_)
        return fused_weight(module, part)[number]

    def dense_bias(self, module: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        part, number = self._part(map_)
        biases = fused_bias(module, part)
        return None if biases is None else biases[number]

    def whole_weight(self, block: nn.Module, part: str) -> torch.Tensor:
        own = [map_ for map_ in self.every.values() if self._part(map_)[0] == part]
        return torch.stack([dense_weight(self.layer(block, map_)) for map_ in own])

    def place(self, map_: TargetLinear) -> str:
        part, number = self._part(map_)
        return f"{part}_maps.{number}"

    def replacement(self, dense: nn.Module, layers: Mapping[str, nn.Module]) -> LowRankExperts:
        gate_up, down = ([layers[m.name] for m in self.every.values() if self._part(m)[0] == part] for part in FUSED)
        return LowRankExperts(gate_of(dense), gate_up, down)

    def run_dense(
        self, module: nn.Module, show: Show, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        # With the maps that the user left out: the module needs all of them.
        maps, gate = {self._part(m): m for m in self.every.values()}, gate_of(module)

        def apply(part: str, e: int, rows: torch.Tensor) -> torch.Tensor:
            map_ = maps[part, e]
            output = functional.linear(rows, self.dense_weight(module, map_), self.dense_bias(module, map_))
            return show(map_, rows, output) if map_ in self.maps else output

        def expert(e: int, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return apply("down", e, gate(apply("gate_up", e, rows))) * weights

        return run_experts(hidden, index, weights, len(maps) // len(FUSED), expert)


class SharedExpertsTarget(_FusedExperts):
    """Fused experts as two maps, ``gate_up`` [E 2I, H] and ``down`` [H, E I], whose low-rank side all experts share.

    A row of the first is a token, a row of the second the hidden units of all experts for one token, those of an
    expert times its routing weight, zeros where the token did not go. So the second moment of the latter has an
    expert's own block on its diagonal, scaled by how often and how strongly it was chosen, and other entries for pairs
    of experts that were chosen together.
    """

    kind = "shared-experts"
    low_rank = SharedExperts

    def all_maps(self, module: nn.Module) -> list[TargetLinear]:
        if isinstance(module, SharedExperts):
            layers: list[Any] = [module.gate_up_map, module.down_map]
            shapes = [(layer.out_features, layer.in_features) for layer in layers]
        else:
            if fused_bias(module, "gate_up") is not None:
                raise UserError(
                    f"--share-experts: the experts {self.name!r} have biases of their own, which one map for all of"
                    " them cannot add; leave --share-experts out"
                )
            experts, twice, width = fused_weight(module, "gate_up").shape
            shapes = [(experts * twice, width), (width, experts * twice // 2)]
        # The experts stand along one side: the outputs of the first, the inputs of the second.
        cuts = (shapes[0][0], shapes[1][1])
        return [
            TargetLinear(f"{self.name}.{part}", *shape, cut=cut)
            for part, shape, cut in zip(FUSED, shapes, cuts, strict=True)
        ]

    def check(self, format_: Format) -> None:
        for map_, stage in zip(self.every.values(), ("up", "down"), strict=True):
            layer = format_.module(map_.out_features, map_.in_features, 1, False, torch.float32, "meta")
            if not hasattr(layer, stage):
                raise UserError(
                    f"--share-experts: format {format_.name!r} has no matrix that could be cut up by expert for"
                    f" {map_.name!r} [{map_.out_features}, {map_.in_features}]; use --format factored"
                )

    def dense_weight(self, module: nn.Module, map_: TargetLinear) -> torch.Tensor:
        if self.local_name(map_) == "gate_up":
            return fused_weight(module, "gate_up").flatten(0, 1)
        # [E, H, I] -> [H, E I]; the only one that is no view.
        return fused_weight(module, "down").transpose(0, 1).flatten(1)

    def whole_weight(self, block: nn.Module, part: str) -> torch.Tensor:
        module = block.get_submodule(self.name)
        assert isinstance(module, SharedExperts)
        weight, parts = dense_weight(module.get_submodule(f"{part}_map")), (module.num_experts, -1)
        return weight.unflatten(0, parts) if part == "gate_up" else weight.unflatten(1, parts).transpose(0, 1)

    def place(self, map_: TargetLinear) -> str:
        return f"{self.local_name(map_)}_map"

    def replacement(self, dense: nn.Module, layers: Mapping[str, nn.Module]) -> SharedExperts:
        gate_up, down = (layers[name] for name in self.every)
        return SharedExperts(gate_of(dense), gate_up, down, len(fused_weight(dense, "gate_up")))

    def run_dense(
        self, module: nn.Module, show: Show, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up, down = self.every.values()
        experts = len(fused_weight(module, "gate_up"))

        def apply(map_: TargetLinear, rows: torch.Tensor) -> torch.Tensor:
            output = functional.linear(rows, self.dense_weight(module, map_))
            return show(map_, rows, output) if map_ in self.maps else output

        # All experts for all tokens: the price of seeing the stacked maps as they are.
        units = gate_of(module)(apply(gate_up, hidden).unflatten(-1, (experts, -1)))
        routing = torch.zeros(len(hidden), experts, dtype=weights.dtype, device=weights.device)
        rows = units * routing.scatter(1, index, weights)[..., None].to(units.dtype)
        return apply(down, rows.flatten(1)).to(hidden.dtype)


def find_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """Return the targets of a block: its linear modules and its fused experts.

    ``only``, ``exclude`` and ``choice`` as in `linear_targets`; for experts they name maps (``mlp.experts.down.*``), or
    the experts' module for all of its maps. Raises UserError for fused experts of a layout that is not known, unless
    they are left out.
    """
    choice = choice or MapChoice()
    targets = linear_targets(block, only, exclude, choice)
    target_class = SharedExpertsTarget if choice.share_experts else ExpertsTarget
    for name, module in block.named_modules():
        if not is_fused(module):
            continue
        if not has_known_layout(module):
            # What its maps are called is not known: whoever names something within it asks for it.
            own = (not only or any(lies_within(p, name) for p in only)) and not matches_any(name, exclude)
            asked = own or any(lies_within(p, name) for p in choice.include)
            if asked and not matches_any(name, choice.exclude):
                raise UserError(
                    f"the experts {name!r} are a {type(module).__name__}, whose layout is not known: {READ};"
                    f" leave them dense with --exclude {name}"
                )
            continue

        def wanted(map_name: str, name: str = name) -> bool:
            def named(patterns: tuple[str, ...]) -> bool:
                return matches_any(map_name, patterns) or matches_any(name, patterns)

            own = (not only or named(only)) and not named(exclude)
            return (own or named(choice.include)) and not named(choice.exclude)

        target = target_class(name, module, wanted, _fraction_used(block, name))
        targets += [target] if target.maps else []
    return targets


def _fraction_used(block: nn.Module, name: str) -> float:
    """Return the fraction of the experts ``name`` that a token is sent to; 1 when no ``top_k`` stands beside them."""
    parent = block.get_submodule(name.rpartition(".")[0])
    experts = len(fused_weight(block.get_submodule(name), "gate_up"))
    said = (getattr(module, "top_k", None) for module in parent.modules())
    chosen = next((k for k in said if isinstance(k, int)), experts)
    return min(1.0, chosen / experts)
