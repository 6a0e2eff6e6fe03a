"""Options that several commands share, and those of the recipe, made from its fields."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from lillama_core.cli.values import offered
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.model import COMMAND_LINE, SHORT, SLOTS, STAGES, Recipe, dashed
from lillama_core.strategies import names
from lillama_core.strategies.options import StrategyOptions
from lillama_core.strategies.validation import choices_of, kind_of

MODEL = "MODEL is a hub id, a local directory, or a .gguf file."

F = TypeVar("F", bound=Callable[..., Any])

DOTTED = re.compile(rf"--(({'|'.join(SLOTS)})|{STAGES}\.[\w-]+)\.([\w-]+)")
"""An option of a chosen strategy: ``--init.input-damping``."""
OF_STRATEGIES = "strategy_options"
RECIPE = "recipe__"
"""Prefix of the parameters that are fields of the recipe."""


class GroupedOption(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        self.group = group
        if not isinstance(kwargs.get("type"), click.Choice):
            kwargs.setdefault("shell_complete", offered)
        super().__init__(*args, **kwargs)


class LillamaCommand(click.Command):
    """A command whose options stand under headings, and never take another option for their value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            # A shell asks what may follow.
            return super().parse_args(ctx, args)
        taking = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
        for word, following in itertools.pairwise(args):
            if word == "--":
                break
            if word in taking and following.startswith("--") and len(following) > 2:
                raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            # Arguments are explained in the text above.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        # Options without a heading, --help among them, come last.
        for group in sorted(groups, key=lambda name: name == ""):
            with formatter.section(group.capitalize() or "Other options"):
                formatter.write_dl(groups[group])


class RecipeCommand(LillamaCommand):
    """A command that takes a recipe: the options of the strategies are taken out before click sees the others."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest, dotted = [], {}
        words = iter(args)
        for word in words:
            if word == "--":
                rest += [word, *words]
                break
            name, equals, value = word.partition("=")
            if not DOTTED.fullmatch(name):
                rest.append(word)
                continue
            if not equals:
                value = next(words, "--")
                if value.startswith("--") and not ctx.resilient_parsing:
                    raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.", ctx)
            dotted[name.removeprefix("--")] = value
        left = super().parse_args(ctx, rest)
        ctx.params[OF_STRATEGIES] = dotted
        return left


def option(*names: str, group: str = "", **settings: Any) -> Callable[[F], F]:
    """``click.option`` under a heading."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def model_options(function: F) -> F:
    """MODEL, ``--architecture`` and ``--trust-remote-code``."""
    for decorate in (
        option(
            "--trust-remote-code", is_flag=True, group="model", help="run code that the model brings (off by default)"
        ),
        option(
            "--architecture",
            metavar="NAME",
            group="model",
            help="use this architecture instead of the one found by model type; 'auto' finds the blocks in the model",
        ),
        click.argument("model", metavar="MODEL", shell_complete=offered),
    ):
        function = decorate(function)
    return function


def track_option(function: F) -> F:
    """``--track``."""
    return option(
        "--track",
        metavar="NAME",
        group="output",
        help="send losses as they come to a tracker that accelerate knows: tensorboard, wandb, trackio, mlflow …",
    )(function)


def tokenizer_option(function: F) -> F:
    return option("--tokenizer", metavar="SRC", group="model", help="tokenizer, if the model does not bring one")(
        function
    )


def device_option(function: F) -> F:
    return option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)")(
        function
    )


def residency_options(function: F) -> F:
    """``--stream``, ``--no-stream`` and ``--max-memory``."""
    for decorate in (
        option(
            "--max-memory",
            metavar="SIZE",
            group="memory",
            help="memory of the host that the run may take, such as 3GB or 3GiB (default: what is available)",
        ),
        option(
            "--stream/--no-stream",
            default=None,
            group="memory",
            help="read the model's blocks from disk one at a time, or hold the model in memory (default: as it fits)",
        ),
    ):
        function = decorate(function)
    return function


def debug_option(function: F) -> F:
    """``--debug``, which `main` looks for itself."""
    return option("--debug", is_flag=True, expose_value=False, help="show tracebacks")(function)


