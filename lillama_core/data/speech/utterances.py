"""Speech from disk or from the Hub: sound as float32 at 16 kHz, and what was said, where that is known.

A folder of sound files with transcripts, a manifest of JSON lines ``{"audio": …, "text": …, "language": …}``, or a
dataset's name.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama_core.data import hub
from lillama_core.data.documents import replace_surrogates
from lillama_core.data.sources import Purpose
from lillama_core.data.speech.audio import LONGEST, SUFFIXES, Sound, decode_audio, read_audio, require_extra
from lillama_core.errors import UserError, nearest, one_line
from lillama_core.system.regular import check_regular


@dataclass(frozen=True)
class Utterance:
    """One recording."""

    path: Path | None
    """The sound file; None where the sound came otherwise."""
    text: str | None
    """What is said, as written by a person; None when not known."""
    encoded: bytes | None = None
    """The contents of a sound file, for a dataset's rows."""
    name: str = ""
    """For tables."""
    where: str = ""
    """For messages: the sound file, or the line of the manifest."""
    language: str | None = None
    """What is spoken, as its code or English name; None when not known."""
    too_long: bool = False
    """Whether `sound` would refuse it for its length; looked at where the user cannot cut it, in a dataset."""

    def sound(self) -> Sound:
        """The samples, as `read_audio` gives them."""
        if self.encoded is not None:
            return decode_audio(io.BytesIO(self.encoded), self.where)
        assert self.path is not None
        return read_audio(self.path)


@dataclass(frozen=True)
class _Dataset:
    repo: str
    config: str
    splits: dict[Purpose, str]
    """What papers report is never calibrated on, unless the user names it."""
    column: str

    def language(self, config: str) -> str | None:
        """The language of a configuration; FLEURS calls them ``fr_fr``, ``cmn_hans_cn`` …"""
        if self.repo != "google/fleurs":
            return "en"
        # Speech models know languages by their codes of two letters, where there is one.
        code = {"cmn": "zh", "fil": "tl", "nb": "no", "jv": "jw"}.get(config.split("_")[0], config.split("_")[0])
        return None if config == "all" else code


DATASETS = {
    "librispeech": _Dataset(
        "openslr/librispeech_asr", "clean", {"calibration": "train.100", "evaluation": "test"}, "text"
    ),
    "librispeech-other": _Dataset(
        "openslr/librispeech_asr", "other", {"calibration": "train.500", "evaluation": "test"}, "text"
    ),
    "fleurs": _Dataset("google/fleurs", "en_us", {"calibration": "train", "evaluation": "test"}, "transcription"),
}
"""Datasets of the Hub by short name; ``librispeech:other:validation`` chooses configuration and split."""


def read_speech(source: str | Path, limit: int | None = None, purpose: Purpose = "evaluation") -> list[Utterance]:
    """The utterances of ``source``, in a fixed order, the first ``limit`` only if given. The sound is not read yet.

    ``source``: a folder of sound files, each with a transcript in ``NAME.txt`` beside it or all in one file
    (``transcription``, ``transcripts.txt``, ``*.trans.txt``), a folder that holds ``manifest.jsonl``; such a manifest;
    or a name in ``DATASETS``, of which ``purpose`` chooses the split where the name does not. Raises UserError, naming
    the file and line, when there is nothing to read.
    """
    # os.path: pathlib raises for what no file can be called.
    path = Path(os.path.expanduser(source))
    check_regular(path)
    if os.path.isdir(path):
        manifest = path / "manifest.jsonl"
        found = list(_manifest(manifest) if manifest.is_file() else _folder(path))
    elif os.path.isfile(path):
        if path.suffix.lower() in SUFFIXES:
            return [Utterance(path, _own_text(path), name=path.stem, where=str(path))]
        found = list(_manifest(path))
    else:
        return list(_dataset(str(source), limit, purpose))
    return found if limit is None else found[:limit]


