"""TODO."""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from lillama_core.errors import UserError, nearest


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of the recipe: its default, what it means, and the values it may take."""
    return field(default=default, metadata={"help": help, "choices": choices})


INIT_ALIASES = {"sensitivity": "fisher", "activation": "whitened"}
"""Names of initialisers that recipes of earlier versions may have."""


@dataclass(frozen=True)
class Recipe:
    """What to remove, from what data, and how. The defaults are the recipe ``default``."""

    name: str = option("default", "name under which the recipe is recorded")
    reduction: float = option(0.2, "fraction of the parameters to remove")
    stacks: tuple[str, ...] = option((), "stacks to compress, such as 'decoder'; empty: all of the model")

    include: tuple[str, ...] = option((), "maps that are compressed on request only, as paths from the block")
    exclude: tuple[str, ...] = option((), "maps to leave dense, as paths from the block; '*' stands for one part")
    share_experts: bool = option(False, "one input projection for all experts of a layer, one output projection")

    compress_embeddings: bool = option(False, "compress the token embedding, and the output head tied to it, as well")

    calibration: tuple[str, ...] = option(
        (),
        "calibration data: a text, JSONL or Parquet file, a dataset name, or 'self'; SRC@WEIGHT to mix several",
    )
    self_share: float = option(0.5, "part of the tokens that the model writes itself when other data is named")
    tokens: int = option(32768, "calibration tokens")
    sequence_length: int = option(512, "tokens in a calibration row")
    samples: int = option(128, "calibration rows of a model that is not fed text: utterances or images")
    use_all_tokens: bool = option(False, "take what there is when the data has fewer tokens")
    held_out: float = option(0.0625, "part of the rows that is kept for choosing checkpoints and for the report")

    init: str = option("fisher", "where the factors start: fisher, whitened, svd or random")
    sensitivity_tokens: int = option(8192, "calibration tokens of the backward pass that 'fisher' needs")
    allocation: str = option("spectrum", "how ranks are shared out: spectrum, uniform, bottom-first or top-first")
    rescaling_tokens: int = option(
        2048,
        "calibration tokens on which the loss that 'spectrum' expects of each part of the model is measured; 0: none",
    )
    correction_tokens: int = option(
        0,
        "calibration tokens on which the last map of a block learns to make up for what was lost below; 0: none",
    )
    minimum_rank: int | None = option(None, "smallest rank of bottom-first and top-first; default: width / 4")
    rank_step: int | None = option(None, "their distance between ranks; default: width / 16")
    format: str = option("pivoted", "how a low-rank map is stored: pivoted or factored")

    loss: str = option("sensitivity", "distillation loss: sensitivity, l1+logcos or mse")
    mode: str = option("student", "whose inputs the student block sees", ("teacher", "student", "teacher+student"))
    train: str = option("factors", "what of a block is trained", ("factors", "block"))
    steps: int = option(45, "optimiser steps a block; 0: no distillation")
    batch_size: int = option(4, "rows in a step")
    learning_rate: float = option(2e-4, "peak learning rate")
    schedule: str = option("cosine", "decay of the learning rate after the warm-up", ("cosine", "constant"))
    warmup: float = option(0.1, "part of the steps in which the learning rate rises")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    gradient_clip: float = option(0.0, "largest norm of a block's gradient; 0: no limit")

    dtype: str | None = option(
        None,
        "dtype of the saved weights; default: the input's, float16 for GGUF",
        ("float32", "bfloat16", "float16"),
    )
    compute: str = option(
        "auto",
        "arithmetic of matrix products; auto: bfloat16 where the processor has it",
        ("auto", "float32", "bfloat16"),
    )
    seed: int = option(0, "seed of everything random")

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", INIT_ALIASES.get(self.init, self.init))
        hints = typing.get_type_hints(Recipe)
        for spec in dataclasses.fields(self):
            # The three views accept the same: a list for a tuple, a whole number for a fraction.
            value = _converted(getattr(self, spec.name), hints[spec.name], dashed(spec.name))
            object.__setattr__(self, spec.name, value)
        for name, low, high in (
            ("self_share", 0.0, 1.0),
            ("held_out", 0.0, 0.5),
            ("warmup", 0.0, 1.0),
            ("weight_decay", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{dashed(name)} must be between {low:g} and {high:g}, not {value!r}")
        for name, least in (
            ("tokens", 1),
            ("samples", 2),
            ("sequence_length", 2),
            ("sensitivity_tokens", 1),
            ("rescaling_tokens", 0),
            ("correction_tokens", 0),
            ("batch_size", 1),
            ("steps", 0),
            ("seed", 0),
            ("minimum_rank", 1),
            ("rank_step", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{dashed(name)} must be at least {least}, not {value}")
        if self.seed >= 2**32:
            raise UserError(f"--seed must be less than 2^32, not {self.seed}")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"{dashed(name)} must be a finite number and not negative, not {value!r}")
        for spec in dataclasses.fields(self):
            choices, value = spec.metadata["choices"], getattr(self, spec.name)
            if choices and value is not None and value not in choices:
                raise UserError(
                    f"{dashed(spec.name)} must be one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def with_options(self, options: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """This recipe with ``options`` over it; raises UserError for unknown keys and wrong types."""
        known = {spec.name: spec for spec in dataclasses.fields(self)}
        hints = typing.get_type_hints(Recipe)
        values: dict[str, Any] = {}
        for key, value in options.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise UserError(f"{where}: unknown key {_shown(key)}{nearest(name, list(known))}")
            values[name] = _converted(value, hints[name], f"{where}: {key}")
        return dataclasses.replace(self, **values)


def dashed(name: str) -> str:
    """The option of a field: ``--learning-rate``."""
    return "--" + name.replace("_", "-")


def _converted(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the field's type, or a UserError that says what was expected."""
    accepted = typing.get_args(hint)
    if type(None) in accepted:
        if value is None:
            return None
        hint = next(a for a in accepted if a is not type(None))
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(i, str) for i in items):
            return tuple(items)
        raise UserError(f"{where} must be a string or a list of strings, not {_shown(value)}")
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4 as a string, because it has no point.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    expected = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}[hint]
    raise UserError(f"{where} must be {expected}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """A value from a file in a message: a few lines of YAML can stand for more than fits into memory."""
    short = reprlib.Repr()
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
