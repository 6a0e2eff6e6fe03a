"""What Whisper is calibrated on: spectrograms, transcripts, what counts of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from lillama_core import Recipe, SampleRequest, Samples
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import IGNORE_INDEX, modality_of
from lillama_core.data.speech import choice
from lillama_core.data.speech.choice import choose_utterances
from lillama_core.data.speech.disturbance import disturbed
from lillama_core.data.speech.utterances import Utterance
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Subject
from lillama_core.evaluation.metrics.speech import NOTES
from lillama_core.models.loading import load_config, load_model
from lillama_core.models.source import locate
from lillama_core.system.progress import Progress
from lillama_plugins.whisper.evaluation import evaluation
from lillama_plugins.whisper.speech import HOP, PADDING_WEIGHT, Speech, decoder_rows
from lillama_registry import registry
from lillama_testing import make_tiny_model


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper") / "model"
    (architecture,) = registry().architectures_for("whisper")
    make_tiny_model(architecture, "whisper", folder)
    return folder


def recordings(folder: Path, texts: list[str | None], seconds: float = 1.0) -> Path:
    """Noise of different loudness, with a manifest."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for i, text in enumerate(texts):
        sound = generator.standard_normal(int(16000 * seconds) + 160 * i) * 0.1
        soundfile.write(folder / f"{i}.wav", sound, 16000)
        lines.append(json.dumps({"audio": f"{i}.wav", **({} if text is None else {"text": text})}))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def load(model_directory: Path, data: Path, **options: Any) -> Samples:
    source = locate(str(model_directory))
    architecture = find_architecture(load_config(source))
    recipe = Recipe(calibration=(str(data),), **options)
    model = load_model(source, architecture, torch.float32)
    processor = modality_of(architecture).load_processor(source, None)
    request = SampleRequest(recipe, model, processor, "", torch.device("cpu"), None, Progress("quiet"))
    return modality_of(architecture).load(request)


