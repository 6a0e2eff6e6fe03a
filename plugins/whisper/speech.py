"""What Whisper is fed while it is compressed: spectrograms of speech, and the transcript that the decoder writes."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lillama_core.data.modality import IGNORE_INDEX, Inputs, Modality, SampleRequest, Samples, check_two_batches
from lillama_core.data.objects import DATA, BatchData, inputs_sha256, stack_batches
from lillama_core.data.speech.audio import RATE
from lillama_core.data.speech.choice import check_count, choose_utterances
from lillama_core.data.speech.disturbance import disturbed
from lillama_core.data.speech.utterances import Utterance
from lillama_core.data.text.modality import next_tokens, random_tokens
from lillama_core.data.workload import Meter, Workload, WorkloadOptions, in_batches, placed
from lillama_core.errors import UserError
from lillama_core.recipe.model import Recipe
from lillama_core.system.regular import check_folder

from .ctranslate2 import save_processor
from .languages import is_multilingual, language_code, prompt, usual_language

PADDING_WEIGHT = 0.1
"""What a frame beyond the end of the sound counts for in statistics and loss: the decoder reads those frames, too.

Whisper tiny.en, 10 % removed without training: divergence 0.067 nats a token at 0, 0.023 at 0.1, 0.033 at 1."""
HOP = 320
"""Samples between two positions of the encoder: 160 between two frames, and a convolution of stride 2."""
BATCH = 8


class Speech(Modality):
    """A row is one utterance: 30 s of log-mel spectrogram for the encoder, its transcript for the decoder.

    A transcript that is not known is the dense model's own, decoded greedily. Every second recording is disturbed.
    """

    name = "speech"
    processor_class = "AutoProcessor"

    def check(self, recipe: Recipe) -> None:
        if not recipe.calibration:
            raise UserError(
                "speech models need recordings to calibrate on: --calibration FOLDER or MANIFEST.jsonl"
                ' with lines {"audio": …, "text": …}; text is optional'
            )
        # Every file is opened now: a damaged one should not end a run half an hour later.
        check_count(choose_utterances(recipe), recipe)

    def load_processor(self, source: Any, spec: str | None) -> Any:
        from transformers import AutoProcessor

        from lillama_core.errors import one_line

        check_folder(Path(spec or source.location))
        try:
            return AutoProcessor.from_pretrained(spec or source.location, trust_remote_code=source.trust_remote_code)
        except Exception as error:
            where = spec or source.spec
            raise UserError(f"no processor found at {where!r} ({one_line(error)}); name one with --tokenizer") from None

    def save_processor(self, processor: Any, folder: Path) -> None:
        save_processor(processor, folder)

    def dummy_inputs(self, config: Any) -> Inputs:
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"input_features": sound, "decoder_input_ids": random_tokens(config)}

    def workloads(self, config: Any, options: WorkloadOptions) -> list[Workload]:
        """The encoder's pass over the 30 s that it always reads, and writing a transcript with the cache."""
        seconds = config.max_source_positions * HOP / RATE
        new = max(2, min(options.new_tokens, config.max_target_positions))
        sound = self.dummy_inputs(config)["input_features"][:1]
        found = []
        for rows in options.batch_sizes:
            batch = {"input_features": sound.expand(rows, -1, -1)}

            def encode(model: Any, meter: Meter, batch: Inputs = batch) -> None:
                inputs = placed(batch, model)
                meter.begin()
                model.get_encoder()(**inputs)
                meter.end()

            def write(model: Any, meter: Meter, batch: Inputs = batch) -> None:
                _write(model, placed(batch, model), new, meter)

            found.append(Workload(in_batches("the encoder's passes", rows), "seconds of sound", rows * seconds, encode))
            found.append(Workload(in_batches("decoding", rows), "tokens", rows * (new - 1), write))
        return found

    def load(self, request: SampleRequest) -> Samples:
        found = choose_utterances(request.recipe, request.progress.line)
        features, frames = [], []
        generator = np.random.default_rng(request.recipe.seed)
        request.progress.phase("Spectrograms", len(found))
        for number, utterance in enumerate(found):
            sound = utterance.sound()
            if number % 2:
                sound = disturbed(sound, generator)
            features.append(
                request.processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features[0]
            )
            frames.append(-(-len(sound) // HOP))
            request.progress.step(utterance.name)
        spectrograms = torch.stack(features)
        languages = _languages(found, spectrograms, request)
        written = _transcripts(found, spectrograms, languages, request)
        digest = hashlib.sha256(spectrograms.numpy().tobytes())
        digest.update(repr(written).encode())
        tokens, targets = decoder_rows(written, request.model, prompt_length(request, languages[0]))
        positions = torch.arange(request.model.config.max_source_positions)
        inside = positions[None] < torch.tensor(frames)[:, None]
        masks = {
            "encoder": torch.where(inside, 1.0, PADDING_WEIGHT),
            # The token before each target: padding at the end predicts nothing.
            "decoder": lengths_mask([len(row) - 1 for row in written], tokens.shape[1]),
        }
        unknown = sum(u.text is None for u in found)
        described: dict[str, Any] = {"kind": "speech", "utterances": len(found), "transcribed by the model": unknown}
        if languages[0] is not None:
            described["languages"] = dict(Counter(languages))
        description = {name: {**described, "path": name} for name in request.recipe.calibration}
        return Samples(
            {"input_features": spectrograms, "decoder_input_ids": tokens},
            description,
            digest.hexdigest(),
            int(sum(frames)),
            masks,
            targets,
            (targets != IGNORE_INDEX).float(),
        )

    def load_given(self, request: SampleRequest) -> Samples:
        """Samples of batches with ``input_features`` and either ``labels`` or ``decoder_input_ids``, as they stand.

        Labels are those of training: what the decoder is to write behind its first token, IGNORE_INDEX at padding.
        """
        assert isinstance(request.data, BatchData)
        config = request.model.config
        dummy = self.dummy_inputs(config)
        like = {**dummy, "labels": dummy["decoder_input_ids"]}
        found = stack_batches(request.data, like, request.recipe.samples, optional=("decoder_input_ids", "labels"))
        labels, tokens = found.pop("labels", None), found.get("decoder_input_ids")
        if labels is not None:
            targets, written = labels, labels.masked_fill(labels == IGNORE_INDEX, config.pad_token_id)
            start = torch.full_like(written[:, :1], config.decoder_start_token_id)
            tokens = torch.cat((start, written[:, :-1]), dim=1)
        elif tokens is not None:
            targets = next_tokens(tokens)
        else:
            raise UserError(
                f"{DATA} has neither 'labels' nor 'decoder_input_ids'; give one of them with input_features"
            )
        check_two_batches(len(tokens), request.recipe)
        inputs = {"input_features": found["input_features"], "decoder_input_ids": tokens}
        predicts = (targets != IGNORE_INDEX).float()
        sha256 = inputs_sha256({**inputs, "targets": targets})
        described = {"kind": "batches", "rows": len(tokens), "sha256": sha256}
        frames = found["input_features"].shape[0] * config.max_source_positions
        return Samples(inputs, {DATA: described}, sha256, frames, {"decoder": predicts}, targets, predicts)


def _write(model: Any, inputs: Inputs, new_tokens: int, meter: Meter) -> None:
    """Let the decoder go on from its first token, greedily, without ending; measured from its second token on."""
    heard = model.get_encoder()(**inputs)
    rows = len(inputs["input_features"])
    token = torch.full((rows, 1), model.config.decoder_start_token_id, device=model.device)
    cache = None
    for number in range(new_tokens):
        if number == 1:
            meter.begin()
        out = model(encoder_outputs=heard, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    meter.end()


def prompt_length(request: SampleRequest, language: str | None) -> int:
    """How many tokens the decoder is given before it writes the first of its own."""
    return len(prompt(request.model.generation_config, request.processor.tokenizer, language))


def _languages(found: list[Utterance], spectrograms: torch.Tensor, request: SampleRequest) -> list[str | None]:
    """The code of what is spoken in every utterance; None for all of them where the model writes English alone.

    What the data says, or else the model's settings, or else what the model itself hears.
    """
    settings, tokenizer = request.model.generation_config, request.processor.tokenizer
    if not is_multilingual(settings):
        return [None] * len(found)
    usual = usual_language(settings, tokenizer)
    named = [u.language or usual for u in found]
    codes = [None if name is None else language_code(settings, name) for name in named]
    unknown = [i for i, code in enumerate(codes) if code is None]
    names = {index: token.strip("<|>") for token, index in settings.lang_to_id.items()}
    for start in range(0, len(unknown), BATCH):
        part = unknown[start : start + BATCH]
        with torch.no_grad():
            heard = request.model.detect_language(spectrograms[part].to(request.device)).tolist()
        for i, index in zip(part, heard, strict=True):
            codes[i] = names[index]
    return codes


def _transcripts(
    found: list[Utterance], spectrograms: torch.Tensor, languages: list[str | None], request: SampleRequest
) -> list[list[int]]:
    """For every utterance the tokens from the start of the transcript to its end, prompt included."""
    tokenizer = request.processor.tokenizer
    # A space before the first word, as the model itself writes it.
    written = [
        None if u.text is None else tokenizer.encode(" " + u.text.strip(), add_special_tokens=False) for u in found
    ]
    unknown = [i for i, row in enumerate(written) if row is None]
    for start in range(0, len(unknown), BATCH):
        part = unknown[start : start + BATCH]
        spoken = [languages[i] for i in part]
        told = {} if spoken[0] is None else {"language": spoken, "task": "transcribe"}
        with torch.no_grad():
            rows = request.model.generate(spectrograms[part].to(request.device), max_new_tokens=200, **told).tolist()
        for i, row in zip(part, rows, strict=True):
            # What generate gives has no prompt, and padding behind the end.
            written[i] = [t for t in row if t not in tokenizer.all_special_ids]
    longest = request.model.config.max_target_positions
    settings = request.model.generation_config
    return [
        [*prompt(settings, tokenizer, language), *row, tokenizer.eos_token_id][:longest]
        for language, row in zip(languages, written, strict=True)
        if row is not None
    ]


def decoder_rows(written: list[list[int]], model: Any, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder reads and what it is to predict, both [rows, length], from token rows of different lengths."""
    length = max(len(row) for row in written) - 1
    tokens = torch.full((len(written), length), model.config.pad_token_id)
    targets = torch.full((len(written), length), IGNORE_INDEX)
    for i, row in enumerate(written):
        tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, prompt - 1 : len(row) - 1] = torch.tensor(row[prompt:])
    return tokens, targets


def lengths_mask(lengths: list[int], longest: int) -> torch.Tensor:
    """1 at the first ``lengths[i]`` positions of row i, 0 behind [rows, longest]."""
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).float()
