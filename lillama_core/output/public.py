"""What others may know of a run: models and data by name, without the folders of the machine that made it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama_core.data.sources import Source

if TYPE_CHECKING:
    from lillama_core.recipe.model import Recipe


def public_name(spec: str) -> str:
    """A model or a data source as others may know it: without folders when it is local."""
    path = Path(os.path.expanduser(spec))
    if path.is_absolute() or spec.startswith((".", "~")) or path.exists():
        return Path(os.path.abspath(path)).name
    return spec


def public_sources(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a record says of its sources of data, with local files named without their folders."""
    return {
        public_name(name): {k: public_name(v) if k == "path" else v for k, v in told.items()}
        for name, told in sources.items()
    }


def public_data(recipe: Recipe, fields: Iterable[str]) -> dict[str, Any]:
    """The sources of a recipe, without folders, and those of its ``fields`` that count for a command."""
    known = public_recipe(recipe.to_dict())
    return {name: known[name] for name in ("calibration", *fields)}


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain values, with files of calibration data named without their folders."""
    sources = [Source.parse(text) for text in recipe["calibration"]]
    public = [str(dataclasses.replace(source, name=public_name(source.name))) for source in sources]
    return {**recipe, "calibration": public}
