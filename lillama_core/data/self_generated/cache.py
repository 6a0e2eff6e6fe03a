"""Sampled batches on disk, so that a second run need not sample again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lillama_core.data.hashing import rows_sha256

_OVERHEAD_BYTES = 1 << 16


class BatchCache:
    """One folder of batches that were all sampled under the same conditions.

    ``conditions`` must hold everything on which the samples depend. What is read back is checked, and a file
    that is not exactly what was asked for counts as absent: anybody may have put it there.
    """

    def __init__(self, root: Path, conditions: dict[str, Any], shape: tuple[int, int], vocabulary: int) -> None:
        self._conditions = json.dumps(conditions, sort_keys=True)
        self._shape = shape
        self._vocabulary = vocabulary
        self.folder = root / "self" / hashlib.sha256(self._conditions.encode()).hexdigest()[:24]

    def path(self, batch: int) -> Path:
        """The file of batch number ``batch``."""
        return self.folder / f"batch-{batch:05d}.safetensors"

    def load(self, batch: int) -> torch.Tensor | None:
        """The rows of ``batch``, int64 of the cache's shape, or None when there is no valid file."""
        from safetensors import SafetensorError, safe_open

        path = self.path(batch)
        try:
            if path.stat().st_size > self._shape[0] * self._shape[1] * 8 + _OVERHEAD_BYTES:
                return None
            with safe_open(str(path), framework="pt") as stored:
                metadata = stored.metadata() or {}
                rows: torch.Tensor = stored.get_tensor("rows")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            return None
        valid = (
            metadata.get("conditions") == self._conditions
            and metadata.get("batch") == str(batch)
            and rows.dtype == torch.int64
            and tuple(rows.shape) == self._shape
            and metadata.get("sha256") == rows_sha256(rows)
            and int(rows.min()) >= 0
            and int(rows.max()) < self._vocabulary
        )
        return rows if valid else None

    def save(self, batch: int, rows: torch.Tensor) -> None:
        """Store ``rows`` so that a reader sees the whole file or none. Raises OSError."""
        from safetensors.torch import save

        metadata = {"conditions": self._conditions, "batch": str(batch), "sha256": rows_sha256(rows)}
        content = save({"rows": rows.contiguous()}, metadata=metadata)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".batch-", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path(batch))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
