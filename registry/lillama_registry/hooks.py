"""Every extension point of lillama, on one page.

A plugin is a module or package named by an entry point of the group ``lillama``; it implements any of
these hooks with ``lillama_core.hookimpl``. The built-in architectures come in by the same door.
"""

from __future__ import annotations

import argparse
from typing import Any

import pluggy

ENTRY_POINT_GROUP = "lillama"

hookspec = pluggy.HookspecMarker("lillama")
hookimpl = pluggy.HookimplMarker("lillama")


@hookspec
def lillama_architectures() -> list[Any]:  # type: ignore[empty-body]
    """Architectures: a list of ``lillama_core.Architecture`` objects."""


@hookspec
def lillama_allocators() -> dict[str, Any]:  # type: ignore[empty-body]
    """Rank allocators by the name that ``--allocation`` takes: ``lillama_core.allocation.Allocator``."""


@hookspec
def lillama_initializers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Initialisers of factors by the name that ``--init`` takes: ``lillama_core.initialization.Initializer``."""


@hookspec
def lillama_formats() -> dict[str, Any]:  # type: ignore[empty-body]
    """Formats of a low-rank map by the name that ``--format`` takes: ``lillama_core.formats.Format``."""


@hookspec
def lillama_losses() -> dict[str, Any]:  # type: ignore[empty-body]
    """Distillation losses by the name that ``--loss`` takes: ``lillama_core.losses.Loss``."""


@hookspec
def lillama_recipes() -> dict[str, Any]:  # type: ignore[empty-body]
    """Recipes by name: a mapping of option to value, each over the ``default`` recipe."""


@hookspec
def lillama_checkpoints() -> dict[str, Any]:  # type: ignore[empty-body]
    """Readers of foreign checkpoint directories by name: ``lillama_core.models.CheckpointReader``."""


@hookspec
def lillama_commands(subparsers: argparse._SubParsersAction) -> None:
    """Commands: add a parser whose ``run`` default takes the parsed arguments and returns an exit status."""
