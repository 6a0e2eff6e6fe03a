"""Putting modules into a model, for good or for a while, or into a copy of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def exact(module: nn.Module, device: torch.device, arithmetic: torch.dtype | None = None) -> nn.Module:
    """``module``, changed in place: on ``device`` in fp32, in eval mode, without gradients.

    Weights of linear layers that are stored in ``arithmetic``, in which autocast makes their products, stay in it: it
    would round them to the same numbers again for every batch.
    """
    module.to(device)
    for part in module.modules():
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            if tensor.is_floating_point() and not (type(part) is nn.Linear and tensor.dtype == arithmetic):
                tensor.data = tensor.data.float()
    return module.eval().requires_grad_(False)


def move(model: nn.Module, device: torch.device) -> None:
    """Put all weights of ``model`` that are in memory on ``device``; those on the meta device stay there."""
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy with modules of its own, in which others can be put, and the same tensors."""
    return copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})


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
