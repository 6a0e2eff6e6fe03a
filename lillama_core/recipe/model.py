"""The recipe: every choice of a compression as one validated, frozen model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from lillama_core.errors import UserError, nearest
from lillama_core.strategies import ALIASES
from lillama_core.strategies.options import StrategyChoice
from lillama_core.strategies.validation import Validated, explain, plain, shown

COMMAND_LINE = "command line"
"""Name of the layer whose options are told with dashes."""

STAGES = "stages"
"""Field that holds the options of stages: ``stages.blocks.correction_ridge`` with dots."""

SLOTS = {"init": "initializers", "allocation": "allocators", "loss": "losses", "format": "formats"}
"""Field that chooses a strategy -> kind of strategy."""

SHORT = {name: ("allocation", name) for name in ("minimum_rank", "rank_step", "rank_multiple")}
"""Flat names -> the slot and the option of its strategy that they stand for."""


def option(default: Any, group: str, help: str, **bounds: Any) -> Any:
    """A field of the recipe: its default, the heading that it stands under, what it means, and its bounds."""
    return Field(default, description=help, json_schema_extra={"group": group}, **bounds)


@dataclass(frozen=True)
class Layer:
    """What one file or command line set, and the recipe that resulted there."""

    where: str
    spelled: Mapping[str, str]
    """What was set, ``steps`` or ``init.input_damping`` -> how it was written."""
    values: Mapping[str, Any]


def chosen(default: str, group: str, help: str) -> Any:
    return option(StrategyChoice(name=default), group, help)


DATA_FIELDS = ("self_share", "tokens", "sequence_length", "samples", "use_all_tokens", "batch_size", "compute", "seed")
"""Fields that say which data a model is run on, and in what arithmetic, besides its sources."""


class Recipe(Validated):
    """What to remove, from what data, and how. The defaults are the recipe ``default``.

    ``Recipe(...)`` and `with_options` take what YAML takes; a wrong name, type or value is a `UserError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = option("default", "recipe", "name under which the recipe is recorded")
    reduction: float = option(0.2, "what to remove", "fraction of the parameters to remove, such as 0.2 or 20%")
    target_parameters: int | None = option(
        None,
        "what to remove",
        "how many parameters the model may have in the end, such as 100M, in place of --reduction",
        ge=1,
    )
    target_speedup: float | None = option(
        None,
        "what to remove",
        "how many times as fast this machine is to be with the result, such as 1.3: in place of --reduction ranks are"
        " shared out by time that is measured",
        gt=1.0,
        le=100.0,
    )
    speedup_work: str | None = option(
        None,
        "what to remove",
        "the work that --target-speedup is about: prompts or decoding of language models, the encoder or decoding of"
        " speech models; default: the first",
    )
    stacks: tuple[str, ...] = option(
        (), "what to remove", "stacks to compress, such as 'decoder'; empty: all of the model"
    )
    include: tuple[str, ...] = option(
        (), "what to remove", "maps that are compressed on request only, as paths from the block"
    )
    exclude: tuple[str, ...] = option(
        (), "what to remove", "maps to leave dense, as paths from the block; '*' stands for one part"
    )
    share_experts: bool = option(
        False, "what to remove", "one input projection for all experts of a layer, one output projection"
    )
    compress_embeddings: bool | None = option(
        None,
        "what to remove",
        "compress the token embedding, and the output head tied to it, as well, in bands of tokens by their frequency;"
        " default: where spectrum shares out losses that fisher predicts, and no stacks are named",
    )
    remove_channels: bool | None = option(
        None,
        "what to remove",
        "take whole inner features out of blocks' feed-forward nets, too, where that costs less than lower ranks;"
        " default: where spectrum shares out losses that fisher predicts",
    )

    calibration: tuple[str, ...] = option(
        (),
        "data",
        "calibration data: a text, JSONL or Parquet file, a dataset name, or 'self'; SRC@WEIGHT to mix several",
    )
    self_share: float = option(
        0.5, "data", "part of the tokens that the model writes itself when other data is named", ge=0.0, le=1.0
    )
    tokens: int = option(32768, "data", "calibration tokens", ge=1)
    sequence_length: int = option(512, "data", "tokens in a calibration row", ge=2)
    samples: int = option(128, "data", "calibration rows of a model that is not fed text: utterances or images", ge=2)
    use_all_tokens: bool = option(False, "data", "take what there is when the data has fewer tokens")
    held_out: float = option(
        0.0625,
        "data",
        "part of the rows that is kept for the report, and as much again to choose by where something is chosen",
        ge=0.0,
        le=0.5,
    )

    init: StrategyChoice = chosen(
        "fisher", "initialisation", "where the factors start: fisher, whitened, svd or random"
    )
    sensitivity_tokens: int = option(
        8192, "initialisation", "calibration tokens of the backward pass that 'fisher' needs", ge=1
    )
    correction_tokens: int = option(
        0,
        "initialisation",
        "calibration tokens on which the last map of a block learns to make up for what was lost below; 0: none",
        ge=0,
    )

    allocation: StrategyChoice = chosen(
        "spectrum", "ranks", "how ranks are shared out: spectrum, uniform, bottom-first or top-first"
    )
    rescaling_tokens: int = option(
        2048,
        "ranks",
        "calibration tokens on which the loss that 'spectrum' expects of each part of the model is measured, or an"
        " allocator that runs the model runs it; 0: none",
        ge=0,
    )

    loss: StrategyChoice = chosen("sensitivity", "distillation", "distillation loss: sensitivity, l1+logcos or mse")
    mode: Literal["teacher", "student", "teacher+student"] = option(
        "student", "distillation", "whose inputs the student block sees"
    )
    train: Literal["factors", "block"] = option("factors", "distillation", "what of a block is trained")
    steps: int = option(45, "distillation", "optimiser steps a block; 0: no distillation", ge=0)
    batch_size: int = option(4, "distillation", "rows in a step", ge=1)
    learning_rate: float = option(2e-4, "distillation", "peak learning rate", ge=0.0, allow_inf_nan=False)
    schedule: Literal["cosine", "constant"] = option(
        "cosine", "distillation", "decay of the learning rate after the warm-up"
    )
    warmup: float = option(0.1, "distillation", "part of the steps in which the learning rate rises", ge=0.0, le=1.0)
    weight_decay: float = option(0.0, "distillation", "AdamW's weight decay", ge=0.0, le=1.0)
    gradient_clip: float = option(
        0.0, "distillation", "largest norm of a block's gradient; 0: no limit", ge=0.0, allow_inf_nan=False
    )

    healing_epochs: float = option(
        0.0,
        "healing",
        "how often the whole compressed model is trained on the calibration rows at the end, by the dense model's"
        " predictions; 0: not at all",
        ge=0.0,
        le=1000.0,
    )

    format: StrategyChoice = chosen("pivoted", "result", "how a low-rank map is stored: pivoted or factored")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "result", "dtype of the saved weights; default: the input's, float16 for GGUF"
    )
    compute: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "result", "arithmetic of matrix products; auto: bfloat16 where the processor has it"
    )
    seed: int = option(0, "result", "seed of everything random", ge=0, lt=2**32)

    stages: Mapping[str, Mapping[str, Any]] = option(
        {},
        "result",
        "options of stages of the pipeline, by stage: {blocks: {correction_ridge: 0.05}}",
    )

    _layers: tuple[Layer, ...] = PrivateAttr(default=())

    def __init__(self, **options: Any) -> None:
        self._fill({}, (), options, "recipe", dashed)

    def _fill(
        self,
        base: Mapping[str, Any],
        below: tuple[Layer, ...],
        options: Mapping[str, Any],
        where: str,
        spell: Callable[[str], str],
    ) -> None:
        """Become ``options`` over ``base``; ``spell`` writes a key as the user knows it."""
        values, spelled = _merged(base, options, where, spell)
        try:
            Validated.__init__(self, **values)
        except ValidationError as error:
            raise UserError(explain(error, Recipe, lambda name: spelled.get(name, dashed(name)))) from None
        # What was written out in full, as a finished run does, says nothing of what somebody chose.
        if spelled and not set(Recipe.model_fields) <= set(spelled):
            below = (*below, Layer(where, spelled, dict(self)))
        self._layers = below

    @field_validator("reduction", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        """``20%`` is 0.2."""
        if isinstance(value, str) and value.rstrip().endswith("%"):
            try:
                return float(value.rstrip()[:-1]) / 100
            except ValueError:
                pass
        return value

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        """``100M`` is a hundred million."""
        if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB])\s*", value)):
            return round(float(found[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()])
        return value

    @field_validator(STAGES, mode="before")
    @classmethod
    def _by_stage(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(own, Mapping) for own in value.values()):
            raise PydanticCustomError("value_error", "a mapping of stage to its options")
        return {
            str(stage): {str(k).replace("-", "_"): plain(v) for k, v in own.items()} for stage, own in value.items()
        }

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _choice(cls, value: Any, info: ValidationInfo) -> Any:
        """A name or a mapping as a choice, with the names of earlier versions as those of today."""
        if isinstance(value, str):
            return StrategyChoice(name=current_name(info.field_name or "", value))
        if not isinstance(value, StrategyChoice):
            raise PydanticCustomError("value_error", "the name of a strategy, or a mapping with its name and options")
        return value

    def with_options(self, options: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """This recipe with ``options`` over it: fields, options of strategies as ``init.input_damping``, old names.

        ``where`` says in messages who gave them. A strategy's options from below are kept under the same strategy and
        dropped under another one. Raises UserError for unknown keys, wrong types and values out of range; whether each
        option is read is checked later, see `lillama_core.recipe.reading`.
        """
        found = Recipe.__new__(Recipe)
        spell = dashed if where == COMMAND_LINE else lambda key: f"{where}: {key}"
        found._fill(dict(self), self._layers, options, where, spell)
        return found

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What each file and command line set, in the order in which they were laid over one another."""
        return self._layers

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON; a strategy without options is its name."""
        return {name: _plain(getattr(self, name)) for name in Recipe.model_fields}

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def __eq__(self, other: object) -> bool:
        # Two recipes are equal when they say the same, wherever each value comes from.
        return isinstance(other, Recipe) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))


def current_name(slot: str, name: str) -> str:
    """Today's name of a strategy that earlier versions may have called otherwise."""
    return ALIASES.get(SLOTS.get(slot, ""), {}).get(name, name)


def dashed(name: str) -> str:
    """The option of a field: ``--learning-rate``; that of a strategy, ``--init.input_damping``, as it is written."""
    return "--" + (name if "." in name else name.replace("_", "-"))


def _plain(value: Any) -> Any:
    if isinstance(value, StrategyChoice):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {key: dict(own) for key, own in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _merged(
    base: Mapping[str, Any], options: Mapping[str, Any], where: str, spell: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of ``base`` with ``options`` over them, and which of them ``options`` sets, as they were written."""
    values: dict[str, Any] = dict(base)
    spelled: dict[str, str] = {}
    strategy_options: list[tuple[str, str, Any, str]] = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        slot, dot, own = name.partition(".")
        if name in SHORT:
            # Written out by an earlier version: the strategy's own default.
            if value is not None:
                strategy_options.append((*SHORT[name], value, spell(str(key))))
        elif slot == STAGES and (by_stage := _stage_options(own, value)) is not None:
            if not dot:
                spelled[STAGES] = spell(str(key))
            for stage, own_options in by_stage.items():
                present: Mapping[str, Mapping[str, Any]] = values.get(STAGES, {})
                found = {str(k).replace("-", "_"): v for k, v in own_options.items()}
                values[STAGES] = {**present, stage: {**present.get(stage, {}), **found}}
                written = spell(str(key))
                spelled |= {f"{STAGES}.{stage}.{k}": written if dot else f"{written}.{stage}.{k}" for k in found}
        elif dot and slot in SLOTS and own:
            strategy_options.append((slot, own, value, spell(str(key))))
        elif name not in Recipe.model_fields:
            known = [*Recipe.model_fields, *SHORT]
            raise UserError(f"{where}: unknown key {shown(key)}{nearest(name, known)}")
        elif name in SLOTS and isinstance(value, Mapping | StrategyChoice):
            given = value.to_plain() if isinstance(value, StrategyChoice) else value
            given = {"name": given} if isinstance(given, str) else given
            # Options alone are for the strategy that is chosen already.
            if "name" in given:
                values[name] = _same_or_new(values.get(name), given["name"], name)
                spelled[name] = spell(str(key))
            nested = given.get("options") if set(given) == {"name", "options"} else None
            for option_, own_value in (nested or {k: v for k, v in given.items() if k != "name"}).items():
                own = str(option_).replace("-", "_")
                strategy_options.append((name, own, own_value, f"{spell(str(key))}.{option_}"))
        else:
            values[name] = _same_or_new(values.get(name), value, name) if name in SLOTS else value
            spelled[name] = spell(str(key))
    for slot, own, value, written in strategy_options:
        choice = values.get(slot, Recipe.model_fields[slot].default)
        if isinstance(choice, str):
            choice = StrategyChoice(name=choice)
        if isinstance(choice, StrategyChoice):
            values[slot] = choice.with_option(own, value)
            spelled[f"{slot}.{own}"] = written
    return values, spelled


def _stage_options(dotted: str, value: Any) -> dict[str, Mapping[str, Any]] | None:
    """Options by stage, from ``NAME.OPTION`` and a value, or from a mapping; None when they are neither."""
    stage, _, own = dotted.partition(".")
    if stage and own:
        return {stage: {own: value}}
    if not dotted and isinstance(value, Mapping) and all(isinstance(of, Mapping) for of in value.values()):
        return {str(name): of for name, of in value.items()}
    return None


def _same_or_new(present: Any, name: Any, slot: str) -> Any:
    """The present choice if ``name`` is the same strategy; another one brings no options along."""
    if isinstance(name, str):
        name = current_name(slot, name)
    return present if isinstance(present, StrategyChoice) and present.name == name else name
