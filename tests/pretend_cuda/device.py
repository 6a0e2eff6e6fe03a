"""Tensors that say that they are on ``cuda:0`` and hold their numbers on the CPU; mixing the two fails as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from pretend_cuda.ledger import Ledger

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LEDGER = Ledger()

SYNCHRONISING: dict[Any, str] = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    # Its CUDA kernel looks whether the probabilities are any.
    aten.multinomial.default: "multinomial",
    # They look whether the decomposition succeeded.
    aten._linalg_eigh.default: "eigh",
    aten._linalg_svd.default: "svd",
    aten.linalg_lstsq.default: "lstsq",
    aten._linalg_check_errors.default: "linalg",
}
"""Operations that make the CPU wait for a CUDA device, since it needs a number or a size that is computed there."""

INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default),
    *(aten.index_put_.default, aten._index_put_impl_.default),
}
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return aten.histc.default(values.double(), *args, **kwargs).to(values.dtype)


def _widened(product: Any, tensors: int) -> Callable[..., torch.Tensor]:
    """``product`` of ``tensors`` tensors whose dtype is that of the result."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        *factors, dtype = args[: tensors + 1]
        return product(*(t.to(dtype) for t in factors), **kwargs)

    return run


SUBSTITUTES: dict[Any, Callable[..., torch.Tensor]] = {aten.histc.default: _histc} | {
    # Not every supported torch has them.
    product.dtype: _widened(product.default, tensors)
    for product, tensors in ((aten.mm, 2), (aten.bmm, 2), (aten.addmm, 3), (aten.baddbmm, 3))
    if "dtype" in product.overloads()
}
"""Operations that CUDA has for dtypes for which the CPU has none."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; ``host`` holds its numbers on the CPU."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        found.host = inner
        LEDGER.hold(inner)
        return found

    def __init__(self, inner: torch.Tensor) -> None:
        """All is done in ``__new__``."""

    def __repr__(self, *, tensor_contents: Any = None) -> Any:
        return f"PretendTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                new: torch.Tensor = PretendTensor(self.host.clone())
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=self.requires_grad)
            else:
                new.requires_grad_(self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What does not reach the dispatcher, or reaches it where this device can not be seen."""
        first: Any = args[0] if args else None
        if func == torch.Tensor.data.__set__:
            value = args[1]
            if isinstance(first, PretendTensor) != isinstance(value, PretendTensor):
                raise RuntimeError(f"Expected data on {first.device}, the device of the tensor, not {value.device}")
            with torch._C.DisableTorchFunctionSubclass():
                func(*args)
            if isinstance(first, PretendTensor):
                first.host = value.host.detach()
                LEDGER.hold(first.host)
            return None
        if isinstance(first, PretendTensor):
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            if func is torch.Tensor.data_ptr:
                return first.host.data_ptr()
            if func is torch.Tensor.tolist:
                LEDGER.copy(first, to_device=False, waits=True)
                return first.host.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendMode(TorchDispatchMode):
    """While entered, what is made on or moved to ``cuda`` is a `PretendTensor`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; what hides this from torch's compiler costs a tenth of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")) or PretendTensor in types:
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.host if isinstance(tensor, PretendTensor) else tensor


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an operation, which nests lists and tuples alone."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with ``change`` applied to every tensor in it. Not torch's pytree, which takes three times as long."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, part) for part in value])
    return value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation that takes or makes tensors on the device."""
    if func is aten._to_copy.default:
        return _moved(args[0], kwargs)
    if func is aten.copy_.default:
        return _copied(*args, **kwargs)
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    here = [t for t in tensors if isinstance(t, PretendTensor)]
    elsewhere = [t for t in tensors if not isinstance(t, PretendTensor)]
    _check_devices(func, args, kwargs, here, elsewhere)
    _count(func, args, elsewhere)
    # Views and results in place are the tensors that they were.
    wrapped = {id(t.host): t for t in here}
    inner_args = _mapped(_inner, args)
    inner_kwargs = {name: _mapped(_inner, value) for name, value in kwargs.items()}
    if kwargs.get("device") is not None:
        inner_kwargs["device"] = CPU
    inner_kwargs.pop("pin_memory", None)
    found = SUBSTITUTES.get(func, func)(*inner_args, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags:
        # The shape that the tensor itself says it has changes too.
        with no_dispatch():
            func(*args, **kwargs)
    return _mapped(lambda t: wrapped[id(t)] if id(t) in wrapped else PretendTensor(t), found)


def _moved(source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """``Tensor.to``, with all that goes by other names."""
    from_device = isinstance(source, PretendTensor)
    to_device = from_device if kwargs.get("device") is None else _is_cuda(kwargs["device"])
    if to_device != from_device:
        # What torch itself makes on the host is pinned if it is not to wait for it.
        LEDGER.copy(source, to_device, waits=not kwargs.get("non_blocking"))
    options = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")}
    if options.get("device") is not None:
        options["device"] = CPU
    found = aten._to_copy.default(_inner(source), **options)
    return PretendTensor(found) if to_device else found


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``Tensor.copy_``."""
    to_device = isinstance(target, PretendTensor)
    if to_device != isinstance(source, PretendTensor):
        # CUDA fills memory that is not pinned before it returns, and reads such memory at once.
        LEDGER.copy(source, to_device, waits=not (non_blocking and (to_device or target.is_pinned())))
    aten.copy_.default(_inner(target), _inner(source))
    return target


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any], here: list[Any], elsewhere: list[Any]) -> None:
    """Raise RuntimeError, as CUDA does, where a tensor on the CPU meets one on the device; a single number may."""
    device = kwargs.get("device")
    wrong = [t for t in elsewhere if t.dim() > 0]
    if func in INDEXING and isinstance(args[0], PretendTensor):
        wrong = [t for t in wrong if t.dtype not in INDICES]
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if here and (wrong or (device is not None and not _is_cuda(device))):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def _count(func: Any, args: Any, elsewhere: list[torch.Tensor]) -> None:
    """Count what ``func`` makes the CPU wait for."""
    if func in SYNCHRONISING:
        LEDGER.synchronise(SYNCHRONISING[func])
    if func not in INDEXING:
        return
    for index in elsewhere:
        if index.dim() > 0:
            LEDGER.copy(index, to_device=True, waits=True)
    # A single number written where a mask says so is masked_fill, which does not wait.
    filled = len(args) > 2 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
    if not filled and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        LEDGER.synchronise("mask as index")
