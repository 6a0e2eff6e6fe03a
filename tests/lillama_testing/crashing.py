"""Runs that a file operation ends: each that writes can be made to fail, or to be the last that the process does."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

from lillama_core.architecture.base import Architecture
from lillama_core.errors import LillamaError, UserError
from lillama_core.pipeline import Request, compress
from lillama_core.system import files
from lillama_testing.tiny import TinyModel, make_tiny_model

KILLED = 77
"""Exit status of a process that ended at an operation."""
SAME = ("*.safetensors", "config.json", "tokenizer.json")
"""Files of a result that are equal whenever the run was the same; the others hold times."""

Fault = Callable[[str], None]


def no_space(path: str) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def read_only(path: str) -> None:
    """Fail as a file system does that was mounted anew after an error."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def killed(path: str) -> None:
    """End the process, with nothing flushed or undone."""
    os._exit(KILLED)


@contextmanager
def operations(
    folder: Path, at: int | None = None, fault: Fault = no_space, lasting: bool = False
) -> Iterator[list[str]]:
    """While open, note every operation that writes below ``folder``, and let the one numbered ``at`` meet ``fault``.

    ``lasting``: those after it meet it as well. Opening to write, making directories, renaming, linking, waiting for
    the disk, and safetensors' own writing, each by kind and path.
    """
    seen: list[str] = []
    root = str(folder.resolve()) + os.sep

    def met(kind: str, path: object) -> None:
        name = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if not name.startswith(root) and kind != "fsync":
            return
        seen.append(f"{kind} {name.removeprefix(root)}")
        if at is not None and (len(seen) - 1 == at or (lasting and len(seen) > at)):
            fault(name)

    def noting(kind: str, function: Callable[..., Any], which: int = 0) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            met(kind, args[which] if which < len(args) else kwargs.get("filename"))
            return function(*args, **kwargs)

        return run

    def opening(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(mode, str) and set(mode) & set("wax+"):
                met("open", file)
            return function(file, mode, *args, **kwargs)

        return run

    def opening_low(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            met("open", file)
        return low(file, flags, *args, **kwargs)

    low = os.open
    with ExitStack() as patched:
        for owner, name in ((builtins, "open"), (io, "open")):
            patched.enter_context(mock.patch.object(owner, name, opening(getattr(owner, name))))
        patched.enter_context(mock.patch.object(os, "open", opening_low))
        for name, which in (("mkdir", 0), ("rename", 1), ("replace", 1), ("link", 1), ("fsync", 0)):
            patched.enter_context(mock.patch.object(os, name, noting(name, getattr(os, name), which)))
        for module in (files, safetensors.torch):
            patched.enter_context(mock.patch.object(module, "save_file", noting("save", module.save_file, 1)))
        yield seen


@dataclass(frozen=True)
class Trial:
    """A small run of one architecture, and what it gives undisturbed."""

    tiny: TinyModel
    folder: Path

    @classmethod
    def of(cls, architecture: Architecture, model_type: str, folder: Path) -> Trial:
        """Make the model and run once undisturbed."""
        trial = cls(make_tiny_model(architecture, model_type, folder / "model"), folder)
        trial.run("expected")
        return trial

    def run(self, name: str, resume: bool = False) -> None:
        request = Request(
            str(self.tiny.folder), self.folder / name / "out", self.tiny.recipe(steps=1), resume=resume,
            architecture=self.tiny.architecture,
        )  # fmt: skip
        compress(request, "quiet")

    def result(self, name: str) -> dict[str, bytes]:
        output = self.folder / name / "out"
        return {p.name: p.read_bytes() for pattern in SAME for p in sorted(output.glob(pattern))}

    def count(self) -> list[str]:
        """The operations of a run."""
        with operations(self.folder / "counted") as seen:
            self.run("counted")
        return seen

    def disturbed(self, at: int, fault: Fault, lasting: bool = False) -> str | None:
        """Run with a fault at an operation, and go on; what was wrong, or None."""
        name = f"{at}-{fault.__name__}"
        here = self.folder / name
        here.mkdir()
        (here / "kept").write_text("years of work")
        said = self._killed(name, at) if fault is killed else self._failed(name, at, fault, lasting)
        if said is not None:
            return said
        if (here / "out").exists() and self.result(name) != self.result("expected"):
            return "a directory appeared that is not the result"
        try:
            if not (here / "out").exists():
                self.run(name, resume=(here / "out.partial").exists())
        except LillamaError as error:
            return f"going on was refused: {error}"
        if self.result(name) != self.result("expected"):
            return "the bytes are not those of the undisturbed run"
        left = {p.name for p in here.iterdir()} - {"out", "kept", ".out.lock", "out.partial"}
        if left or (here / "kept").read_text() != "years of work":
            return f"{sorted(left)} are left, or what was there before is not"
        return None

    def _failed(self, name: str, at: int, fault: Fault, lasting: bool) -> str | None:
        try:
            with operations(self.folder / name, at, fault, lasting):
                self.run(name)
        except (LillamaError, UserError) as error:
            return f"the message has several lines: {error}" if "\n" in str(error) else None
        except Exception as error:
            return f"{type(error).__name__} came out: {error}"
        # Not every operation is needed: a link becomes a copy.
        return None if (self.folder / name / "out").exists() else "nothing was said"

    def _killed(self, name: str, at: int) -> str | None:
        child = os.fork()
        if child == 0:
            try:
                with operations(self.folder / name, at, killed):
                    self.run(name)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return None if status in (0, KILLED) else f"the process ended with status {status}"
