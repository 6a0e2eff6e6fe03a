"""The conformance kit: what every architecture must do, for ``lillama plugin check`` and for a plugin's own tests.

from lillama_testing import parametrize_with_checks

@parametrize_with_checks([MyArchitecture()])
def test_conformance(check):
    check()
"""

from __future__ import annotations

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
from lillama_testing.command import lillama_commands
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