def test_what_was_said_counts_most(model_directory: Path, tmp_path: Path) -> None:
    texts: list[str | None] = ["a", "a longer text", "b", "c"]
    found = load(model_directory, recordings(tmp_path / "data", texts), batch_size=2)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    positions = [-(-(16000 + 160 * i) // HOP) for i in order]
    for weights, inside in zip(found.masks["encoder"], positions, strict=True):
        assert weights[:inside].eq(1).all()
        assert weights[inside:].eq(PADDING_WEIGHT).all()
    assert found.targets is not None
    assert found.output_mask is not None
    # Every token behind the prompt is predicted once, the end of the text included; padding never.
    assert torch.equal(found.output_mask, (found.targets != IGNORE_INDEX).float())
    tokens = found.inputs["decoder_input_ids"]
    for row, counted, target in zip(tokens, found.masks["decoder"], found.targets, strict=True):
        length = int(counted.sum())
        kept = target[: length - 1] != IGNORE_INDEX
        assert torch.equal(row[1:length][kept], target[: length - 1][kept])
        assert (target[length:] == IGNORE_INDEX).all()
    assert load(model_directory, tmp_path / "data", batch_size=2).sha256 == found.sha256
    assert load(model_directory, tmp_path / "data", batch_size=2, seed=1).sha256 != found.sha256


def test_without_a_text_the_model_says_what_it_heard(model_directory: Path, tmp_path: Path) -> None:
    found = load(model_directory, recordings(tmp_path / "data", [None] * 4), batch_size=2)
    (description,) = found.description.values()
    assert description["transcribed by the model"] == 4
    assert found.targets is not None
    assert ((found.targets != IGNORE_INDEX).sum(1) >= 1).all()


SPOKEN = ["<|en|>", "<|fr|>", "<|transcribe|>", "<|translate|>"]


@pytest.fixture(scope="module")
def multilingual(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the tokens and settings of one of several languages."""
    folder = tmp_path_factory.mktemp("several") / "model"
    processor = AutoProcessor.from_pretrained(model_directory)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": SPOKEN}, replace_extra_special_tokens=False)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(model_directory)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(processor.tokenizer))
    # Not to be made from the model's config again when it is loaded.
    model.generation_config._from_model_config = False
    ids = dict(zip(SPOKEN, processor.tokenizer.convert_tokens_to_ids(SPOKEN), strict=True))
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {t: ids[t] for t in SPOKEN[:2]}
    model.generation_config.task_to_id = {t.strip("<|>"): ids[t] for t in SPOKEN[2:]}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_decoder_is_told_the_language(multilingual: Path, tmp_path: Path) -> None:
    """What `generate` puts before a transcript stands before those that are calibrated on, too."""
    data = recordings(tmp_path / "data", ["un texte", None, "a text", None])
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    for line, language in zip(lines, ("fr", "French", "<|en|>", None), strict=True):
        line |= {} if language is None else {"language": language}
    (data / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = load(multilingual, data, batch_size=2)
    tokenizer = AutoProcessor.from_pretrained(multilingual).tokenizer
    model = AutoModelForSpeechSeq2Seq.from_pretrained(multilingual).eval()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    heard = model.detect_language(found.inputs["input_features"])[order.index(3)]
    spoken = ["fr", "fr", "en", tokenizer.decode(heard).strip("<|>")]
    assert found.targets is not None
    for row, target, number in zip(found.inputs["decoder_input_ids"], found.targets, order, strict=True):
        begin = ["<|startoftranscript|>", f"<|{spoken[number]}|>", "<|transcribe|>", "<|notimestamps|>"]
        assert tokenizer.convert_ids_to_tokens(row[:4].tolist()) == begin
        assert (target[:3] == IGNORE_INDEX).all()
        assert target[3] != IGNORE_INDEX
    (description,) = found.description.values()
    assert sum(description["languages"].values()) == 4
    assert description["languages"]["fr"] >= 2


def test_an_unknown_language_is_named(multilingual: Path, tmp_path: Path) -> None:
    data = recordings(tmp_path / "data", ["a"] * 4)
    manifest = data / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"text"', '"language": "klingon", "text"'))
    with pytest.raises(UserError, match="does not know the language 'klingon'; it knows en, fr"):
        load(multilingual, data, batch_size=2)


def test_each_utterance_is_measured_in_its_language(
    multilingual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recordings(tmp_path / "data", ["it's", "c'est", "it's", "c'est"])
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    for line, language in zip(lines, (None, "fr", "en", "fr"), strict=True):
        line |= {} if language is None else {"language": language}
    (data / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(multilingual).eval()
    subject = Subject("several", model, AutoProcessor.from_pretrained(multilingual))
    asked = []
    generate = model.generate

    def noting(**options: Any) -> Any:
        asked.append((options["language"], len(options["encoder_outputs"].last_hidden_state)))
        return generate(**options)

    monkeypatch.setattr(model, "generate", noting)
    evaluation.metrics[0].measure(subject, EvaluationOptions(data=str(data / "manifest.jsonl")), lambda line: None)
    assert asked == [("en", 1), ("en", 1), ("fr", 2)]
    # The normaliser of English writes contractions out, the one for all other languages does not.
    assert [s.reference for s in subject.notes[NOTES]["data"]] == ["it is", "it is", "c est", "c est"]


def test_rows_of_tokens_by_hand() -> None:
    class Model:
        class config:  # noqa: N801
            pad_token_id = 9

    tokens, targets = decoder_rows([[1, 2, 5, 6, 3], [1, 2, 3]], Model, prompt=2)
    assert tokens.tolist() == [[1, 2, 5, 6], [1, 2, 9, 9]]
    assert targets.tolist() == [[IGNORE_INDEX, 5, 6, 3], [IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX]]


def test_a_disturbed_recording_still_holds_the_voice() -> None:
    t = np.arange(16000) / 16000
    sound = (0.1 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    found = [disturbed(sound, np.random.default_rng(seed)) for seed in range(20)]
    assert all(f.shape == sound.shape and f.dtype == np.float32 and np.abs(f).max() <= 1 for f in found)
    correlations = [abs(np.corrcoef(f, sound)[0, 1]) for f in found]
    # At 5 dB the voice has 0.87 of the amplitude.
    assert min(correlations) > 0.8
    assert len({round(float(c), 6) for c in correlations}) == 20
    np.testing.assert_array_equal(found[3], disturbed(sound, np.random.default_rng(3)))


@pytest.mark.parametrize(
    ("data", "message"),
    [((), "need recordings"), (("two",), "2 recordings; at least two batches of 4"), (("two@2",), "two@2")],
)
def test_what_cannot_be_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...], message: str
) -> None:
    recordings(tmp_path / "two", ["a", "b"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        Speech().check(Recipe(calibration=data))


def test_a_recording_is_named_once(tmp_path: Path) -> None:
    """Or it could be both trained on and held out."""
    folder = recordings(tmp_path / "few", ["a"] * 9)
    again = (str(folder), str(folder.parent / "few" / "."))
    with pytest.raises(UserError, match="is among the recordings named before; name each once"):
        Speech().check(Recipe(calibration=again))
    with pytest.raises(UserError, match="--samples 6 is less than two batches of 4: ask for more"):
        Speech().check(Recipe(calibration=(str(folder),), samples=6))


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Utterance(None, "a", b"", str(i), too_long=i == 1) for i in range(3)]
    asked: list[Any] = []

    def read(*arguments: Any) -> list[Utterance]:
        asked.append(arguments)
        return rows

    monkeypatch.setattr(choice, "read_speech", read)
    lines: list[str] = []
    found = choose_utterances(Recipe(calibration=("librispeech",), samples=3), lines.append)
    assert sorted(u.name for u in found) == ["0", "2"]
    assert lines == ["librispeech: 1 of 3 recordings are too long; left out"]
    assert asked == [("librispeech", 3, "calibration")]
