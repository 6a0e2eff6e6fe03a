"""What a result went through after its compression, as the commands that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lillama_core.errors import one_line
from lillama_core.healing import options as healing
from lillama_core.output.record import RunRecord
from lillama_core.quantization import options as quantization
from lillama_core.recipe.model import Recipe, dashed


def later_commands(record: RunRecord, choices: Sequence[str]) -> list[str] | None:
    """The command lines after the one of ``lillama compress``, which has made OUTPUT; each ends with ``choices``.

    None where the record does not tell one of them: its data were objects of a Python program, or it is too old.
    """
    # A training that belongs to the compression has the data of that.
    steps = [_finetune(told) for told in record.healing if "data" in told]
    steps += [] if record.quantization is None else [_quantize(record.quantization)]
    names = ["OUTPUT", *(f"OUTPUT{number + 2}" for number in range(len(steps)))]
    lines = []
    for words, model, output in zip(steps, names, names[1:], strict=False):
        if words is None:
            return None
        command, *options = words
        said = ["lillama", command, model, "--output", output, *options, *choices]
        lines.append(shlex.join(one_line(word, None) for word in said))
    return lines


def _finetune(told: Mapping[str, Any]) -> list[str] | None:
    own = {"tokens": healing.TOKENS, **({"self_share": 0.0} if told["objective"] == "lm" else {})}
    data = _data(told["data"], "--data", own)
    defaults = {**healing.HealingOptions().model_dump(), "epochs": healing.EPOCHS}
    options = _changed({name: told.get(name, value) for name, value in defaults.items()}, defaults)
    teacher = [] if told.get("teacher") is None else ["--teacher", told["teacher"]]
    return None if data is None else ["finetune", *teacher, *data, *options]


def _quantize(told: Mapping[str, Any]) -> list[str] | None:
    if told.get("target_size") is not None:
        size = ["--target-size", str(told["target_size"])]
    else:
        bits = {"bits": told.get("bits"), "embedding_bits": told.get("table_bits")}
        size = _changed(bits, {"bits": 8, "embedding_bits": 8})
    own = {"tokens": quantization.TOKENS, "self_share": 0.0}
    data = [] if told.get("calibration") is None else _data(told["calibration"], "--calibration", own)
    if data is None or told.get("exclude") is None:
        return None
    return ["quantize", *size, *(word for path in told["exclude"] for word in ("--exclude", path)), *data]


def _data(told: Mapping[str, Any], option: str, own: Mapping[str, Any]) -> list[str] | None:
    """The options of data; ``own`` are defaults of the command that are not the recipe's."""
    if told.get("recipe") is None or any(s.get("kind") in ("texts", "batches") for s in told["sources"].values()):
        return None
    options = dict(told["recipe"])
    sources = [word for source in options.pop("calibration") for word in (option, source)]
    return sources + _changed(options, {**Recipe().to_dict(), **own})


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The options whose values are not the defaults."""
    words = []
    for name, value in values.items():
        if value != defaults[name]:
            words += [dashed(name)] if value is True else [dashed(name), str(value)]
    return words
