"""Loads plugins one by one, so that a broken one is reported and the others work."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from lillama_registry import hooks

NAMED_HOOKS = {
    "allocators": "lillama_allocators",
    "initializers": "lillama_initializers",
    "formats": "lillama_formats",
    "losses": "lillama_losses",
    "recipes": "lillama_recipes",
    "checkpoints": "lillama_checkpoints",
}
"""Kinds of strategy that plugins add by name, and the hook that gives them."""


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin that works: its entry point's name, the distribution that brought it, what it provides."""

    name: str
    distribution: str
    version: str
    architectures: tuple[Any, ...]
    strategies: Mapping[str, Mapping[str, Any]]
    """Kind (a key of ``NAMED_HOOKS``) -> name -> strategy."""


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be loaded, and why (one line)."""

    name: str
    distribution: str
    reason: str


class Registry:
    """The plugins found in the environment.

    ``LILLAMA_PLUGINS`` limits what is loaded to a comma-separated list of entry-point names (empty: none).
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("lillama")
        self.manager.add_hookspecs(hooks)
        self.loaded: list[LoadedPlugin] = []
        self.failures: list[PluginFailure] = []

    def load_entry_points(self) -> None:
        """Load every plugin of the group, skipping and recording those that fail."""
        wanted = os.environ.get("LILLAMA_PLUGINS")
        allowed = None if wanted is None else {name.strip() for name in wanted.split(",")}
        seen: set[tuple[str, str]] = set()
        for entry_point in importlib.metadata.entry_points(group=hooks.ENTRY_POINT_GROUP):
            # An editable install can be listed twice (its egg-info and its dist-info).
            key = (entry_point.name, entry_point.value)
            if key in seen or (allowed is not None and entry_point.name not in allowed):
                continue
            seen.add(key)
            distribution = entry_point.dist.name if entry_point.dist else "unknown"
            version = entry_point.dist.version if entry_point.dist else ""
            try:
                module = entry_point.load()
            # A stranger's module may raise anything at import, SystemExit included.
            except (Exception, SystemExit) as error:
                self._fail(entry_point.name, distribution, error)
            else:
                self.add(module, entry_point.name, distribution, version)

    def add(self, module: Any, name: str, distribution: str = "", version: str = "") -> None:
        """Register one plugin and ask it for everything it provides; on any failure it is taken out again."""
        try:
            self.manager.register(module, name=name)
            self.manager.check_pending()
            self._check_marked(module)
            plugin = LoadedPlugin(
                name, distribution, version, _architectures(module), {k: _named(module, k) for k in NAMED_HOOKS}
            )
            self._check_taken(plugin)
        except (Exception, SystemExit) as error:
            # A second plugin of one name must not take the first one with it.
            if self.manager.get_plugin(name) is module:
                self.manager.unregister(name=name)
            self._fail(name, distribution, error)
        else:
            self.loaded.append(plugin)

    def _check_marked(self, module: Any) -> None:
        """A hook without its decorator would be passed over in silence."""
        for hook in ("lillama_architectures", "lillama_commands", *NAMED_HOOKS.values()):
            if hasattr(module, hook) and self.manager.parse_hookimpl_opts(module, hook) is None:
                raise TypeError(f"{hook} is not marked with @lillama_core.hookimpl")

    def _check_taken(self, plugin: LoadedPlugin) -> None:
        for other in self.loaded:
            for kind, strategies in plugin.strategies.items():
                for name in strategies:
                    if name in other.strategies[kind]:
                        raise ValueError(f"plugin {other.name!r} provides {name!r} among the {kind} already")

    def add_commands(self, subparsers: Any) -> None:
        """Let every plugin add its commands; one that fails is recorded, and the others go on."""
        for plugin in list(self.loaded):
            others = [p for name, p in self.manager.list_name_plugin() if name != plugin.name]
            hook = self.manager.subset_hook_caller("lillama_commands", remove_plugins=others)
            try:
                hook(subparsers=subparsers)
            except (Exception, SystemExit) as error:
                self._fail(plugin.name, plugin.distribution, error, "its commands")

    def _fail(self, name: str, distribution: str, error: BaseException, what: str = "") -> None:
        reason = " ".join(f"{f'{what}: ' if what else ''}{type(error).__name__}: {error}".split())
        failure = PluginFailure(name, distribution, reason)
        if failure not in self.failures:
            self.failures.append(failure)

    @property
    def architectures(self) -> list[Any]:
        """All architectures, in the order of registration."""
        return [a for plugin in self.loaded for a in plugin.architectures]

    def architectures_for(self, model_type: str) -> list[Any]:
        """The architectures that claim ``config.model_type``: one when all is well."""
        return [a for a in self.architectures if model_type in a.model_types]

    def plugin_of(self, architecture: Any) -> LoadedPlugin:
        """The plugin that brought ``architecture``."""
        return next(p for p in self.loaded if any(a is architecture for a in p.architectures))

    def strategies(self, kind: str) -> dict[str, Any]:
        """What plugins add of one kind (a key of ``NAMED_HOOKS``), by name."""
        return {name: found for plugin in self.loaded for name, found in plugin.strategies[kind].items()}

    def provides(self, plugin: LoadedPlugin) -> dict[str, list[str]]:
        """What one plugin brings: kind -> names."""
        types = sorted({t for a in plugin.architectures for t in a.model_types})
        found = {"architectures": sorted({a.name for a in plugin.architectures}), "model types": types}
        found |= {kind: sorted(strategies) for kind, strategies in plugin.strategies.items()}
        return {kind: names for kind, names in found.items() if names}


def _architectures(module: Any) -> tuple[Any, ...]:
    """What a plugin's hook gives, checked as far as the core relies on it."""
    hook = getattr(module, "lillama_architectures", None)
    found = [] if hook is None else hook()
    if not isinstance(found, list | tuple):
        raise TypeError(f"lillama_architectures gives a {type(found).__name__}, not a list")
    for architecture in found:
        if not all(hasattr(architecture, name) for name in ("name", "model_types", "stacks")):
            raise TypeError(f"lillama_architectures gives {architecture!r}, which is not an Architecture")
        if isinstance(architecture.model_types, str):
            raise TypeError(f"model_types of architecture {architecture.name!r} is a string, not a tuple of them")
    return tuple(found)


def _named(module: Any, kind: str) -> dict[str, Any]:
    hook = getattr(module, NAMED_HOOKS[kind], None)
    found = {} if hook is None else hook()
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{NAMED_HOOKS[kind]} must give a dict of name to strategy, not {found!r}")
    return found


@functools.cache
def registry() -> Registry:
    """The process's registry, filled from the entry points at first use."""
    found = Registry()
    found.load_entry_points()
    return found
