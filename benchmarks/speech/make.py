"""Makes the synthetic speech set: sentences of public texts, read by Debian's flite and espeak-ng.

``python benchmarks/speech/make.py`` writes ``benchmarks/data/speech/synthetic/{calibration,evaluation}`` and the small
excerpt that ships in the wheel. Sentences, voices and speeds follow from ``SEED`` and the texts alone; the sound, from
flite 2.2 and espeak-ng 1.51 as well. ``benchmarks/data/speech/README.md`` lists the voices.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SEED = 20251122
RATE = 16_000
UTTERANCES = 210
"""In each half."""
EXCERPT = 20
"""Utterances of the evaluation half that ship in the wheel."""

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
TEXTS = ("tales-grimm.txt", "wikitext2-valid.txt", "wikitext2-test.txt")
TARGET = DATA / "speech" / "synthetic"
SHIPPED = HERE.parents[1] / "lillama_core" / "metrics" / "data" / "speech" / "synthetic"

SPOKEN = re.compile(r"[A-Z][a-z]*(?: (?:I|[a-z]+)(?:'[a-z]+)?,?)+\.")
"""A sentence that a synthesiser reads as it is written: plain words, none of them a name."""
WORDS = range(6, 19)


@dataclass(frozen=True)
class Voice:
    """A synthesiser's voice at one speed."""

    program: str
    name: str
    speed: float
    """1 is the voice's own; 1.2 is a fifth faster."""

    def __str__(self) -> str:
        return f"{self.program}-{self.name}"

    def say(self, text: str, path: Path) -> None:
        """Write ``text`` as speech into the WAV file ``path``, at whatever rate the voice has."""
        if self.program == "flite":
            stretch = f"duration_stretch={1 / self.speed:.3f}"
            command = ["flite", "-voice", self.name, "--setf", stretch, "-t", text, "-o", str(path)]
        else:
            command = ["espeak-ng", "-v", self.name, "-s", str(round(160 * self.speed)), "-w", str(path), text]
        subprocess.run(command, check=True)


COMMON = (
    ("flite", "slt"),
    ("flite", "awb"),
    ("flite", "kal16"),
    ("espeak-ng", "en-us"),
    ("espeak-ng", "en-us+f2"),
)
UNSEEN = (("flite", "rms"), ("espeak-ng", "en-gb"))
"""Only in the evaluation half."""
SPEEDS = (0.9, 1.0, 1.1)


def sentences(lines: Iterable[str]) -> Iterator[str]:
    """The plain sentences of a tokenised text ("as he went ,") as people write them."""
    for line in lines:
        for raw in re.split(r"(?<= [.!?;])\s", line.strip()):
            text = re.sub(r" ('s|n't|'ll|'re|'ve|'d|'m)\b", r"\1", raw.replace(" ,", ",").replace(" .", "."))
            if SPOKEN.fullmatch(text) and len(text.split()) in WORDS:
                yield text


def chosen_sentences(generator: random.Random) -> list[str]:
    """Sentences for both halves, each once, in random order."""
    found = dict.fromkeys(s for name in TEXTS for s in sentences((DATA / name).read_text("utf-8").splitlines()))
    return generator.sample(list(found), 2 * UTTERANCES)


def recorded(voice: Voice, text: str) -> np.ndarray:
    """``text`` spoken, float32 [samples] at ``RATE``, with the peak at a half."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        voice.say(text, path)
        sound, rate = soundfile.read(path, dtype="float32")
    sound = soxr.resample(sound, rate, RATE)
    return np.asarray(0.5 * sound / np.abs(sound).max(), dtype=np.float32)


def write_half(folder: Path, texts: list[str], voices: list[Voice]) -> None:
    """The utterances of one half and their manifest; the voices take turns."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows: list[dict[str, str | float]] = []
    for number, (text, voice) in enumerate(zip(texts, voices, strict=True)):
        name = f"{number:03d}.ogg"
        soundfile.write(
            folder / name, recorded(voice, text), RATE, format="OGG", subtype="VORBIS", compression_level=0.8
        )
        rows.append({"audio": name, "text": text, "voice": str(voice), "speed": voice.speed})
    write_manifest(folder, rows)


def write_manifest(folder: Path, rows: list[dict[str, str | float]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")


def voices_in_turn(names: tuple[tuple[str, str], ...], generator: random.Random) -> list[Voice]:
    """A voice for each utterance of a half: every name equally often, speeds by chance."""
    return [Voice(*names[i % len(names)], generator.choice(SPEEDS)) for i in range(UTTERANCES)]


def main() -> None:
    generator = random.Random(SEED)
    texts = chosen_sentences(generator)
    halves = {"calibration": COMMON, "evaluation": COMMON + UNSEEN}
    for number, (half, names) in enumerate(halves.items()):
        share = texts[number * UTTERANCES : (number + 1) * UTTERANCES]
        write_half(TARGET / half, share, voices_in_turn(names, generator))
    shutil.rmtree(SHIPPED, ignore_errors=True)
    SHIPPED.mkdir(parents=True)
    rows = [json.loads(line) for line in (TARGET / "evaluation" / "manifest.jsonl").read_text("utf-8").splitlines()]
    for row in rows[:EXCERPT]:
        shutil.copyfile(TARGET / "evaluation" / row["audio"], SHIPPED / row["audio"])
    write_manifest(SHIPPED, rows[:EXCERPT])


if __name__ == "__main__":
    main()
