"""Loads plugins one by one, so that a broken one is reported and the others work."""

from __future__ import annotations

import functools
import importlib.metadata
import os
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
}
"""Kinds of strategy that plugins add by name, and the hook that gives them."""


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin that works: its entry point's name, the distribution that brought it, what it provides."""

    name: str
    distribution: str
    version: str
    module: Any


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
            for hook in ("lillama_architectures", *NAMED_HOOKS.values()):
                implementation = getattr(module, hook, None)
                if implementation is not None:
                    implementation()
        except (Exception, SystemExit) as error:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            self._fail(name, distribution, error)
        else:
            self.loaded.append(LoadedPlugin(name, distribution, version, module))

    def _fail(self, name: str, distribution: str, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self.failures.append(PluginFailure(name, distribution, reason))

    @functools.cached_property
    def architectures(self) -> list[Any]:
        """All architectures, in the order of registration."""
        return [a for found in self.manager.hook.lillama_architectures() for a in found]

    def architectures_for(self, model_type: str) -> list[Any]:
        """The architectures that claim ``config.model_type``: one when all is well."""
        return [a for a in self.architectures if model_type in a.model_types]

    def strategies(self, kind: str) -> dict[str, Any]:
        """What plugins add of one kind (a key of ``NAMED_HOOKS``), by name."""
        merged: dict[str, Any] = {}
        for found in getattr(self.manager.hook, NAMED_HOOKS[kind])():
            merged.update(found)
        return merged

    def provides(self, plugin: LoadedPlugin) -> dict[str, list[str]]:
        """What one plugin brings: kind -> names."""
        found: dict[str, list[str]] = {}
        architectures = getattr(plugin.module, "lillama_architectures", None)
        if architectures is not None:
            found["model types"] = sorted({t for a in architectures() for t in a.model_types})
        for kind, hook in NAMED_HOOKS.items():
            implementation = getattr(plugin.module, hook, None)
            if implementation is not None:
                found[kind] = sorted(implementation())
        return found


@functools.cache
def registry() -> Registry:
    """The process's registry, filled from the entry points at first use."""
    found = Registry()
    found.load_entry_points()
    return found
