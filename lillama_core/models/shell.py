"""Putting loaded tensors into a model on the meta device, and completing what a checkpoint does not hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lillama_core.models.transformers_adapter import initialize, mark_loaded, nearest_model, tied_weights


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make ``tensor`` the parameter or buffer ``name`` of ``model``."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._buffers:
        mark_loaded(tensor)
        module._buffers[own] = tensor
    else:
        parameter = nn.Parameter(tensor, requires_grad=False)
        mark_loaded(parameter)
        module._parameters[own] = parameter


def fill_shell(model: Any, tensors: Mapping[str, torch.Tensor], blocks: Collection[nn.Module]) -> None:
    """Put ``tensors`` into ``model``, compute its other tensors outside of ``blocks``, and tie what is tied."""
    for name, tensor in tensors.items():
        put(model, name, tensor)
    tied = {name for pair in tied_weights(model) for name in pair}
    _complete(model, model, blocks, tied)
    model.tie_weights(missing_keys=set(model.state_dict()) - set(tensors), recompute_mapping=False)
    model.eval().requires_grad_(False)


def complete_buffers(block: nn.Module, model: nn.Module, path: str) -> None:
    """Compute the tensors of ``block`` that are not loaded; ``model`` is the one that has it at ``path``."""
    owner = nearest_model(model, path)
    if not _complete(block, owner, (), ()):
        return
    # Some classes compute what their blocks hold: they have to find the block in its place.
    place, _, name = path.rpartition(".")
    siblings = model.get_submodule(place)._modules
    own = siblings[name]
    siblings[name] = block
    try:
        with torch.random.fork_rng(devices=[]):
            initialize(owner, owner, set(owner.children()))
    finally:
        siblings[name] = own


def _complete(module: nn.Module, owner: Any, skip: Collection[nn.Module], tied: Collection[str]) -> bool:
    """Compute what is on the meta device, as transformers does, but for names in ``tied`` and modules in ``skip``.

    Returns whether there was anything.
    """
    inside = {id(m) for outer in skip for m in outer.modules()}
    left = False
    for path, part in module.named_modules():
        if id(part) in inside:
            continue
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.device.type != "meta" or f"{path}.{name}".removeprefix(".") in tied:
                    continue
                empty = torch.empty_like(tensor, device="cpu")
                held[name] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
                left = True
    if left:
        # Some classes draw numbers for weights that are loaded: the caller's generator stays as it is.
        with torch.random.fork_rng(devices=[]):
            initialize(module, owner, skip)
    return left
