"""What is published: a small wheel with what a user needs, without the models and data of the benchmarks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import environment

from lillama_benchmarks import suites
from lillama_benchmarks.suites import Suite, choose_models, cross_architecture
from lillama_core.errors import UserError

ROOT = Path(__file__).parents[1]
MOST_BYTES = 2_500_000
SETUPTOOLS = int(importlib.metadata.version("setuptools").partition(".")[0])
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
BUILD = "import setuptools.build_meta as backend; backend.build_wheel('.')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored, dirs_exist_ok=True)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, tree / file)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, check=True, capture_output=True)
    (built,) = tree.glob("*.whl")
    return built


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


needs_setuptools = pytest.mark.skipif(SETUPTOOLS < 77, reason="needs setuptools 77, as pyproject.toml says")


@needs_setuptools
def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES


@needs_setuptools
def test_models_and_data_of_the_benchmarks_stay_behind(wheel: Path) -> None:
    ours = {name for name in names_of(wheel) if name.startswith("lillama_benchmarks/")}
    assert "lillama_benchmarks/suites.py" in ours
    assert not {n for n in ours if n.startswith(("lillama_benchmarks/zoo/", "lillama_benchmarks/data/"))}
    assert not {n for n in names_of(wheel) if n.endswith((".safetensors", ".cpp"))}


@needs_setuptools
def test_every_module_and_file_of_the_core_is_in_the_wheel(wheel: Path) -> None:
    shipped = names_of(wheel)
    for package in ("lillama_core", "lillama_registry", "lillama_plugins", "lillama_testing"):
        folder = ROOT / FOLDERS[package]
        files = {f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
        assert not {str(file) for file in files if f"{package}/{file.as_posix()}" not in shipped}


@needs_setuptools
def test_what_is_installed_loads_models_without_an_import(wheel: Path, compressed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import site, sys
site.addsitedir(sys.argv[1])
finders = [f for f in sys.meta_path if getattr(f, "__module__", "") == "lillama_startup"]
assert finders and "lillama_core" not in sys.modules and "torch" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[2]).model.layers[0].mlp).__module__)
print(sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING["lillama"].__module__)
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "site"), str(compressed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "lillama_core.output.quantizer"


def test_a_broken_installation_stops_nobody_who_uses_transformers() -> None:
    code = f"""
import sys, warnings
sys.path.insert(0, {str(ROOT / "registry")!r})
sys.modules["lillama_registry"] = None  # which the core imports when the format is registered
import lillama_startup
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
print(*[w.message for w in caught if "lillama" in str(w.message)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "transformers cannot load models compressed by lillama" in done.stdout


def test_the_zoo_needs_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cross_architecture(tmp_path) == []
    suite = suites.SUITES["cross-architecture"]
    for names in ((), ("mamba-tiny",)):
        with pytest.raises(UserError, match="come with the repository, not with the package: work in a clone"):
            choose_models(suite, names, tmp_path)
    (model,) = choose_models(suite, (str(tmp_path),), tmp_path)
    assert model.fetch() == tmp_path.resolve()


def test_a_suite_of_given_models_needs_no_zoo(tmp_path: Path) -> None:
    empty = Suite("none", lambda _: [], (), (0.2,))
    assert [m.name for m in choose_models(empty, (str(tmp_path),), tmp_path)] == [tmp_path.name]
