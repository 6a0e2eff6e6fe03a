"""Compare the sizes in a model's config with the weights beside it, before anything of that size is made."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lillama_core.errors import UserError
from lillama_core.models.integrity import check_safetensors

MOST_PARTS = 100_000
"""Of layers, experts or labels that a config may count: a config may make a list of them. The largest released models
have some hundreds."""
_COUNTS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|experts|labels)$")
_NUMBERS_OF = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|blocks?|experts|labels)$")
_LARGEST = 2**63


@dataclass(frozen=True)
class Allowed:
    """How large a model may be; the defaults are for one whose weights are not at hand."""

    weights: int = 500_000
    """By name. DeepSeek-V3, of 671 billion parameters, has 91,000 on disk."""
    numbers: int = 10**14
    """In all the weights."""


def allowed_by(location: str | None) -> Allowed:
    """What the safetensors in the directory ``location`` allow for.

    A shared block is one on disk and several in the model, a low-rank or quantised weight is smaller on disk than the
    one that it stands for: so several times what is there.
    """
    folder = Path(location or "")
    if not location or not os.path.isfile(folder / "config.json"):
        return Allowed()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return Allowed()
    tensors = sum(len(check_safetensors(file)) for file in files)
    size = sum(file.stat().st_size for file in files)
    return Allowed(weights=8 * tensors + 1000, numbers=256 * size + 10**7)


def check_numbers(config: Mapping[str, Any], spec: str) -> None:
    """Raise UserError for numbers in ``config``, or a config in it, that no model has; ``spec`` names the model."""
    for name, value in config.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                check_numbers(inner, spec)
            elif isinstance(inner, int) and not isinstance(inner, bool):
                _check_number(str(name), inner, spec)


def _check_number(name: str, value: int, spec: str) -> None:
    # Digits without end take a while to write.
    shown = f"{value:,}" if abs(value) < _LARGEST else f"a number of {value.bit_length()} bits"
    if abs(value) >= _LARGEST:
        limit = "less than 2^63"
    elif value > MOST_PARTS and _COUNTS.search(name):
        limit = f"at most {MOST_PARTS:,}"
    elif value < 0 and _NUMBERS_OF.match(name):
        limit = "at least 0"
    else:
        return
    raise UserError(f"the config of model {spec!r} has {shown} as {name}; it must be {limit}: correct config.json")


@contextlib.contextmanager
def no_larger_than(allowed: Allowed) -> Iterator[None]:
    """While open, a module that is made on the meta device with more than is ``allowed`` raises UserError.

    Modules without weights are counted as well: a list of them may be as long.
    """
    made = {"modules": 0, "weights": 0, "numbers": 0}

    def count(what: str, number: int, most: int) -> None:
        made[what] += number
        if made[what] > most:
            raise UserError(
                f"it describes more than {most:,} {what}, more than the weight files hold: correct the sizes in"
                " config.json"
            )

    def parameter(module: nn.Module, name: str, given: nn.Parameter | None) -> None:
        if given is not None and given.is_meta:
            count("weights", 1, allowed.weights)
            count("numbers", given.numel(), allowed.numbers)

    def submodule(module: nn.Module, name: str, given: nn.Module | None) -> None:
        count("modules", 1, 4 * allowed.weights)

    hooks = [
        register_module_parameter_registration_hook(parameter),
        register_module_module_registration_hook(submodule),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
