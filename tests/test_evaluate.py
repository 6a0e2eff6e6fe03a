"""``lillama evaluate`` where a model does not fit, and in several processes: the numbers stay the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_processes import job, lines

from lillama_core import evaluate, quantize
from lillama_core.cli.main import main
from lillama_core.errors import UserError
from lillama_core.evaluation.base import Evaluation, EvaluationOptions
from lillama_core.pipeline import Request, compress, opening
from lillama_registry import registry
from lillama_testing.tiny import TinyModel, make_tiny_model

FEW: dict[str, Any] = {"windows": 5, "sequence_length": 32, "limit": 7, "quiet": True}
SAME: dict[str, Any] = {**FEW, "metrics": ("perplexity", "accuracy")}
"""Those that do not depend on the machine."""
SHORT = ("--windows", "5", "--sequence-length", "32", "--limit", "7")


def specimen(model_type: str, folder: Path) -> TinyModel:
    (architecture,) = registry().architectures_for(model_type)
    return make_tiny_model(architecture, model_type, folder)


def values(found: Any) -> list[dict[str, float]]:
    """By model, what does not depend on the machine."""
    return [
        {m.name: m.value for m in one.measurements if m.name.split("/")[0] in ("perplexity", "accuracy")}
        for one in found.evaluated
    ]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "mamba"])
def test_a_streamed_model_measures_as_in_memory(model_type: str, tmp_path: Path) -> None:
    made = specimen(model_type, tmp_path / "dense")
    compress(Request(str(made.folder), tmp_path / "small", made.recipe()), "quiet")
    resident, streamed = (
        values(evaluate(tmp_path / "small", baseline=made.folder, stream=stream, **SAME)) for stream in (False, True)
    )
    assert resident[0]["perplexity"] != resident[1]["perplexity"]
    assert set(resident[0]) == {
        "perplexity",
        *(f"accuracy/{n}" for n in ("lillama_continuation", "lillama_cloze", "mean")),
    }
    for one, other in zip(resident, streamed, strict=True):
        # Batches are larger.
        assert other == pytest.approx(one, rel=1e-5)


def test_a_quantized_model_too(tmp_path: Path) -> None:
    made = specimen("llama", tmp_path / "dense")
    compress(Request(str(made.folder), tmp_path / "small", made.recipe(format="factored")), "quiet")
    quantize(tmp_path / "small", tmp_path / "bits", bits=8)
    exact, resident, streamed = (
        values(evaluate(tmp_path / folder, stream=stream, **SAME))[0]
        for folder, stream in (("small", False), ("bits", True), ("bits", False))
    )
    assert streamed == pytest.approx(resident, rel=1e-5)
    assert streamed["perplexity"] != exact["perplexity"]


def test_in_half_precision_too(tmp_path: Path) -> None:
    made = specimen("llama", tmp_path / "dense")
    resident, streamed = (
        values(evaluate(made.folder, stream=stream, dtype="bfloat16", **SAME)) for stream in (False, True)
    )
    exact = values(evaluate(made.folder, **SAME))
    assert streamed[0]["perplexity"] == pytest.approx(resident[0]["perplexity"], rel=1e-3)
    assert streamed[0]["perplexity"] != exact[0]["perplexity"]


def test_what_does_not_fit_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = specimen("llama", tmp_path / "dense")
    needed = 4 * sum(p.numel() for p in made.load().parameters())
    for free, streamed in ((needed + 10_000, False), (needed - 1, True)):
        monkeypatch.setattr(opening, "free_host", lambda free=free: free)
        assert main(["evaluate", str(made.folder), *SHORT]) == 0
        said = capsys.readouterr()
        assert ("block by block from disk: its weights take" in said.err) == streamed
        assert ("speed: left out, it needs the whole model in memory" in said.err) == streamed
        assert ("speed/decoding" in said.out) != streamed


def test_what_has_to_run_token_by_token_is_refused(tmp_path: Path) -> None:
    made = specimen("whisper", tmp_path / "dense")
    with pytest.raises(UserError, match="only where it fits in memory: none of its metrics reads it block by block"):
        evaluate(made.folder, stream=True, quiet=True)


def test_that_a_streamed_run_cannot_be_measured_is_told_before_it(tmp_path: Path) -> None:
    made = specimen("whisper", tmp_path / "dense")
    before = sorted(tmp_path.iterdir())
    request = Request(str(made.folder), tmp_path / "small", made.recipe(), stream=True, evaluate=True)
    with pytest.raises(UserError, match="no metric of architecture 'whisper' measures a model so; pass --no-stream"):
        compress(request, "quiet")
    assert sorted(tmp_path.iterdir()) == before


def test_answers_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = specimen("llama", tmp_path / "dense")
    compress(Request(str(made.folder), tmp_path / "small", made.recipe()), "quiet")
    arguments = ["evaluate", str(tmp_path / "small"), "--baseline", str(made.folder), *SHORT, "--metrics"]
    assert main([*arguments, "perplexity,answers", "--answers", "2"]) == 0
    said = capsys.readouterr()
    assert "answers: 2, of 64 tokens at most" in said.err
    (first, second) = [i for i, line in enumerate(said.out.splitlines()) if line.startswith("> ")]
    lines = said.out.splitlines()[first:]
    assert lines[0].startswith("> ")
    assert lines[1].startswith("dense")
    assert any(line.startswith("small") for line in lines[1 : second - first])
    found = evaluate(tmp_path / "small", baseline=made.folder, answers=1, metrics="answers", **FEW)
    ((prompt, (dense, small)),) = found.answers
    assert dense != small
    assert f"> {prompt}" in repr(found)
    assert main([*arguments, "perplexity,answers"]) == 0
    assert "answers: " not in capsys.readouterr().err


def test_transcripts_are_answers(tmp_path: Path) -> None:
    made = specimen("whisper", tmp_path / "dense")
    found = evaluate(made.folder, answers=2, limit=1, quiet=True)
    assert len(found.answers) == 2
    assert found.answers[0][0].split()


def test_an_evaluation_without_answers_says_so() -> None:
    with pytest.raises(UserError, match="--answers does nothing: none of the metrics writes or transcribes"):
        Evaluation("perplexity").check(EvaluationOptions(answers=1))


def by_name(path: Path) -> dict[str, dict[str, float]]:
    found = json.loads(path.read_text())
    wanted = ("perplexity", "accuracy", "wer", "cer", "routing")
    return {
        model: {m["name"]: m["value"] for m in measured if m["name"].split("/")[0] in wanted}
        for model, measured in found.items()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
@pytest.mark.parametrize(("model_type", "processes"), [("mixtral", 2), ("whisper", 3)])
def test_processes_share_the_rows(model_type: str, processes: int, tmp_path: Path) -> None:
    made = specimen(model_type, tmp_path / "dense")
    # Of five windows and seven questions, or of twenty-five utterances, not all have as many.
    options = ("--limit", "4") if model_type == "whisper" else SHORT
    words = ["evaluate", str(made.folder), *options, "--details"]
    assert main([*words, str(tmp_path / "one"), "--json", str(tmp_path / "one.json")]) == 0
    done = job([[*words, str(tmp_path / "many"), "--json", str(tmp_path / "many.json")]] * processes)
    assert done.status == 0, lines(done) or done
    assert done.stdout.count("metric ") == 1
    one, many = (by_name(tmp_path / name) for name in ("one.json", "many.json"))
    assert len(one[str(made.folder)]) >= 4
    assert many[str(made.folder)] == pytest.approx(one[str(made.folder)], rel=1e-5)
    written = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("one", "many")]
    assert written[0] == written[1] != []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
def test_processes_that_measure_other_things_are_refused(tmp_path: Path) -> None:
    made = specimen("llama", tmp_path / "dense")
    words = ["evaluate", str(made.folder), *SHORT]
    done = job([words, [*words, "--dtype", "bfloat16"]])
    assert done.status != 0
    (line,) = lines(done)
    assert "process 1 differs from process 0 in dtype (None -> bfloat16)" in line
