"""Speeds in an evaluation: both models in memory, in turns; what is left out where that cannot be."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lillama_core
from lillama_core.evaluation.base import Evaluation, EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.turns import in_turns, quartiles, repeated
from lillama_core.pipeline import Request, compress
from lillama_registry import registry
from lillama_testing.tiny import TinyModel, make_tiny_model

CPU = torch.device("cpu")


def tiny_llama(folder: Path) -> TinyModel:
    (architecture,) = registry().architectures_for("llama")
    return make_tiny_model(architecture, "llama", folder)


def test_models_take_turns_and_who_begins_changes() -> None:
    calls: list[str] = []

    def round_(model: str, meter: Any) -> None:
        meter.begin()
        calls.append(model)
        time.sleep({"quick": 0.005, "slow": 0.02}[model])
        meter.end()

    quick, slow = in_turns(["quick", "slow"], [round_] * 4, CPU)
    assert calls == ["slow", "quick", "quick", "slow"] * 2
    assert len(quick) == len(slow) == 4
    assert max(quick) < min(slow)


def test_rounds_end_by_number_or_by_time() -> None:
    assert len(list(repeated("work", 2, 5, 60.0))) == 5
    assert len(list(repeated("work", 2, 5, -1.0))) == 2

    def slowly() -> Iterator[str]:
        for work in repeated("work", 1, 100, 0.05):
            time.sleep(0.02)
            yield work

    assert 2 <= len(list(slowly())) <= 5


def test_quartiles_of_few_numbers() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 5.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def measurements(found: Any) -> list[dict[str, Measurement]]:
    return [{m.name: m for m in evaluated.measurements} for evaluated in found]


def test_a_model_is_as_fast_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_llama(tmp_path / "dense")
    calls: list[int] = []
    generate = type(made.load()).generate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(id(self))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(made.load()), "generate", noted)
    found = lillama_core.evaluate(made.folder, baseline=made.folder, metrics="speed", quiet=True)
    dense, same = measurements(found.evaluated)
    # All that writes are rounds of both: each pair of calls is one of either model.
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(set(calls)) == 2
    assert all(set(pair) == set(calls) for pair in pairs)
    assert {pair[0] for pair in pairs} == set(calls)
    assert set(dense) == {"speed/decoding", "speed/prompt"}
    assert set(same) == {*dense, "speed_up/decoding", "speed_up/prompt"}
    for work in ("decoding", "prompt"):
        ratio = same[f"speed_up/{work}"]
        assert ratio.interval is not None
        assert ratio.interval[0] <= ratio.value <= ratio.interval[1]
        assert 0.5 < ratio.value < 2
        assert "in turns with the other model, both in float32" in ratio.meaning


def test_one_model_is_timed_by_itself(tmp_path: Path) -> None:
    made = tiny_llama(tmp_path / "dense")
    (found,) = measurements(lillama_core.evaluate(made.folder, metrics="speed", quiet=True).evaluated)
    assert set(found) == {"speed/decoding", "speed/prompt"}
    assert "in turns" not in found["speed/decoding"].meaning


class Naps:
    """A metric of a plugin that notes whom it saw."""

    name = "naps"

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        raise AssertionError("is measured in turns")

    def measure_in_turns(
        self, subject: Subject, options: EvaluationOptions, report: Report
    ) -> tuple[list[Measurement], list[Measurement]]:
        assert subject.baseline is not None
        own, other = (
            [Measurement("parameters", float(sum(p.numel() for p in one.model.parameters())), "", "lower", "They.")]
            for one in (subject, subject.baseline)
        )
        return own, other


def test_both_models_are_in_memory_and_in_one_dtype(tmp_path: Path) -> None:
    made = tiny_llama(tmp_path / "dense")
    compress(Request(str(made.folder), tmp_path / "small", made.recipe()), "quiet")
    architecture = made.architecture
    architecture = type(architecture)(name="napping", model_types=architecture.model_types, stacks=architecture.stacks)
    architecture.evaluation = Evaluation(Naps())
    found = lillama_core.evaluate(tmp_path / "small", baseline=made.folder, architecture=architecture, quiet=True)
    dense, small = measurements(found.evaluated)
    counted = json.loads((tmp_path / "small" / "lillama.json").read_text(encoding="utf-8"))["parameters"]
    assert dense["parameters"].value == counted["parameters_before"]
    assert small["parameters"].value == counted["parameters_after"]


@pytest.mark.parametrize("stream", [None, True])
def test_what_cannot_be_in_turns_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool | None
) -> None:
    made = tiny_llama(tmp_path / "dense")
    if stream is None:
        # There is room for each model, and none for the dense one beside the other.
        monkeypatch.setattr(
            "lillama_core.pipeline.evaluate.lacks_room", lambda *_: "its weights take 2 GB, and 1 GB are free"
        )
    request = Request(str(made.folder), tmp_path / "small", made.recipe(), evaluate=True, stream=stream)
    compress(request, "quiet")
    said = json.loads((tmp_path / "small" / "lillama.json").read_text(encoding="utf-8"))["evaluation"]
    names = {m["name"] for which in ("dense", "compressed") for m in said[which]}
    assert "perplexity" in names
    assert not any(name.startswith("speed") for name in names)
    why = (
        "it needs the whole model in memory" if stream else "it needs 'dense' in memory as well: its weights take 2 GB"
    )
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert f"speed: left out, {why}" in card
    assert "Not measured: speed: left out" in page
    assert str(tmp_path) not in card
    assert str(tmp_path) not in page


def test_the_card_and_the_report_tell_speeds_in_turns(tmp_path: Path) -> None:
    made = tiny_llama(tmp_path / "dense")
    compress(Request(str(made.folder), tmp_path / "small", made.recipe(), evaluate=True), "quiet")
    said = json.loads((tmp_path / "small" / "lillama.json").read_text(encoding="utf-8"))["evaluation"]
    assert said["left_out"] == []
    times = {m["name"]: m["value"] for m in said["compressed"]}["speed_up/decoding"]
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert f"| `speed_up/decoding` | — | {times:.2f} [" in card
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert f"{times:.2f} times (" in page
    assert "in turns, round after round" in page
