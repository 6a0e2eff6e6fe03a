"""Where the routers of a mixture of experts send the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.data.sources import Source
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject

from .architecture import ROUTERS

WINDOWS = 8
"""Routing needs less text than perplexity."""
FILE = "routing.safetensors"
"""The choices among the details."""


@torch.inference_mode()
def choices(model: Any, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, int]:
    """The experts chosen in every layer that has a router, int16 [layers, tokens, k], and how many there are a layer.

    ``rows``: token ids [windows, length]; each window is read on its own. ``model``: in eval mode on ``device``.
    """
    found: dict[str, list[torch.Tensor]] = {}
    routers = _routers(model)
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.setdefault(name, []).append(out[-1].to("cpu", torch.int16))
        )
        for name, module in routers.items()
    ]
    try:
        for row in rows:
            model.get_decoder()(input_ids=row[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    experts = max(len(module.weight) for module in routers.values())
    return torch.stack([torch.cat(found[name]) for name in routers]), experts


def _routers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(tuple(f".{r}" for r in ROUTERS))}


def token_shares(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """The part of the tokens that each expert gets, [layers, experts]; a layer's parts sum to the experts a token."""
    return functional.one_hot(chosen.long(), experts).sum(2).float().mean(1)


def agreement(chosen: torch.Tensor, reference: torch.Tensor) -> float:
    """Part of the choices in ``reference`` [layers, tokens, k] that ``chosen`` makes too, in whatever order."""
    return (reference[..., :, None] == chosen[..., None, :]).any(-1).float().mean().item()


class Routing:
    """How evenly the experts are used, and whether tokens go where the first model measured sends them.

    Notes ``routing``, the choices, ``routed_tokens``, the text that they were made on, and ``tokens_per_expert``, for
    every layer the part of the tokens of each expert. The first two are its details.
    """

    name = "routing"

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """The smallest share of an expert, and the agreement when there is a baseline that read the same text."""
        source = Source.parse(options.data) if options.data else Source(str(OFFLINE_TEXT))
        windows = min(WINDOWS, options.windows or WINDOWS)
        rows = load_text_windows(source, subject.tokenizer, options.sequence_length, windows)
        report(f"routing: {len(rows)} windows of {options.sequence_length} tokens")
        if not _routers(subject.model):
            # Families of experts have members whose layers are all dense.
            return []
        chosen, experts = choices(subject.model, rows, subject.device)
        shares = token_shares(chosen, experts)
        subject.notes |= {"routing": chosen, "routed_tokens": rows, "tokens_per_expert": shares.tolist()}
        if options.details is not None:
            options.details.mkdir(parents=True, exist_ok=True)
            save_file({"routing": chosen, "routed_tokens": rows}, options.details / FILE)
        found = [
            Measurement(
                "routing/smallest_share",
                100 * shares.min().item(),
                "%",
                "higher",
                f"Part of the tokens that the least used expert of any layer gets; {experts} experts a layer,"
                f" {chosen.shape[-1]} a token.",
            )
        ]
        if subject.baseline is None:
            return found
        before = subject.baseline.notes
        same_text = torch.equal(before.get("routed_tokens", torch.empty(0)), rows)
        if not same_text or before["routing"].shape != chosen.shape:
            report("routing/agreement: the first model's choices on this text are not known; not compared")
        else:
            found.append(
                Measurement(
                    "routing/agreement",
                    100 * agreement(chosen, before["routing"]),
                    "%",
                    "higher",
                    "Part of the choices of an expert that the first model makes as well, all layers together.",
                )
            )
        return found

    def load_saved(self, folder: Path) -> dict[str, Any]:
        """The choices that `measure` wrote into ``folder``; none is no error."""
        try:
            return dict(load_file(folder / FILE)) if (folder / FILE).is_file() else {}
        except SafetensorError as error:
            raise ValueError(f"{FILE} is damaged: {error}") from None
