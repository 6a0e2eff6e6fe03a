"""The conformance kit: what every architecture must do, for ``lillama plugin check`` and for a plugin's own tests.

from lillama_testing import parametrize_with_checks

@parametrize_with_checks([MyArchitecture()])
def test_conformance(check):
    check()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lillama_registry import LazyCommand, hookimpl

if TYPE_CHECKING:
    from lillama_testing.checks import (
        CHECKS,
        Case,
        CheckFailed,
        Outcome,
        cases,
        check_architecture,
        parametrize_with_checks,
        run_check,
    )
    from lillama_testing.tiny import TinyModel, make_tiny_model, specimen_at

__all__ = [
    "CHECKS",
    "Case",
    "CheckFailed",
    "Outcome",
    "TinyModel",
    "cases",
    "check_architecture",
    "lillama_commands",
    "make_tiny_model",
    "parametrize_with_checks",
    "run_check",
    "specimen_at",
]

_IN_TINY = ("TinyModel", "make_tiny_model", "specimen_at")


@hookimpl
def lillama_commands() -> dict[str, LazyCommand]:
    return {
        "plugin": LazyCommand("lillama_testing.command:plugin", "begin a plugin, and check that it does what it must")
    }


def __getattr__(name: str) -> Any:
    """Import the kit, which needs torch, when it is used: this module is loaded as a plugin by every command."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lillama_testing.{'tiny' if name in _IN_TINY else 'checks'}"), name)
