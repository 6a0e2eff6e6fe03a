"""Things that are chosen by name: the one place where a name becomes an object."""

from __future__ import annotations

import functools
from typing import Any

import lillama_registry
from lillama_core.errors import UserError, nearest

OPTIONS = {
    "allocators": "--allocation",
    "initializers": "--init",
    "formats": "--format",
    "losses": "--loss",
    "recipes": "--recipe",
}
"""Kind of thing -> the option by which a user names one."""


def names(kind: str) -> list[str]:
    """All names of one kind, those of plugins included."""
    return lillama_registry.registry().names(kind)


def get(kind: str, name: str) -> Any:
    """What is registered under ``name``: an object, or a class.

    Raises UserError that suggests the nearest name when there is none, and that names the plugins when several claim it
    or when it cannot be imported.
    """
    try:
        return lillama_registry.registry().get(kind, name)
    except KeyError:
        known = names(kind)
        what = OPTIONS.get(kind, f"one of the {kind}")
        raise UserError(f"{what} must be one of {', '.join(known)}, not {name!r}{nearest(name, known)}") from None
    except (lillama_registry.ConflictError, ImportError) as error:
        raise UserError(str(error)) from None


def make(kind: str, name: str) -> Any:
    """The object registered under ``name``; a class is instantiated, once."""
    found = get(kind, name)
    return _instance(found) if isinstance(found, type) else found


@functools.cache
def _instance(of: type) -> Any:
    return of()
