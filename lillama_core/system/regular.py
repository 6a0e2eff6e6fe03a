"""Read regular files alone, and know beforehand what can be written: a pipe is waited for without end."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from lillama_core.errors import UserError

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe, a socket or a device; links are followed, and what is not there passes.

    Opening a pipe waits for somebody who writes to it, and a device may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        # Whoever opens it says why it cannot be read.
        return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise UserError(f"{str(path)!r} is {kind}, not a regular file; save what it gives to a file first")


def check_folder(folder: Path) -> None:
    """Raise UserError where `check_regular` does, for ``folder`` and all in it that libraries may open by its name."""
    check_regular(folder)
    for inside in (folder, folder / "additional_chat_templates"):
        if os.path.isdir(inside):
            for entry in sorted(inside.iterdir()):
                check_regular(entry)


def leads_out(file: Path) -> bool:
    """Whether ``file``, of a model, is a link to what is no part of the model: it must not come along when copied.

    In the Hub's cache a model is a folder of links into the folder ``blobs`` two levels up.
    """
    folder = file.parent.resolve()
    found = file.resolve()
    return not (found.is_relative_to(folder) or found.parent == folder.parent.parent / "blobs")


def check_new_file(path: Path, option: str) -> None:
    """Raise UserError unless a file can be made at ``path``, or replaced there; nothing is left behind.

    ``option`` is what the user named it with.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {str(path)!r} cannot be written: it is no regular file")
    check_writable(path.absolute().parent, f"{option} {str(path)!r} cannot be written")


def check_new_folder(path: Path, option: str) -> None:
    """Raise UserError unless ``path`` is a directory that can be written to, or can become one."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    check_writable(there, f"{option} {str(path)!r} cannot be made")


def check_writable(folder: Path, complaint: str) -> None:
    """Raise UserError that begins with ``complaint`` unless files can be made in ``folder``.

    It is tried: of the kernel's own file systems, permissions say that the superuser may write to them.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "is no directory" if not folder.is_dir() else f"is not writable ({error.strerror or error})"
        raise UserError(f"{complaint}: {str(folder)!r} {why}") from None
