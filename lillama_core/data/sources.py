"""How a source of text is written, and what the writing refers to."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lillama_core.errors import UserError, nearest

SELF = "self"
"""The source that stands for text sampled from the model itself (a file of that name is ``./self``)."""

FileFormat = Literal["text", "jsonl", "parquet"]
Purpose = Literal["calibration", "evaluation"]

Row = tuple[str, dict[str, Any]]
"""Where a row of data stands, for error messages, and its columns."""

_ROW_SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".parquet": "parquet",
}
# Endings that no dataset's name has, so that a mistyped path is not looked for on the Hub.
_FILE_SUFFIXES = (*_ROW_SUFFIXES, ".txt", ".text", ".md", ".rst", ".csv", ".tsv", ".gz", ".zst", ".arrow")
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MOUNT = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class Source:
    """One source of text and its weight among the others.

    ``name`` is ``self``, the path of a file, or a dataset as ``NAME[:CONFIG[:SPLIT]]`` where NAME is a short
    name (see `DATASET_ALIASES`) or ``organisation/name``; an empty CONFIG means the dataset's default, so
    that ``wikitext2::test`` is a split of the default configuration. A file that exists is taken before a
    dataset of the same name. Weights are relative.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read ``SRC`` or ``SRC@WEIGHT``.

        Only a number after the last ``@`` is a weight, so ``notes@home.txt`` is a name; a name that itself
        ends like a weight takes an explicit one (``data@2@1``). Raises UserError when the name or the weight
        is missing, or when the weight is not positive and finite.
        """
        text = text.strip()
        name, at, suffix = text.rpartition("@")
        if not at:
            name, weight = text, 1.0
        elif not suffix:
            raise UserError(f"source {text!r} has no weight after '@'; write {name}@1 or just {name}")
        else:
            try:
                weight = float(suffix)
            except ValueError:
                name, weight = text, 1.0
        if not name:
            raise UserError(f"source {text!r} names nothing; give 'self', a file, or a dataset such as wikitext2")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"source {text!r}: the weight after '@' must be a positive number, not {suffix}")
        return cls(name, weight)

    def __str__(self) -> str:
        """The writing that `parse` reads back as this very source."""
        weight = repr(float(self.weight)).removesuffix(".0")
        if self.weight != 1.0:
            return f"{self.name}@{weight}"
        tail = self.name.rpartition("@")[2] if "@" in self.name else "x"
        try:
            float(tail or "0")
        except ValueError:
            return self.name
        return f"{self.name}@{weight}"


@dataclass(frozen=True)
class OwnText:
    """Text that the model writes."""


@dataclass(frozen=True)
class LocalFile:
    """A file; that it is readable is for `checks` to find out."""

    path: Path
    format: FileFormat


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub."""

    repo: str
    config: str | None = None
    split: str = "train"
    joined: bool = False
    """The rows are pieces of one running text, put together by blank lines, rather than documents."""


@dataclass(frozen=True)
class _Alias:
    repo: str
    config: str | None = None
    evaluation_split: str = "train"
    joined: bool = False


DATASET_ALIASES: dict[str, _Alias] = {
    # Perplexity on this one is by custom that of the test split's lines, joined by blank lines.
    "wikitext2": _Alias("Salesforce/wikitext", "wikitext-2-raw-v1", evaluation_split="test", joined=True),
    "redpajama": _Alias("togethercomputer/RedPajama-Data-1T-Sample"),
    "slimorca": _Alias("Open-Orca/SlimOrca"),
    "alpaca": _Alias("tatsu-lab/alpaca"),
    "inkuba-mono": _Alias("lelapa/Inkuba-Mono"),
}
"""Short names for well-known datasets."""

Location = OwnText | LocalFile | HubDataset


def locate(name: str, purpose: Purpose = "calibration") -> Location:
    """What ``name`` refers to; only looks whether a file exists.

    Raises UserError for a directory, and for a name that is neither a file nor can be a dataset.
    """
    if name == SELF:
        return OwnText()
    # Not by pathlib, which knows no answer where the user is unknown.
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            raise UserError(f"{name} is a directory; name a file in it (.txt, .jsonl, .parquet)")
        if path.exists():
            return LocalFile(path, _file_format(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} cannot be a file: {error}") from error
    dataset = None if _MOUNT.match(name) else _dataset(name, purpose)
    if dataset is None:
        raise UserError(
            f"{name}: no such file, and not a dataset name "
            f"({', '.join(DATASET_ALIASES)} or ORGANISATION/NAME)"
            f"{_suggestion(path)}"
        )
    return dataset


def _file_format(path: Path) -> FileFormat:
    lowered = path.name.lower()
    return next((kind for suffix, kind in _ROW_SUFFIXES.items() if lowered.endswith(suffix)), "text")


def _dataset(name: str, purpose: Purpose) -> HubDataset | None:
    repo, *details = name.split(":")
    if len(details) > 2:
        return None
    config = details[0] if details else ""
    split = details[1] if len(details) == 2 else ""
    alias = DATASET_ALIASES.get(repo)
    if alias is not None:
        usual = alias.evaluation_split if purpose == "evaluation" else "train"
        return HubDataset(alias.repo, config or alias.config, split or usual, alias.joined)
    if _DATASET.fullmatch(repo) and not repo.lower().endswith(_FILE_SUFFIXES):
        return HubDataset(repo, config or None, split or "train")
    return None


def _suggestion(path: Path) -> str:
    """The most similar file beside ``path`` or dataset name, as the end of a message."""
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        beside = []
    return nearest(path.name, beside) or nearest(path.name, list(DATASET_ALIASES))
