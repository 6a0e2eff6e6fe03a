"""Write files so that one which exists is complete, and read them back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lillama_core.errors import LillamaError
from lillama_core.system.regular import check_regular


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that ``path`` is complete whenever it exists."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path, default: Any = None) -> Any:
    """Read a JSON file of the run; ``default`` when it does not exist."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise LillamaError(f"{str(path)!r} is damaged ({error}); start anew with --overwrite") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of what is in a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every safetensors file of ``folder``, by its name."""
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def apply_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode of a new file: some libraries write for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], durable: bool = True) -> None:
    """Write a safetensors file so that ``path`` is complete whenever it exists.

    One that is not ``durable`` survives this process, but perhaps not a power cut; it costs no wait for the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    # Sorted, and without views: equal tensors give equal bytes.
    save_file({k: tensors[k].detach().cpu().contiguous().clone() for k in sorted(tensors)}, str(temporary))
    if durable:
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.replace(path)


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The ``wanted`` tensors of a safetensors file of the run; raises LillamaError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise LillamaError(f"{str(path)!r} is damaged ({error}); start anew with --overwrite") from None
