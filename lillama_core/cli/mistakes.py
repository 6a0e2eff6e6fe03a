"""What click finds wrong with a command, in the one line that every error of lillama has."""

from __future__ import annotations

import re

import click

from lillama_core.errors import nearest


def one_line_of(mistake: click.ClickException) -> str:
    """The message of ``mistake``, with the nearest known name for a misspelt one and the help to read."""
    context = getattr(mistake, "ctx", None)
    text = _message(mistake, context)
    return text if context is None else f"{text} (see '{context.command_path} --help')"


def _message(mistake: click.ClickException, context: click.Context | None) -> str:
    if isinstance(mistake, click.NoSuchOption):
        return f"unknown option {mistake.option_name!r}{nearest(mistake.option_name, option_names(context))}"
    if isinstance(mistake, click.MissingParameter):
        return f"required: {_names(mistake)}"
    if isinstance(mistake, click.BadOptionUsage):
        return f"option {mistake.option_name} needs a value" if "requires" in mistake.message else _plain(mistake)
    if isinstance(mistake, click.BadParameter):
        where = _names(mistake)
        return f"{where}: {_plain(mistake)}" if where else _plain(mistake)
    if mistake.message == "Missing command.":
        return "required: COMMAND"
    if extra := re.match(r"Got unexpected extra arguments? \((\S+).*\)", mistake.message):
        return f"unknown argument {extra[1]!r}"
    return _plain(mistake)


def option_names(context: click.Context | None) -> list[str]:
    """All options of the command of ``context``."""
    if context is None:
        return []
    return [name for p in context.command.get_params(context) for name in (*p.opts, *p.secondary_opts)]


def _names(mistake: click.BadParameter) -> str:
    parameter = mistake.param
    if isinstance(parameter, click.Option):
        return "/".join(parameter.opts)
    return parameter.make_metavar(mistake.ctx) if parameter is not None and mistake.ctx is not None else ""


def _plain(mistake: click.ClickException) -> str:
    text = " ".join(mistake.message.split()).rstrip(".")
    return text[:1].lower() + text[1:]
