"""Plugins of lillama: the hooks, the manager, and the lookup from a model's config to its architecture."""

from lillama_registry.hooks import ENTRY_POINT_GROUP, hookimpl, hookspec
from lillama_registry.manager import LoadedPlugin, PluginFailure, Registry, registry

__all__ = [
    "ENTRY_POINT_GROUP",
    "LoadedPlugin",
    "PluginFailure",
    "Registry",
    "hookimpl",
    "hookspec",
    "registry",
]
