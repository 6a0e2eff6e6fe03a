"""Rank plans: which map gets which rank, and what that saves, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import UserError
from lillama_core.formats import Format

INDEX_ALLOWANCE = 0.004
"""Largest part of the kept parameters that is given up to make room for a format's indices."""


@dataclass(frozen=True)
class PlannedMap:
    """One map's place in a plan."""

    name: str
    """Path from the model."""
    stack: str
    block: int
    map: TargetLinear
    writes: str = ""
    """The channels that its outputs are, by their path from the model, where such may be taken out."""
    reads: str = ""
    """Likewise of its inputs."""
    has_bias: bool = False
    runs: int = 1
    """How many of its outputs each of the channels is that it writes."""

    @property
    def dense_parameters(self) -> int:
        return self.map.parameters

    def without(self, channels: Mapping[str, int]) -> PlannedMap:
        """The map that is left when of some ``channels`` only so many stay."""
        if self.writes not in channels and self.reads not in channels:
            return self
        outputs = channels[self.writes] * self.runs if self.writes in channels else self.map.out_features
        inputs = channels.get(self.reads, self.map.in_features)
        return replace(self, map=replace(self.map, out_features=outputs, in_features=inputs))


@dataclass(frozen=True)
class RankPlan:
    """Map name -> rank; a map that is not listed has a matrix of full rank."""

    format: str
    ranks: Mapping[str, int]
    channels: Mapping[str, int] = field(default_factory=dict)
    """Path of channels -> how many of them stay; of those that are not listed all do."""

    def of(self, block: Block) -> dict[str, int]:
        """The ranks of a block's maps by the names that they have there."""
        return {m.name: self.ranks[block.full_name(m)] for m in block.maps if block.full_name(m) in self.ranks}

    def shapes_of(self, block: Block) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's maps that have fewer rows or columns than in the dense model, by their names there."""
        counts = self.channels_of(block)
        found: dict[str, tuple[int, int]] = {}
        for channels in block.channels:
            if channels.name in counts:
                count = counts[channels.name]
                found |= {m.name: (count * channels.runs, m.in_features) for m in channels.sources}
                found[channels.sink.name] = (channels.sink.out_features, count)
        return found

    def channels_of(self, block: Block) -> dict[str, int]:
        """How many of a block's channels stay, by the names that they have there; without those that all stay."""
        found = {c.name: block.path_of(c.name) for c in block.channels}
        return {name: self.channels[path] for name, path in found.items() if path in self.channels}


def parameters_of(map_: PlannedMap, plan: RankPlan, format_: Format) -> int:
    """Parameters of one map under ``plan``, its bias left out."""
    rank, left = plan.ranks.get(map_.name), map_.without(plan.channels)
    if rank is None:
        return left.dense_parameters
    return format_.parameters(left.map.out_features, left.map.in_features, rank)


def multiply_adds_of(map_: PlannedMap, plan: RankPlan, format_: Format) -> float:
    """Multiply-adds a token of one map under ``plan``: one a parameter and row, in the dense map and in all formats."""
    parameters = parameters_of(map_, plan, format_)
    rank = plan.ranks.get(map_.name)
    for_all = 0 if rank is None or not map_.map.cut else parameters - rank * map_.map.cut
    return for_all + map_.map.token_fraction * (parameters - for_all)


def kept_parameters(maps: list[PlannedMap], plan: RankPlan, format_: Format) -> int:
    """Parameters of ``maps`` under ``plan``, biases left out."""
    return sum(parameters_of(m, plan, format_) for m in maps)


@dataclass(frozen=True)
class Budget:
    """How many parameters the maps may keep for the model to reach the wanted size."""

    maps_dense: int
    """Parameters of all maps that may be compressed."""
    reference: int
    """Parameters that the reduction is a fraction of: the model's, or the selected stacks'."""
    removed: int
    """Parameters to remove."""

    @property
    def maps_kept(self) -> int:
        return self.maps_dense - self.removed


def make_budget(
    maps: list[PlannedMap], reference: int, reduction: float, format_: Format, of_what: str = "the model"
) -> Budget:
    """The budget for removing the fraction ``reduction`` of ``reference`` parameters.

    Raises UserError when ``reduction`` is not in (0, 1) or more than the maps give at rank 1.
    """
    if not math.isfinite(reduction) or not 0 < reduction < 1:
        raise UserError(f"the reduction must be a number between 0 and 1, such as 0.2; got {reduction:g}")
    dense = sum(m.dense_parameters for m in maps)
    smallest = sum(format_.parameters(m.map.out_features, m.map.in_features, 1) for m in maps)
    removed = round(reduction * reference)
    if removed < 1:
        raise UserError(f"a reduction of {reduction:g} removes none of the {reference:,} parameters of {of_what}")
    # Files shall be as much smaller as was asked: indices, at two bytes a parameter, are made up for by parameters.
    indices = sum(format_.index_bytes(m.map.out_features, m.map.in_features) for m in maps) // 2
    removed += min(indices, int(INDEX_ALLOWANCE * (reference - removed)), max(0, dense - removed - smallest))
    if dense - removed < smallest:
        # Rounded down, so that the number named can be asked for.
        most = math.floor((dense - smallest) / reference * 1000) / 1000
        if most <= 0:
            raise UserError(f"the linear maps of {of_what} are too small a part of it to be worth compressing")
        raise UserError(
            f"a reduction of {reduction:g} is more than the linear maps of {of_what} can give;"
            f" the maximum is {most:.3f}"
        )
    return Budget(dense, reference, removed)


def describe_plan(
    maps: list[PlannedMap], plan: RankPlan, format_: Format, total: int, bytes_per_parameter: int
) -> dict[str, Any]:
    """What a plan means before anything is computed: parameters, multiply-adds a token, bytes."""
    kept = kept_parameters(maps, plan, format_)
    dense = sum(m.dense_parameters for m in maps)
    # A channel that is taken out takes its biases with it, which are in no map.
    biases = sum(m.map.out_features - m.without(plan.channels).map.out_features for m in maps if m.has_bias)
    after = total - dense + kept - biases
    return {
        "parameters_before": total,
        "parameters_after": after,
        "reduction": 1 - after / total,
        "multiply_adds_per_token_before": round(sum(m.map.token_fraction * m.dense_parameters for m in maps)),
        "multiply_adds_per_token_after": round(sum(multiply_adds_of(m, plan, format_) for m in maps)),
        "bytes_before": total * bytes_per_parameter,
        "bytes_after": after * bytes_per_parameter,
    }


def rank_range(ranks: Sequence[int | None]) -> str:
    """The rank of one map, or the range of several; None is a map that stays dense."""
    low = [rank for rank in ranks if rank is not None]
    if not low:
        return "dense"
    text = str(min(low)) if min(low) == max(low) else f"{min(low)}–{max(low)}"
    return text if len(low) == len(ranks) else f"{text}, dense"
