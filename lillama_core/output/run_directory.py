"""The directory of a run that is not finished: everything needed to go on after a kill.

``DIR.partial`` holds the fingerprint of the run, the decompositions and one file for each finished block. Every file is
written under another name and renamed, so that what exists is complete. DIR itself appears by rename, complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lillama_core.errors import LillamaError, UserError
from lillama_core.system.files import read_json, write_json
from lillama_core.system.regular import check_writable

OWN_ENTRIES = frozenset(
    name + end
    for name in (
        "run.json",
        "blocks",
        "profile",
        "states",
        "gradients",
        "healing",
        "result",
        "replaced",
        "probe.safetensors",
        "shell.safetensors",
    )
    for end in ("", ".tmp")
)
"""All that a run puts right into ``DIR.partial``; anything else is somebody's, and is never removed."""


class RunDirectory:
    """``DIR.partial`` of one run, and the lock that makes it one."""

    def __init__(self, output: Path, resumes: bool = True) -> None:
        """``resumes``: whether a run can go on with what another has left, as messages then advise."""
        self.resumes = resumes
        self.output = normal_path(output)
        self.path = self.output.with_name(self.output.name + ".partial")
        self.blocks = self.path / "blocks"
        self.store = self.path / "profile"
        self.states = self.path / "states"
        self.gradients = self.path / "gradients"
        self.healing = self.path / "healing"
        self.result = self.path / "result"
        self.replaced = self.path / "replaced"
        self.made = False
        """Whether this run has made the directory: all that is in it is its own."""
        # Beside the directory, so that it can be taken before the directory is touched.
        self._lock = FileLock(str(self.output.with_name(f".{self.output.name}.lock")))

    def check(self, overwrite: bool, resume: bool, earlier: Path | None = None) -> None:
        """Raise UserError, touching nothing, when a run may not write to the output.

        ``earlier`` is the output of a step before: what its unfinished run was to replace, the last step replaces.
        """
        if overwrite and resume:
            raise UserError("--overwrite and --resume exclude each other")
        try:
            self._check_output(overwrite, resume, earlier)
            self._check_partial(overwrite, resume)
        except OSError as error:
            raise self._unwritable(error) from None

    def _check_output(self, overwrite: bool, resume: bool, earlier: Path | None) -> None:
        output, shown = self.output, repr(str(self.output))
        if output.is_symlink() or self.path.is_symlink():
            raise UserError(f"output {shown} is a symbolic link; name the directory itself")
        if output.exists():
            if not output.is_dir():
                raise UserError(f"output {shown} is a file")
            # A run that was to replace the output goes on to do so.
            steps = [self] if earlier is None else [self, RunDirectory(earlier)]
            to_replace = not overwrite and any(step._started().get("overwrite") is True for step in steps)
            replacing = overwrite or (resume and to_replace)
            if resume and not replacing:
                raise UserError(f"output {shown} is finished: there is nothing to resume")
            if not replacing:
                resumable = ", or --resume to go on with the run that was to" if self.resumes and to_replace else ""
                raise UserError(f"output {shown} exists; pass --overwrite to replace it{resumable}")
            if any(output.iterdir()) and not (output / "lillama.json").is_file():
                # A slip such as `--output ~ --overwrite` must not cost somebody's files.
                raise UserError(f"output {shown} holds files that lillama did not write; name another directory")
        parent = output.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        check_writable(parent, f"output {shown} cannot be written")

    def _check_partial(self, overwrite: bool, resume: bool) -> None:
        if not self.path.exists():
            return
        partial = repr(str(self.path))
        if not self.path.is_dir():
            raise UserError(f"{partial}, where the unfinished run would be, is a file")
        # File managers and network file systems leave theirs wherever somebody looks.
        left = {e.name for e in self.path.iterdir() if not e.name.startswith((".DS_Store", "Thumbs.db", ".nfs"))}
        if unknown := sorted(left - OWN_ENTRIES):
            raise UserError(
                f"{partial}, where the unfinished run would be, holds {unknown[0]!r}, which lillama did not write"
            )
        if not (overwrite or resume):
            if self._is_locked():
                raise self._busy()
            ways = "--resume to go on or --overwrite" if self.resumes else "--overwrite"
            raise UserError(f"an unfinished run is in {partial}; pass {ways} to start anew")

    def _is_locked(self) -> bool:
        """Whether another run holds the lock; leaves no lock file that was not there."""
        if not Path(self._lock.lock_file).exists():
            return False
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return True
        self._lock.release()
        return False

    def _busy(self) -> UserError:
        return UserError(f"another run is writing to {str(self.output)!r}")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"output {str(self.output)!r} cannot be written: {error.strerror or error}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; raises UserError when another run does. Missing parents are made, and unmade if unused."""
        missing = [p for p in self.output.parents if not p.exists()]
        lock = Path(self._lock.lock_file)
        try:
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
            except Timeout:
                raise self._busy() from None
            except OSError as error:
                raise self._unwritable(error) from None
            try:
                yield
            finally:
                # Removed while it is held: whoever opened it meanwhile notices that the file is gone.
                lock.unlink(missing_ok=True)
                self._lock.release()
        finally:
            for parent in missing:
                try:
                    parent.rmdir()
                except OSError:
                    break

    def _started(self) -> dict[str, Any]:
        """What the unfinished run wrote down at its start; empty when there is none."""
        try:
            found = read_json(self.path / "run.json", default={})
        except LillamaError as error:
            raise UserError(str(error)) from None
        return found if isinstance(found, dict) else {}

    def check_fingerprint(self, known: dict[str, Any]) -> None:
        """Raise UserError when the unfinished run differs from this one in what is ``known`` so far."""
        details = differences(self._started(), known)
        if details:
            raise UserError(
                f"{str(self.path)!r} is from another run; it differs in {', '.join(details)};"
                " repeat that command, or pass --overwrite to start anew"
            )

    def open(self, fingerprint: dict[str, Any], overwrite: bool) -> None:
        """Make the directory or re-enter it; the lock is held. Raises UserError for a run that was started otherwise.

        What an earlier run left is removed only here, after all checks.
        """
        # Without the note of its start nobody knows what the rest belongs to. So it goes last.
        if self.path.exists() and (overwrite or not (self.path / "run.json").is_file()):
            for part in (self.blocks, self.store, self.states, self.gradients, self.healing, self.result):
                shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(self.path)
        self.check_fingerprint(fingerprint)
        overwrite = overwrite or self._started().get("overwrite") is True
        self.made = not self.path.exists()
        shutil.rmtree(self.result, ignore_errors=True)
        self.blocks.mkdir(parents=True, exist_ok=True)
        for folder in (self.store, self.states, self.gradients, self.healing):
            folder.mkdir(exist_ok=True)
        write_json(self.path / "run.json", {**fingerprint, "overwrite": overwrite})

    @property
    def is_mere_beginning(self) -> bool:
        """Whether this run has made the directory, and no block is done.

        Statistics alone are of no use to a request that had to be changed: they are of other options. Those of an
        earlier run, which this one resumed, are not its own to remove.
        """
        return self.made and not any(self.blocks.glob("*.safetensors"))

    def discard(self) -> None:
        """Remove the directory: the run was refused at its beginning, or what it was to give has been published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Make the result appear as the output directory, replacing an old one, and remove the rest.

        Raises LillamaError when something is there that the user did not ask to replace.
        """
        if os.path.lexists(self.output):
            ours = (self.output / "lillama.json").is_file() or (self.output.is_dir() and not any(self.output.iterdir()))
            if not (ours and self._started().get("overwrite") is True):
                then = "--resume finishes" if self.resumes else "repeat the command"
                raise LillamaError(f"{str(self.output)!r} has appeared since this run began; move it away, and {then}")
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.output.rename(self.replaced)
        self.result.rename(self.output)
        shutil.rmtree(self.path, ignore_errors=True)


def differences(found: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """What of ``known`` two fingerprints of runs differ in, each in a few words; nothing if in nothing."""
    details: list[str] = []
    for key in sorted(k for k in known if k in found and found[k] != known[k]):
        old, new = found[key], known[key]
        if isinstance(old, dict) and isinstance(new, dict):
            parts = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            details += [f"{part} ({old.get(part)} -> {new.get(part)})" for part in parts]
        elif len(str(old)) == len(str(new)) == 64:
            # Hashes say nothing to anybody.
            details.append(f"the {key}")
        else:
            details.append(f"{key} ({old} -> {new})")
    return details


def normal_path(output: Path) -> Path:
    """``output`` as an absolute path with a name of its own; raises UserError for the root of a file system."""
    try:
        str(output).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"output {str(output)!a} is not UTF-8 text; choose another name") from None
    found = Path(os.path.abspath(output))
    if not found.name:
        raise UserError(f"output {str(output)!r} is not the name of a directory to make")
    return found
