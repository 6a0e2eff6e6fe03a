"""Where and in what arithmetic the work is done."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lillama_core.errors import UserError


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }.get(device.type)
    if available is None:
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    if not available:
        raise UserError(f"device {name!r} is not available on this machine")
    return device


def exact_device(where: torch.device | torch.Tensor) -> torch.device:
    """Return the device on which to compute in fp64 what is on ``where``: CUDA as it is, else the CPU.

    Not every accelerator has fp64, Apple's MPS for one.
    """
    device = where.device if isinstance(where, torch.Tensor) else where
    return device if device.type == "cuda" else torch.device("cpu")


def choose_autocast(compute: str, device: torch.device) -> torch.dtype | None:
    """Half precision for matrix products, or None for fp32 throughout."""
    if compute == "float32":
        return None
    return torch.bfloat16 if compute == "bfloat16" or has_fast_bfloat16(device) else None


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are done in hardware; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


@functools.cache
def has_fast_bfloat16_cpu() -> bool:
    """`has_fast_bfloat16` of the CPU, looked up once."""
    return has_fast_bfloat16(torch.device("cpu"))


@contextmanager
def fast_gram_products(device: torch.device, bfloat16: bool = False) -> Iterator[None]:
    """Let fp32 products round their inputs inside: CUDA to 11 bits (TF32), a CPU to 8 if ``bfloat16`` and it can.

    For sums of x x^T over many rows, which stay in fp32. TF32 changes truncation errors by less than 1e-5 of
    themselves, and is 8 times as fast on an A100. Rows that hold bfloat16 values lose nothing at all by 8 bits: on a
    CPU with AMX such products are 2.7 to 3.7 times as fast, and their error no larger. Not for products of moments,
    from which small energies are left by cancellation. Elsewhere, and outside, nothing changes.
    """
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu" or not bfloat16 or not hasattr(matmul, "fp32_precision") or not has_fast_bfloat16_cpu():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
