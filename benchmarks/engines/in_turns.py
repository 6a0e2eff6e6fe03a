"""Cells in turns, in this process: one model after the other, or a few side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from lillama_benchmarks.cells import Cell, SuiteRunner
from lillama_benchmarks.results import Result


@dataclass(frozen=True)
class InTurns:
    """The cells of a model one after the other."""

    runner: SuiteRunner
    jobs: int = 1
    """Models at a time."""

    def run(self, cells: Sequence[Cell], keep: Callable[[Result], None]) -> None:
        """Work on ``cells``, those of a model side by side in the list."""
        keeping = Lock()

        def work(own: list[Cell]) -> None:
            for cell in own:
                result = cell.run(self.runner)
                with keeping:
                    keep(result)

        models = [list(own) for _, own in itertools.groupby(cells, lambda cell: cell.model.name)]
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                # Asked for, so that what a thread raises is raised here.
                list(pool.map(work, models))
            except BaseException:
                self.runner.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
