"""Every extension point of lillama, on one page.

A plugin is a module or package named by an entry point of the group ``lillama``; it implements any of these hooks with
``lillama_core.hookimpl``. What lillama brings itself comes in by the same door (``lillama_core/builtin.py``).

Most hooks give a mapping of name to thing. A thing is an object, a class that is instantiated without arguments (or
with its validated ``Options``, see `lillama_core.strategies.StrategyOptions`), or a reference
``"package.module:attribute"`` that is imported when the name is first used, so that listing names costs nothing.

Two plugins that give one name are an error that names both when that name is used, and a line in ``lillama plugins``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from lillama_registry.commands import LazyCommand

if TYPE_CHECKING:
    import click

    from lillama_core.allocation import Allocator
    from lillama_core.architecture import Architecture
    from lillama_core.architecture.targets.base import TargetModule
    from lillama_core.data.modality import Modality
    from lillama_core.distillation.losses import Loss
    from lillama_core.evaluation import Metric
    from lillama_core.exporting import Exporter
    from lillama_core.formats import Format
    from lillama_core.initialization import Initializer
    from lillama_core.models.source import CheckpointReader
    from lillama_core.pipeline import Stage

ENTRY_POINT_GROUP = "lillama"
API_VERSION = 1
"""Of this interface; raised when plugins that were made for the one before would fail or do wrong. A plugin may state
the one that it is made for as ``LILLAMA_API``."""

hookspec = pluggy.HookspecMarker("lillama")
hookimpl = pluggy.HookimplMarker("lillama")

T = TypeVar("T")
Named = Mapping[str, "T | type[T] | str"]
"""Name -> object, class, or reference ``"package.module:attribute"``."""


@hookspec
def lillama_architectures() -> Sequence[Architecture]:  # type: ignore[empty-body]
    """Architectures: where the blocks and linear maps of some model types are, and how such models are measured."""


@hookspec
def lillama_targets() -> Named[TargetModule]:  # type: ignore[empty-body]
    """Kinds of target, by the name that the config of a compressed model gives: classes that find, observe and swap
    the linear maps of one kind of module."""


@hookspec
def lillama_modalities() -> Named[Modality]:  # type: ignore[empty-body]
    """Modalities, by the name that an architecture gives: what a model is fed, and how its data is loaded."""


@hookspec
def lillama_metrics() -> Named[Metric]:  # type: ignore[empty-body]
    """Metrics, by the name that an architecture's evaluation gives."""


@hookspec
def lillama_allocators() -> Named[Allocator]:  # type: ignore[empty-body]
    """Rank allocators, by the name that ``--allocation`` takes."""


@hookspec
def lillama_initializers() -> Named[Initializer]:  # type: ignore[empty-body]
    """Initialisers of factors, by the name that ``--init`` takes."""


@hookspec
def lillama_formats() -> Named[Format]:  # type: ignore[empty-body]
    """Formats of a low-rank map, by the name that ``--format`` takes."""


@hookspec
def lillama_losses() -> Named[Loss]:  # type: ignore[empty-body]
    """Distillation losses, by the name that ``--loss`` takes."""


@hookspec
def lillama_stages() -> Named[Stage]:  # type: ignore[empty-body]
    """Stages of the compression pipeline; each says by its ``after`` behind which stage it runs."""


@hookspec
def lillama_recipes() -> Mapping[str, Mapping[str, Any] | Path]:  # type: ignore[empty-body]
    """Recipes by the name that ``--recipe`` takes: options over ``default``, as a mapping or a YAML file."""


@hookspec
def lillama_checkpoints() -> Named[CheckpointReader]:  # type: ignore[empty-body]
    """Readers of other programs' checkpoint directories."""


@hookspec
def lillama_exporters() -> Named[Exporter]:  # type: ignore[empty-body]
    """Formats that a compressed model is exported in, by the name that ``lillama export --to`` takes."""


@hookspec
def lillama_commands() -> Mapping[str, click.Command | LazyCommand | str]:  # type: ignore[empty-body]
    """Commands of the command line by their names. A command returns its exit status, or None for 0; what it raises is
    told as for the core's own. A reference is imported when the command is called; `LazyCommand` adds the line that
    ``lillama --help`` shows of it."""
