"""What is measured while a model works, but for time: the arithmetic of its products, and the memory of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    # torch knows those of CUDA alone. As those: all pairs are counted, whatever the mask leaves out.
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _int8(rows: Any, weight: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * int(rows.numel()) * int(weight.shape[0])


_MORE = {"_scaled_dot_product_flash_attention_for_cpu": _attention, "_weight_int8pack_mm": _int8}
"""Operators of torch that it has no count for -> floating point operations of a call."""


class Arithmetic:
    """Multiply-adds between begin and end, of matrix products, convolutions and attention, and how many of these."""

    def __init__(self) -> None:
        self.multiply_adds = 0
        self.products = 0
        more = {getattr(torch.ops.aten, name, None): formula for name, formula in _MORE.items()}
        formulas = {**flop_registry, **{op: formula for op, formula in more.items() if op is not None}}
        mapping = {op: self._counted(formula) for op, formula in formulas.items()}
        self._counter = FlopCounterMode(display=False, custom_mapping=mapping)

    def _counted(self, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            self.products += 1
            return formula(*args, **kwargs)

        # The arguments as they are, for the formulas of torch look at their shapes themselves.
        count._get_raw = True  # type: ignore[attr-defined]
        return count

    def begin(self) -> None:
        self.products = 0
        self._counter.__enter__()

    def end(self) -> None:
        self._counter.__exit__(None, None, None)
        self.multiply_adds = self._counter.get_total_flops() // 2


class TensorMemory(TorchDispatchMode):
    """The most bytes that tensors made between begin and end take at once; what operators need inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live = 0
        self._known: set[int] = set()

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and _storage(tensor)._cdata not in before | self._known:
                self._add(_storage(tensor))
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._live += size
        self.bytes = max(self.bytes, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
