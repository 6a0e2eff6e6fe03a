"""The text that the zoo's small models are trained on, and the text that is kept from them."""

from __future__ import annotations

from pathlib import Path

from lillama_core.errors import UserError

DATA = Path(__file__).parent.parent / "data"

HELD_OUT_CHARACTERS = 218_194
"""The last articles of WikiText-2's test split, from the beginning of one on; nothing in the zoo is trained on them."""


def _text(name: str) -> str:
    if not (DATA / name).is_file():
        raise UserError(f"{name!r}, which the zoo's models are trained on, comes with the repository: work in a clone")
    return (DATA / name).read_text(encoding="utf-8")


def _test_split() -> str:
    return _text("wikitext2-test.txt")


def training_text() -> str:
    """WikiText-2's validation split and its test split up to the held-out articles: about 2.2 MB."""
    return _text("wikitext2-valid.txt") + _test_split()[:-HELD_OUT_CHARACTERS]


def held_out_text() -> str:
    """The articles at the end of WikiText-2's test split on which the small models are measured."""
    return _test_split()[-HELD_OUT_CHARACTERS:]
