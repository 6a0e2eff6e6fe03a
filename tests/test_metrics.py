"""The ready-made metrics, each against a computation of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from lillama_core.architecture.find import find_architecture
from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.data.sources import Source
from lillama_core.data.speech.utterances import Utterance
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Subject, language_model_evaluation
from lillama_core.evaluation.comparison import Evaluated, by_model, comparison_rows
from lillama_core.evaluation.metrics import (
    DecodeSpeed,
    Footprint,
    Perplexity,
    ZeroShotAccuracy,
    zero_shot,
)
from lillama_core.evaluation.metrics.perplexity import perplexity, window_losses
from lillama_core.evaluation.metrics.speech import timed_utterances
from lillama_testing.tiny import byte_level_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SETS = ("continuation", "cloze")


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A tiny Llama with random weights and tied embeddings, and a byte-level tokenizer to match."""
    text = "\n".join(OFFLINE_TEXT.read_text(encoding="utf-8").splitlines()[:40])
    tokenizer = byte_level_tokenizer(text, 400, eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Subject("tiny", LlamaForCausalLM(config).eval(), tokenizer)


def items(name: str) -> list[dict[str, Any]]:
    lines = (zero_shot.TASKS_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def log_probability(subject: Subject, context: list[int], rest: list[int]) -> float:
    """Of ``rest`` after ``context``, one token after the other."""
    total = 0.0
    for position, token in enumerate(rest):
        with torch.no_grad():
            logits = subject.model(torch.tensor([context + rest[:position]])).logits[0, -1].double()
        total += (logits[token] - logits.exp().sum().log()).item()
    return total


def test_perplexity_is_that_of_a_token_by_token_loop(subject: Subject) -> None:
    rows = torch.randint(1, 300, (3, 7), generator=torch.Generator().manual_seed(1))
    means = [-log_probability(subject, row[:1], row[1:]) / 6 for row in rows.tolist()]
    expected = math.exp(sum(means) / 3)
    spread = math.sqrt(sum((mean - sum(means) / 3) ** 2 for mean in means) / 2)
    for batch in (None, 1, 2):
        value, error = perplexity(subject.model, rows, subject.device, batch)
        assert value == pytest.approx(expected, rel=1e-5)
        assert error == pytest.approx(expected * spread / math.sqrt(3), rel=1e-4)


def test_windows_longer_than_a_chunk_of_logits(subject: Subject) -> None:
    rows = torch.randint(1, 300, (2, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = torch.stack([subject.model(row[None], labels=row[None]).loss for row in rows])
    found = window_losses(subject.model, rows, subject.device)
    torch.testing.assert_close(found.float(), expected)


def test_what_perplexity_is_of_is_told_by_a_hash(subject: Subject, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words and then some more " * 30, encoding="utf-8")

    def data(windows: int) -> str | None:
        options = EvaluationOptions(data=str(text), sequence_length=16, windows=windows)
        return Perplexity().measure(subject, options, lambda line: None)[0].data

    first = data(2)
    assert first == data(2)
    assert first != data(3)
    text.write_text("a few words and then some less " * 30, encoding="utf-8")
    assert first != data(2)


def test_perplexity_of_one_window_has_no_standard_error(subject: Subject) -> None:
    [found] = Perplexity().measure(subject, EvaluationOptions(windows=1, sequence_length=16), print)
    assert found.name == "perplexity"
    assert found.standard_error is None


def test_perplexity_uses_what_there_is_and_says_so(subject: Subject, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words and then some more " * 10, encoding="utf-8")
    lines: list[str] = []
    options = EvaluationOptions(data=str(text), windows=10_000, sequence_length=16)
    [found] = Perplexity().measure(subject, options, lines.append)
    assert math.isfinite(found.value)
    assert any("using all" in line for line in lines)


@pytest.mark.parametrize("length", [1, 10_000])
def test_perplexity_without_a_window_is_refused(subject: Subject, tmp_path: Path, length: int) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(UserError, match=str(length)):
        Perplexity().measure(subject, EvaluationOptions(data=str(text), sequence_length=length), print)


def test_text_shipped_gives_the_first_windows_of_the_full_one(subject: Subject) -> None:
    full = ROOT / "benchmarks" / "data" / "wikitext2-test.txt"
    rows = [load_text_windows(Source(str(path)), subject.tokenizer, 512, 40) for path in (OFFLINE_TEXT, full)]
    assert torch.equal(*rows)
    assert rows[0].shape == (40, 512)


@pytest.mark.parametrize("name", SETS)
def test_offline_questions_are_sound(name: str) -> None:
    questions = items(name)
    assert len(questions) == 240
    assert set(Counter(question["label"] for question in questions).values()) == {60}
    assert len({(question["context"], question["label"]) for question in questions}) > 230
    for question in questions:
        assert len(question["choices"]) == len(set(question["choices"])) == 4
        assert question["context"] == question["context"].strip() != ""
        for text in [question["context"], *question["choices"]]:
            assert "unk" not in text
            assert " @" not in text


def test_maker_gives_the_files_that_are_shipped(tmp_path: Path) -> None:
    maker = ROOT / "benchmarks" / "offline_tasks" / "make.py"
    subprocess.run([sys.executable, str(maker), "--target", str(tmp_path)], check=True)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(made) == 3
    for path in made:
        assert (tmp_path / path).read_bytes() == (ROOT / "lillama_core" / path).read_bytes()


def test_accuracy_is_that_of_the_likeliest_answer(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    expected = []
    for name in SETS:
        right = 0
        for question in items(name)[:8]:
            context = subject.tokenizer(question["context"])["input_ids"]
            scores = [
                log_probability(subject, context, subject.tokenizer(f" {choice}")["input_ids"])
                for choice in question["choices"]
            ]
            right += scores.index(max(scores)) == question["label"]
        expected.append(right / 8)
    found = ZeroShotAccuracy().measure(subject, EvaluationOptions(limit=8), lambda line: None)
    assert [m.name for m in found] == [
        "accuracy/lillama_continuation",
        "accuracy/lillama_cloze",
        "accuracy/mean",
    ]
    assert [m.value for m in found[:2]] == pytest.approx([100 * value for value in expected])
    assert [m.standard_error for m in found[:2]] == pytest.approx(
        [100 * math.sqrt(value * (1 - value) / 8) for value in expected]
    )
    assert found[2].value == pytest.approx(50 * sum(expected))
    assert capsys.readouterr() == ("", "")


def test_a_group_counts_all_its_items(subject: Subject) -> None:
    pytest.importorskip("lm_eval")
    single = ZeroShotAccuracy().measure(subject, EvaluationOptions(limit=8), lambda line: None)
    options = EvaluationOptions(tasks=("lillama_offline",), limit=8)
    [group] = ZeroShotAccuracy().measure(subject, options, lambda line: None)
    assert group.value == pytest.approx(single[2].value)
    assert "16 questions" in group.meaning


def test_examples_before_a_question(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    contexts: list[str] = []
    loglikelihood = huggingface.HFLM.loglikelihood

    def noted(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        contexts.extend(request.args[0] for request in requests)
        return loglikelihood(self, requests, *args, **kwargs)

    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", noted)
    asked = [question["context"] for question in items("cloze")]
    data = []
    for shots in (0, 2):
        contexts.clear()
        options = EvaluationOptions(tasks=("lillama_cloze",), limit=4, shots=shots)
        [found] = ZeroShotAccuracy().measure(subject, options, lambda line: None)
        assert ("with 2 examples before each" in found.meaning) == (shots == 2)
        for context in contexts:
            assert context.endswith(tuple(asked[:4]))
            assert sum(question in context for question in asked) == 1 + shots
        data.append(found.data)
    assert len(contexts) >= 8
    # Every model sees the same examples.
    first = list(contexts)
    contexts.clear()
    ZeroShotAccuracy().measure(subject, options, lambda line: None)
    assert contexts == first
    # The same questions are asked.
    assert data[0] == data[1]


def test_aliases_and_repetitions() -> None:
    assert zero_shot.expand(()) == zero_shot.OFFLINE_TASKS
    assert len(zero_shot.expand(("paper", "arc_easy"))) == 9


def test_an_unknown_task_gets_a_suggestion(subject: Subject) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        ZeroShotAccuracy().measure(subject, EvaluationOptions(tasks=("arc_eazy",)), print)


def test_a_task_without_its_data_is_one_line(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'piqa'.*Couldn't reach the Hub\).*network") as caught:
        ZeroShotAccuracy().measure(subject, EvaluationOptions(tasks=("piqa",)), print)
    assert "\n" not in str(caught.value)


def test_without_lm_eval(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "_installed", lambda: False)
    lines: list[str] = []
    assert ZeroShotAccuracy().measure(subject, EvaluationOptions(), lines.append) == []
    assert "skipped" in lines[0]
    with pytest.raises(UserError, match=r"lillama\[eval\]"):
        ZeroShotAccuracy().measure(subject, EvaluationOptions(tasks=("piqa",)), print)


def test_footprint_counts_tied_weights_once(subject: Subject) -> None:
    parameters, weights, peak = Footprint().measure(subject, EvaluationOptions(), print)
    model = subject.model
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert parameters.value == sum(unique.values())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert weights.value * 1e6 == pytest.approx(4 * parameters.value + buffers)
    assert peak.value > weights.value


def test_speed(subject: Subject) -> None:
    decoding, prompt = DecodeSpeed().measure(subject, EvaluationOptions(), print)
    assert decoding.name == "speed/decoding"
    assert prompt.name == "speed/prompt"
    assert 0 < decoding.value < prompt.value


def test_speed_of_a_model_with_little_room(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.model.config, "max_position_embeddings", 40)
    decoding, prompt = DecodeSpeed().measure(subject, EvaluationOptions(), print)
    assert "prompt of 20" in decoding.meaning
    assert "prompt of 39" in prompt.meaning


def test_language_models_are_all_measured_alike() -> None:
    five = ["perplexity", "accuracy", "speed", "footprint", "answers"]
    assert [metric.name for metric in language_model_evaluation.metrics] == five
    for model_type in ("llama", "mamba", "falcon_mamba"):
        assert find_architecture(CONFIG_MAPPING[model_type]()).evaluation is language_model_evaluation
    routed = find_architecture(CONFIG_MAPPING["mixtral"]()).evaluation
    assert [metric.name for metric in routed.metrics] == [*five, "routing"]


def test_a_model_beside_itself_is_in_the_file_twice() -> None:
    measured = [[Measurement("perplexity", value, "", "lower", "What it is.")] for value in (20.0, 20.5, 30.0)]
    found = by_model([Evaluated(name, m) for name, m in zip(("m", "m", "n"), measured, strict=True)])
    assert {name: m[0]["value"] for name, m in found.items()} == {"m": 20.0, "m (2)": 20.5, "n": 30.0}


@pytest.mark.parametrize(
    ("models", "columns"),
    [
        (("a/dense", "a/small"), ["dense", "small"]),
        (("runs/1/small", "runs/2/small"), ["1/small", "2/small"]),
        (("small", "runs/small"), ["small", "runs/small"]),
        (("small", "small"), ["small (1)", "small (2)"]),
    ],
)
def test_columns_of_a_comparison_differ(models: tuple[str, ...], columns: list[str]) -> None:
    rows, _ = comparison_rows([Evaluated(model, []) for model in models])
    assert rows[0] == ["metric", *columns, "change", "unit", "better"]


def test_recordings_that_are_all_too_long_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Utterance(None, "", b"", "1", "a row", too_long=True)
    monkeypatch.setattr("lillama_core.evaluation.metrics.speech.read_speech", lambda source, count: [long] * count)
    with pytest.raises(UserError, match="'org/talks': the first 10 recordings are all too long"):
        timed_utterances(EvaluationOptions(data="org/talks"))
