"""Progress for people: a live bar on a terminal or in a notebook, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from lillama_core.errors import UserError
from lillama_core.system.interrupt import raise_if_interrupted
from lillama_core.system.tracking import Tracker

Verbosity = Literal["quiet", "normal", "verbose"]


def _notebook_display() -> Any:
    """The function that shows an object below the cell of a notebook; None where this process is not a notebook's."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # A shell on a terminal has no kernel: it gets what a terminal gets.
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display


class _NotebookBar:
    """Of rich's progress bar what `Progress` uses, below the cell: rich's own needs ipywidgets there."""

    INTERVAL = 0.2
    """Seconds between two pictures: each is a message to the browser, and stays in some until the cell is run again."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None
        self._shown = self._begun = 0.0
        self._text, self._note = "", ""
        self._done, self._total = 0, 0

    def start(self) -> None:
        self._handle = self._display({"text/plain": ""}, raw=True, display_id=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def add_task(self, name: str, total: int | None, note: str) -> int:
        self._text, self._note, self._done, self._total = name, note, 0, total or 0
        self._begun = time.monotonic()
        self._show()
        return 0

    def remove_task(self, task: int) -> None:
        self._text = ""

    def update(self, task: int, *, advance: int = 0, note: str | None = None, description: str | None = None) -> None:
        self._done += advance
        self._note = self._note if note is None else note
        self._text = self._text if description is None else description
        if time.monotonic() - self._shown >= self.INTERVAL or self._done == self._total:
            self._show()

    def _show(self) -> None:
        if self._handle is None:
            return
        self._shown = time.monotonic()
        spent = self._shown - self._begun
        left = spent / self._done * (self._total - self._done) if self._done else 0.0
        clock = f"{self._done}/{self._total}  {self._note}  elapsed {spent:.0f} s, remaining {left:.0f} s"
        plain = f"{self._text}  {clock}" if self._total else self._text
        bar = f'<progress value="{self._done}" max="{self._total}"></progress> ' if self._total else ""
        picture = f"{html.escape(self._text)} {bar}{html.escape(clock if self._total else '')}"
        self._handle.update({"text/plain": plain, "text/html": picture}, raw=True)


class Progress:
    """Reports long work on stderr, so that stdout stays free for results.

    Use as a context manager. ``phase`` opens a stage of known length, ``step`` advances it, ``line`` says
    something that stays on the screen, and ``detail`` the same when the user asked for more.

    What is said before the first ``phase`` or ``release`` is held back: should the request turn out to be mistaken,
    the error is the only thing on stderr. (A terminal shows it in passing.)
    """

    def __init__(self, verbosity: Verbosity = "normal") -> None:
        self.verbosity = verbosity
        self.tracker: Tracker | None = None
        """Gets the numbers of `measured`, too; ended with this."""
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._total = 0
        self._done = 0
        self._phase_started = self._started
        self._last_line = 0.0
        self._held: list[str] | None = []
        notebook = None if verbosity == "quiet" else _notebook_display()
        if notebook is not None:
            self._bar = _NotebookBar(notebook)
        elif verbosity != "quiet" and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            class _TerminalBar(Bar):
                def say(self, text: str) -> None:
                    self.console.print(text, highlight=False, markup=False)

            self._bar = _TerminalBar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, UserError):
            self.release()
        if self._bar is not None:
            self._bar.stop()
        if self.tracker is not None:
            self.tracker.finish()

    def release(self) -> None:
        """Say what was held back, and hold back no more: the request has passed all checks."""
        held, self._held = self._held, None
        for text in held or ():
            self._print(text)

    def phase(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        self._name, self._total, self._done = name, total, 0
        self._phase_started = self._last_line = time.monotonic()
        self.release()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, note="")
        elif self.verbosity != "quiet":
            self._print(f"{name} …")

    def step(self, note: str = "", advance: int = 1) -> None:
        """Advance the stage; ``note`` says where it stands (a block's name, a loss)."""
        raise_if_interrupted()
        self._done += advance
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=advance, note=note)
            return
        now = time.monotonic()
        # A log wants a line now and then, not one for each batch.
        if self.verbosity != "quiet" and (now - self._last_line >= 10 or self._done == self._total):
            self._last_line = now
            spent = now - self._phase_started
            left = spent / self._done * (self._total - self._done) if self._done else 0.0
            self._print(
                f"{self._name} {self._done}/{self._total}{'  ' + note if note else ''}"
                f"  elapsed {spent:.0f} s, remaining {left:.0f} s"
            )

    def track(self, name: str | None, run: str, settings: Mapping[str, Any]) -> None:
        """From here on send numbers to the tracker ``name``, if any; raises UserError where it refuses."""
        if name is not None:
            self.tracker = Tracker(name, run, settings, self.line)

    def measured(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of the run, by name: for a tracker, where there is one."""
        if self.tracker is not None:
            self.tracker.log(values, step)

    def line(self, text: str) -> None:
        """Say something that stays."""
        raise_if_interrupted()
        if self.verbosity != "quiet":
            self._print(text)

    def detail(self, text: str) -> None:
        """Say something that only ``--verbose`` shows."""
        if self.verbosity == "verbose":
            self._print(text)

    def _print(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
            if self._bar is not None and self._task is None:
                self._task = self._bar.add_task(text, total=None, note="")
            elif self._bar is not None:
                self._bar.update(self._task, description=text)
        elif self._bar is not None:
            self._bar.say(text)
        else:
            print(text, file=sys.stderr, flush=True)
