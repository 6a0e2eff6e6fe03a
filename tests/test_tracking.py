"""Numbers of a run for a tracker: those of the record, while it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Ended

from lillama_core.errors import UserError
from lillama_core.system.progress import Progress
from lillama_core.system.tracking import FOLDER, Tracker, check_tracker

Cli = Callable[..., Ended]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of what TensorBoard reads below ``folder``."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.*"):
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_losses_of_a_run_reach_the_tracker(
    tiny_model: Path, calibration_text: str, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    small, healed = tmp_path / "small", tmp_path / "healed"
    options = ("--calibration", calibration_text, *QUICK, "--track", "tensorboard")
    ended = run_cli("compress", tiny_model, "--output", small, *options)
    assert ended.status == 0, ended
    blocks = json.loads((small / "lillama.json").read_text())["blocks"]
    found = scalars(tmp_path / FOLDER / "small")
    for name in ("loss_before", "loss_after"):
        assert found[f"block/{name}"] == [(i + 1, pytest.approx(b[name], rel=1e-5)) for i, b in enumerate(blocks)]
    data = ("--data", calibration_text, "--tokens", "1024", "--sequence-length", "32", "--self-share", "0")
    ended = run_cli(
        "finetune", small, "--teacher", tiny_model, "--output", healed, *data, "--epochs", "1", "--track", "tensorboard"
    )
    assert ended.status == 0, ended
    curve = json.loads((healed / "lillama.json").read_text())["healing"][-1]["curve"]
    found = scalars(tmp_path / FOLDER / "healed")
    held_out = [(p["step"], pytest.approx(p["loss"], rel=1e-5)) for p in curve[1:]]
    assert found["healing/held_out_loss"] == held_out
    assert len(found["healing/loss"]) == curve[-1]["step"]


def test_trackers_that_are_not_there(tiny_model: Path, tmp_path: Path, run_cli: Cli) -> None:
    for name, message in (("tensorbord", "did you mean 'tensorboard'"), ("aim", "run 'pip install aim'")):
        ended = run_cli("compress", tiny_model, "--output", tmp_path / "small", "--track", name)
        assert message in ended.error
        with pytest.raises(UserError, match="--track"):
            check_tracker(name)
    assert not list(tmp_path.glob("small*"))


def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    with Progress() as progress:
        progress.track("tensorboard", "run", {"tokens": 5, "stages": {"a": 1}})
        progress.measured({"loss": 1.0}, 1)
        nonsense: Any = "two"
        progress.measured({"loss": 2.0}, nonsense)
        progress.measured({"loss": 2.0}, 3)
    said = capsys.readouterr().err
    assert said.count("Nothing is sent to tensorboard any more") == 1
    assert scalars(tmp_path)["loss"][0] == (1, 1.0)
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("lillama_core.system.tracking.FOLDER", str(tmp_path / "taken"))
    with pytest.raises(UserError, match="--track tensorboard: "):
        Tracker("tensorboard", "run", {}, print)
