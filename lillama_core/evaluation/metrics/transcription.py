"""Transcribe speech: sounds in batches of like length through ``generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lillama_core.data.speech.audio import RATE, Sound
from lillama_core.evaluation.base import Subject
from lillama_core.system.quiet import quiet

BATCH = 16
"""Utterances transcribed together."""
TOKENS_PER_SECOND = 10
"""More than anybody says; a model that repeats itself without end is cut off there."""


@torch.inference_mode()
def transcribe(subject: Subject, sounds: Sequence[Sound], **generation: Any) -> list[str]:
    """What is said in ``sounds`` (float32 [samples] at 16 kHz), decoded greedily, in their order.

    ``subject.tokenizer`` is a processor with a feature extractor and a tokenizer. ``generation`` goes to ``generate``.
    Long and short sounds go into different batches, so that a short one need not wait for a long one's last word.
    """
    processor = subject.tokenizer
    dtype = next(p.dtype for p in subject.model.parameters() if p.is_floating_point())
    order = sorted(range(len(sounds)), key=lambda index: -len(sounds[index]))
    texts = [""] * len(sounds)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        found = processor.feature_extractor(
            [sounds[index] for index in chosen], sampling_rate=RATE, return_tensors="pt"
        )
        most = [_most_tokens(subject.model, len(sounds[index])) for index in chosen]
        with quiet():
            tokens = subject.model.generate(
                encoder_outputs=_encoded(subject.model, found["input_features"].to(subject.device, dtype)),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(most),
                **generation,
            )
        # Each is cut at its own limit, not at that of the longest it happens to share a batch with.
        written = [row[:limit] for row, limit in zip(tokens.tolist(), most, strict=True)]
        for index, text in zip(chosen, processor.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
    return texts


def _encoded(model: Any, features: Tensor) -> Any:
    """What the encoder makes of ``features`` [utterances, bands, frames].

    On a CPU one utterance at a time: its caches hold the activations of one, which saved a sixth of the time of all.
    """
    from transformers.modeling_outputs import BaseModelOutput

    encoder = model.get_encoder()
    parts = features.split(1) if features.device.type == "cpu" else (features,)
    return BaseModelOutput(last_hidden_state=torch.cat([encoder(part).last_hidden_state for part in parts]))


def _most_tokens(model: Any, samples: int) -> int:
    """New tokens allowed for a sound of so many samples; never more than there are positions for."""
    room = getattr(model.config, "max_target_positions", None)
    most = 16 + math.ceil(TOKENS_PER_SECOND * samples / RATE)
    # A prompt of up to four tokens stands before them.
    return most if room is None else max(1, min(most, room - 4))
