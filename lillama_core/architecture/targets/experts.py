"""Experts fused into three-dimensional parameters: each expert's matrices as maps, and where they are found.

What such a module computes is at the head of `expert_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.channels import Channels, filled
from lillama_core.architecture.targets.expert_layouts import READ, can_share, has_known_layout, is_fused, is_routed
from lillama_core.architecture.targets.expert_modules import (
    LowRankExperts,
    SharedExperts,
    fused_bias,
    fused_weight,
    gate_of,
    identities_of,
    parts_of,
    run_parts,
    takes_turns,
)
from lillama_core.architecture.targets.fused_experts import FusedExperts, Show
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, lies_within, matches_any
from lillama_core.errors import UserError
from lillama_core.formats.base import Format, dense_weight


class ExpertsTarget(FusedExperts):
    """Fused experts whose matrices are maps one by one, as ``gate_up.<e>`` [2I, H] and ``down.<e>`` [H, I].

    A map sees the tokens that are routed to its expert. Its group is the same matrix of all experts of the layer.
    """

    kind = "experts"
    low_rank = LowRankExperts

    def __init__(
        self,
        name: str,
        module: nn.Module,
        wanted: Callable[[str], bool] = lambda name: True,
        token_fraction: float = 1.0,
    ) -> None:
        super().__init__(name, module, wanted, token_fraction)
        if isinstance(module, LowRankExperts):
            gate, parts = module.gate, module.parts
        else:
            gate, parts = gate_of(module), tuple(parts_of(module))
        self.in_turns = parts[0] == "gate_up" and takes_turns(gate)

    def all_maps(self, module: nn.Module) -> list[TargetLinear]:
        maps = []
        for part in module.parts if isinstance(module, LowRankExperts) else parts_of(module):
            if isinstance(module, LowRankExperts):
                layers: Any = module.get_submodule(f"{part}_maps")
                shapes = [(layer.out_features, layer.in_features) for layer in layers]
            else:
                _, out_features, in_features = fused_weight(module, part).shape
                shapes = [(out_features, in_features)] * len(fused_weight(module, "down"))
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

    def nets(self) -> list[Channels]:
        *_, (last, _) = map(self._part, self.every.values())
        found = []
        for sink in (m for m in self.maps if self._part(m)[0] == last):
            own = [m for m in self.every.values() if self._part(m)[1] == self._part(sink)[1] and m != sink]
            if all(m in self.maps for m in own):
                found.append(Channels(tuple(own), sink, self.in_turns))
        return found

    def whole_weight(self, block: nn.Module, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        weights = (dense_weight(self.layer(block, map_)) for map_ in self._maps_of(part))
        rows, columns = shape
        return torch.stack([filled(filled(w, rows, self._runs(part)).T, columns).T for w in weights])

    def whole_bias(self, block: nn.Module, part: str, size: int) -> torch.Tensor:
        biases = (self.bias(block, map_) for map_ in self._maps_of(part))
        return torch.stack([filled(b.detach(), size, self._runs(part)) for b in biases if b is not None])

    def _maps_of(self, part: str) -> list[TargetLinear]:
        return [map_ for map_ in self.every.values() if self._part(map_)[0] == part]

    def _runs(self, part: str) -> int:
        return 2 if part == "gate_up" and not self.in_turns else 1

    def place(self, map_: TargetLinear) -> str:
        part, number = self._part(map_)
        return f"{part}_maps.{number}"

    def replacement(self, dense: nn.Module, layers: Mapping[str, nn.Module]) -> LowRankExperts:
        maps: dict[str, list[nn.Module]] = {part: [] for part in parts_of(dense)}
        for map_ in self.every.values():
            maps[self._part(map_)[0]].append(layers[map_.name])
        return LowRankExperts(dense, maps)

    def run_dense(self, module: nn.Module, show: Show, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # With the maps that the user left out: the module needs all of them.
        maps = {self._part(m): m for m in self.every.values()}

        def apply(part: str, e: int, rows: torch.Tensor) -> torch.Tensor:
            map_ = maps[part, e]
            output = functional.linear(rows, self.dense_weight(module, map_), self.dense_bias(module, map_))
            return show(map_, rows, output) if map_ in self.maps else output

        experts = len(fused_weight(module, "down"))
        return run_parts(call, tuple(parts_of(module)), experts, identities_of(module), gate_of(module), apply)


class SharedExpertsTarget(FusedExperts):
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
            if not can_share(module):
                raise UserError(
                    f"--share-experts: the experts {self.name!r} have biases of their own, or another layout than"
                    " gate_up_proj and down_proj, for which one map cannot stand for all of them; leave --share-experts"
                    f" out, or these dense with --exclude {self.name}"
                )
            experts, twice, width = fused_weight(module, "gate_up").shape
            shapes = [(experts * twice, width), (width, experts * twice // 2)]
        # The experts stand along one side: the outputs of the first, the inputs of the second.
        cuts = (shapes[0][0], shapes[1][1])
        return [
            TargetLinear(f"{self.name}.{part}", *shape, cut=cut)
            for part, shape, cut in zip(("gate_up", "down"), shapes, cuts, strict=True)
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

    def whole_weight(self, block: nn.Module, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        module = block.get_submodule(self.name)
        assert isinstance(module, SharedExperts)
        weight, parts = dense_weight(module.get_submodule(f"{part}_map")), (module.num_experts, -1)
        return weight.unflatten(0, parts) if part == "gate_up" else weight.unflatten(1, parts).transpose(0, 1)

    def place(self, map_: TargetLinear) -> str:
        return f"{self.local_name(map_)}_map"

    def replacement(self, dense: nn.Module, layers: Mapping[str, nn.Module]) -> SharedExperts:
        gate_up, down = (layers[name] for name in self.every)
        return SharedExperts(gate_of(dense), gate_up, down, len(fused_weight(dense, "gate_up")))

    def run_dense(self, module: nn.Module, show: Show, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, index, weights = call
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
    parent, module = block.get_submodule(name.rpartition(".")[0]), block.get_submodule(name)
    if not is_routed(module):
        return 1.0
    experts = len(fused_weight(module, "down")) + identities_of(module)
    said = (getattr(module, "top_k", None) for module in parent.modules())
    chosen = next((k for k in said if isinstance(k, int)), experts)
    return min(1.0, chosen / experts)
