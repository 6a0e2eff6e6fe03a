"""Putting modules into a model, for good or for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextlib.contextmanager
def swapped_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, other modules stand at the given paths of ``model``: the dense tables, say."""
    own = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            replace_module(model, path, module)
        yield
    finally:
        for path, module in own.items():
            replace_module(model, path, module)
