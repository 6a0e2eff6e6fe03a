"""What is said of a model that no plugin claims."""

from __future__ import annotations

import difflib

import lillama_registry
from lillama_core.errors import UserError


def no_plugin(model_type: str, remark: str = "") -> UserError:
    """The error for a model type that no plugin claims; it lists the nearest types that are claimed."""
    found = lillama_registry.registry()
    known = sorted({t for a in found.architectures for t in a.model_types})
    near = difflib.get_close_matches(model_type, known, n=3, cutoff=0.3) or known[:3]
    nearest_ones = f"nearest: {', '.join(near)}" if near else "no plugin is loaded"
    broken = f"; not loaded: {', '.join(f.name for f in found.failures)}" if found.failures else ""
    return UserError(
        f"no plugin handles model type {model_type!r}{remark} ({nearest_ones}); use --architecture auto"
        " to have its blocks found, --architecture NAME if they are built like those of a known one, or add a plugin:"
        f" see 'Add an architecture' in the README{broken}"
    )
