"""``lillama doctor``: what it says of this machine is so, and what does not work gives status 1."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import Ended, environment, run_process
from packaging.requirements import Requirement

from lillama_core.system.cache import default_cache_dir
from lillama_core.system.diagnosis import broken_requirements, extras, size_of, unmet
from lillama_registry import registry


def test_it_names_versions_plugins_and_folders(run_cli: Callable[..., Ended]) -> None:
    ended = run_cli("doctor")
    assert (ended.status, ended.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines() if not line.startswith("extra"))
    assert f"torch {torch.__version__}" in lines["libraries"]
    assert f"transformers {importlib.metadata.version('transformers')}" in lines["libraries"]
    assert lines["plugins"] == ", ".join(p.name for p in registry().loaded)
    assert str(default_cache_dir()) in lines["cache"]


def test_what_is_missing_or_too_old_is_told() -> None:
    have = importlib.metadata.version("numpy")
    assert unmet(Requirement("numpy>=1.0")) is None
    assert unmet(Requirement("numpy>=999")) == f"numpy>=999 (there is {have})"
    assert unmet(Requirement("no-such-distribution>=1.2")) == "no-such-distribution>=1.2"


def test_extras_are_those_that_the_package_declares() -> None:
    declared = importlib.metadata.metadata("lillama").get_all("Provides-Extra")
    assert declared is not None
    assert [extra.name for extra in extras()] == sorted(set(declared) - {"dev"})
    # What runs these tests has all that the package needs.
    assert broken_requirements() == []


def test_a_broken_plugin_is_named_and_gives_status_1(tmp_path: Path) -> None:
    (tmp_path / "shattered.py").write_text("import no_such_module\n")
    info = tmp_path / "shattered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shattered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lillama]\nshattered = shattered\n")
    ended = run_process("doctor", env=environment(PYTHONPATH=str(tmp_path)))
    assert ended.status == 1
    assert any("shattered (shattered) cannot be loaded" in line for line in ended.stdout.splitlines()), ended


def test_the_size_of_a_folder_counts_files_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"0" * 1000)
    (tmp_path / "y").write_bytes(b"0" * 500)
    os.symlink(tmp_path / "y", tmp_path / "link")
    assert size_of(tmp_path) == 1500
