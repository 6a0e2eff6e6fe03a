"""What a shell offers for the value of an option or argument, by what the help calls it."""

from __future__ import annotations

import re

import click
from click.shell_completion import CompletionItem

from lillama_core.recipe.model import SLOTS
from lillama_core.strategies import names

PATHS = {"DIR": "dir", "MODEL": "file", "DENSE": "file", "FILE": "file", "SRC": "file", "FILE.yaml": "file"}
"""Words of a metavar that stand for a path -> what click has a shell complete then."""


def offered(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The words of ``auto|float32`` that are no placeholders, the names of recipes and strategies, and paths."""
    parts = (parameter.metavar or "").split("|")
    words = [part for part in parts if re.fullmatch(r"[a-z0-9][a-z0-9+_-]*", part)]
    slot = parameter.opts[0].removeprefix("--")
    if slot == "recipe":
        words += names("recipes")
    elif slot in SLOTS:
        words += names(SLOTS[slot])
    elif slot == "to":
        words += names("exporters")
    found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    # A shell that is told of a path looks at nothing else.
    paths = [] if found else [PATHS[part] for part in parts if part in PATHS]
    return found + [CompletionItem(incomplete, type=kind) for kind in paths[:1]]
