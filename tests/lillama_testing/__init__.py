"""The conformance kit: what every architecture must do, for ``lillama plugin check`` and for a plugin's own tests.

from lillama_testing import parametrize_with_checks

@parametrize_with_checks([MyArchitecture()])
def test_conformance(check):
    check()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lillama_testing.command import lillama_commands

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

_TINY = ("TinyModel", "make_tiny_model", "specimen_at")

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


# Without a __dir__ beside it: pluggy looks at everything that a plugin's dir names, and would load torch.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "lillama_testing.tiny" if name in _TINY else "lillama_testing.checks"
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
