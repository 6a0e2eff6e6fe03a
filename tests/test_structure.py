"""The rules of the tree: what imports what, how large a module may be, and that every one says what it is for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

ROOT = Path(__file__).parents[1]
CORE = ROOT / "lillama_core"
PACKAGES = (CORE, ROOT / "registry" / "lillama_registry", ROOT / "plugins", ROOT / "benchmarks")
MODULES = sorted(file for folder in PACKAGES for file in folder.rglob("*.py"))
configure()
MOST_AT_THE_TOP = 8
MOST_LINES = 400
MOST_LINES_OF_AN_ARCHITECTURE = 30


def shown(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def docstrings_of(file: Path) -> list[str | None]:
    """The docstring of a module, and those of its classes and functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]


def test_imports_keep_the_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    kept = lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None, no_logo=True)
    assert kept, capsys.readouterr().out


def test_the_top_of_the_core_is_seen_at_a_glance() -> None:
    assert len(found := sorted(CORE.glob("*.py"))) <= MOST_AT_THE_TOP, shown(found)


def test_no_module_of_the_core_is_long() -> None:
    too_long = [file for file in sorted(CORE.rglob("*.py")) if lines_of(file) > MOST_LINES]
    assert not too_long, shown(too_long)


def test_every_architecture_is_a_short_declaration() -> None:
    found = sorted((ROOT / "plugins").glob("*/architecture.py"))
    assert found
    too_long = [file for file in found if lines_of(file) > MOST_LINES_OF_AN_ARCHITECTURE]
    assert not too_long, shown(too_long)


def test_every_module_says_what_it_is_for() -> None:
    silent = [file for file in MODULES if not docstrings_of(file)[0]]
    assert not silent, shown(silent)


def test_no_docstring_is_still_to_be_written() -> None:
    left = [file for file in MODULES if any(text and re.match(r"TODO\b", text) for text in docstrings_of(file))]
    assert not left, shown(left)


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_every_folder_of_modules_is_a_package(folder: Path) -> None:
    scripts = {ROOT / "benchmarks" / name for name in ("offline_tasks", "speech")}
    bare = {file.parent for file in folder.rglob("*.py")} - scripts
    bare = {found for found in bare if not (found / "__init__.py").is_file()}
    assert not bare, shown(sorted(bare))
