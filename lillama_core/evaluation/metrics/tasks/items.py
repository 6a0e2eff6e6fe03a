"""Hands the items to lm-eval, which names these functions in the YAML files next to this one.

A function and not lm-eval's ``data_files``, because those have to be absolute paths, and because nothing
is then copied into the user's dataset cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def _load(name: str) -> dict[str, Dataset]:
    """Split ``test`` with the fields id, context, choices (4 strings) and label (index of the true one)."""
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def continuation(**metadata: Any) -> dict[str, Dataset]:
    """The items of lillama_continuation; lm-eval passes the task's metadata, which is not needed."""
    return _load("continuation")


def cloze(**metadata: Any) -> dict[str, Dataset]:
    """The items of lillama_cloze; lm-eval passes the task's metadata, which is not needed."""
    return _load("cloze")
