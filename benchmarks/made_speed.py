"""How fast the dense and the compressed model read and write, both in memory, in turns."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from lillama_core.system.quiet import quiet


def open_model(folder: str, device: torch.device) -> Any:
    """A dense or compressed model in memory, in its own dtype."""
    from lillama_core.architecture.find import find_architecture
    from lillama_core.models.loading import load_config, load_model
    from lillama_core.models.source import locate

    source = locate(folder)
    architecture = find_architecture(load_config(source, allow_compressed=True))
    return load_model(source, architecture, "auto").to(device)


def inputs_of(model: Any, prompt: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What ``generate`` is given: random tokens [1, prompt] of the tokenizer's, or as much sound as the model hears."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        sound = torch.randn(1, model.config.num_mel_bins, frames, generator=generator)
        return {"input_features": sound.to(device, model.dtype)}
    tokens = torch.randint(2, 384, (1, prompt), generator=generator).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def speeds(dense: str, compressed: str, device_name: str, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds to the first token of a prompt, or of a recording, and for each token after it, greedy.

    The models take turns, so that a drift of the machine hits both; the first round does not count. What follows the
    first token is a difference of two runs: a handful of new tokens are too few for it. ``ratio`` is that of the
    medians, dense / compressed.
    """
    device = torch.device(device_name)
    models = {name: open_model(folder, device) for name, folder in {"dense": dense, "compressed": compressed}.items()}
    given = {name: inputs_of(model, prompt, device) for name, model in models.items()}

    def seconds(name: str, count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        # An end of the text in between would make the models incomparable.
        with torch.inference_mode(), quiet():
            models[name].generate(**given[name], do_sample=False, min_new_tokens=count, max_new_tokens=count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first: dict[str, list[float]] = {name: [] for name in models}
    following: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 1):
        for name in models:
            start, whole = seconds(name, 1), seconds(name, 1 + new_tokens)
            if round_:
                first[name].append(start)
                following[name].append((whole - start) / new_tokens)
    medians = {
        what: {name: 1000 * statistics.median(times) for name, times in found.items()}
        for what, found in (("first token", first), ("token", following))
    }
    return {
        what: {
            **{f"{name} ms": round(milliseconds, 3) for name, milliseconds in found.items()},
            "ratio": round(found["dense"] / found["compressed"], 3),
        }
        for what, found in medians.items()
    }
