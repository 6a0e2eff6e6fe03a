"""Whisper: CTranslate2's directories converted exactly, and its evaluation, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperConfig, WhisperForConditionalGeneration

from lillama_benchmarks.zoo import fetch
from lillama_core.data.speech.audio import RATE
from lillama_core.data.speech.utterances import read_speech
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Subject
from lillama_core.evaluation.comparison import Evaluated, show_comparison
from lillama_core.evaluation.metrics import error_rates, speech
from lillama_core.evaluation.metrics.error_rates import Scored, paired_difference
from lillama_core.evaluation.metrics.speech import SPEECH_SETS, WordErrorRate
from lillama_core.evaluation.metrics.transcription import transcribe
from lillama_core.models.source import locate
from lillama_core.pipeline.evaluate import EvaluationRequest, compare
from lillama_plugins.whisper import ctranslate2
from lillama_plugins.whisper.evaluation import evaluation
from lillama_plugins.whisper.metrics import normalizer
from lillama_plugins.whisper.model_file import read_model_file

TYPES = {
    np.dtype("float32"): 0,
    np.dtype("int8"): 1,
    np.dtype("int16"): 2,
    np.dtype("int32"): 3,
    np.dtype("float16"): 4,
}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]
STAMPS = ["<|0.00|>", "<|0.02|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*LETTERS, "he", *SPECIAL, *STAMPS]
START = VOCABULARY.index("<|startoftranscript|>")
WIDTH, MELS = 16, 80

Variables = dict[str, Any]


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    """A random Whisper whose every tensor, zero biases included, differs from every other."""
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(VOCABULARY),
            num_mel_bins=MELS,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=40,
            max_target_positions=60,
            pad_token_id=START - 1,
            bos_token_id=START - 1,
            eos_token_id=START - 1,
            decoder_start_token_id=START,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def variables(model: Any) -> Variables:
    """The tensors of ``model`` as CTranslate2's converter names and stacks them."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    found: Variables = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def linear(there: str, *here: str) -> None:
        found[f"{there}/weight"] = np.concatenate([state[f"{name}.weight"] for name in here])
        zeros = np.zeros(WIDTH, state["proj_out.weight"].dtype)
        found[f"{there}/bias"] = np.concatenate([state.get(f"{name}.bias", zeros) for name in here])

    def norm(there: str, here: str) -> None:
        found[f"{there}/gamma"], found[f"{there}/beta"] = state[f"{here}.weight"], state[f"{here}.bias"]

    for convolution in ("conv1", "conv2"):
        linear(f"encoder/{convolution}", f"model.encoder.{convolution}")
    for side, heads, layers in (("encoder", 4, 2), ("decoder", 2, 1)):
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/pre_norm"] = np.array(1, np.int8)
        found[f"{side}/activation"] = np.array(3, np.int8)
        found[f"{side}/scale_embeddings"] = np.array(0, np.int8)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(layers):
            there, here = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            linear(f"{there}/self_attention/linear_0", *(f"{here}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{there}/self_attention/linear_1", f"{here}.self_attn.out_proj")
            norm(f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{there}/attention/linear_0", f"{here}.encoder_attn.q_proj")
                linear(f"{there}/attention/linear_1", *(f"{here}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{there}/attention/linear_2", f"{here}.encoder_attn.out_proj")
                norm(f"{there}/attention/layer_norm", f"{here}.encoder_attn_layer_norm")
            linear(f"{there}/ffn/linear_0", f"{here}.fc1")
            linear(f"{there}/ffn/linear_1", f"{here}.fc2")
            norm(f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")
    found["decoder/alignment_layer"] = np.array(-1, np.int16)
    return found


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def model_bin(found: Variables, specification: str = "WhisperSpec", version: int = 6) -> bytes:
    """The file as CTranslate2 writes it."""
    parts = [struct.pack("<I", version), text(specification), struct.pack("<II", 3, len(found))]
    for name, array in found.items():
        parts.append(text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
        parts.append(struct.pack("<BI", TYPES[array.dtype], array.nbytes) + array.tobytes())
    parts += [struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    return b"".join(parts)


def write(folder: Path, found: Variables, **header: Any) -> Path:
    """A CTranslate2 directory in which ``found`` is the model."""
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(model_bin(found, **header))
    added = [{"id": VOCABULARY.index(t), "content": t, "special": True} for t in SPECIAL]
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "he", SPECIAL[0]])}
    tokenizer = {"model": {"vocab": vocabulary, "merges": ["h e"]}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "vocabulary.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    settings = {"suppress_ids": [3], "suppress_ids_begin": [4, START - 1], "alignment_heads": [[0, 1]], "lang_ids": []}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy and damage."""
    return write(tmp_path_factory.mktemp("bare") / "tiny", variables(tiny()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ctranslate2") / "tiny", variables(tiny()))


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Path:
    """The same in transformers' layout."""
    folder = directory.parent / "converted"
    folder.mkdir()
    ctranslate2.save(ctranslate2.convert(directory), folder)
    return folder


@pytest.fixture
def subject(checkpoint: Path) -> Subject:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(str(checkpoint)).eval()
    return Subject("tiny", model, AutoProcessor.from_pretrained(str(checkpoint)))


def test_every_tensor_comes_through_unchanged(directory: Path) -> None:
    original, converted = tiny(), ctranslate2.convert(directory)
    model = ctranslate2.build(converted)
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    sound, tokens = torch.randn(1, MELS, 3000), torch.tensor([[START, 5, 6]])
    with torch.no_grad():
        ours, theirs = (m(input_features=sound, decoder_input_ids=tokens).logits for m in (model, original))
    assert torch.equal(ours, theirs)
    assert model.config.encoder_attention_heads == 4
    assert model.config.decoder_attention_heads == 2


def test_the_program_takes_the_directory_as_a_model(directory: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = locate(str(directory))
    weights = (Path(found.location) / "model.safetensors").read_bytes()
    assert weights == (checkpoint / "model.safetensors").read_bytes()
    assert found.short_name == "tiny"
    # Its own layout is left alone.
    assert locate(str(checkpoint)).location == str(checkpoint)
    with pytest.raises(UserError, match="only Whisper"):
        locate(str(write(tmp_path / "other", {}, specification="TransformerSpec")))


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    model = tiny(torch.float16)
    converted = ctranslate2.convert(write(tmp_path / "half", variables(model)))
    assert converted.config.dtype == torch.float16
    assert {tensor.dtype for tensor in converted.state.values()} == {torch.float16}
    for name, tensor in converted.state.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_checkpoint_is_complete(checkpoint: Path) -> None:
    needed = {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "normalizer.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert needed <= {path.name for path in checkpoint.iterdir()}
    processor = AutoProcessor.from_pretrained(str(checkpoint))
    assert [processor.tokenizer.convert_tokens_to_ids(t) for t in VOCABULARY] == list(range(len(VOCABULARY)))
    assert processor.tokenizer.normalize("Mister Smith's favourite colour") == "mister smith is favorite color"
    ids = processor.tokenizer("he").input_ids
    assert [VOCABULARY[i] for i in ids] == ["<|startoftranscript|>", "<|notimestamps|>", "he", "<|endoftext|>"]


def test_it_writes_what_its_settings_allow(subject: Subject) -> None:
    features = subject.tokenizer.feature_extractor(np.ones(RATE), sampling_rate=RATE, return_tensors="pt")
    out = subject.model.generate(**features, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    logits = out.logits[0][0].clone()
    # By hand: after the prompt, the best token that is suppressed neither always nor at the start.
    prompt = torch.tensor([[START, VOCABULARY.index("<|notimestamps|>")]])
    with torch.no_grad():
        expected = subject.model(**features, decoder_input_ids=prompt).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    expected[[3, 4, START - 1]] = -torch.inf
    assert out.sequences[0].tolist()[:3] == [*prompt[0].tolist(), expected.argmax().item()]


def _changed(**changes: Any) -> Variables:
    found = variables(tiny())
    for name, value in changes.items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


TOKENIZER = '{"model": {"vocab": %s, "merges": %s}, "added_tokens": %s}'
WEIGHT = "decoder/layer_0/ffn/linear_0/weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {WEIGHT: np.ones((40, WIDTH), np.int8)},
            r"integer weights \(decoder/layer_0/ffn/linear_0/weight: int8\); float32",
        ),
        ({WEIGHT: np.ones((40, WIDTH), np.int16)}, r"integer weights .* int16"),
        ({WEIGHT: None}, "has no tensor decoder/layer_0/ffn/linear_0/weight"),
        ({WEIGHT: np.ones((40, WIDTH + 1), np.float32)}, "has the shape"),
        ({"encoder/layer_0/self_attention/linear_0/weight": None}, "encoder/layer_0"),
        ({"encoder/num_heads": np.array(5, np.int16)}, "encoder/num_heads is 5 for a width of 16"),
        ({"encoder/num_heads": np.array(0, np.int16)}, "encoder/num_heads is 0"),
        ({"decoder/activation": np.array(0, np.int8)}, "decoder/activation is 0"),
        ({"decoder/alibi": np.array(1, np.int8)}, "decoder/alibi is 1"),
        ({"decoder/more": np.ones(3, np.float32)}, "holds 1 tensors .* no place for, such as decoder/more"),
        ({"decoder/embeddings/weight": np.ones((0, WIDTH), np.float32)}, "decoder/embeddings/weight"),
        ({"encoder/num_heads": np.array(np.nan, np.float32)}, "encoder/num_heads is nan, not a whole number"),
        ({"decoder/pre_norm": np.array(np.inf, np.float16)}, "decoder/pre_norm is inf, not a whole number"),
        ({"decoder/scale_embeddings": np.array(0.5, np.float32)}, "decoder/scale_embeddings is 0.5"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, changes: Variables, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ctranslate2.convert(write(tmp_path / "bad", _changed(**changes)))
    assert "model.bin" in str(caught.value)


def test_another_kind_of_model_or_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of kind 'TransformerSpec'; of CTranslate2's models only Whisper"):
        ctranslate2.convert(write(tmp_path / "a", {}, specification="TransformerSpec"))
    with pytest.raises(UserError, match="version 4 of CTranslate2's format"):
        ctranslate2.convert(write(tmp_path / "b", {}, version=4))


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("model.bin", None, r"model\.bin cannot be read"),
        ("model.bin", "", r"model\.bin ends within its version"),
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not the tokenizer of a Whisper model"),
        ("vocabulary.txt", "a\nb\n", "vocabulary beside it differ"),
        ("config.json", None, r"config\.json is missing"),
        ("config.json", "{}", r"config\.json .* not of a Whisper model"),
        ("config.json", "[]", r"config\.json .* not of a Whisper model"),
        (
            "config.json",
            '{"suppress_ids": [1e999], "suppress_ids_begin": []}',
            r"config\.json .* not of a Whisper model",
        ),
        (
            "config.json",
            '{"suppress_ids": [1e30], "suppress_ids_begin": []}',
            r"number in suppress_ids is missing or wr",
        ),
        ("tokenizer.json", TOKENIZER % ('{"h": 0}', "[]", "[]"), r"tokenizer\.json is not|differ"),
        ("tokenizer.json", TOKENIZER % ('{"h": 0}', '["h e"]', "[]"), r"tokenizer\.json is not the tokenizer"),
        ("tokenizer.json", TOKENIZER % ('{"h": -7}', "[]", "[]"), r"tokenizer\.json is not the tokenizer"),
        ("vocabulary.txt", b"a\n\xff\n", r"vocabulary\.txt cannot be read"),
        ("vocabulary.json", "[1, 2]", r"vocabulary\.json is damaged: it is not a list of tokens"),
        ("vocabulary.json", '{"a": 0}', r"vocabulary\.json is damaged: it is not a list of tokens"),
        ("vocabulary.json", json.dumps([*VOCABULARY, "\ud800"]), "vocabulary .* is damaged"),
        ("preprocessor_config.json", "{", r"preprocessor_config\.json cannot be read"),
        ("preprocessor_config.json", "[]", r"preprocessor_config\.json is not that of a Whisper model"),
        (
            "preprocessor_config.json",
            '{"feature_size": 9999999999}',
            "computes 9999999999 mel bands, the model reads",
        ),
        ("preprocessor_config.json", '{"feature_size": "x"}', r"preprocessor_config\.json is not that of a Whisper"),
        ("preprocessor_config.json", '{"n_fft": 1e999}', r"preprocessor_config\.json is not that of a Whisper"),
    ],
)
def test_missing_and_damaged_files_are_named(
    bare: Path, tmp_path: Path, name: str, contents: str | bytes | None, message: str
) -> None:
    folder = shutil.copytree(bare, tmp_path / "bad")
    (folder / name).unlink(missing_ok=True)
    if contents is not None:
        (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(UserError, match=message) as caught:
        ctranslate2.convert(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("added", "languages", "message"),
    [
        ([], [], r"<\|transcribe\|>.* is missing or wrong"),
        (["<|transcribe|>"], [], r"<\|translate\|>.* is missing or wrong"),
        (["<|transcribe|>", "<|translate|>"], [[1]], r"unhashable.* is missing or wrong"),
        (["<|transcribe|>", "<|translate|>"], None, "is missing or wrong"),
    ],
)
def test_what_several_languages_need_is_named(
    bare: Path, tmp_path: Path, added: list[str], languages: Any, message: str
) -> None:
    folder = shutil.copytree(bare, tmp_path / "bad")
    (folder / "vocabulary.txt").write_text("".join(f"{t}\n" for t in [*VOCABULARY, *added]), encoding="utf-8")
    settings = json.loads((folder / "config.json").read_text()) | {"lang_ids": languages}
    (folder / "config.json").write_text(json.dumps(settings))
    # As many tokens as a model of several languages has; no other weight is looked at.
    config = WhisperConfig(vocab_size=51865, num_mel_bins=MELS, max_target_positions=60)
    processor = ctranslate2._processor(folder, config)
    with pytest.raises(UserError, match=message) as caught:
        ctranslate2._generation_config(folder, config, processor)
    assert "\n" not in str(caught.value)


def test_a_size_is_believed_only_as_far_as_the_file_goes(tmp_path: Path) -> None:
    header = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1) + text("x")
    path = tmp_path / "model.bin"
    # 4 GiB announced, none there; and dimensions whose product no machine could hold.
    path.write_bytes(header + struct.pack("<BIBI", 1, 2**30 - 1, 0, 4 * (2**30 - 1)))
    with pytest.raises(UserError, match=r"ends within x \(4294967292 bytes needed, 0 left\): it is truncated"):
        read_model_file(path)
    path.write_bytes(header + struct.pack("<B255IBI", 255, *[2**32 - 1] * 255, 0, 16) + bytes(16))
    with pytest.raises(UserError, match="is damaged: x of shape"):
        read_model_file(path)
    path.write_bytes(header + struct.pack("<B4IBI", 4, 0, *[2**32 - 1] * 3, 0, 0))
    with pytest.raises(UserError, match="x has the impossible shape"):
        read_model_file(path)


SMALL = {"a": np.arange(3, dtype=np.float16), "b": np.ones((2, 2), np.float32), "c": np.array(1, np.int8)}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 10_000) | st.none(),
)
def test_damaged_files_are_read_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    found = SMALL | {"decoder/embeddings/weight": np.ones((1, 1), np.float32)}
    raw = bytearray(model_bin(found))
    for position, value in changes:
        raw[position % len(raw)] = value
    path.write_bytes(bytes(raw[:length]))
    try:
        read = read_model_file(path, "WhisperSpec")
    except UserError:
        return
    assert sum(t.numel() * t.element_size() for t in read.variables.values()) <= len(raw)
    with pytest.raises(UserError):
        ctranslate2.convert_weights(path, read)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = model_bin(SMALL | {"decoder/embeddings/weight": np.ones((1, 1), np.float32)})
    path = tmp_path_factory.getbasetemp() / "truncated.bin"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(UserError, match="truncated"):
        read_model_file(path)


# Evaluation.


def levenshtein(a: list[str], b: list[str]) -> int:
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


@settings(max_examples=60, deadline=None)
@given(*[st.lists(st.sampled_from(["a", "he", "son", "had"]), min_size=1, max_size=8)] * 2)
def test_errors_are_counted_as_by_hand(reference: list[str], hypothesis: list[str]) -> None:
    scored = error_rates.score("x", " ".join(reference), " ".join(hypothesis))
    assert (scored.word_errors, scored.words) == (levenshtein(reference, hypothesis), len(reference))
    joined = list(scored.reference), list(scored.hypothesis)
    assert (scored.character_errors, scored.characters) == (levenshtein(*joined), len(joined[0]))


def made_up(errors: np.ndarray, words: int = 10) -> list[Scored]:
    return [Scored(str(i), str(i), "", int(e), words, int(e), words) for i, e in enumerate(errors)]


def test_the_bootstrap_agrees_with_the_formula_for_equal_lengths() -> None:
    errors = np.random.default_rng(1).poisson(2, size=400)
    expected = 100 * errors.std() / 10 / np.sqrt(len(errors))
    found = error_rates.standard_error(list(errors), [10] * len(errors), seed=0)
    assert found == pytest.approx(expected, rel=0.08)
    assert error_rates.standard_error([1], [10], seed=0) is None


def test_a_paired_difference_ignores_what_is_hard_for_both() -> None:
    generator = np.random.default_rng(2)
    hard = generator.poisson(5, size=200)
    extra = (generator.random(200) < 0.2).astype(int)
    found = paired_difference(made_up(hard), made_up(hard + extra))
    assert found.value == pytest.approx(100 * extra.sum() / 2000)
    assert found.standard_error == pytest.approx(100 * extra.std() / 10 / np.sqrt(200), rel=0.1)
    assert found.low < found.value < found.high
    same = paired_difference(made_up(hard), made_up(hard))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same utterances"):
        paired_difference(made_up(hard), made_up(hard)[1:])


def test_transcripts_do_not_depend_on_the_batch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds = [u.sound() for u in read_speech(SPEECH_SETS["synthetic"], 5)]
    together = transcribe(subject, sounds)
    monkeypatch.setattr("lillama_core.evaluation.metrics.transcription.BATCH", 2)
    assert transcribe(subject, sounds[::-1]) == together[::-1]
    assert len(set(together)) > 1


def test_a_model_that_never_ends_is_cut_off(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lengths = subject.tokenizer.batch_decode, []

    def noting(rows: list[list[int]], **options: Any) -> list[str]:
        lengths.extend(len(row) for row in rows)
        return decode(rows, **options)

    monkeypatch.setattr(subject.tokenizer, "batch_decode", noting)
    sounds = [np.ones(seconds * RATE, np.float32) for seconds in (1, 3, 9)]
    transcribe(subject, sounds, suppress_tokens=[START - 1])
    # The longest first; there are 60 positions, 4 of them for the prompt.
    assert lengths == [56, 16 + 30, 16 + 10]


def test_the_evaluation_measures_both_sets_and_the_change(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EvaluationOptions(limit=2)
    evaluation.check(options)
    measurements = {m.name: m for m in evaluation.run(subject, options)}
    assert list(measurements)[:5] == [
        "wer/read",
        "cer/read",
        "wer/synthetic",
        "cer/synthetic",
        "speed/real_time_factor",
    ]
    assert all(np.isfinite(m.value) for m in measurements.values())
    noted = subject.notes[speech.NOTES]
    by_hand = 100 * sum(levenshtein(s.reference.split(), s.hypothesis.split()) for s in noted["read"]) / 30
    assert measurements["wer/read"].value == pytest.approx(by_hand)
    again = Subject("again", subject.model, subject.tokenizer, baseline=replace(subject, model=None))
    changes = {m.name: m for m in evaluation.metrics[0].measure(again, options, lambda line: None)}
    assert changes["wer_change/read"].value == changes["wer_change/synthetic"].value == 0.0
    assert changes["wer_change/read"].interval == (0.0, 0.0)
    assert "0.00 [0.00, 0.00]" in show_comparison([Evaluated("again", list(changes.values()))])
    # Sounds are taken up a few at a time, which changes nothing.
    monkeypatch.setattr(speech, "AT_HAND", 1)
    lines: list[str] = []
    evaluation.metrics[0].measure(again, options, lines.append)
    assert again.notes[speech.NOTES] == noted
    assert "wer/read: 1 of 2 transcribed" in lines
    assert not any("not compared" in line for line in lines)
    fewer: list[str] = []
    found = evaluation.metrics[0].measure(again, replace(options, limit=1), fewer.append)
    assert not any(m.name.startswith("wer_change") for m in found)
    assert "wer_change/read: the first model was not measured on these utterances; not compared" in fewer
    error_rates.write_transcripts(noted["read"], tmp_path / "out", "read")
    assert error_rates.read_transcripts(tmp_path / "out" / "read.jsonl") == noted["read"]
    table = (tmp_path / "out" / "read.txt").read_text()
    assert table.startswith(f"read: {by_hand:.2f} % word errors, 2 utterances")
    assert all(s.name in table for s in noted["read"])
    assert evaluation.load_saved(tmp_path / "out") == {speech.NOTES: {"read": noted["read"]}}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not a directory"),
        ({}, "holds nothing that the metrics of architecture 'whisper' can compare with; .* --baseline"),
        ({"read.jsonl": "[1"}, "cannot be read: read.jsonl does not hold transcripts"),
        ({"read.jsonl": '{"name": "a"}'}, "cannot be read: read.jsonl does not hold transcripts"),
    ],
)
def test_details_of_a_baseline_that_are_none(
    content: dict[str, str] | None, complaint: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "1-dense"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        compare(EvaluationRequest((str(checkpoint),), EvaluationOptions(limit=1), baseline_details=folder, quiet=True))


def test_the_normaliser_needs_no_file_of_the_checkpoint(subject: Subject) -> None:
    subject.tokenizer.tokenizer.english_spelling_normalizer = None
    assert normalizer(subject)("Mr. Dashwood's  COLOUR, um, twenty-one!") == "mister dashwood is color 21"


def _set(folder: Path, *texts: str | None) -> Path:
    import shutil

    folder.mkdir()
    shutil.copy(SPEECH_SETS["read"] / "0880.flac", folder / "a.flac")
    rows = [{"audio": "a.flac"} | ({} if t is None else {"text": t}) for t in texts]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_set_without_transcripts_is_refused_before_the_model_is_needed(tmp_path: Path) -> None:
    folder = _set(tmp_path / "mine", "he was", None, None)
    with pytest.raises(
        UserError, match=r"2 of 3 utterances have no transcript, the first is .*manifest\.jsonl, line 2;"
    ):
        evaluation.check(EvaluationOptions(data=str(folder)))


def test_a_damaged_recording_is_named_before_the_others_are_transcribed(tmp_path: Path) -> None:
    folder = _set(tmp_path / "mine", "he was", "here")
    (folder / "b.flac").write_bytes((folder / "a.flac").read_bytes()[:4000])
    with (folder / "manifest.jsonl").open("a") as manifest:
        manifest.write(json.dumps({"audio": "b.flac", "text": "and gone"}) + "\n")
    with pytest.raises(UserError, match=r"b\.flac"):
        evaluation.check(EvaluationOptions(data=str(folder)))


def test_transcripts_without_words_are_left_out(subject: Subject, tmp_path: Path) -> None:
    metric, lines = evaluation.metrics[0], []
    assert isinstance(metric, WordErrorRate)
    options = EvaluationOptions(data=str(_set(tmp_path / "mine", "he was", "[noise]")))
    assert [m.name for m in metric.measure(subject, options, lines.append)] == ["wer/mine", "cer/mine"]
    assert "1 transcripts hold no words; left out" in lines[0]
    options = EvaluationOptions(data=str(_set(tmp_path / "none", "[noise]")))
    with pytest.raises(UserError, match="no transcript holds any words"):
        metric.measure(subject, options, lines.append)


ZOO = os.environ.get("LILLAMA_TEST_ZOO")


@pytest.mark.slow
@pytest.mark.skipif(not ZOO, reason="LILLAMA_TEST_ZOO names a folder where the model (71 MB) is, or is to be, kept")
def test_tiny_en_reads_the_five_sentences() -> None:
    folder = fetch("whisper-tiny.en", Path(str(ZOO)))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(str(folder), dtype=torch.float32).eval()
    subject = Subject("tiny.en", model, AutoProcessor.from_pretrained(str(folder)))
    options = EvaluationOptions(data=str(SPEECH_SETS["read"]))
    evaluation.metrics[0].measure(subject, options, lambda line: None)
    errors = {s.name: s.word_errors for s in subject.notes[speech.NOTES]["read"]}
    # One real mistake of two words ("old sposed"), and the slip in the fourth transcript.
    assert errors == {"0870.flac": 0, "0880.flac": 2, "0890.flac": 0, "0920.flac": 1, "0930.flac": 0}
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
