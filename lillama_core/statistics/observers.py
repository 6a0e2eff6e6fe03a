"""Second moments of what goes into the maps and of the gradients that come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.initialization import MapStatistics
from lillama_core.runtime.masks import StackMasks, upstream_tensors
from lillama_core.statistics.moments import SecondMoment, blend, flat_rows, weighted_average
from lillama_core.statistics.reduction import reduce_moments
from lillama_core.system.devices import exact_device
from lillama_core.system.processes import World


class InputObserver:
    """Accumulates G = E[x x^T] for the maps of one block, once for maps that read the same tensor."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.moments: dict[str, SecondMoment] = {}
        self._leader: dict[str, str] = {}
        self._averages: dict[tuple[str, str], torch.Tensor] = {}
        self._seen: list[tuple[str, torch.Tensor]] = []
        self._masks = StackMasks()
        self._upstream: set[int] = set()

    @contextlib.contextmanager
    def observe(self, module: nn.Module) -> Iterator[None]:
        """While open, every call of ``module``'s targets is observed."""
        with contextlib.ExitStack() as stack:
            for target in self.block.targets:
                stack.enter_context(target.observe(module, on_input=self._observe))
            try:
                yield
            finally:
                self._seen.clear()

    def next_batch(self, masks: StackMasks | None = None, arguments: Any = ()) -> None:
        """Forget the tensors of the batch before: what follows cannot share with them.

        ``masks`` and the block's other ``arguments`` are those of the batch that follows.
        """
        self._seen.clear()
        self._masks = masks or StackMasks()
        self._upstream = upstream_tensors(arguments)

    def _observe(self, map_: TargetLinear, tensor: torch.Tensor) -> None:
        # The first call decides which maps read one tensor; only the first of them accumulates.
        name = map_.name
        leader = self._leader.setdefault(name, next((other for other, seen in self._seen if seen is tensor), name))
        if leader == name:
            self._seen.append((name, tensor))
            self._averages.clear()
            self.moments.setdefault(name, SecondMoment()).add(
                *flat_rows(tensor, self._masks, tensor.data_ptr() in self._upstream)
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything seen, as tensors by name, from which `of` makes an observer that says the same."""
        names = [map_.name for map_ in self.block.maps]
        found = {f"leader.{name}": torch.tensor(names.index(leader)) for name, leader in self._leader.items()}
        for name, moment in self.moments.items():
            found |= {f"{kind}.{name}": value for kind, value in moment.tensors().items()}
        return found

    @classmethod
    def of(cls, block: Block, tensors: dict[str, torch.Tensor]) -> InputObserver:
        """The observer of ``block`` that gave these `tensors`."""
        found, names = cls(block), [map_.name for map_ in block.maps]
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "leader":
                found._leader[name] = names[int(value)]
            elif kind == "total":
                moment = found.moments[name] = SecondMoment()
                moment.restore({kind: tensors[f"{kind}.{name}"] for kind in ("total", "sum", "count")})
        return found

    def reduced(self, world: World, owner: int | None, device: torch.device) -> InputObserver:
        """The observer of the rows of all processes; it says something in the process ``owner``, None: in all."""
        if world.size == 1:
            return self
        names = [map_.name for map_ in self.block.maps]
        # A process of which no row came to an expert does not know what its maps share.
        leaders = world.greatest([names.index(self._leader[n]) if n in self._leader else -1 for n in names])
        found = InputObserver(self.block)
        found._leader = {name: names[int(at)] for name, at in zip(names, leaders, strict=True) if at >= 0}
        found.moments = reduce_moments(world, self.moments, names, owner, device)
        return found

    def count(self, name: str) -> float:
        """How many rows a map has seen."""
        found = self.moments.get(self._leader.get(name, name))
        return 0.0 if found is None else found.count

    def expected(self, name: str) -> float:
        """How many rows of as much data to expect at a map: those seen, but never none where its group saw some."""
        group = group_of(self.block, name)
        return self.count(name) if not group else 0.95 * self.count(name) + 0.05 * _mean([*map(self.count, group)])

    def center(self, name: str) -> torch.Tensor | None:
        """E[x] of a map's inputs, or None if no row reached it.

        Of the rows of `moment`, those that are borrowed among them: G - E[x] E[x]^T is positive only about their mean.
        """
        found = self.moments.get(self._leader.get(name, name))
        if found is None or not found.count:
            return None
        group = self._group(name)
        return blend(found.center(), found.count, self._average(group, "center")) if group else found.center()

    def moment(self, name: str) -> torch.Tensor | None:
        """G of a map, or None if no row reached it or its group.

        A map of a group borrows from it as if it had seen as many rows of the group's average as it has inputs: few
        rows of its own do not span its inputs, many outweigh the loan. One that no row reached gets a multiple of the
        identity, so that its weights alone decide.
        """
        found = self.moments.get(self._leader.get(name, name))
        group = self._group(name)
        if not group:
            return None if found is None or not found.count else found.mean()
        average = self._average(group, "mean")
        if found is None or not found.count:
            return torch.eye(len(average), device=average.device) * average.diagonal().mean()
        return blend(found.mean(), found.count, average)

    def _group(self, name: str) -> dict[str, SecondMoment]:
        """What the maps in the group of ``name`` have seen, of those that have seen rows."""
        leaders = {n: self._leader.get(n, n) for n in group_of(self.block, name)}
        return {n: m for n, of in leaders.items() if (m := self.moments.get(of)) is not None and m.count}

    def _average(self, group: dict[str, SecondMoment], what: str) -> torch.Tensor:
        # Asked for once for every map of the group, when all rows have been seen; the first map stands for the group.
        key = (next(iter(group)), what)
        if key not in self._averages:
            self._averages[key] = weighted_average(
                {n: getattr(m, what)() for n, m in group.items()}, {n: m.count for n, m in group.items()}
            )
        return self._averages[key]


def group_of(block: Block, name: str) -> list[str]:
    """The names of the maps in the group of the map ``name``; none when it is in no group."""
    group = next(m.group for m in block.maps if m.name == name)
    return [] if group is None else [m.name for m in block.maps if m.group == group]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class GradientObserver:
    """Accumulates the second moments of the gradients at the maps' outputs and at the block's output."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.moments: dict[str, SecondMoment] = {m.name: SecondMoment() for m in block.maps}
        self.squares: dict[str, float | torch.Tensor] = dict.fromkeys(self.moments, 0.0)
        """Sums over rows; on the device until they are asked for, so that no map waits for it."""
        self.output = SecondMoment()

    @contextlib.contextmanager
    def observe(self, module: nn.Module, masks: StackMasks | None = None, arguments: Any = ()) -> Iterator[None]:
        """While open, gradients that flow back through ``module``'s targets are observed.

        ``masks`` and the block's other ``arguments`` are those of the batch that is run meanwhile.
        """
        upstream = upstream_tensors(arguments)
        reading: set[str] = set()
        positions = masks or StackMasks()

        def note_input(map_: TargetLinear, tensor: torch.Tensor) -> None:
            if tensor.data_ptr() in upstream:
                reading.add(map_.name)

        with contextlib.ExitStack() as stack:
            for target in self.block.targets:

                def watch(map_: TargetLinear, output: torch.Tensor, target: TargetModule = target) -> None:
                    # Nothing that is trained or followed enters a map that reads another stack's output alone.
                    if not output.requires_grad:
                        output.requires_grad_(True)
                    weight = target.weight(module, map_)
                    reads_upstream = map_.name in reading
                    output.register_hook(lambda g: self._observe(map_.name, g, weight, positions, reads_upstream))

                stack.enter_context(target.observe(module, on_input=note_input, on_output=watch))
            yield

    def _observe(
        self, name: str, gradient: torch.Tensor, weight: torch.Tensor, masks: StackMasks, reads_upstream: bool
    ) -> None:
        rows, weights = flat_rows(gradient.detach(), masks, reads_upstream)
        squares = rows.float().square().sum(1)
        squares = squares.sum() if weights is None else (squares * weights).sum()
        if exact_device(squares) == squares.device:
            squares = squares.double()
        self.squares[name] = self.squares[name] + squares
        # See MapStatistics: on a map with more outputs than inputs W^T F W is smaller, and enough.
        if weight.shape[0] > weight.shape[1]:
            rows = rows.float() @ weight.float()
        self.moments[name].add(rows, weights)

    def reduced(self, world: World, owner: int, device: torch.device) -> GradientObserver:
        """The observer of the rows of all processes; it says something in the process ``owner``."""
        if world.size == 1:
            return self
        names = list(self.squares)
        found = GradientObserver(self.block)
        found.squares = dict(zip(names, world.sums([float(self.squares[n]) for n in names]), strict=True))
        found.moments |= reduce_moments(world, self.moments, names, owner, device)
        found.output = reduce_moments(world, {"": self.output}, [""], owner, device)[""]
        return found

    def statistics(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors by name, ready for a file; maps of a group borrow from each other.

        The outputs of a group's maps go the same way, so that they can lend each other F. W^T F W belongs to one W
        alone: such a map borrows in `map_statistics`.
        """
        found = {"output": self.output.mean()}
        moments = {n: m.mean() for n, m in self.moments.items() if m.count}
        counts = {n: self.moments[n].count for n in moments}
        averages: dict[str | None, torch.Tensor] = {}
        for map_ in self.block.maps:
            name = map_.name
            group = [n for n in group_of(self.block, name) if n in moments]
            if name not in moments and not group:
                continue
            squares = sum(float(self.squares[n]) for n in group or [name]) / sum(counts[n] for n in group or [name])
            found[f"scale.{name}"] = torch.tensor(squares / map_.out_features, dtype=torch.float64)
            if not group or map_.out_features > map_.in_features:
                if name in moments:
                    found[f"gradients.{name}"] = moments[name]
                    found[f"rows.{name}"] = torch.tensor(counts[name])
                continue
            if map_.group not in averages:
                averages[map_.group] = weighted_average({n: moments[n] for n in group}, counts)
            average = averages[map_.group]
            found[f"gradients.{name}"] = blend(moments[name], counts[name], average) if name in moments else average
        return found


def map_statistics(
    map_: TargetLinear,
    weight: torch.Tensor,
    observer: InputObserver,
    gradients: dict[str, torch.Tensor],
    sequences: int,
    device: torch.device,
    has_bias: bool = False,
) -> MapStatistics:
    """What an initialiser may see of one map with ``weight`` [out, in], on ``device``.

    ``gradients`` is what `GradientObserver.statistics` returned; the calibration data has ``sequences`` rows.
    """
    name = map_.name
    inputs, moment, center = observer.moment(name), gradients.get(f"gradients.{name}"), observer.center(name)
    scale = float(gradients[f"scale.{name}"].item()) if f"scale.{name}" in gradients else 0.0
    moment = None if moment is None else moment.to(device)
    if scale > 0 and map_.group is not None and map_.out_features > map_.in_features:
        # The group lends the size of its gradients, without a direction: F = scale times the identity.
        W = weight.to(device).float()
        loan = scale * (W.T @ W)
        moment = loan if moment is None else blend(moment, float(gradients[f"rows.{name}"].item()), loan)
    return MapStatistics(
        None if inputs is None else inputs.to(device),
        moment,
        scale,
        observer.expected(name) / max(1, sequences),
        None if center is None else center.to(device),
        has_bias,
    )
