"""Runs in one process leave neither files open nor temporary files behind; ``benchmarks/soak.py`` does 200."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from lillama_benchmarks.soak import soak


def test_a_few_runs_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    looks = list(soak(tmp_path, 4))
    assert looks[-1]["files"] <= looks[1]["files"]
    # A library may keep one for the whole process.
    assert len({look["temporary"] for look in looks}) == 1
    # The first runs fill caches of the libraries.
    assert looks[-1]["memory"] - looks[2]["memory"] < 100_000_000
