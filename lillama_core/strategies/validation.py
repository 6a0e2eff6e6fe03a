"""Pydantic models whose mistakes are told in one line that says what was expected."""

from __future__ import annotations

import reprlib
import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from lillama_core.errors import nearest

NOUNS = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}


LARGEST = 10**15
"""Of all whole numbers that are counts or sizes: beyond 2^63 libraries fail, each in its own way."""

NOT_READ = ("int_parsing", "float_parsing", "bool_parsing", "wrong_type")
"""Errors of pydantic for which a value is shown as it was written."""


class Validated(BaseModel):
    """A frozen model without unknown fields, in which truth values are no numbers and one string is a list of one."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        kind = kind_of(cls, info.field_name or "")
        if kind is tuple and isinstance(value, str):
            return (value,)
        if value is None:
            # Whether a field may be left open is for its type to say.
            return value
        if (kind in (int, float, str) and isinstance(value, bool)) or (
            kind is bool and not isinstance(value, bool | str)
        ):
            raise PydanticCustomError("wrong_type", "wrong type")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise PydanticCustomError("too_large", "too large")
        return value


def kind_of(model: type[BaseModel], name: str) -> Any:
    """The type of a field without its None: ``int`` for ``int | None``, ``tuple`` for ``tuple[str, ...]``, and
    ``Literal`` for a choice of words."""
    hint = _without_none(model.model_fields[name].annotation)
    return typing.get_origin(hint) or hint


def choices_of(model: type[BaseModel], name: str) -> tuple[str, ...]:
    """The words that a field may be; empty when it is not a choice of words."""
    hint = _without_none(model.model_fields[name].annotation)
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def explain(error: ValidationError, model: type[BaseModel], spell: Callable[[str], str]) -> str:
    """The first mistake in one line, such as ``--steps must be a whole number, not 'many'``.

    ``spell`` gives the name by which the user knows a field.
    """
    first = error.errors(include_url=False)[0]
    if not first["loc"] or str(first["loc"][0]) not in model.model_fields:
        return f"{spell(str(first['loc'][0]) if first['loc'] else '')}: {first['msg']}"
    name = str(first["loc"][0])
    value = first["input"] if first["type"] in NOT_READ else plain(first["input"])
    expected = expectation(model, name, first)
    said = "" if len(first["loc"]) > 1 else f", not {shown(value)}"
    choices = choices_of(model, name)
    return f"{spell(name)} must be {expected}{said}{nearest(value, choices) if isinstance(value, str) else ''}"


def expectation(model: type[BaseModel], name: str, error: Any) -> str:
    """What a field takes, as far as ``error`` was about it: a type, a bound or a choice of words."""
    bounds = {type(m).__name__.lower(): m for m in model.model_fields[name].metadata}
    low, high = (getattr(bounds.get(k), k, None) for k in ("ge", "le"))
    match error["type"]:
        case "greater_than_equal" | "less_than_equal" if low is not None and high is not None:
            return f"between {low:g} and {high:g}"
        case "greater_than_equal":
            return f"at least {low:g}"
        case "less_than_equal":
            return f"at most {high:g}"
        case "greater_than":
            return f"more than {error['ctx']['gt']:g}"
        case "less_than":
            limit = error["ctx"]["lt"]
            return f"less than {f'2^{limit.bit_length() - 1}' if limit == 2**32 else limit}"
        case "too_large":
            return "at most 10^15"
        case "finite_number":
            return "a finite number"
        case "value_error" | "assertion_error":
            return str(error["msg"])
    kind = kind_of(model, name)
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, choices_of(model, name)))}"
    if kind is tuple:
        return "a string or a list of strings"
    return NOUNS.get(kind, getattr(kind, "__name__", str(kind)))


def plain(value: Any) -> Any:
    """A value as YAML 1.2 would read it: words from a command line may be numbers, and YAML 1.1 reads 3e-4 as text."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


def shown(value: Any) -> str:
    """A value in a message, shortened: a few lines of YAML can stand for more than fits into memory."""
    short = reprlib.Repr()
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
