"""The command line's entry: which command to run, and how what it raises ends.

Nothing heavy is imported here: ``lillama --help`` needs neither torch nor a command's own module.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from lillama_core.cli.group import LillamaGroup
from lillama_core.cli.mistakes import one_line_of
from lillama_core.cli.silence import silence
from lillama_core.errors import OUT_OF_MEMORY, LillamaError, UserError, is_out_of_memory
from lillama_core.system.interrupt import noting_interrupts
from lillama_core.system.processes import fails_first

COMPLETION = "_LILLAMA_COMPLETE"
"""The variable by which the script of ``lillama completion`` asks."""


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        import importlib.metadata

        click.echo(f"lillama {importlib.metadata.version('lillama')}")
        context.exit()


@click.group(
    cls=LillamaGroup,
    name="lillama",
    no_args_is_help=False,
    context_settings={"max_content_width": 110},
    help="Make pretrained models smaller: low-rank linear maps, distilled block by block.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="print the version and exit",
)  # fmt: skip
def lillama() -> None:
    """The group of all commands, those of plugins included."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for a user's mistake, 1 for any other failure, or the command's own.

    Where a shell asks by a variable what may follow a word, the answer is printed instead.
    """
    if (asked := os.environ.get(COMPLETION)) is not None:
        # Whatever is half typed, somebody is at it: no message would help.
        with silence(), contextlib.suppress(Exception):
            return shell_complete(lillama, {}, "lillama", COMPLETION, asked)
        return 1
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows no "→" gets a question mark instead of a traceback.
        sys.stdout.reconfigure(errors="replace")
    # The options of the command that was called, once it is known: errors advise only those that there are.
    known: set[str] = set()
    try:
        with noting_interrupts(), contextlib.nullcontext() if debug else silence():
            _check_words(arguments)
            status = _run(list(arguments), known)
            # Now, so that a closed pipe is noticed here.
            sys.stdout.flush()
        return status
    except LillamaError as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        kept = "; what was finished is kept, --resume goes on from there" if "resume" in known else ""
        return _complain(f"interrupted{kept}", 1)
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`): nothing to say, and nobody to say it to. The interpreter would
        # try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            shorter = ", or lower --sequence-length" if "sequence_length" in known else ""
            other = f"out of memory; free some memory{shorter}"
            # Only a compression has all the options that may help.
            return _complain(OUT_OF_MEMORY if {"resume", "recipe"} <= known else other, 1)
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            return _complain(f"{error.strerror or error}{where}", 1)
        # Here, so that help and errors of the user's need no pydantic.
        from lillama_core.strategies import blamed

        where = f"in {found}; " if (found := blamed(error)) else ""
        return _complain(f"{type(error).__name__}: {error} ({where}--debug shows where)", 1)


def _check_words(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is no text: no record could name it, and no terminal show it."""
    for word in arguments:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"argument {word!a} is not UTF-8 text; rename what it names") from None


def _run(arguments: list[str], known: set[str]) -> int:
    """Parse, note the command's parameters in ``known``, and run; click's own errors become UserErrors."""
    try:
        with lillama.make_context("lillama", arguments, obj=known) as context:
            status = lillama.invoke(context)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as mistake:
        raise UserError(one_line_of(mistake)) from None


def _complain(message: str, status: int) -> int:
    if fails_first():
        print(f"lillama: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
