"""Plugins of strangers: working ones are used, broken ones are reported and skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK_ANYHOW, Ended, environment, run_process, tree

from lillama_core import Architecture, hookimpl
from lillama_core.allocation import Uniform
from lillama_registry import API_VERSION, LazyCommand, Registry, registry

WORKING = """
import lillama_core
from lillama_core.allocation import Uniform


class First(Uniform):
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
def lillama_commands():
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
    assert failed["late"] == "OSError: no way"

    make_model(tmp_path / "olmo", family="olmo")
    done = run_with(
        *(target, "compress", tmp_path / "olmo", "-o", tmp_path / "o", "--calibration", calibration_text),
        *("--recipe", "hasty", *QUICK_ANYHOW),
    )
    assert done.status == 0, done
    assert "Plugin broken of broken is skipped: ModuleNotFoundError" in done.stderr
    record = json.loads((tmp_path / "o" / "lillama.json").read_text())
    assert (record["architecture"], record["recipe"]["allocation"]) == ("olmo", "firstborn")
    assert record["recipe"]["name"] == "hasty"

    # Without it, the same model is refused, and the plugin that might have helped is named.
    without = run_with(target, "plan", tmp_path / "olmo", LILLAMA_PLUGINS="mamba,broken")
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


def claim(name: str, *model_types: str, fallback: bool = False) -> Plugin:
    """A plugin of one architecture of this name."""
    made = Architecture(name=name, model_types=model_types, stacks={"decoder": "model.layers"})
    made.fallback = fallback
    return Plugin(lillama_architectures=lambda: [made])


@pytest.mark.parametrize("fallback_first", [True, False])
def test_a_fallback_gives_way(fallback_first: bool) -> None:
    """In silence, whichever is loaded first; what no other claims is its own, and LILLAMA_PLUGINS leaves it out."""
    found = Registry()
    plugins = {"low": claim("low", "one", "two", fallback=True), "high": claim("high", "one")}
    for name in plugins if fallback_first else reversed(plugins):
        found.add(plugins[name], name)
    assert [a.name for a in found.architectures_for("one")] == ["high"]
    assert [a.name for a in found.architectures_for("two")] == ["low"]
    assert not found.conflicts
    listed = {p.name: found.provides(p) for p in found.loaded}
    assert listed["high"]["model types"] == ["one"]
    assert listed["low"] == {"architectures": ["low"], "model types, unless another plugin claims them": ["one", "two"]}


def test_only_two_explicit_claims_conflict() -> None:
    found = Registry()
    for name in ("first", "second"):
        found.add(claim(name, "one", fallback=True), name)
    assert [a.name for a in found.architectures_for("one")] == ["first"]
    assert not found.conflicts
    for name in ("third", "fourth"):
        found.add(claim(name, "one"), name)
    assert [a.name for a in found.architectures_for("one")] == ["third", "fourth"]
    (conflict,) = found.conflicts
    assert [p.name for p in conflict.plugins] == ["third", "fourth"]


def test_a_fallback_can_be_chosen_by_name(
    added: Registry, run_cli: Callable[..., Ended], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    make_model(tmp_path / "olmo", family="olmo")

    def used(*options: str) -> str:
        done = run_cli("plan", tmp_path / "olmo", "--json", *options)
        assert done.status == 0, done
        return str(json.loads(done.stdout)["architecture"])

    assert used() == "transformer"
    added.add(claim("mine", "olmo"), "rival")
    assert used() == "mine"
    assert used("--architecture", "transformer") == "transformer"


def test_plain_listing(run_cli: Callable[..., Ended]) -> None:
    done = run_cli("plugins")
    assert done.status == 0
    lines = done.stdout.splitlines()
    assert any(line.startswith("transformer  (lillama ") for line in lines)
    assert any(line.startswith("  allocators: bottom-first, spectrum") for line in lines)
    assert any("model types:" in line and "llama" in line for line in lines)


class Plugin:
    """A plugin as an object: pluggy takes anything with attributes."""

    LILLAMA_API: Any = API_VERSION

    def __init__(self, **hooks: Any) -> None:
        for name, give in hooks.items():
            setattr(self, name, hookimpl(give))


def declared(**attributes: Any) -> Any:
    """An object of a subclass of Architecture with these attributes, and one that is its own affair."""
    own = {"name": "mine", "stacks": {"decoder": "model.layers"}, "helper": len}
    return type("Mine", (Architecture,), {**own, **attributes})()


def test_attributes_of_its_own_are_a_plugins_affair() -> None:
    found = Registry()
    found.add(Plugin(lillama_architectures=lambda: [declared()]), "fine")
    assert [a.name for a in found.architectures] == ["mine"]


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"lillama_architectures": lambda: None}, "gives a NoneType, not a list"),
        ({"lillama_architectures": lambda: ["llama"]}, "'llama', which is not an Architecture"),
        ({"lillama_architectures": lambda: [Architecture]}, "the class Architecture, not an object of it: write Arch"),
        ({"lillama_architectures": lambda: [declared(model_types="llama")]}, "must be a tuple of strings, not 'llama'"),
        ({"lillama_architectures": lambda: [declared(exclude="mlp.*")]}, "exclude of architecture 'mine' must be a"),
        ({"lillama_architectures": lambda: [declared(excludes=("mlp.*",))]}, "'excludes'; did you mean 'exclude'?"),
        ({"lillama_architectures": lambda: [declared(pined=("mlp.*",))]}, "'pined'; did you mean 'pinned'?"),
        ({"lillama_architectures": lambda: [declared(call_blok=len)]}, "'call_blok'; did you mean 'call_block'?"),
        ({"lillama_architectures": lambda: [declared(stacks=["model.layers"])]}, "must be a dict of name to path"),
        ({"lillama_architectures": lambda: [declared(fallback="yes")]}, "must be True or False, not 'yes'"),
        ({"lillama_architectures": lambda: [declared(stacks={})]}, "architecture 'mine' has no stacks"),
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
    assert found.names("losses") == ["mine"]
    assert found.architectures == []


