"""Where and in what arithmetic the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def fast_gram_products(device: torch.device) -> Iterator[None]:
    """Let CUDA make fp32 products in TF32 inside; elsewhere, and outside, nothing changes.

    For sums of x x^T over many rows, of which the inputs alone are rounded: to 11 bits, where bfloat16 keeps 8 and
    that changes truncation errors by less than 1e-5 of themselves; on an A100 it is 8 times as fast. Not for products
    of moments, from which small energies are left by cancellation.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
