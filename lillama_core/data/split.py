"""Three disjoint parts of the calibration rows: to fit, to choose, to report.

- fit: statistics, loss calibration, training and the closed-form correction see these rows;
- choose: they pick checkpoints and the size of a correction, and serve nothing else;
- report: they say how good the result is, on the command line, in the card and in the report, and choose nothing.

Where nothing is chosen (no training, no correction) there is no part to choose by.

Several processes share the rows: each has all batches, of every one its own rows, and of a small one perhaps none. So a
step of training has the rows that it has in a single process.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lillama_core.data.modality import Samples
from lillama_core.errors import UserError
from lillama_core.system.processes import World


@dataclass(frozen=True)
class CalibrationSplit:
    """Batches of calibration rows, and which of them serve what."""

    batches: tuple[Samples, ...]
    fit: tuple[int, ...]
    """Positions in ``batches``."""
    choose: tuple[int, ...]
    report: tuple[int, ...]
    sizes: tuple[int, ...]
    """How many rows each batch has in all processes together."""

    @classmethod
    def of(cls, data: Samples, batch_size: int, held_out: float, chooses: bool) -> CalibrationSplit:
        """Split the rows of ``data`` into batches of ``batch_size`` rows, and these into three parts.

        ``held_out`` is the fraction of the batches that reports, at least one; when something ``chooses``, as many do
        that. Of two batches, the second is halved for it. Rows beyond the last whole batch are left out. Raises
        UserError when there are too few.
        """
        whole = len(data) // batch_size
        # Something is left to fit by, however much is asked to be held out.
        held = max(1, min(round(held_out * whole), (whole - 1) // (2 if chooses else 1)))
        batches = [data.part(start * batch_size, (start + 1) * batch_size) for start in range(whole)]
        if not chooses:
            fit = whole - held
            choose: range | tuple[int, ...] = ()
        elif whole - 2 * held >= 1:
            fit = whole - 2 * held
            choose = range(fit, fit + held)
        else:
            fit = whole - 1
            last = batches.pop() if batches else None
            if last is None or len(last) < 2:
                raise UserError(
                    f"{whole} batches of {batch_size} rows are too few to fit, to choose and to report by: give more"
                    " data, or lower --batch-size"
                )
            middle = len(last) // 2
            batches += [last.part(0, middle), last.part(middle, len(last))]
            choose = (fit,)
        if fit < 1:
            raise UserError(f"{whole} batches of {batch_size} rows are too few to fit by and to report: give more data")
        report = range(fit + len(choose), len(batches))
        sizes = tuple(map(len, batches))
        return cls(tuple(batches), tuple(range(fit)), tuple(choose), tuple(report), sizes)

    def share(self, world: World) -> CalibrationSplit:
        """The same batches with the rows of this process alone: those of which `World.numbers` has the numbers.

        Raises UserError where a process would have no row to fit by.
        """
        if world.size == 1:
            return self
        if self.fitted_rows < world.size:
            raise UserError(
                f"{self.fitted_rows} rows to fit by are too few for {world.size} processes: give more data, or start"
                " fewer"
            )
        starts = itertools.accumulate(self.sizes, initial=0)
        own = [
            b.every((world.rank - start) % world.size, world.size)
            for b, start in zip(self.batches, starts, strict=False)
        ]
        return replace(self, batches=tuple(own))

    def here(self, part: Sequence[int]) -> tuple[int, ...]:
        """Which of the batches at these positions this process has rows of."""
        return tuple(i for i in part if len(self.batches[i]))

    @property
    def fitted_rows(self) -> int:
        """How many rows, from the first, are fitted to."""
        return sum(self.sizes[i] for i in self.fit)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Rows and SHA-256 of each part, for the record."""
        parts = {"fit": self.fit, "choose": self.choose, "report": self.report}
        return {
            name: {"rows": sum(self.sizes[i] for i in part), "sha256": self._sha256(part)}
            for name, part in parts.items()
        }

    def _sha256(self, part: Sequence[int]) -> str:
        digest = hashlib.sha256()
        for index in part:
            for name, tensor in sorted(self.batches[index].inputs.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def rows_for(self, tokens: int, given_tokens: int) -> int:
        """How many rows hold about ``tokens`` of the ``given_tokens`` tokens of all rows; at least one."""
        return max(1, round(sum(self.sizes) * min(1.0, tokens / given_tokens)))

    def batches_with(self, rows: int) -> int:
        """How many batches, from the first, hold the first ``rows`` rows."""
        found = 0
        while rows > 0 and found < len(self.sizes):
            rows -= self.sizes[found]
            found += 1
        return found

    def batches_for(self, fraction: float) -> int:
        """How many batches are the ``fraction`` of those that are fitted to, rounded up."""
        return math.ceil(len(self.fit) * min(1.0, fraction))
