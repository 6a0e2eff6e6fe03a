"""Render conversations by a model's chat template in a process of its own, which is ended when it takes too long.

jinja2's sandbox restricts what a template reaches, not how much it computes: loops within loops have no end, and one
power of large numbers cannot be interrupted. The operating system's limits end both.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from lillama_core.data.documents import Message, UnrenderableChatError, render_chat
from lillama_core.errors import UserError

SECONDS = 2
"""Of processor time for one conversation; a template takes about a millisecond."""
BYTES = 2 << 30
"""Of memory beyond what the process has at its start."""

Render = Callable[[list[Message]], str]


@contextlib.contextmanager
def chat_renderer(tokenizer: Any) -> Iterator[Render]:
    """Give a function that renders conversations as `render_chat` does.

    It raises UserError for a template that takes longer than ``SECONDS`` or more than ``BYTES``. The process is made
    for the first conversation, and only where there is a template.
    """
    worker: list[_Worker] = []

    def render(messages: list[Message]) -> str:
        if not getattr(tokenizer, "chat_template", None) or "fork" not in multiprocessing.get_all_start_methods():
            return render_chat(tokenizer, messages)
        if not worker:
            worker.append(_Worker(tokenizer))
        return worker[0].render(messages)

    try:
        yield render
    finally:
        for one in worker:
            one.end()


class _Worker:
    """A copy of this process that renders what it is sent."""

    def __init__(self, tokenizer: Any) -> None:
        forking = multiprocessing.get_context("fork")
        self._pipe, theirs = forking.Pipe()
        self._process = forking.Process(target=_work, args=(tokenizer, self._pipe, theirs), daemon=True)
        with warnings.catch_warnings():
            # Of the threads that the copy lacks: it uses nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def render(self, messages: list[Message]) -> str:
        try:
            self._pipe.send(messages)
            rendered, text = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(
                f"the chat template takes more than {SECONDS} seconds or {BYTES >> 30} GiB for one conversation;"
                " correct the tokenizer's chat_template, or give data without conversations"
            ) from None
        if not rendered:
            raise UnrenderableChatError(text)
        return str(text)

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _work(tokenizer: Any, ours: Connection, pipe: Connection) -> None:
    """Answer each conversation with whether it was rendered, and the text or the template's complaint."""
    import resource
    import signal

    # Or the end of the process that asks would not be seen here.
    ours.close()
    # Ctrl-C is for the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        import psutil

        _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + BYTES)
    while True:
        try:
            messages = pipe.recv()
        except (EOFError, OSError):
            return
        # The kernel ends the process at this many seconds of processor time, whatever it does.
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS)
        try:
            answer = (True, render_chat(tokenizer, messages))
        except MemoryError:
            return
        except UnrenderableChatError as error:
            if isinstance(error.__cause__, MemoryError):
                return
            answer = (False, str(error))
        pipe.send(answer)


def _limit(which: int, value: int) -> None:
    """Lower a limit of this process, or leave it where it cannot be set so."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
