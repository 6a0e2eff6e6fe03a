"""``--push``: the directory that a command makes, on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lillama_core.cli.options import option
from lillama_core.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


def push_options(function: F) -> F:
    """``--push`` and ``--private``."""
    for decorate in (
        option("--private", is_flag=True, group="output", help="make the repository of --push private, if it is new"),
        option(
            "--push",
            metavar="REPO",
            group="output",
            help="upload DIR to this repository of the Hugging Face Hub at the end, such as me/smaller",
        ),
    ):
        function = decorate(function)
    return function


@contextlib.contextmanager
def pushing(options: Mapping[str, Any]) -> Iterator[None]:
    """Before the work find out whether its result can be pushed, and push it when it is done."""
    repository = options["push"]
    if repository is None:
        if options["private"]:
            raise UserError("--private does nothing without --push, the repository that it is about")
        yield
        return
    from lillama_core.output.push import check_push, push

    check_push(repository)
    yield
    if options.get("dry_run"):
        return
    from lillama_core.system.processes import world_of_environment

    # Of several processes one has written the result.
    if world_of_environment().is_main:
        if not options["quiet"]:
            print(f"Pushing {options['output']} to {repository}", file=sys.stderr, flush=True)
        print(f"pushed      {push(Path(options['output']), repository, options['private'])}")