@pytest.mark.parametrize("stated", [0, 2, "1", None, True])
def test_a_plugin_for_another_interface_is_skipped(stated: Any) -> None:
    """Before its hooks are asked, whose meaning may be another; one that states this version, or none, is loaded."""
    asked: list[str] = []
    odd = Plugin(lillama_losses=lambda: asked.append("odd") or {})
    odd.LILLAMA_API = stated
    fine = Plugin(lillama_losses=lambda: {"mine": object()})
    fine.LILLAMA_API = API_VERSION
    found = Registry()
    found.add(odd, "odd")
    found.add(fine, "fine")
    assert ([p.name for p in found.loaded], asked) == (["fine"], [])
    assert f"it is made for version {stated!r} of the plugin interface" in found.failures[0].reason


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with lillama's own plugins, in the place of the process's, to which a test adds."""
    made = Registry()
    made.load_entry_points()
    monkeypatch.setattr("lillama_registry.registry", lambda: made)
    return made


def test_names_that_two_plugins_claim(added: Registry, run_cli: Callable[..., Ended], tiny_model: Path) -> None:
    """Neither wins, the core's own neither: using the name is an error that names both, and the others work."""
    added.add(Plugin(lillama_allocators=lambda: {"uniform": object()}), "usurper", "u", "1")
    added.add(Plugin(lillama_losses=lambda: {"mine": object()}), "first", "one", "1")
    added.add(Plugin(lillama_losses=lambda: {"mine": object()}), "second", "two", "2")
    said = run_cli("plan", tiny_model, "--allocation", "uniform").error
    assert "'uniform' among the allocators is claimed by the plugins 'core' (lillama " in said
    assert "'usurper' (u 1)" in said
    said = run_cli("plan", tiny_model, "--loss", "mine").error
    assert "'mine' among the losses is claimed by the plugins 'first' (one 1) and 'second' (two 2)" in said
    assert run_cli("plan", tiny_model, "--allocation", "top-first").status == 0
    listed = run_cli("plugins").stdout
    assert "conflict: 'mine' among the losses is claimed by the plugins 'first' (one 1) and 'second' (two 2)" in listed
    assert "uniform  cannot be used: 'uniform' among the allocators is claimed" in run_cli("strategies").stdout


GREET = """
import click


@click.command()
@click.option("--loudly", is_flag=True)
@click.option("--times", type=int, default=1)
def greet(loudly, times):
    print(("HELLO" if loudly else "hello") * times)
    return 3 if times == 3 else None
"""