def _manifest(path: Path) -> Iterator[Utterance]:
    """One utterance a line; paths are relative to the manifest."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text; give a folder of sound files or a manifest of JSON lines with the field 'audio'"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not valid JSON ({one_line(error)}); every line must hold one object"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not row["audio"]:
            raise UserError(f"{where} names no sound file: it needs the field 'audio' with a path")
        text = row.get("text")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: 'text' is a {type(text).__name__}; it must be a string, or be left out")
        language = row.get("language")
        if language is not None and not isinstance(language, str):
            raise UserError(f"{where}: 'language' is a {type(language).__name__}; it must be a string, or be left out")
        audio = path.parent / row["audio"]
        if not os.path.isfile(audio):
            raise UserError(f"{where}: {row['audio']} does not exist (looked for {audio})")
        yield Utterance(audio, _filled(text), name=row["audio"], where=where, language=_filled(language))
    if empty:
        raise UserError(f"{path} is empty; a manifest holds one object a line with the field 'audio'")


def _folder(folder: Path) -> Iterator[Utterance]:
    """Every sound file below ``folder``, by name."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{folder} holds no sound files ({', '.join(SUFFIXES)}) and no manifest.jsonl")
    listed: dict[Path, dict[str, str]] = {}
    for path in files:
        if path.parent not in listed:
            listed[path.parent] = _listed_texts(path.parent, {p.stem for p in files if p.parent == path.parent})
        text = _own_text(path) or listed[path.parent].get(path.stem)
        yield Utterance(path, text, name=path.stem, where=str(path))


def _own_text(path: Path) -> str | None:
    """The transcript in a file of the same name."""
    beside = path.with_suffix(".txt")
    return _filled(_text(beside)) if beside.is_file() else None


def _text(path: Path) -> str:
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a transcript: {one_line(error)}") from error


def _filled(text: str | None) -> str | None:
    return " ".join(replace_surrogates(text).split()) or None if text is not None else None


def _listed_texts(folder: Path, sounds: set[str]) -> dict[str, str]:
    """Transcripts by the sound file's name without suffix, from the files that list those of a whole folder.

    ``sounds`` are the names of the folder's own.
    """
    texts = {}
    for path in sorted(folder.iterdir()):
        if path.name in ("transcription", "transcripts.txt") or path.name.endswith(".trans.txt"):
            for number, line in enumerate(_text(path).split("\n"), start=1):
                if line.strip():
                    name, text = _listed_text(line, sounds, f"{path}, line {number}")
                    texts[name] = text
    return texts


def _listed_text(line: str, sounds: set[str], where: str) -> tuple[str, str]:
    """Name and transcript: ``<s> words </s> (NAME)`` as Sphinx writes it, or ``NAME words`` as LibriSpeech does.

    A transcript may itself end in a word in parentheses: where the first word names a sound, that decides.
    """
    name, _, text = line.strip().replace("\t", " ", 1).partition(" ")
    sphinx = re.fullmatch(r"\s*(?:<s>)?(.*?)(?:</s>)?\s*\(([^()\s]+)\)\s*", line)
    if sphinx and (_stem(sphinx[2]) in sounds or _stem(name) not in sounds):
        text, name = sphinx.groups()
    if not text.strip():
        raise UserError(f"{where} holds no transcript; write 'NAME words of the transcript'")
    return _stem(name), " ".join(text.split())


def _stem(name: str) -> str:
    """A sound file's name without the suffix that some lists give it."""
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name


def _dataset(name: str, limit: int | None, purpose: Purpose) -> Iterator[Utterance]:
    """Rows of a dataset of the Hub, streamed, their sound still encoded."""
    short, *choices = name.split(":")
    if short not in DATASETS or len(choices) > 2:
        known = ", ".join(DATASETS)
        raise UserError(
            f"{name!r} is no folder, no manifest and no speech dataset ({known}){nearest(short, list(DATASETS))}"
        )
    dataset = DATASETS[short]
    config, split = [*choices, *(dataset.config, dataset.splits[purpose])[len(choices) :]]
    import datasets

    try:
        rows = hub.load(dataset.repo, config, split)
        # Decoding is ours: the library's own wants another library.
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
        for number, row in enumerate(rows):
            if limit is not None and number >= limit:
                return
            audio = row["audio"]
            where = f"{name}, row {number + 1}"
            # A dataset prepared on this machine has files instead of bytes.
            path = Path(audio["path"]) if audio["bytes"] is None else None
            text, encoded = _filled(row[dataset.column]), audio["bytes"]
            too_long = _is_too_long(path if encoded is None else io.BytesIO(encoded))
            yield Utterance(path, text, encoded, f"{number + 1}", where, dataset.language(config), too_long)
    except UserError:
        raise
    except Exception as error:  # the library passes on errors of many others: network, formats, scripts
        raise UserError(
            f"dataset {dataset.repo} ({config}, {split}) cannot be loaded: {one_line(error)}; check the connection, or "
            "name a local folder or manifest"
        ) from error


def _is_too_long(file: Any) -> bool:
    """Whether the header of a sound file promises more than ``LONGEST``; what is damaged is complained of when read."""
    soundfile = require_extra("soundfile")
    try:
        found = soundfile.info(file)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError, OSError):
        return False
    return bool(found.frames > LONGEST * found.samplerate)
