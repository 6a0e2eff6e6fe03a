"""What Whisper is fed while it is compressed: spectrograms of speech, and the transcript that the decoder writes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from lillama_core import Inputs, Modality, Recipe, SampleRequest, Samples, UserError
from lillama_core.calibration.audio import RATE, Utterance, read_speech
from lillama_core.modality import IGNORED, random_tokens

from .ctranslate2 import save_processor

PADDING_WEIGHT = 0.0
"""What a frame beyond the end of the sound counts for; the README says how it was chosen."""
HOP = 320
"""Samples between two positions of the encoder: 160 between two frames, and a convolution of stride 2."""
BATCH = 8


class Speech(Modality):
    """A row is one utterance: 30 s of log-mel spectrogram for the encoder, its transcript for the decoder.

    A transcript that is not known is the dense model's own, decoded greedily.
    """

    name = "speech"
    processor_class = "AutoProcessor"

    def check(self, recipe: Recipe, trust_remote_code: bool) -> None:
        if not recipe.calibration:
            raise UserError(
                "speech models need recordings to calibrate on: --calibration FOLDER or MANIFEST.jsonl"
                ' with lines {"audio": …, "text": …}; text is optional'
            )
        # Every file is opened now: a damaged one should not end a run half an hour later.
        _check_count(_utterances(recipe), recipe)

    def load_processor(self, source: Any, spec: str | None) -> Any:
        from transformers import AutoProcessor

        from lillama_core.errors import one_line

        try:
            return AutoProcessor.from_pretrained(spec or source.location, trust_remote_code=source.trust_remote_code)
        except Exception as error:
            where = spec or source.spec
            raise UserError(f"no processor found at {where!r} ({one_line(error)}); name one with --tokenizer") from None

    def save_processor(self, processor: Any, folder: Path) -> None:
        save_processor(processor, folder)

    def probe(self, config: Any) -> Inputs:
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"input_features": sound, "decoder_input_ids": random_tokens(config)}

    def load(self, request: SampleRequest) -> Samples:
        found = _utterances(request.recipe)
        features, frames, digest = [], [], hashlib.sha256()
        request.progress.phase("Spectrograms", len(found))
        for utterance in found:
            sound = utterance.sound()
            features.append(
                request.processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features[0]
            )
            frames.append(-(-len(sound) // HOP))
            digest.update(sound.tobytes())
            request.progress.step(utterance.name)
        spectrograms = torch.stack(features)
        written = _transcripts(found, spectrograms, request)
        digest.update(repr(written).encode())
        tokens, targets = decoder_rows(written, request.model, prompt_length(request.processor))
        positions = torch.arange(request.model.config.max_source_positions)
        inside = positions[None] < torch.tensor(frames)[:, None]
        masks = {
            "encoder": torch.where(inside, 1.0, PADDING_WEIGHT),
            # The token before each target: padding at the end predicts nothing.
            "decoder": lengths_mask([len(row) - 1 for row in written], tokens.shape[1]),
        }
        unknown = sum(u.text is None for u in found)
        description = {
            name: {"kind": "speech", "path": name, "utterances": len(found), "transcribed by the model": unknown}
            for name in request.recipe.calibration
        }
        return Samples(
            {"input_features": spectrograms, "decoder_input_ids": tokens},
            description,
            digest.hexdigest(),
            int(sum(frames)),
            masks,
            targets,
            masks["decoder"],
        )


def _utterances(recipe: Recipe) -> list[Utterance]:
    """The recordings to calibrate on: all there are, or ``recipe.samples`` drawn by the recipe's seed."""
    found = [u for source in recipe.calibration for u in read_speech(source.rpartition("@")[0] or source)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return [found[i] for i in order[: recipe.samples]]


def _check_count(found: list[Utterance], recipe: Recipe) -> None:
    if len(found) < 2 * recipe.batch_size:
        raise UserError(
            f"{', '.join(recipe.calibration)}: {len(found)} recordings; at least two batches of {recipe.batch_size}"
            " are needed: give more, or lower --batch-size"
        )
    for utterance in found:
        utterance.sound()


def prompt_length(processor: Any) -> int:
    """How many tokens the decoder is given before it writes the first of its own."""
    return len(processor.tokenizer.prefix_tokens)


def _transcripts(found: list[Utterance], spectrograms: torch.Tensor, request: SampleRequest) -> list[list[int]]:
    """For every utterance the tokens from the start of the transcript to its end, prompt included."""
    tokenizer = request.processor.tokenizer
    # A space before the first word, as the model itself writes it.
    written = [None if u.text is None else tokenizer(" " + u.text.strip()).input_ids for u in found]
    unknown = [i for i, row in enumerate(written) if row is None]
    for start in range(0, len(unknown), BATCH):
        part = unknown[start : start + BATCH]
        with torch.no_grad():
            rows = request.model.generate(spectrograms[part].to(request.device), max_new_tokens=200).tolist()
        for i, row in zip(part, rows, strict=True):
            # What generate gives has no prompt, and padding behind the end.
            own = [t for t in row if t not in tokenizer.all_special_ids]
            written[i] = [*tokenizer.prefix_tokens, *own, tokenizer.eos_token_id]
    longest = request.model.config.max_target_positions
    return [row[:longest] for row in written if row is not None]


def decoder_rows(written: list[list[int]], model: Any, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder reads and what it is to predict, both [rows, length], from token rows of different lengths."""
    length = max(len(row) for row in written) - 1
    tokens = torch.full((len(written), length), model.config.pad_token_id)
    targets = torch.full((len(written), length), IGNORED)
    for i, row in enumerate(written):
        tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, prompt - 1 : len(row) - 1] = torch.tensor(row[prompt:])
    return tokens, targets


def lengths_mask(lengths: list[int], longest: int) -> torch.Tensor:
    """1 at the first ``lengths[i]`` positions of row i, 0 behind [rows, longest]."""
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).float()
