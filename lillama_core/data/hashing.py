"""Fingerprints of token rows."""

from __future__ import annotations

import hashlib

import torch


def rows_sha256(rows: torch.Tensor) -> str:
    """SHA-256 of integer ``rows`` ``[rows, sequence_length]`` and their shape, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    digest.update(rows.contiguous().cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
