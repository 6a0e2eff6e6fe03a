"""Plugins of strangers: working ones are used, broken ones are reported and skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Ended, environment, run_process, tree

from lillama_core import Architecture, hookimpl
from lillama_registry import Registry, registry

WORKING = """
import lillama_core


class First(type(make("allocators", "uniform"))):
    name = "firstborn"


@lillama_core.hookimpl
def lillama_architectures():
    return [lillama_core.Architecture(name="olmo", model_types=("olmo",), stacks={"decoder": "model.layers"})]


@lillama_core.hookimpl
def lillama_allocators():
    return {"firstborn": First()}


@lillama_core.hookimpl
def lillama_recipes():
    return {"hasty": {"steps": 1, "allocation": "firstborn"}}


"""
LATE = """
import lillama_core


@lillama_core.hookimpl
def lillama_commands(subparsers):
    raise OSError("no\\nway")
"""
RIVAL = """
import lillama_core


@lillama_core.hookimpl
def lillama_architectures():
    return [lillama_core.Architecture(name="mine", model_types=("llama",), stacks={"decoder": "model.layers"})]
"""


def install(folder: Path, name: str, source: str, module: str | None = None) -> None:
    """Put a distribution with one plugin into ``folder``, as an installer would."""
    module = module or name.replace("-", "_")
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lillama]\n{name} = {module}\n")


def run_with(folder: Path, *arguments: str | Path, **changes: str) -> Ended:
    return run_process(*arguments, env=environment(PYTHONPATH=str(folder), **changes))


def test_working_plugin(
    tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found beside broken ones; the architecture, the allocator, and the recipe that it adds all work."""
    target = tmp_path / "site"
    install(target, "stranger", WORKING)
    install(target, "broken", "import a_module_that_is_not_there")
    install(target, "leaving", "raise SystemExit('goodbye')")
    install(target, "absent", "", module="absent")
    (target / "absent.py").unlink()
    install(target, "misspelt", WORKING.replace("lillama_recipes", "lillama_recipies"))
    install(target, "clumsy", WORKING.replace("@lillama", "# @"))
    install(target, "late", LATE)

    listed = run_with(target, "plugins", "--json")
    assert (listed.status, listed.stderr) == (0, "")
    found = json.loads(listed.stdout)
    plugins = {p["plugin"]: p for p in found["plugins"]}
    assert plugins["stranger"] == {
        "plugin": "stranger",
        "distribution": "stranger",
        "version": "1.0",
        "provides": {
            "architectures": ["olmo"],
            "model types": ["olmo"],
            "allocators": ["firstborn"],
            "recipes": ["hasty"],
        },
    }
    assert plugins["transformer"]["distribution"] == "lillama"
    assert plugins["core"]["provides"]["allocators"] == ["bottom-first", "spectrum", "top-first", "uniform"]
    failed = {f["plugin"]: f["error"] for f in found["failed"]}
    assert sorted(failed) == ["absent", "broken", "clumsy", "late", "leaving", "misspelt"]
    assert "a_module_that_is_not_there" in failed["broken"]
    assert failed["leaving"] == "SystemExit: goodbye"
    assert "lillama_recipies" in failed["misspelt"]
    assert "is not marked with @lillama_core.hookimpl" in failed["clumsy"]
    assert failed["late"] == "its commands: OSError: no way"

    make_model(tmp_path / "olmo", family="olmo")
    done = run_with(
        *(target, "compress", tmp_path / "olmo", "-o", tmp_path / "o", "--calibration", calibration_text),
        *("--recipe", "hasty", *QUICK),
    )
    assert done.status == 0, done
    assert "Plugin broken of broken is skipped: ModuleNotFoundError" in done.stderr
    record = json.loads((tmp_path / "o" / "lillama.json").read_text())
    assert (record["architecture"], record["recipe"]["allocation"]) == ("olmo", "firstborn")
    assert record["recipe"]["name"] == "hasty"

    # Without it, the same model is refused, and the plugin that might have helped is named.
    without = run_with(target, "plan", tmp_path / "olmo", LILLAMA_PLUGINS="transformer,broken")
    assert "no plugin handles model type 'olmo'" in without.error
    assert "not loaded: broken" in without.error


def test_two_plugins_claim_one_model_type(tmp_path: Path, tiny_model: Path) -> None:
    target = tmp_path / "site"
    install(target, "rival", RIVAL)
    before = tree(tmp_path / "tiny")
    said = run_with(target, "plan", tiny_model).error
    assert "model type 'llama' is claimed by the plugins" in said
    assert "'rival' (rival 1.0)" in said
    assert "'transformer' (lillama " in said
    assert "choose with --architecture" in said
    assert tree(tmp_path / "tiny") == before


