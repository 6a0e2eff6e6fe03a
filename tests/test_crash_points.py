"""A run that a file operation ends leaves what was there, says so in one line, and goes on to the same bytes.

``benchmarks/crash_points.py`` tries every operation of four architectures, `tests/test_resume.py` signals.
"""

from __future__ import annotations

import pytest

from lillama_registry import registry
from lillama_testing.crashing import Trial, killed, no_space, read_only

PARTS = 4
"""Points that are tried of each fault, even parts of a run apart."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    (architecture,) = registry().architectures_for("llama")
    return Trial.of(architecture, "llama", tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def points(trial: Trial) -> list[str]:
    return trial.count()


def test_the_operations_of_a_run_are_seen(points: list[str]) -> None:
    for part in ("mkdir out.partial", "replace out.partial/run.json", "save out.partial/", "fsync"):
        assert any(point.startswith(part) for point in points), part
    assert points[-1] == "rename out"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("fault", [no_space, read_only, killed], ids=lambda fault: fault.__name__)
def test_a_run_goes_on_after(trial: Trial, points: list[str], fault: object, part: int) -> None:
    kinds = [no_space, read_only, killed]
    # Other points for each fault, the last of a run among them.
    at = (len(points) - 1) * (3 * part + kinds.index(fault) + 1) // (3 * PARTS)
    found = trial.disturbed(at, fault, lasting=fault is read_only)  # type: ignore[arg-type]
    assert found is None, f"{points[at]}: {found}"
