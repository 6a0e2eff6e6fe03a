"""Load plugins one by one, so that a broken one is reported and the others work."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from lillama_registry import hooks
from lillama_registry.commands import LazyCommand

if TYPE_CHECKING:
    from lillama_core.architecture import Architecture

CORE = "core"
"""Name of the plugin with which lillama registers its own strategies; it is always loaded, and first."""
NAMED_HOOKS = {
    "targets": "lillama_targets",
    "modalities": "lillama_modalities",
    "metrics": "lillama_metrics",
    "allocators": "lillama_allocators",
    "initializers": "lillama_initializers",
    "formats": "lillama_formats",
    "losses": "lillama_losses",
    "stages": "lillama_stages",
    "recipes": "lillama_recipes",
    "checkpoints": "lillama_checkpoints",
    "exporters": "lillama_exporters",
    "commands": "lillama_commands",
}
"""Kinds of thing that plugins add by name, and the hook that gives them."""


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin that works: its entry point's name, the distribution that brought it, what it provides."""

    name: str
    distribution: str
    version: str
    architectures: tuple[Architecture, ...]
    named: Mapping[str, Mapping[str, Any]]
    """Kind (a key of ``NAMED_HOOKS``) -> name -> what the hook gave: an object, a class or a reference."""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be loaded, and why (one line)."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class Conflict:
    """One name that several plugins claim."""

    kind: str
    name: str
    plugins: tuple[LoadedPlugin, ...]

    def __str__(self) -> str:
        return f"{self.name!r} among the {self.kind} is claimed by the plugins {' and '.join(map(str, self.plugins))}"


class ConflictError(LookupError):
    """A name that several plugins claim was asked for; the message names them all."""


class Registry:
    """The plugins found in the environment.

    ``LILLAMA_PLUGINS`` limits what is loaded beside the core to a comma-separated list of entry-point names (empty:
    nothing).
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("lillama")
        self.manager.add_hookspecs(hooks)
        self.loaded: list[LoadedPlugin] = []
        self.failures: list[PluginFailure] = []

    def load_entry_points(self) -> None:
        """Load every plugin of the group, skipping and recording those that fail."""
        wanted = os.environ.get("LILLAMA_PLUGINS")
        allowed = None if wanted is None else {CORE, *(name.strip() for name in wanted.split(","))}
        seen: set[tuple[str, str]] = set()
        found = importlib.metadata.entry_points(group=hooks.ENTRY_POINT_GROUP)
        for entry_point in sorted(found, key=lambda e: e.value != "lillama_core.builtin"):
            # An editable install can be listed twice (its egg-info and its dist-info).
            key = (entry_point.name, entry_point.value)
            if key in seen or (allowed is not None and entry_point.name not in allowed):
                continue
            seen.add(key)
            distribution = entry_point.dist.name if entry_point.dist else "unknown"
            version = entry_point.dist.version if entry_point.dist else ""
            try:
                module = entry_point.load()
            # Somebody's module may raise anything at import, SystemExit included.
            except (Exception, SystemExit) as error:
                self._fail(entry_point.name, distribution, error)
            else:
                self.add(module, entry_point.name, distribution, version)

    def add(self, module: Any, name: str, distribution: str = "", version: str = "") -> None:
        """Register one plugin and ask it for everything it provides; on any failure it is taken out again."""
        # Two distributions may each have a plugin of one name: what they claim decides, not who came first.
        registered = f"{name} of {distribution}"
        try:
            self.manager.register(module, name=registered)
            self.manager.check_pending()
            _check_version(module)
            self._check_marked(module)
            named = {kind: _named(module, kind) for kind in NAMED_HOOKS}
            plugin = LoadedPlugin(name, distribution, version, _architectures(module), named)
        except (Exception, SystemExit) as error:
            # A second plugin of one name must not take the first one with it.
            if self.manager.get_plugin(registered) is module:
                self.manager.unregister(name=registered)
            self._fail(name, distribution, error)
        else:
            self.loaded.append(plugin)

    def _check_marked(self, module: Any) -> None:
        """A hook without its decorator would be passed over in silence."""
        for hook in ("lillama_architectures", *NAMED_HOOKS.values()):
            if hasattr(module, hook) and self.manager.parse_hookimpl_opts(module, hook) is None:
                raise TypeError(f"{hook} is not marked with @lillama_core.hookimpl")

    def _fail(self, name: str, distribution: str, error: BaseException) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        failure = PluginFailure(name, distribution, reason)
        if failure not in self.failures:
            self.failures.append(failure)

    @property
    def architectures(self) -> list[Architecture]:
        """All architectures, in the order of registration."""
        return [a for plugin in self.loaded for a in plugin.architectures]

    def architectures_for(self, model_type: str, among: Sequence[Architecture] | None = None) -> list[Architecture]:
        """The architectures (of those ``among``) that claim ``config.model_type``: one when all is well.

        A fallback counts only where nothing else claims the model type, and then the first alone.
        """
        found = [a for a in (self.architectures if among is None else among) if model_type in a.model_types]
        return [a for a in found if not is_fallback(a)] or found[:1]

    def plugin_of(self, architecture: Architecture) -> LoadedPlugin:
        """The plugin that brought ``architecture``."""
        return next(p for p in self.loaded if any(a is architecture for a in p.architectures))

    def names(self, kind: str) -> list[str]:
        """All names of one kind (a key of ``NAMED_HOOKS``), sorted."""
        return sorted({name for plugin in self.loaded for name in plugin.named[kind]})

    def claims(self, kind: str, name: str) -> list[tuple[LoadedPlugin, Any]]:
        """The plugins that give ``name``, each with what it gives: a reference is not imported."""
        return [(plugin, plugin.named[kind][name]) for plugin in self.loaded if name in plugin.named[kind]]

    def get(self, kind: str, name: str) -> Any:
        """What a plugin gives under ``name``: an object or a class; a reference is imported first.

        Raises KeyError when no plugin gives it, ConflictError when several do, and ImportError, naming the plugin, when
        the reference leads nowhere.
        """
        claiming = self.claims(kind, name)
        if not claiming:
            raise KeyError(name)
        if len(claiming) > 1:
            raise ConflictError(str(Conflict(kind, name, tuple(plugin for plugin, _ in claiming))))
        plugin, found = claiming[0]
        if isinstance(found, LazyCommand):
            found = found.reference
        if not isinstance(found, str):
            return found
        module, _, attribute = found.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ImportError(f"plugin {plugin} gives {found!r} for {name!r}: {reason}") from error

    def each(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Name and thing of one kind, imported; a name that several plugins claim is left out."""
        conflicting = {c.name for c in self.conflicts if c.kind == kind}
        for name in self.names(kind):
            if name not in conflicting:
                yield name, self.get(kind, name)

    @property
    def conflicts(self) -> list[Conflict]:
        """Every name and model type that more than one plugin claims; the claim of a fallback is none of them."""
        claims: dict[tuple[str, str], list[LoadedPlugin]] = {}
        for plugin in self.loaded:
            own = {(kind, name) for kind, names in plugin.named.items() for name in names}
            own |= {("model types", t) for a in plugin.architectures if not is_fallback(a) for t in a.model_types}
            own |= {("architectures", a.name) for a in plugin.architectures}
            for key in own:
                claims.setdefault(key, []).append(plugin)
        return [Conflict(*key, tuple(plugins)) for key, plugins in sorted(claims.items()) if len(plugins) > 1]

    def provides(self, plugin: LoadedPlugin) -> dict[str, list[str]]:
        """What one plugin brings: kind -> names."""
        found = {"architectures": sorted({a.name for a in plugin.architectures})}
        for kind, fallback in (("model types", False), ("model types, unless another plugin claims them", True)):
            of_rank = [a for a in plugin.architectures if is_fallback(a) is fallback]
            found[kind] = sorted({t for a in of_rank for t in a.model_types})
        found |= {kind: sorted(named) for kind, named in plugin.named.items()}
        return {kind: names for kind, names in found.items() if names}


