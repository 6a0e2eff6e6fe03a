"""Recipes by name and from YAML files, each over its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lillama_core.errors import UserError, nearest, one_line
from lillama_core.recipe.model import Recipe
from lillama_core.strategies import get, names
from lillama_core.strategies.validation import shown
from lillama_core.system.regular import check_regular


def recipe_names() -> list[str]:
    """Recipes that can be named: those that come with lillama, and those of plugins."""
    return names("recipes")


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe by name or from a YAML file, whose ``recipe: NAME`` names its base (``default`` if absent)."""
    return _load(name_or_file, None, ())


def _load(name_or_file: str, folder: Path | None, chain: tuple[str, ...]) -> Recipe:
    """``folder`` is that of the file that names this recipe as its base: paths in it start there."""
    path = Path(name_or_file) if folder is None else folder / name_or_file
    check_regular(path)
    try:
        is_file = name_or_file.endswith((".yaml", ".yml")) or path.is_file()
        key = str(path.resolve()) if is_file else name_or_file
        if key in chain:
            raise UserError(f"recipe {name_or_file!r} is based on itself")
        data = _from_file(path, name_or_file) if is_file else _named(name_or_file)
    except OSError as error:
        raise UserError(f"recipe {name_or_file!r} cannot be read: {error.strerror or error}") from None
    where = f"recipe {name_or_file!r}"
    base_name = data.pop("recipe", None)
    if base_name is None:
        base = Recipe()
    elif isinstance(base_name, str):
        base = _load(base_name, path.parent if is_file else None, (*chain, key))
    else:
        raise UserError(f"{where}: recipe must be the name of its base, not {shown(base_name)}")
    return base.with_options({"name": path.stem if is_file else name_or_file, **data}, where)


def _from_file(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no recipe file {name!r}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Whatever is in the file: values such as the date 2024-99-99 fail in Python, not in the parser.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {name!r} is not YAML: {one_line(error)}") from None
    if data is None:
        raise UserError(f"recipe {name!r} is empty")
    if not isinstance(data, dict):
        raise UserError(f"recipe {name!r} must be a mapping of option to value")
    return data


def _named(name: str) -> dict[str, Any]:
    if name not in (known := recipe_names()):
        raise UserError(f"no recipe named {name!r} (there are: {', '.join(known)}){nearest(name, known)}")
    found = get("recipes", name)
    return _from_file(found, name) if isinstance(found, Path) else dict(found)
