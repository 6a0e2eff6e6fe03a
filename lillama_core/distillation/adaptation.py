"""Factors fitted again to what their maps read in the compressed model, map by map in the order of a block.

In the model as far as it is compressed a map reads x', not what it reads in the dense model, x. Of the rows that are
fitted to, E[x' x'^T], and E[x x'^T] if asked for, go to the initialiser, which makes other factors of them
(`Initializer.adapt`). Maps that read one tensor, and those of a group, are fitted together; what comes after them in
the block then reads what they give. Modules that hold several maps (the experts of a layer) show nothing of them once
they are low rank: their maps keep the factors that they had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.distillation.training import RoutingReplay
from lillama_core.formats import Factored, FactoredLinear
from lillama_core.initialization import Initializer, StudentStatistics, balance
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.harness import StopForward
from lillama_core.runtime.masks import upstream_tensors
from lillama_core.statistics.moments import SecondMoment, computes_in_bfloat16, flat_rows
from lillama_core.statistics.reduction import reduce_moments
from lillama_core.system.devices import exact_device, fast_gram_products
from lillama_core.system.processes import ALONE, World


def adapt(
    block: Block,
    dense: nn.Module,
    student: nn.Module,
    names: Collection[str],
    initializer: Initializer,
    activations: StackActivations,
    routes: StackActivations | None,
    entering: Sequence[torch.Tensor],
    batches: Sequence[int],
    routing: RoutingReplay,
    world: World = ALONE,
) -> None:
    """Replace the factors of the maps ``names`` in ``student`` by what ``initializer`` makes of them.

    ``activations`` are the compressed model's at this block, ``routes`` has what the dense model gives its own beside
    ``entering``, for an initialiser that compares both. A map that fewer rows of ``batches`` reach than it has inputs
    keeps its factors: they would not span its inputs. So does one that does not get the same rows in both models.
    """
    device = activations.runner.device
    maps = {m.name: m for target in block.targets if isinstance(target, LinearTarget) for m in target.maps}
    readers = Readers(block, routing)
    if batches:
        readers.rows(student, activations, activations.hidden[batches[0]], batches[0])
    # A process of which no row came to an expert does not know what its maps share.
    called = world.from_main(lambda: readers.leader)
    readers.leader = {**called, **{name: name for name in maps if name not in called}}
    for level in readers.levels(set(names) & set(maps)):
        leaders = sorted({readers.leader[name] for name in level})
        pairs = {leader: _Pairs(maps[leader], device, routes is not None) for leader in leaders}
        for batch in batches:
            ours = readers.rows(student, activations, activations.hidden[batch], batch, leaders)
            theirs = ours if routes is None else readers.rows(dense, routes, entering[batch], batch, leaders)
            for leader, pair in pairs.items():
                for (own, weights), (x, _) in zip(ours.get(leader, ()), theirs.get(leader, ()), strict=False):
                    pair.add(own, x, weights)
        seen = _reduced(pairs, world, device)
        layers = {}
        for name in (name for name in level if readers.leader[name] in seen):
            moments, map_ = seen[readers.leader[name]], maps[name]
            target = block.target_of(map_)
            layer, bias = target.layer(student, map_), target.bias(dense, map_)
            assert isinstance(layer, FactoredLinear)
            weight = target.weight(dense, map_).detach()
            exact = exact_device(weight)
            B, A = (part.weight.detach().to(exact) for part in (layer.up, layer.down))
            found = initializer.adapt(weight.to(exact), B, A, moments.statistics(exact, bias is not None))
            shift = None if found[2] is None or bias is None else found[2] + bias.to(exact)
            own_bias = None if layer.bias is None else layer.bias.detach()
            made = Factored().from_factors(*balance(*found[:2]), own_bias if shift is None else shift)
            layers[name] = made.to(device)
        block.put(student, layers)


class _Pairs:
    """Moments of the inputs x' of one map and x of the dense one, row by row."""

    def __init__(self, map_: TargetLinear, device: torch.device, compares: bool) -> None:
        self.own, self.size = SecondMoment(), map_.in_features
        self.sums = [torch.zeros(self.size, self.size, device=device), torch.zeros(self.size, device=device)]
        """Of x x'^T and of x; none where they are not compared."""
        if not compares:
            self.sums.clear()

    def add(self, own: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add rows x' and x [n, in], each pair as often as ``weights`` [n] says; none where their numbers differ."""
        if own.shape != x.shape:
            return
        if weights is not None:
            kept = weights > 0
            own, x, weights = own[kept], x[kept], weights[kept].float()
        self.own.add(own, weights)
        if self.sums:
            half, x = own.dtype == torch.bfloat16, x.float()
            x = x if weights is None else x * weights[:, None]
            self.sums[1] += x.sum(0)
            with torch.autocast(x.device.type, enabled=False), fast_gram_products(x.device, half):
                self.sums[0].addmm_(x.T, own.float())

    def statistics(self, device: torch.device, has_bias: bool) -> StudentStatistics:
        """The means, on ``device``."""
        inputs, center = self.own.mean().to(device), self.own.center().to(device)
        compared = [total.to(device) / self.own.count for total in self.sums]
        return StudentStatistics(inputs, center, has_bias, *compared)


def _reduced(pairs: dict[str, _Pairs], world: World, device: torch.device) -> dict[str, _Pairs]:
    """Of the rows of all processes; what too few rows reached is left out."""
    reduced = reduce_moments(world, {name: pair.own for name, pair in pairs.items()}, list(pairs), None, device)
    for name, pair in pairs.items():
        pair.own = reduced.get(name, pair.own)
        world.sum_(pair.sums)
    return {name: pair for name, pair in pairs.items() if pair.own.count >= pair.size}


@dataclass
class Readers:
    """Which maps of a block read one tensor, in what order, and the rows of it."""

    block: Block
    routing: RoutingReplay
    leader: dict[str, str] = field(default_factory=dict)
    """By map, the first one that reads the same tensor; of the first run, in the order of the calls."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often leaders were called in the first run; it may be otherwise in other runs for maps of a group."""

    def levels(self, names: Collection[str]) -> list[list[str]]:
        """The maps ``names`` that can be fitted together, in the order of the block; last what was not called."""
        groups = {m.name: m.group for m in self.block.maps}
        found: dict[str, list[str]] = {}
        for name in (name for name in self.leader if name in names):
            found.setdefault(groups[name] or self.leader[name], []).append(name)
        return list(found.values())

    def rows(
        self,
        module: nn.Module,
        activations: StackActivations,
        hidden: torch.Tensor,
        batch: int,
        leaders: Collection[str] = (),
    ) -> dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """By the map of ``leaders`` that reads them, rows [n, in] and what each counts for [n], call by call."""
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        tensors: list[tuple[str, torch.Tensor]] = []
        masks, inputs = activations.masks[batch], activations.runner.inputs(self.block, batch)
        upstream = upstream_tensors([inputs.args, inputs.kwargs])
        expected = {leader: self.calls.get(leader, 0) for leader in leaders}
        steady = expected and all(expected.values()) and not any(m.group for m in self.block.maps if m.name in expected)

        def note(map_: TargetLinear, tensor: torch.Tensor) -> None:
            first = next((name for name, other in tensors if other is tensor), map_.name)
            leader = self.leader.setdefault(map_.name, first)
            if leader != map_.name:
                return
            tensors.append((leader, tensor))
            if not leaders:
                self.calls[leader] = self.calls.get(leader, 0) + 1
            elif leader in leaders:
                rows, weights = flat_rows(tensor, masks, tensor.data_ptr() in upstream)
                # As the map itself will have them.
                rows = rows.bfloat16() if computes_in_bfloat16(rows.device) else rows
                found.setdefault(leader, []).append((rows, weights))
                if steady and all(len(found.get(name, ())) == calls for name, calls in expected.items()):
                    # What comes after it in the block is not to be seen now.
                    raise StopForward

        with torch.no_grad(), contextlib.suppress(StopForward), contextlib.ExitStack() as stack:
            for target in (target for target in self.block.targets if isinstance(target, LinearTarget)):
                stack.enter_context(target.observe(module, on_input=note))
            stack.enter_context(self.routing.replaying(module, batch))
            activations.runner(module, self.block, batch, hidden)
        return found
