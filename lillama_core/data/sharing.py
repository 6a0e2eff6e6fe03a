"""Calibration data read by one process and handed to the others of the job: it may be text that a model wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lillama_core.data.modality import Samples
from lillama_core.system.processes import World


def shared_samples(world: World, load: Callable[[], Samples]) -> Samples:
    """What ``load`` gives in the main process, which alone calls it, in all processes; on the CPU where it was sent."""
    if world.size == 1:
        return load()
    if world.is_main:
        found = load()
        described, tensors = _take_apart(found)
        world.from_main(lambda: described)
        world.copy_([_bytes_of(tensor) for tensor in tensors.values()])
        return found
    described = world.from_main(dict[str, Any])
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in described["tensors"].items()
    }
    # Views: what arrives in them is in the tensors.
    world.copy_([_bytes_of(tensor) for tensor in tensors.values()])
    return Samples(
        {n.removeprefix("inputs."): t for n, t in tensors.items() if n.startswith("inputs.")},
        described["description"],
        described["sha256"],
        described["tokens"],
        {n.removeprefix("masks."): t for n, t in tensors.items() if n.startswith("masks.")},
        tensors.get("targets"),
        tensors.get("output_mask"),
    )


def _take_apart(samples: Samples) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What JSON can say of ``samples``, and their tensors by name."""
    tensors = {f"inputs.{name}": tensor for name, tensor in samples.inputs.items()}
    tensors |= {f"masks.{name}": tensor for name, tensor in samples.masks.items()}
    if samples.targets is not None:
        tensors["targets"] = samples.targets
    if samples.output_mask is not None:
        tensors["output_mask"] = samples.output_mask
    described = {
        "description": dict(samples.description),
        "sha256": samples.sha256,
        "tokens": samples.tokens,
        "tensors": {n: (list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()},
    }
    return described, tensors


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in its memory where that is contiguous: not every backend sends every dtype."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)
