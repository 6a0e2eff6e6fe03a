"""`lora_targets`: which layers PEFT has to adapt in a compressed model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lillama_core.errors import UserError, nearest
from lillama_core.formats.base import LowRankLinear
from lillama_core.quantization.modules import QuantizedLinear


def lora_targets(model: nn.Module, names: str | Sequence[str] | None = None) -> list[str]:
    """The paths to give PEFT as ``target_modules``, for the ``names`` that one would give it of the dense model.

    A low-rank map is two plain linear layers, and it is these that an adapter is laid over, trained and merged into: a
    map ``q_proj`` gives ``….q_proj.mix`` and ``….q_proj.up``, a dense one itself. ``names`` are ends of paths, such as
    ``q_proj``; None: those that PEFT takes by default of models of this type. Raises UserError for a name that no
    linear layer has, and for layers in few bits, into which nothing can be merged.
    """
    if names is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULTS:
            raise UserError(f"PEFT has no default target modules for models of type {kind!r}; name some, as 'q_proj'")
        wanted = tuple(DEFAULTS[kind])
    else:
        wanted = (names,) if isinstance(names, str) else tuple(names)
    found: list[str] = []
    for name in wanted:
        own = [(p, m) for p, m in model.named_modules() if p == name or p.endswith(f".{name}")]
        layers = [path for p, m in own for path in _layers(p, m)]
        if not layers:
            ends = sorted({p.rpartition(".")[2] for p, m in model.named_modules() if _layers(p, m)})
            raise UserError(f"no linear layer of the model is called {name!r}{nearest(name, ends)}")
        found += [path for path in layers if path not in found]
    return found


def _layers(path: str, module: nn.Module) -> list[str]:
    """The plain linear layers that a linear map is made of; none for a module of another kind."""
    if isinstance(module, QuantizedLinear):
        raise UserError(f"{path!r} holds its weight in few bits: adapt the model before it is quantised")
    if isinstance(module, LowRankLinear):
        return [found for name, child in module.named_children() for found in _layers(f"{path}.{name}", child)]
    return [path] if type(module) is nn.Linear else []
