"""What the metrics of speed have in common: rounds of work by the clock, of one model or of two in turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lillama_core.data.workload import Meter
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.turns import in_turns, quartiles


@dataclass(frozen=True)
class TimedRound:
    """What a model does in a round, and how much of it there is."""

    run: Callable[[Subject, Meter], None]
    amount: float


@dataclass(frozen=True)
class TimedWork:
    """One kind of work that is timed."""

    name: str
    """What stands behind ``speed/``."""
    unit: str
    better: Literal["higher", "lower"]
    """``higher``: the number is the amount done in a second; ``lower``: the seconds that one of it takes."""
    meaning: str
    rounds: Iterable[TimedRound]
    """The first does not count: kernels are compiled, memory is asked for."""


class Speed(ABC):
    """A metric that times work: its numbers are medians of rounds, with the middle half of the rounds."""

    name: str

    @abstractmethod
    def works(self, subjects: Sequence[Subject], options: EvaluationOptions, report: Report) -> list[TimedWork]:
        """What each of ``subjects`` is to do, the same for all of them."""

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """One measurement for each kind of work, of a model by itself."""
        return [found for work in self.works([subject], options, report) for found in _timed([subject], work)[0]]

    def measure_in_turns(
        self, subject: Subject, options: EvaluationOptions, report: Report
    ) -> tuple[list[Measurement], list[Measurement]]:
        """Those of ``subject``, with how many times as fast it is, and those of its baseline, which is in memory, too.

        Both do each round, the one after the other.
        """
        assert subject.baseline is not None
        own, other = list[Measurement](), list[Measurement]()
        pair = [subject, subject.baseline]
        for work in self.works(pair, options, report):
            found = _timed(pair, work)
            own += found[0]
            other += found[1]
        return own, other


def _timed(subjects: Sequence[Subject], work: TimedWork) -> list[list[Measurement]]:
    """Measurements by subject, the first of which is compared with the second if there is one."""
    amounts: list[float] = []

    def rounds() -> Iterable[Callable[[Subject, Meter], None]]:
        for one in work.rounds:
            amounts.append(one.amount)
            yield one.run

    seconds = [of_one[1:] for of_one in in_turns(subjects, rounds(), subjects[0].device)]
    how = f"in brackets the middle half of {len(seconds[0])} rounds"
    if len(subjects) > 1:
        how += f", in turns with the other model, both in {str(subjects[0].model.dtype).removeprefix('torch.')}"
    found = []
    for of_one in seconds:
        done = zip(amounts[1:], of_one, strict=True)
        low, middle, high = quartiles([a / s if work.better == "higher" else s / a for a, s in done])
        meaning = f"{work.meaning}; {how}."
        found.append([Measurement(f"speed/{work.name}", middle, work.unit, work.better, meaning, interval=(low, high))])
    if len(subjects) > 1:
        low, middle, high = quartiles([other / own for own, other in zip(*seconds, strict=True)])
        meaning = f"How many times as fast as the first model, by round; {how}."
        found[0].append(Measurement(f"speed_up/{work.name}", middle, "", "higher", meaning, interval=(low, high)))
    return found
