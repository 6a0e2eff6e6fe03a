"""Things that are chosen by name: the one place where a name becomes an object, with its options."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import lillama_registry
from lillama_core.errors import UserError, nearest
from lillama_core.strategies.options import (
    ChosenStrategies,
    Strategy,
    StrategyChoice,
    StrategyOptions,
    validated_options,
)

__all__ = [
    "ALIASES",
    "OPTIONS",
    "ChosenStrategies",
    "Strategy",
    "StrategyChoice",
    "StrategyOptions",
    "blamed",
    "get",
    "having_option",
    "make",
    "names",
    "options_of",
]

OPTIONS = {
    "allocators": "--allocation",
    "initializers": "--init",
    "formats": "--format",
    "losses": "--loss",
    "recipes": "--recipe",
    "exporters": "--to",
}
"""Kind of thing -> the option by which a user names one."""


ALIASES = {"initializers": {"sensitivity": "fisher", "activation": "whitened"}}
"""By kind: names of earlier versions -> those of today."""


def names(kind: str) -> list[str]:
    """All names of one kind, those of plugins included."""
    return lillama_registry.registry().names(kind)


def get(kind: str, name: str) -> Any:
    """What is registered under ``name``: an object, or a class.

    Raises UserError that suggests the nearest name when there is none, and that names the plugins when several claim it
    or when it cannot be imported.
    """
    name = ALIASES.get(kind, {}).get(name, name)
    try:
        return lillama_registry.registry().get(kind, name)
    except KeyError:
        known = [*names(kind), *ALIASES.get(kind, {})]
        what = OPTIONS.get(kind, f"one of the {kind}")
        raise UserError(f"{what} must be one of {', '.join(names(kind))}, not {name!r}{nearest(name, known)}") from None
    except (lillama_registry.ConflictError, ImportError) as error:
        raise UserError(str(error)) from None


def make(kind: str, choice: str | StrategyChoice, spelled: Mapping[str, str] = MappingProxyType({})) -> Any:
    """The strategy that ``choice`` names, with its options validated.

    A class is instantiated; what a plugin gives as an object is returned as it is, unless options are given for it.
    ``spelled`` says by options how the user wrote them, ``--minimum-rank``; the others are told as ``--init.name``.
    Raises UserError as `get` does, and for options that the strategy does not have or that are out of range.
    """
    if isinstance(choice, str):
        choice = StrategyChoice(name=choice)
    found = get(kind, choice.name)
    if not choice.options:
        return _instance(found) if isinstance(found, type) else found
    model = options_of(found)
    elsewhere = {option: having_option(kind, option) for option in choice.options if option not in model.model_fields}
    spell = {option: spelled.get(option, f"{OPTIONS.get(kind, kind)}.{option}") for option in choice.options}
    options = validated_options(model, choice, spell, elsewhere)
    of: Any = found if isinstance(found, type) else type(found)
    return of(options)


@functools.cache
def _instance(of: type) -> Any:
    return of()


def options_of(strategy: Any) -> type[StrategyOptions]:
    """The model of a strategy's options, given the class or an object; one without any, if it is no `Strategy`."""
    of = strategy if isinstance(strategy, type) else type(strategy)
    return of.Options if issubclass(of, Strategy) else StrategyOptions


def having_option(kind: str, option: str) -> list[str]:
    """The strategies of a kind that have an option of this name; those that cannot be imported are passed over."""
    found = []
    for name in names(kind):
        try:
            if option in options_of(get(kind, name)).model_fields:
                found.append(name)
        except UserError:
            continue
    return found


def blamed(error: BaseException) -> str | None:
    """The strategy of a plugin in whose methods ``error`` was raised, in words; None: in no such strategy."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        # Not by the file: what a strategy inherits from one of the core's is in the core.
        strategy = traceback.tb_frame.f_locals.get("self")
        module = type(strategy).__module__
        if isinstance(strategy, Strategy) and not module.startswith("lillama_core."):
            found = f"{getattr(strategy, 'name', type(strategy).__name__)!r} of {module}"
        traceback = traceback.tb_next
    return found
