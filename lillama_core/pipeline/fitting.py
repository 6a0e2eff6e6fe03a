"""Bits of every matrix such that the files of weights fit into a size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.targets.quantized import matrix
from lillama_core.errors import UserError
from lillama_core.estimates.sizes import show_size
from lillama_core.pipeline.calibrated import Calibration, rounding_errors
from lillama_core.quantization.choice import Candidate, fewest_errors
from lillama_core.quantization.packing import packing_of

HEADER_BYTES = 160
"""What the header of a safetensors file says of a tensor, at most, beside its name."""


def check_target(model: Any, weights: Mapping[str, bool], target: int) -> None:
    """Raise UserError where ``target`` bytes are more than the model takes, or less than 4 bits throughout."""
    now = whole_bytes(model)
    if target >= now:
        raise UserError(
            f"a --target-size of {show_size(target)} is nothing to do: the weights take {show_size(now)} as they are"
        )
    least = least_bytes(model, weights)
    if target < least:
        raise UserError(
            f"a --target-size of {show_size(target)} cannot be met: in 4 bits throughout the weights take"
            f" {show_size(least)}; 'lillama compress --target-size' takes ranks away as well"
        )


def whole_bytes(model: Any) -> int:
    """What the files take as the weights are; ``model`` may be on the meta device."""
    return _fixed(model, ())


def least_bytes(model: Any, weights: Iterable[str]) -> int:
    """What the files take with all ``weights`` in 4 bits; ``model`` may be on the meta device."""
    return _fixed(model, weights) + sum(packing_of(matrix(model, path), 4).nbytes for path in weights)


def bits_within(
    model: Any, architecture: Architecture, weights: Mapping[str, bool], target: int, calibration: Calibration | None
) -> dict[str, int]:
    """Path -> bits of the ``weights``, path -> whether it is a table, so that all of them fit into ``target`` bytes.

    Those go to 4 bits whose outputs change least for the bytes that it saves, as `rounding_errors` says; tables only
    where that is not enough: 8 windows of WikiText-2 had a perplexity of 27.6 by SmolLM2, of 32.7 with its maps in 4
    bits, and of 36.1 with its table as well, which has a fifth of the parameters.
    """
    eight = {path: packing_of(matrix(model, path), 8).nbytes for path in weights}
    four = {path: packing_of(matrix(model, path), 4).nbytes for path in weights}
    limit = target - _fixed(model, weights)
    maps, tables = ([p for p, table in weights.items() if table == which] for which in (False, True))
    if sum(eight.values()) <= limit:
        return dict.fromkeys(weights, 8)
    errors = rounding_errors(model, architecture, maps, calibration)
    candidates = {path: Candidate(eight[path], four[path], errors[path]) for path in maps}
    taken: set[str] = set()
    for path in (None, *sorted(tables, key=lambda p: four[p] - eight[p])):
        if path is not None:
            taken.add(path)
        held = sum((four if p in taken else eight)[p] for p in tables)
        try:
            taken |= fewest_errors(candidates, limit - held)
        except ValueError:
            continue
        break
    return {path: packing_of(matrix(model, path), 4 if path in taken else 8).bits for path in weights}


def _fixed(model: Any, weights: Iterable[str]) -> int:
    """Bytes of the files beside the ``weights``: other tensors, and what headers say."""
    state = model.state_dict(keep_vars=True)
    # Tied tensors are one; on the meta device all are at the address 0.
    stored = {tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in state.values() if tensor.numel()}
    header = 1024 + sum(len(name) + HEADER_BYTES for name in state)
    return sum(stored.values()) + header - sum(matrix(model, path).nbytes for path in weights)
