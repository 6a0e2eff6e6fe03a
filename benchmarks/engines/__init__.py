"""Who works on the cells of a suite: this process in turns, or Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lillama_benchmarks.cells import Cell
from lillama_benchmarks.results import Result

OPTIONS: dict[str, tuple[str, ...]] = {
    "in-turns": ("jobs",),
    "ray": ("ray_address", "cpus_per_cell", "gpus_per_cell", "retries"),
}
"""Engines by name, and the options of the command that each alone reads."""


class Engine(Protocol):
    """Works on cells."""

    def run(self, cells: Sequence[Cell], keep: Callable[[Result], None]) -> None:
        """Work on ``cells``, and give each result to ``keep`` as it ends, one at a time.

        The dense cell of a model stands before its others, and ends before they begin: they are compared with it. A
        cell that fails has its error in its result, and the rest goes on. What ends the run early (Ctrl-C) is raised,
        after all that was being worked on has been ended.
        """
        ...


__all__ = ["OPTIONS", "Engine"]
