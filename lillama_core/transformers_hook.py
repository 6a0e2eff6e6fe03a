"""Register the format of compressed models with transformers as soon as transformers is imported, and not before.

A finder at the front of ``sys.meta_path`` waits for the one module of transformers that holds the table of
quantization methods. When that module has been executed (or executed again, by ``importlib.reload``), the quantizer is
imported, which puts itself into the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"
"""The module that every ``from_pretrained`` asks for quantization methods."""
QUANTIZER = "lillama_core.output.quantizer"
"""The module whose ``register`` adds the format to that table; it also does so when it is first imported."""


def install() -> None:
    """Register now if transformers is in use already, and else as soon as it is; calling it again does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # In front of the others, since the first one that knows a module loads it.
        sys.meta_path.insert(0, _Finder())
    # Another thread that imports it may be past the finders already: wait until it is done, as an import would.
    importlib._bootstrap._lock_unlock_module(TABLE)  # type: ignore[attr-defined]
    # Registering twice does no harm.
    table = sys.modules.get(TABLE)
    if table is not None and not getattr(table.__spec__, "_initializing", False):
        _register()


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """Find a module as the finder does: for one that was asked before it was there."""
    return _Finder().find_spec(name, path, target)


class _Finder(MetaPathFinder):
    """Finds nothing itself: has the loader of one module followed by the registration."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, _Finder) or find is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """The loader of the table, and what comes after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        # What tools ask a loader for besides: its path, the source.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of this one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    try:
        # While the quantizer itself is being imported this is a part of it, which has no ``register`` yet.
        register = getattr(importlib.import_module(QUANTIZER), "register", None)
        if register is not None:
            register()
    except Exception as error:
        # Whoever imports transformers for something else must be able to.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"transformers cannot load models compressed by lillama: {reason}", stacklevel=2)
