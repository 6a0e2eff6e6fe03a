"""The stacks of a run: what was noted of each block, and its maps as a table of names by blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lillama_core.allocation.plan import rank_range
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.output.record import RunRecord
from lillama_core.strategies import make

MOST_ROWS = 40
"""Map names of a heat map; beyond, names that differ in numbers alone (experts.0, experts.1) share a row."""


@dataclass
class Cell:
    """The maps of one name in one block: their ranks (None: dense) and parameters."""

    ranks: list[int | None] = field(default_factory=list)
    dense: int = 0
    kept: int = 0

    def add(self, rank: int | None, dense: int, kept: int) -> None:
        self.ranks.append(rank)
        self.dense += dense
        self.kept += kept

    @property
    def smaller(self) -> bool:
        return self.kept < self.dense

    @property
    def kept_fraction(self) -> float:
        """Part of the dense parameters that is kept."""
        return self.kept / self.dense

    @property
    def text(self) -> str:
        """The rank, the range of several, or "dense"; of matrices that lost channels alone the part that is kept."""
        whole = all(rank is None for rank in self.ranks)
        return f"{100 * self.kept_fraction:.0f} %" if whole and self.smaller else rank_range(self.ranks)


@dataclass
class Stack:
    """A stack of blocks: what the run noted of each, and its maps as a table of names by blocks."""

    name: str
    blocks: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, dict[int, Cell]] = field(default_factory=dict)
    """Name of a map within its block -> number of the block -> cell."""
    shapes: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    @property
    def low_rank(self) -> bool:
        return any(cell.smaller for row in self.cells.values() for cell in row.values())

    @property
    def trained(self) -> bool:
        return any(block.get("steps") for block in self.blocks)


def stacks(record: RunRecord) -> list[Stack]:
    """The record's blocks and maps by stack, in the order of the run."""
    found: dict[str, Stack] = {}
    places: dict[str, tuple[Stack, int]] = {}
    for block in record.blocks:
        path, _, _ = block["name"].rpartition(".")
        stack = found.setdefault(path, Stack(path))
        places[block["name"]] = stack, len(stack.blocks)
        stack.blocks.append(block)
    outside: dict[str, Stack] = {}
    maps = []
    for name, (out, in_) in record.shapes.items():
        stack, position, inner = _place(name, places, outside)
        maps.append((stack, position, inner, name, out, in_))
    found = {**{f"{path} (outside)": s for path, s in outside.items()}, **found}
    crowded = {s.name for s in found.values() if len({m[2] for m in maps if m[0] is s}) > MOST_ROWS}
    format_ = make("formats", record.plan["format"])
    for stack, position, inner, name, out, in_ in maps:
        row = kind_of(inner) if stack.name in crowded else inner
        rank = record.plan["ranks"].get(name)
        left = record.plan.get("shapes", {}).get(name, (out, in_))
        kept = left[0] * left[1] if rank is None else format_.parameters(*left, rank)
        stack.cells.setdefault(row, {}).setdefault(position, Cell()).add(rank, out * in_, kept)
        stack.shapes.setdefault(row, set()).add((out, in_))
    return list(found.values())


def _place(name: str, places: dict[str, tuple[Stack, int]], outside: dict[str, Stack]) -> tuple[Stack, int, str]:
    """The stack, the block's number in it, and the name within the block of the map called ``name``.

    ``outside`` gets the stacks of maps that lie in no block.
    """
    block = name
    while block and block not in places:
        block = block.rpartition(".")[0]
    if not block:
        # The token embedding: a stack of one block, of which nothing else is noted.
        parent, _, inner = name.rpartition(".")
        return outside.setdefault(parent, Stack(parent or "model", [{"name": parent}])), 0, inner
    stack, position = places[block]
    return stack, position, name[len(block) + 1 :]