@pytest.mark.parametrize(("choice", "name"), [("rival", "mine"), ("mine", "mine"), ("transformer", "transformer")])
def test_choosing_between_two(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, run_cli: Callable[..., Ended], choice: str, name: str
) -> None:
    """By the name of the plugin or of its architecture, as the message of the last test advises."""
    added = Registry()
    added.load_entry_points()
    mine = Architecture(name="mine", model_types=("llama",), stacks={"decoder": "model.layers"})
    added.add(Plugin(lillama_architectures=lambda: [mine]), "rival")
    monkeypatch.setattr("lillama_registry.registry", lambda: added)
    assert "is claimed by the plugins" in run_cli("plan", tiny_model).error
    done = run_cli("plan", tiny_model, "--architecture", choice, "--json")
    assert json.loads(done.stdout)["architecture"] == name


def test_plain_listing(run_cli: Callable[..., Ended]) -> None:
    done = run_cli("plugins")
    assert done.status == 0
    lines = done.stdout.splitlines()
    assert any(line.startswith("transformer  (lillama ") for line in lines)
    assert any(line.startswith("  allocators: bottom-first, spectrum") for line in lines)
    assert any("model types:" in line and "llama" in line for line in lines)


class Plugin:
    """A plugin as an object: pluggy takes anything with attributes."""

    def __init__(self, **hooks: Any) -> None:
        for name, give in hooks.items():
            setattr(self, name, hookimpl(give))


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"lillama_architectures": lambda: None}, "gives a NoneType, not a list"),
        ({"lillama_architectures": lambda: ["llama"]}, "'llama', which is not an Architecture"),
        ({"lillama_architectures": lambda: [Architecture(model_types="llama")]}, "is a string"),  # type: ignore[arg-type]
        ({"lillama_architectures": lambda: 1 / 0}, "ZeroDivisionError"),
        ({"lillama_allocators": lambda: ["uniform"]}, "must give a dict"),
        ({"lillama_recipes": lambda: {1: {}}}, "must give a dict"),
        ({"lillama_losses": lambda wrong: {}}, "wrong"),
        ({"lillama_unknown": lambda: []}, "lillama_unknown"),
    ],
)
def test_plugins_that_give_something_else(hooks: dict[str, Any], reason: str) -> None:
    found = Registry()
    found.add(Plugin(**hooks), "odd", "odd-distribution", "1")
    assert not found.loaded
    (failure,) = found.failures
    assert (failure.name, failure.distribution) == ("odd", "odd-distribution")
    assert reason in failure.reason
    # It is out: what is asked of all plugins works.
    found.add(Plugin(lillama_losses=lambda: {"mine": object()}), "good")
    assert list(found.strategies("losses")) == ["mine"]
    assert found.architectures == []


def test_names_that_are_taken() -> None:
    found = Registry()
    found.add(Plugin(lillama_losses=lambda: {"mine": object()}), "first")
    found.add(Plugin(lillama_losses=lambda: {"mine": object()}), "second")
    found.add(Plugin(), "first", "another")
    assert [p.name for p in found.loaded] == ["first"]
    assert "plugin 'first' provides 'mine' among the losses already" in found.failures[0].reason
    assert found.failures[1].distribution == "another"
    assert list(found.strategies("losses")) == ["mine"]


def test_the_core_keeps_its_names(monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Ended]) -> None:
    from lillama_core.strategies import allocators

    added = Registry()
    added.load_entry_points()
    added.add(Plugin(lillama_allocators=lambda: {"uniform": object()}), "usurper", "u", "1")
    for place in ("lillama_core.strategies.registry", "lillama_core.cli.main.registry"):
        monkeypatch.setattr(place, lambda: added)
    assert allocators()["uniform"].name == "uniform"
    assert "uniform (hidden by the core's)" in run_cli("plugins").stdout


def test_commands_of_plugins(monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Ended]) -> None:
    def greet(subparsers: Any) -> None:
        parser = subparsers.add_parser("greet")
        parser.add_argument("--loudly", action="store_true")
        parser.set_defaults(run=lambda options: print("HELLO" if options.loudly else "hello") or 0)

    def clash(subparsers: Any) -> None:
        subparsers.add_parser("plan")

    added = Registry()
    added.add(Plugin(lillama_commands=clash), "clashing")
    added.add(Plugin(lillama_commands=greet), "polite")
    monkeypatch.setattr("lillama_core.cli.main.registry", lambda: added)
    assert run_cli("greet", "--loudly") == Ended(0, "HELLO\n", "")
    assert "unknown option '--loudy'; did you mean '--loudly'?" in run_cli("greet", "--loudy").error
    assert [f.name for f in added.failures] == ["clashing"]
    assert "plan" in added.failures[0].reason


def test_choosing_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_PLUGINS", "")
    nothing = Registry()
    nothing.load_entry_points()
    assert not nothing.loaded
    assert not nothing.failures
    assert [p.name for p in registry().loaded].count("transformer") == 1
