"""Reading sound and transcripts: every format and layout, and one clear line for whatever is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama_core.data.speech import utterances as audio
from lillama_core.data.speech.audio import RATE, decode_audio, read_audio
from lillama_core.data.speech.utterances import read_speech
from lillama_core.errors import UserError

PITCH = 440.0


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    """A sine of 440 Hz, amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * PITCH * np.arange(round(rate * seconds)) / rate)


def write(path: Path, sound: np.ndarray | None = None, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(rate) if sound is None else sound, rate)
    return path


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_gives_the_tone_that_was_written(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    sound = np.repeat(tone(rate)[:, None], channels, axis=1)
    read = read_audio(write(tmp_path / f"tone{suffix}", sound, rate))
    assert read.dtype == np.float32
    assert read.shape == (RATE,)
    # The ends ring where the rate was changed; Vorbis is lossy.
    inside = slice(RATE // 8, -RATE // 8)
    np.testing.assert_allclose(read[inside], tone(RATE)[inside], atol=0.03 if suffix == ".ogg" else 1e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    sound = np.stack([tone(RATE), np.zeros(RATE)], axis=1)
    np.testing.assert_allclose(read_audio(write(tmp_path / "left.wav", sound)), 0.5 * tone(RATE), atol=1e-4)


def test_thirty_seconds_are_the_limit(tmp_path: Path) -> None:
    assert len(read_audio(write(tmp_path / "long.wav", tone(RATE, 30.0)))) == 30 * RATE
    with pytest.raises(UserError, match=r"longer\.flac is 30\.5 s long; at most 30 s are supported"):
        read_audio(write(tmp_path / "longer.flac", tone(8000, 30.5), 8000))


def _truncated_flac(path: Path) -> None:
    whole = write(path.with_name("whole.flac"), np.random.default_rng(0).normal(0, 0.1, RATE)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.touch(), "is empty; give a WAV, FLAC or OGG file"),
    "text": (lambda path: path.write_text("This is no sound at all.\n" * 9), "damaged or not a sound file"),
    "header only": (lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt "), "damaged or not a sound file"),
    "no samples": (lambda path: soundfile.write(path, tone(RATE)[:0], RATE, format="WAV"), "only 0.00 s of sound"),
    "truncated": (_truncated_flac, "damaged or not a sound file|truncated"),
    "silent": (lambda path: soundfile.write(path, np.zeros(RATE), RATE, format="WAV"), "is silent"),
    "muted": (lambda path: soundfile.write(path, np.full(RATE, -1 / 32768), RATE, format="WAV"), "is silent"),
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "cannot be read|is empty"),
    "not a number": (
        lambda path: soundfile.write(path, np.full(RATE, np.nan), RATE, format="WAV", subtype="FLOAT"),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sound_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    path = tmp_path / "bad.wav"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        read_audio(path)
    assert "\n" not in str(caught.value)
    assert "bad.wav" in str(caught.value)


def _wav(sound: Any = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, tone(RATE, 0.2) if sound is None else sound, RATE, format="FLAC")
    return stream.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000) | st.none(),
)
def test_damaged_bytes_are_sound_or_a_user_error(changes: list[tuple[int, int]], length: int | None) -> None:
    raw = bytearray(_wav())
    for position, value in changes:
        raw[position % len(raw)] = value
    try:
        sound = decode_audio(io.BytesIO(bytes(raw[:length])), "fuzzed")
    except UserError:
        return
    assert np.isfinite(sound).all()
    assert len(sound) <= 30 * RATE


def test_a_manifest_is_relative_to_itself_and_text_is_optional(tmp_path: Path) -> None:
    write(tmp_path / "set" / "sub" / "one.wav")
    write(tmp_path / "set" / "two.flac")
    rows = [{"audio": "sub/one.wav", "text": " Two\nwords "}, {"audio": str(tmp_path / "set" / "two.flac")}]
    manifest = tmp_path / "set" / "manifest.jsonl"
    manifest.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    for source in (manifest, str(manifest), manifest.parent):
        one, two = read_speech(source)
        assert (one.text, two.text) == ("Two words", None)
        assert len(one.sound()) == len(two.sound()) == RATE
    assert len(read_speech(manifest, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not valid JSON"),
        ("[1]", r"line 2 names no sound file"),
        ('{"text": "words"}', r"line 2 names no sound file"),
        ('{"audio": 3}', r"line 2 names no sound file"),
        ('{"audio": "gone.wav", "text": "words"}', r"line 2: gone\.wav does not exist"),
        ('{"audio": "%s"}' % ("n" * 5000), r"line 2: n+ … n+"),
        ('{"audio": "one.wav", "text": 3}', r"line 2: 'text' is a int"),
        ('{"audio": "one.wav", "language": ["fr"]}', r"line 2: 'language' is a list"),
    ],
)
def test_a_bad_line_of_a_manifest_is_named(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path / "one.wav")
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text('{"audio": "one.wav"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_speech(manifest)
    assert str(manifest) in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"\n\n", b"\xff\xfe\0\0"])
def test_an_empty_or_binary_manifest_is_refused(tmp_path: Path, contents: bytes) -> None:
    manifest = tmp_path / "speech.jsonl"
    manifest.write_bytes(contents)
    with pytest.raises(UserError, match=r"is empty|is not UTF-8"):
        read_speech(manifest)


def test_transcripts_beside_the_sound_or_listed(tmp_path: Path) -> None:
    beside, sphinx, libri = tmp_path / "beside", tmp_path / "sphinx", tmp_path / "libri"
    write(beside / "a.wav")
    write(beside / "b.wav")
    (beside / "a.txt").write_text("he had a son\n")
    write(sphinx / "austen-0870.wav")
    (sphinx / "transcription").write_text("<s> he had a son </s> (austen-0870)\n")
    write(libri / "84" / "121123" / "84-121123-0000.flac")
    (libri / "84" / "121123" / "84-121123.trans.txt").write_text("84-121123-0000 HE HAD A SON\n")
    assert [u.text for u in read_speech(beside)] == ["he had a son", None]
    assert [u.text for u in read_speech(sphinx)] == ["he had a son"]
    assert [u.text for u in read_speech(libri)] == ["HE HAD A SON"]
    (beside / "transcripts.txt").write_text("b.wav\tand a daughter\n")
    assert [u.text for u in read_speech(beside)] == ["he had a son", "and a daughter"]
    assert [u.text for u in read_speech(beside / "a.wav")] == ["he had a son"]


def test_a_line_without_a_transcript_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    (tmp_path / "transcripts.txt").write_text("a he had a son\nb\n")
    with pytest.raises(UserError, match=r"transcripts\.txt, line 2 holds no transcript"):
        read_speech(tmp_path)


def test_a_folder_without_sound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(UserError, match="holds no sound files"):
        read_speech(tmp_path)


@pytest.mark.parametrize("name", ["librispeach", "no/such/folder", "librispeech:a:b:c", "~nobody/speech", "n" * 5000])
def test_an_unknown_source_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no folder, no manifest and no speech dataset"):
        read_speech(name)


def test_a_dataset_that_cannot_be_reached_is_a_user_error() -> None:
    # conftest.py keeps the Hub out of reach.
    with pytest.raises(UserError, match=r"openslr/librispeech_asr .* cannot be loaded"):
        read_speech("librispeech", limit=1)


def test_the_rows_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(repo: str, config: str, **options: Any) -> Any:
        asked.append((repo, config, options["split"]))
        rows = {"audio": [{"bytes": _wav(), "path": None}] * 3, "transcription": ["one", "two  words", ""]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_speech("fleurs:en_us:validation", limit=2)
    assert [u.text for u in found] == ["one", "two words"]
    assert len(found[0].sound()) == round(0.2 * RATE)
    assert read_speech("fleurs")[2].text is None
    # What is measured is never calibrated on, unless it is named.
    assert [u.language for u in read_speech("fleurs:fr_fr", purpose="calibration")] == ["fr"] * 3
    assert [u.language for u in read_speech("fleurs:cmn_hans_cn", limit=1)] == ["zh"]
    chosen = [("en_us", "validation"), ("en_us", "test"), ("fr_fr", "train"), ("cmn_hans_cn", "test")]
    assert asked == [("google/fleurs", *one) for one in chosen]


def test_a_dataset_with_a_script_is_taken_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FLEURS is one."""
    import datasets

    def load(repo: str, config: str, **options: Any) -> Any:
        if options.get("revision") != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found fleurs.py")
        rows = {"audio": [{"bytes": _wav(), "path": None}], "transcription": ["one"]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [u.text for u in read_speech("fleurs")] == ["one"]


def test_rows_of_a_dataset_that_are_too_long_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "audio": [{"bytes": one, "path": None} for one in (_wav(), _wav(np.zeros(31 * RATE)), b"damaged")],
        "text": ["a"] * 3,
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows).to_iterable_dataset()
    )
    assert [u.too_long for u in read_speech("librispeech")] == [False, True, False]


def test_a_transcript_may_end_in_a_word_in_parentheses(tmp_path: Path) -> None:
    for name in ("utt1", "laughs"):
        (tmp_path / f"{name}.wav").write_bytes(_wav())
    lines = "utt1 and then he left (smiles)\nsome words (laughs)\nabsent all gone (too)\n"
    (tmp_path / "transcripts.txt").write_text(lines)
    assert {u.name: u.text for u in read_speech(tmp_path)} == {
        "laughs": "some words",
        "utt1": "and then he left (smiles)",
    }


def test_a_missing_library_is_named_with_the_extra() -> None:
    with pytest.raises(UserError, match=r"no_such_library: pip install 'lillama\[speech\]'"):
        audio.require_extra("no_such_library")