def exclusive(context: click.Context, first: str, second: str) -> None:
    """Raise a usage error when both of two options are given."""
    if context.params.get(first.replace("-", "_")) and context.params.get(second.replace("-", "_")):
        raise click.UsageError(f"--{second} is not allowed with --{first}", context)


def recipe_options(function: F) -> F:
    """``--recipe``, an option for every field of the recipe, and the short names of strategies' options."""
    decorators = [
        option(
            "--recipe",
            default="default",
            metavar="NAME|FILE.yaml",
            group="recipe",
            help="a named recipe, or a file; each option below overrides it, and a YAML file takes the same names",
        )
    ]
    for name, field in Recipe.model_fields.items():
        if name not in ("name", STAGES):
            decorators.append(_field_option(name, field, field.default))
    for name, (slot, own) in SHORT.items():
        decorators.append(
            option(
                dashed(name),
                f"{RECIPE}{name}",
                metavar="N",
                group="ranks",
                help=f"the same as --{slot}.{dashed(own)[2:]}",
            )
        )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def data_options(names: Sequence[str], defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """The options of some fields of the recipe, for a command that has no recipe, with ``defaults`` of its own."""

    def decorate(function: F) -> F:
        for name in reversed(names):
            field = Recipe.model_fields[name]
            function = _field_option(name, field, defaults.get(name, field.default))(function)
        return function

    return decorate


def choice_options(model: type[StrategyOptions], group: str) -> Callable[[F], F]:
    """An option for every field of ``model``; its value stays text, or is None where the user said nothing."""

    def decorate(function: F) -> F:
        for name, field in reversed(model.model_fields.items()):
            metavar = "|".join(choices_of(model, name)) or {int: "N", float: "X"}[kind_of(model, name)]
            text = f"{field.description} (default: {field.default})"
            function = option(dashed(name), name, metavar=metavar, group=group, default=None, help=text)(function)
        return function

    return decorate


def _field_option(name: str, field: Any, default: Any) -> Callable[[F], F]:
    """The option of one field; its value stays text, which the recipe reads."""
    shown = "" if default in (None, ()) else f" (default: {default})"
    group = field.json_schema_extra["group"]
    settings: dict[str, Any] = {"help": f"{field.description}{shown}", "default": None, "group": group}
    kind = kind_of(Recipe, name)
    if kind is bool:
        return option(f"{dashed(name)}/{dashed('no_' + name)}", f"{RECIPE}{name}", **settings)
    if kind is tuple:
        settings |= {"multiple": True, "metavar": "SRC" if name == "calibration" else "NAME"}
    elif name in SLOTS:
        settings["metavar"] = "NAME"
        # The field's own words say what lillama brings.
        others = [other for other in names(SLOTS[name]) if other not in field.description.replace(",", " ").split()]
        settings["help"] += f"; of plugins: {', '.join(others)}" if others else ""
        settings["help"] += f"; its own options as --{name}.OPTION VALUE, see 'lillama strategies'"
    else:
        settings["metavar"] = "|".join(choices_of(Recipe, name)) or {int: "N", float: "X", str: "NAME"}[kind]
    return option(dashed(name), f"{RECIPE}{name}", **settings)


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe that a command's options describe; raises UserError for values that it does not take."""
    given: dict[str, Any] = {}
    for key, value in options.items():
        if key.startswith(RECIPE) and value not in (None, ()):
            name = key.removeprefix(RECIPE)
            given[name] = sources_of(value) if isinstance(value, tuple) else value
    named = {name.replace("_", "-"): value for name, value in given.items()}
    return load_recipe(options["recipe"]).with_options({**named, **options.get(OF_STRATEGIES, {})}, COMMAND_LINE)


def sources_of(values: Sequence[str]) -> list[str]:
    """What an option names that may be given several times, and each time several things."""
    return [part for item in values for part in _parts(item)]


def _parts(item: str) -> Sequence[str]:
    """The names in ``a,b,c``, unless there is a file of just that name."""
    # Not by pathlib: a list may be longer than any name of a file.
    if os.path.exists(item.rpartition("@")[0] or item) or os.path.exists(item):
        return [item]
    # Empty parts are for whoever reads the names to refuse.
    return item.split(",")