def is_fallback(architecture: Architecture) -> bool:
    """Whether ``architecture`` claims its model types only where no other does."""
    return bool(getattr(architecture, "fallback", False))


def _check_version(module: Any) -> None:
    """Raise TypeError for a plugin that says that it is made for another interface."""
    stated = getattr(module, "LILLAMA_API", hooks.API_VERSION)
    if stated != hooks.API_VERSION or isinstance(stated, bool):
        raise TypeError(
            f"it is made for version {stated!r} of the plugin interface (LILLAMA_API), and this lillama has version"
            f" {hooks.API_VERSION}: install versions that belong together"
        )


def _architectures(module: Any) -> tuple[Architecture, ...]:
    """What a plugin's hook gives, checked as far as the core relies on it."""
    hook = getattr(module, "lillama_architectures", None)
    found = [] if hook is None else hook()
    if not isinstance(found, list | tuple):
        raise TypeError(f"lillama_architectures gives a {type(found).__name__}, not a list")
    for architecture in found:
        if isinstance(architecture, type):
            name = architecture.__name__
            raise TypeError(f"lillama_architectures gives the class {name}, not an object of it: write {name}()")
        if not all(hasattr(architecture, name) for name in ("name", "model_types", "stacks")):
            raise TypeError(f"lillama_architectures gives {architecture!r}, which is not an Architecture")
        check = getattr(architecture, "check_declaration", None)
        if check is not None:
            check()
    return tuple(found)


def _named(module: Any, kind: str) -> dict[str, Any]:
    hook = getattr(module, NAMED_HOOKS[kind], None)
    found = {} if hook is None else hook()
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{NAMED_HOOKS[kind]} must give a dict of name to {kind}, not {found!r}")
    for name, given in found.items():
        thing = given.reference if isinstance(given, LazyCommand) else given
        if isinstance(thing, str) and not all(thing.partition(":")):
            raise TypeError(f"{NAMED_HOOKS[kind]} gives {thing!r} for {name!r}; a reference is 'package.module:name'")
    return dict(found)


@functools.cache
def registry() -> Registry:
    """The process's registry, filled from the entry points at first use."""
    found = Registry()
    found.load_entry_points()
    return found