def test_commands_of_plugins(
    added: Registry, run_cli: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import click

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "greeting.py").write_text(GREET)
    (tmp_path / "grumbling.py").write_text("raise RuntimeError('not today')")
    lazy = LazyCommand("greeting:greet", "say hello")
    added.add(Plugin(lillama_commands=lambda: {"greet": lazy}), "polite", "good-manners", "1")
    added.add(Plugin(lillama_commands=lambda: {"grumble": "grumbling:grumble", "odd": object()}), "rude", "bad", "1")
    added.add(Plugin(lillama_commands=lambda: {"plan": click.Command("plan")}), "clashing", "clash", "2")
    done = run_cli("--help")
    assert (done.status, done.stderr) == (0, "")
    lines = [line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert ["greet", "say hello"] in lines
    assert ["grumble", "of the plugin rude"] in lines
    assert not {"greeting", "grumbling"} & set(sys.modules)

    assert run_cli("greet", "--loudly") == Ended(0, "HELLO\n", "")
    assert run_cli("greet", "--times", "3").status == 3
    assert "unknown option '--loudy'; did you mean '--loudly'?" in run_cli("greet", "--loudy").error
    assert "--times: 'x' is not a valid integer (see 'lillama greet --help')" in run_cli("greet", "--times", "x").error
    assert "no command 'gret'" in run_cli("gret").error
    assert "did you mean 'greet'?" in run_cli("gret").error

    said = run_cli("grumble").error
    assert "plugin 'rude' (bad 1) gives 'grumbling:grumble' for 'grumble': RuntimeError: not today" in said
    assert "is no click.Command" in run_cli("odd").error
    said = run_cli("plan", "m").error
    assert "'plan' among the commands is claimed by the plugins 'core' (lillama " in said
    assert "'clashing' (clash 2)" in said


# A strategy with options of its own

DAMPED = """
from pydantic import Field

import lillama_core
from lillama_core.allocation import Uniform
from lillama_core.allocation.plan import RankPlan
from lillama_core.strategies import StrategyOptions


class CappedOptions(StrategyOptions):
    largest: int = Field(default=99, description="largest rank", ge=1)


class Capped(Uniform):
    '''Even ranks up to a largest one.'''

    name = "capped"
    Options = CappedOptions

    def allocate(self, request):
        plan = super().allocate(request)
        return RankPlan(plan.format, {name: min(rank, self.options.largest) for name, rank in plan.ranks.items()})


@lillama_core.hookimpl
def lillama_allocators():
    return {"capped": "capping:Capped", "plain": Capped()}
"""


def test_a_plugins_strategy_brings_its_own_options(tmp_path: Path, tiny_model: Path) -> None:
    target = tmp_path / "site"
    install(target, "capping", DAMPED)
    (tmp_path / "mine.yaml").write_text("allocation: {name: capped, largest: 7}\n")

    def ranks(*arguments: str) -> int:
        done = run_with(target, "plan", tiny_model, "--json", *arguments)
        assert done.status == 0, done
        return max(m["rank"] for m in json.loads(done.stdout)["maps"])

    assert ranks("--recipe", str(tmp_path / "mine.yaml")) == 7
    assert ranks("--allocation", "capped", "--allocation.largest", "5") == 5
    assert ranks("--allocation", "plain", "--allocation.largest", "5") == 5
    assert ranks("--allocation", "capped") > 7
    said = run_with(target, "plan", tiny_model, "--allocation", "capped", "--allocation.largst", "5").error
    assert said == "--allocation.largst: 'capped' has no such option; did you mean 'largest'?"
    said = run_with(target, "plan", tiny_model, "--recipe", str(tmp_path / "mine.yaml"), "--allocation.largest=0").error
    assert said == "--allocation.largest must be at least 1, not 0"
    listed = run_with(target, "strategies", "capped")
    assert "capped  Even ranks up to a largest one." in listed.stdout
    assert "--allocation.largest  largest rank (default: 99)" in listed.stdout
    # Names with a hyphen may be broken there.
    shown = " ".join(run_with(target, "compress", "--help").stdout.split()).replace("- ", "-")
    theirs = "bayesian-search, block-influence, capped, effective-rank, plain, variance-threshold"
    assert f"bottom-first or top-first (default: spectrum); of plugins: {theirs}; its" in shown


def test_what_a_plugins_strategy_raises_is_told_with_its_name(
    added: Registry, run_cli: Callable[..., Ended], tiny_model: Path
) -> None:
    class Hasty(Uniform):
        name = "hasty"

        def allocate(self, request: Any) -> Any:
            return self.fail(request)

        def fail(self, request: Any) -> Any:
            raise KeyError("rank")

    added.add(Plugin(lillama_allocators=lambda: {"hasty": Hasty}), "hasty", "hasty", "1")
    done = run_cli("plan", tiny_model, "--allocation", "hasty")
    assert done == Ended(1, "", f"lillama: error: KeyError: 'rank' (in 'hasty' of {__name__}; --debug shows where)\n")


def test_an_object_that_is_no_strategy_takes_no_options(
    added: Registry, run_cli: Callable[..., Ended], tiny_model: Path
) -> None:
    """Whatever has the methods works, as it did before there were options."""

    class Plain:
        name = "plain"
        needs_spectra = False

        def allocate(self, request: Any) -> Any:
            return Uniform().allocate(request)

    added.add(Plugin(lillama_allocators=lambda: {"plain": Plain()}), "plain", "plain", "1")
    assert run_cli("plan", tiny_model, "--allocation", "plain").status == 0
    said = run_cli("plan", tiny_model, "--allocation", "plain", "--allocation.any", "1").error
    assert said == "--allocation.any: 'plain' has no such option"


def test_choosing_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_PLUGINS", "")
    nothing = Registry()
    nothing.load_entry_points()
    assert [p.name for p in nothing.loaded] == ["core"]
    assert not nothing.failures
    assert [p.name for p in registry().loaded].count("transformer") == 1
