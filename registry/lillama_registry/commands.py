"""A command that is imported when it is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LazyCommand:
    """A reference to a ``click.Command``, and the line that ``lillama --help`` shows without importing it."""

    reference: str
    """``package.module:attribute``"""
    short_help: str
