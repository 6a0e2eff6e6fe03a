"""Plugins of lillama: the hooks, the manager, and the lookup from a name to what a plugin gives under it."""

from lillama_registry.commands import LazyCommand
from lillama_registry.hooks import API_VERSION, ENTRY_POINT_GROUP, hookimpl, hookspec
from lillama_registry.manager import Conflict, ConflictError, LoadedPlugin, PluginFailure, Registry, registry

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "Conflict",
    "ConflictError",
    "LazyCommand",
    "LoadedPlugin",
    "PluginFailure",
    "Registry",
    "hookimpl",
    "hookspec",
    "registry",
]
