"""Options that a strategy owns, and the choice of a strategy by name.

A strategy is anything that a recipe chooses by name. It derives from `Strategy` and declares a `StrategyOptions` model;
what the recipe says beside the name is validated against that model before the strategy is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lillama_core.errors import UserError, nearest
from lillama_core.strategies.validation import Validated, explain, plain


class StrategyOptions(Validated):
    """Options of a strategy: a frozen model that refuses what it does not know.

    Every field says in its ``description`` what it does and where its default comes from.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Strategy:
    """Base of everything that is chosen by name and may have options."""

    name: str
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    """The model of its options; a subclass that has some names its own, and annotates ``options`` with it."""
    options: StrategyOptions

    def __init__(self, options: StrategyOptions | None = None) -> None:
        self.options = self.Options() if options is None else options

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        """Own options that have no effect beside the other ``chosen`` strategies: name -> why not."""
        return {}


class ChosenStrategies:
    """The strategies of one recipe, made."""

    def __init__(self, init: Any, allocation: Any, loss: Any, format: Any, recipe: Any = None) -> None:
        """``recipe`` holds the fields that are not strategies."""
        self.init = init
        self.allocation = allocation
        self.loss = loss
        self.format = format
        self.recipe = recipe


class StrategyChoice(BaseModel):
    """A strategy by name, with the options that were given for it.

    Made from a name, or from a mapping ``{name: fisher, input_damping: 1e-4}``. Equal to its bare name as long as no
    option is given. Options are validated when the strategy is made, see `lillama_core.strategies.make`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: Mapping[str, Any] = MappingProxyType({})

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and not (set(value) <= {"name", "options"} and "options" in value):
            rest = {str(k).replace("-", "_"): plain(v) for k, v in value.items() if k != "name"}
            return {"name": value.get("name"), "options": rest}
        return value

    def to_plain(self) -> str | dict[str, Any]:
        """The bare name, or the mapping that YAML takes."""
        return {"name": self.name, **self.options} if self.options else self.name

    def with_option(self, option: str, value: Any) -> StrategyChoice:
        """This choice with one option more, or changed."""
        return StrategyChoice(name=self.name, options={**self.options, option: plain(value)})

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name} ({', '.join(f'{k}: {v}' for k, v in self.options.items())})"

    def __repr__(self) -> str:
        return repr(self.to_plain())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.to_plain() == other
        return isinstance(other, StrategyChoice) and self.to_plain() == other.to_plain()

    def __hash__(self) -> int:
        # Of the name alone: a choice without options is equal to it.
        return hash(self.name)


def validated_options(
    model: type[StrategyOptions], choice: StrategyChoice, spell: Mapping[str, str], others: Mapping[str, list[str]]
) -> StrategyOptions:
    """``choice.options`` as an instance of ``model``.

    ``spell`` says how a user writes each option, ``others`` which other strategies have it. Raises UserError for an
    unknown option, a wrong type and a value out of range.
    """
    known = list(model.model_fields)
    for option in choice.options:
        if option not in known:
            able = others.get(option, [])
            listed = " and ".join(filter(None, (", ".join(map(repr, able[:-1])), repr(able[-1])))) if able else ""
            advice = f"; {listed} {'has' if len(able) == 1 else 'have'} it"
            raise UserError(
                f"{spell[option]}: {choice.name!r} has no such option{advice if able else nearest(option, known)}"
            )
    try:
        return model(**choice.options)
    except ValidationError as error:
        raise UserError(explain(error, model, lambda name: spell.get(name, name))) from None
