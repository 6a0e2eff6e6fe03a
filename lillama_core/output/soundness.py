"""Whether tensors that were read are ones that a model can be run with: orders are orders, and numbers are numbers."""

from __future__ import annotations

import torch
from torch import nn

from lillama_core.errors import LillamaError
from lillama_core.quantization.packing import Packing


def check_orders(model: nn.Module, path: str = "") -> None:
    """Raise LillamaError for a buffer that should hold the numbers 0 to n - 1, each once, and does not.

    Modules name such buffers in ``orders``: an index that is too large reads what is not there, and one that comes
    twice leaves a feature out. ``path`` is the model's own, for the message. What is on the meta device is passed over.
    """
    for name, module in model.named_modules(prefix=path):
        for own in getattr(type(module), "orders", ()):
            order = getattr(module, own)
            if order.is_meta:
                continue
            found = order.detach().cpu().long()
            if not torch.equal(found.sort().values, torch.arange(len(found))):
                raise LillamaError(
                    f"{name}.{own} is no order of {len(found)} numbers: the weights are damaged, or not of this model"
                )


def check_finite(model: nn.Module, path: str = "") -> None:
    """Raise LillamaError for a parameter or buffer with an infinite number, or one that is none, scales included.

    What is on the meta device is passed over.
    """
    prefix = f"{path}." if path else ""
    for name, tensor in model.state_dict(prefix=prefix, keep_vars=True).items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise LillamaError(f"{name} holds numbers that are infinite or none")
    for name, module in model.named_modules(prefix=path):
        packing = getattr(module, "packing", None)
        if not isinstance(packing, Packing):
            continue
        packed = getattr(module, "packed", None)
        packed = module.weight if packed is None else packed
        if not packed.is_meta and not bool(torch.isfinite(packing.scales(packed)).all()):
            raise LillamaError(f"{name} is held in few bits, by scales that are infinite or none")
