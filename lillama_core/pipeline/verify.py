"""``lillama verify``: is a compressed directory what was written, and can a model be run with it?

The directory is looked at block by block, so that no more than one is in memory. Nothing in it is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lillama_core.architecture.find import find_architecture
from lillama_core.errors import LillamaError, UserError, one_line
from lillama_core.models.loading import load_config
from lillama_core.models.source import locate, weight_files
from lillama_core.output.shards import compressed_reader
from lillama_core.output.soundness import check_finite, check_orders
from lillama_core.system.files import sha256_of
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class Verified:
    """What was found sound."""

    files: int
    """Weight files."""
    hashed: int
    """Weight files whose SHA-256 is the one in the record; a record of an earlier version has none."""
    blocks: int
    tensors: int


def verify(
    model: str, architecture: str | None = None, trust_remote_code: bool = False, quiet: bool = False
) -> Verified:
    """Check the config, the weights and the record of the compressed directory ``model``.

    Every weight that the config promises is there, in its shape, and finite; orders of features are orders; and the
    weight files have the hashes that lillama.json tells. Raises UserError when ``model`` is no compressed directory,
    and LillamaError that names what is wrong with it.
    """
    with Progress("quiet" if quiet else "normal") as progress:
        return _verify(model, architecture, trust_remote_code, progress)


def _verify(model: str, architecture: str | None, trust_remote_code: bool, progress: Progress) -> Verified:
    source = locate(model, trust_remote_code)
    if not source.is_local or source.gguf_file is not None:
        raise UserError(f"{model!r} is no directory that lillama has written")
    config = load_config(source, allow_compressed=True)
    # Of another method it would have been refused.
    if getattr(config, "quantization_config", None) is None:
        raise UserError(f"model {model!r} is not compressed by lillama: there is nothing to verify")
    hashed = _check_hashes(Path(source.location), progress)
    files = set(weight_files(source).values())
    reader, _ = compressed_reader(source, config, find_architecture(config, architecture, trust_remote_code))
    for fault, those in (("lacks", reader.missing), ("has, and should not have,", reader.unexpected)):
        if those:
            raise LillamaError(f"model {model!r} {fault} {len(those)} of its weights, such as {those[0]}")
    # Shapes are compared with the config's as weights are read.
    reader.load_shell()
    tensors = _check(reader.model, "")
    progress.phase("Verifying", len(reader.paths))
    for path in reader.paths:
        tensors += _check(reader.block(path), path)
        progress.step(path)
    return Verified(len(files), hashed, len(reader.paths), tensors)


def _check(module: nn.Module, path: str) -> int:
    """Raise LillamaError for what is wrong with the weights of ``module``, and return how many there are."""
    check_orders(module, path)
    check_finite(module, path)
    return sum(not tensor.is_meta for tensor in module.state_dict().values())


def _check_hashes(folder: Path, progress: Progress) -> int:
    """Raise LillamaError for a weight file that is not the one of the record, and return how many were compared."""
    record = folder / "lillama.json"
    try:
        # Not as the record of a compression: a dense model in few bits has another.
        said = json.loads(record.read_text(encoding="utf-8"))
        recorded = said.get("sha256", {})
        if not isinstance(recorded, dict):
            raise ValueError("sha256 is no mapping of file to hash")
    except FileNotFoundError:
        # Saved by transformers, not by lillama.
        recorded = {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(record)!r} cannot be read: {one_line(error)}") from None
    present = {file.name: file for file in folder.glob("*.safetensors")}
    if recorded and set(recorded) != set(present):
        odd = min(set(recorded) ^ set(present))
        there = "is not in the record" if odd in present else "is gone"
        raise LillamaError(f"weight file {odd!r} {there}")
    for name, file in sorted(present.items()):
        if recorded:
            progress.line(f"Hashing {name}")
            if sha256_of(file) != recorded[name]:
                raise LillamaError(f"{name!r} is not what was written: its SHA-256 is another than in lillama.json")
    return len(present) if recorded else 0
