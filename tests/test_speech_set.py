"""The speech that is committed: what its description says of it."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lillama_core.data.shipped import SPEECH_SETS
from lillama_core.data.speech.audio import RATE, read_audio
from lillama_core.data.speech.utterances import read_speech

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = ROOT / "benchmarks" / "data" / "speech" / "synthetic"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_speech", ROOT / "benchmarks" / "speech" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(folder: Path) -> list[dict[str, str | float]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]


def test_the_halves_share_no_sentence_and_two_voices_are_new() -> None:
    calibration, evaluation = rows(SYNTHETIC / "calibration"), rows(SYNTHETIC / "evaluation")
    assert len(calibration) == len(evaluation) == 210
    sentences = [row["text"] for row in calibration + evaluation]
    assert len(set(sentences)) == len(sentences) >= 400
    known, heard = ({row["voice"] for row in half} for half in (calibration, evaluation))
    assert heard - known == {"flite-rms", "espeak-ng-en-gb"}
    assert known < heard
    assert len({row["speed"] for row in evaluation}) == 3


@pytest.mark.parametrize("half", ["calibration", "evaluation"])
def test_every_utterance_is_there_and_can_be_read(half: str) -> None:
    folder = SYNTHETIC / half
    utterances = read_speech(folder)
    assert {u.path for u in utterances} == set(folder.glob("*.ogg"))
    for utterance in utterances:
        assert utterance.path is not None
        sound = read_audio(utterance.path)
        assert 1.0 < len(sound) / RATE < 20.0
        assert 0.2 < np.abs(sound).max() <= 1.0


def test_what_ships_is_the_start_of_the_evaluation_half_and_five_read_sentences() -> None:
    whole, shipped = rows(SYNTHETIC / "evaluation"), rows(SPEECH_SETS["synthetic"])
    assert shipped == whole[: len(shipped)]
    assert len(shipped) == 20
    for row in shipped:
        name = str(row["audio"])
        assert (SPEECH_SETS["synthetic"] / name).read_bytes() == (SYNTHETIC / "evaluation" / name).read_bytes()
    read = read_speech(SPEECH_SETS["read"])
    assert len(read) == 5
    assert all(u.text and 2.0 < len(u.sound()) / RATE < 8.0 for u in read)


def test_the_sentences_follow_from_the_seed(make: ModuleType) -> None:
    generator = random.Random(make.SEED)
    texts = make.chosen_sentences(generator)
    assert texts == [row["text"] for half in ("calibration", "evaluation") for row in rows(SYNTHETIC / half)]
    voices = make.voices_in_turn(make.COMMON, generator)
    made = [(row["voice"], row["speed"]) for row in rows(SYNTHETIC / "calibration")]
    assert [(str(voice), voice.speed) for voice in voices] == made


@pytest.mark.skipif(not (shutil.which("flite") and shutil.which("espeak-ng")), reason="needs flite and espeak-ng")
def test_the_synthesisers_say_what_is_committed(make: ModuleType) -> None:
    for row in rows(SYNTHETIC / "evaluation")[:7]:
        program, name = next(v for v in make.COMMON + make.UNSEEN if f"{v[0]}-{v[1]}" == row["voice"])
        made = make.recorded(make.Voice(program, name, row["speed"]), row["text"])
        stored = read_audio(SYNTHETIC / "evaluation" / str(row["audio"]))
        assert len(made) == len(stored)
        # Vorbis is lossy; another sentence or voice would correlate with nothing.
        assert np.corrcoef(made, stored)[0, 1] > 0.95


def test_only_sentences_that_are_spoken_as_written(make: ModuleType) -> None:
    lines = [
        "He had a son , and I do n't know of any other one .",
        "In 1941 he had a son , and nobody knows of any other one .",
        'He said , " this is the one that you are looking for . "',
        "He had a son called <unk> , and nobody knows of any other .",
        "He went to Paris and never came back to his old house .",
        "Too short a sentence .",
    ]
    assert list(make.sentences(lines)) == ["He had a son, and I don't know of any other one."]
