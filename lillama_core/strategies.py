"""Strategies by name: the built-in ones and those that plugins add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lillama_core import allocation, losses
from lillama_core import formats as formats_package
from lillama_core import initialization as initialization_package
from lillama_core.errors import UserError, nearest
from lillama_registry import registry

T = TypeVar("T")


def _merged(built_in: Mapping[str, T], kind: str) -> dict[str, T]:
    return {**registry().strategies(kind), **built_in}


def formats() -> dict[str, formats_package.Format]:
    return _merged(formats_package.BUILT_IN, "formats")


def allocators() -> dict[str, allocation.Allocator]:
    return _merged(allocation.BUILT_IN, "allocators")


def initializers() -> dict[str, initialization_package.Initializer]:
    return _merged(initialization_package.BUILT_IN, "initializers")


def all_losses() -> dict[str, losses.Loss]:
    return _merged(losses.BUILT_IN, "losses")


def built_in() -> dict[str, list[str]]:
    """What the core itself brings, by kind: names that no plugin can take over."""
    from lillama_core.recipe import built_in_recipes

    return {
        "allocators": sorted(allocation.BUILT_IN),
        "initializers": sorted(initialization_package.BUILT_IN),
        "formats": sorted(formats_package.BUILT_IN),
        "losses": sorted(losses.BUILT_IN),
        "recipes": built_in_recipes(),
    }


def choose(strategies: Mapping[str, T], name: str, option: str) -> T:
    """The strategy called ``name``; raises UserError that suggests the nearest."""
    if name not in strategies:
        known = sorted(strategies)
        raise UserError(f"{option} must be one of {', '.join(known)}, not {name!r}{nearest(name, known)}")
    return strategies[name]
