"""The part of ``torch.cuda`` that is asked about the device, answered for the pretend one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from pretend_cuda.device import LEDGER, PretendMode

TOTAL_BYTES = 80 * 10**9
CAPABILITY = (8, 0)
"""Of an A100: bfloat16 is fast, as on most cards in use."""


class Stream:
    """A stream that is always idle: operations end when they are called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments are those of ``torch.cuda.Stream`` and change nothing."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        LEDGER.synchronise("synchronize")


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments are those of ``torch.cuda.Event`` and change nothing."""

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        LEDGER.synchronise("synchronize")


def constant(value: Any) -> Callable[..., Any]:
    """Return a function that takes anything and gives ``value``."""
    return lambda *args, **kwargs: value


ANSWERS: dict[str, Any] = {
    "_lazy_init": constant(None),
    "is_available": constant(True),
    "is_bf16_supported": constant(True),
    "is_current_stream_capturing": constant(False),
    "current_device": constant(0),
    "device_count": constant(1),
    "get_device_capability": constant(CAPABILITY),
    "get_device_name": constant("pretend device"),
    "get_device_properties": constant(
        SimpleNamespace(name="pretend device", major=8, minor=0, total_memory=TOTAL_BYTES, multi_processor_count=108)
    ),
    "mem_get_info": lambda *device: (TOTAL_BYTES - LEDGER.live, TOTAL_BYTES),
    "memory_allocated": lambda *device: LEDGER.live,
    "max_memory_allocated": lambda *device: LEDGER.peak,
    "reset_peak_memory_stats": constant(None),
    # What is drawn on the device is drawn by the CPU's generator.
    "get_rng_state": lambda *device: torch.get_rng_state(),
    "set_rng_state": constant(None),
    "synchronize": lambda *device: LEDGER.synchronise("synchronize"),
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda *device: Stream(),
    "default_stream": lambda *device: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
}


@contextlib.contextmanager
def pretend_device() -> Iterator[None]:
    """While open there is a device ``cuda:0``. For a process of its own, in which the guard was loaded before torch."""
    torch._C._ensureCUDADeviceGuardSet()
    # Else a module's parameters keep the object that they are, and only change what it refers to.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(PretendMode())
        # ``torch.tensor(…, device="cuda")`` then moves what it made where the mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield
