"""The directory of a run that is not finished: everything needed to go on after a kill.

``DIR.partial`` holds the fingerprint of the run, the profile and one file for each finished block. Every file is
written under another name and renamed, so that what exists is complete. DIR itself appears by rename, complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lillama_core.errors import LillamaError, UserError


class RunDirectory:
    """``DIR.partial`` of one run, locked while it is open."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.blocks = self.path / "blocks"
        self.profile = self.path / "profile"
        self.result = self.path / "result"
        # Beside the directory, so that it can be taken before the directory is touched.
        self._lock = FileLock(str(output.with_name(f".{output.name}.lock")))

    @staticmethod
    def check(output: Path, overwrite: bool, resume: bool) -> None:
        """Raise UserError, touching nothing, when a run may not write to ``output``."""
        partial = output.with_name(output.name + ".partial")
        if overwrite and resume:
            raise UserError("--overwrite and --resume exclude each other")
        if output.is_symlink() or partial.is_symlink():
            raise UserError(f"output {str(output)!r} is a symbolic link; name the directory itself")
        if output.exists() and not output.is_dir():
            raise UserError(f"output {str(output)!r} is a file")
        if output.exists() and resume:
            raise UserError(f"output {str(output)!r} is finished: there is nothing to resume")
        if output.exists() and not overwrite:
            raise UserError(f"output {str(output)!r} exists; pass --overwrite to replace it")
        if output.exists() and any(output.iterdir()) and not (output / "lillama.json").is_file():
            # A slip such as `--output ~ --overwrite` must not cost somebody's files.
            raise UserError(f"output {str(output)!r} holds files that lillama did not write; name another directory")
        if partial.exists() and not (overwrite or resume):
            raise UserError(
                f"an unfinished run is in {str(partial)!r}; pass --resume to go on or --overwrite to start anew"
            )
        parent = output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"output {str(output)!r} cannot be written: {str(parent)!r} is not a writable directory")

    def open(self, fingerprint: dict[str, Any], overwrite: bool, resume: bool) -> None:
        """Take the lock and make or re-enter the directory.

        Raises UserError when another run holds it, or when ``resume`` meets a run that was started otherwise.
        """
        created = self._make_parent()
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another run is writing to {str(self.output)!r}") from None
        except OSError as error:
            if created is not None:
                shutil.rmtree(created, ignore_errors=True)
            raise UserError(f"output {str(self.output)!r} cannot be written: {error.strerror}") from None
        try:
            if overwrite and self.path.exists():
                shutil.rmtree(self.path)
            if self.path.exists():
                self._check_fingerprint(fingerprint)
            self.blocks.mkdir(parents=True, exist_ok=True)
            self.profile.mkdir(exist_ok=True)
            write_json(self.path / "run.json", fingerprint)
        except BaseException:
            self.close()
            raise

    def _make_parent(self) -> Path | None:
        """Make the missing parents of the output; the topmost one made, or None."""
        missing = [p for p in self.output.absolute().parents if not p.exists()]
        try:
            self.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {str(self.output)!r} cannot be written: {error.strerror}") from None
        return missing[-1] if missing else None

    def _check_fingerprint(self, wanted: dict[str, Any]) -> None:
        found = read_json(self.path / "run.json", default={})
        differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if differing:
            details = []
            for key in differing:
                old, new = found.get(key), wanted.get(key)
                if isinstance(old, dict) and isinstance(new, dict):
                    details += [f"{k} ({old.get(k)} -> {new.get(k)})" for k in new if old.get(k) != new.get(k)]
                else:
                    details.append(key)
            raise UserError(
                f"{str(self.path)!r} is from another run; it differs in {', '.join(details)};"
                " repeat that command, or pass --overwrite to start anew"
            )

    def close(self) -> None:
        """Release the lock; what was finished stays."""
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the directory: the run was refused before any of its blocks was done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Make the result appear as the output directory, replacing an old one, and remove the rest."""
        old = self.output.with_name(self.output.name + ".old")
        if self.output.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        self.result.rename(self.output)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise LillamaError(f"{str(path)!r} is damaged ({error}); start anew with --overwrite") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file so that ``path`` is complete whenever it exists."""
    temporary = path.with_name(path.name + ".tmp")
    # Sorted, and without views: equal tensors give equal bytes.
    save_file({k: tensors[k].detach().cpu().contiguous().clone() for k in sorted(tensors)}, str(temporary))
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file of the run; raises LillamaError when it is damaged."""
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise LillamaError(f"{str(path)!r} is damaged ({error}); start anew with --overwrite") from None
