"""Text that a model writes itself, by plain sampling from its own distribution."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.data.self_generated.cache import BatchCache
from lillama_core.errors import LillamaError, UserError
from lillama_core.models.transformers_adapter import can_use_static_cache
from lillama_core.system.cache import default_cache_dir
from lillama_core.system.progress import Progress
from lillama_core.system.quiet import quiet
from lillama_core.system.seeds import derive_seed, stream

SAMPLER_VERSION = 3
"""To be raised whenever the same seed would give other text, so that old cache files are left alone."""
TEMPERATURE = 1.0
_BATCH_ROWS = 32
# Bounds the memory for keys and values when sequences are long.
_BATCH_TOKENS = 32 * 1024


def batch_rows(sequence_length: int) -> int:
    """Rows sampled side by side; batches are always full, so that a longer run begins with the same rows."""
    return max(1, min(_BATCH_ROWS, _BATCH_TOKENS // sequence_length))


@dataclass(frozen=True)
class SamplingPlace:
    """Where and in which precision to sample, and where to keep the result."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    model_fingerprint: str
    cache_dir: Path | None
    """None: `default_cache_dir`."""


def text_config(model: Any) -> Any:
    """The part of the model's configuration that describes its text decoder."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def check_can_sample(model: Any) -> None:
    """Raise UserError when ``model`` cannot write text from nothing."""
    able = callable(getattr(model, "generate", None)) and getattr(model, "can_generate", lambda: True)()
    if not able:
        raise UserError(
            f"{type(model).__name__} cannot generate text, so it cannot write its own calibration data; "
            "name a file or a dataset and set the self share to 0"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} writes only in answer to an encoder's input, so it cannot write its own "
            "calibration data; name a file or a dataset and set the self share to 0"
        )


def sample_rows(
    model: Any,
    tokenizer: Any,
    rows: int,
    sequence_length: int,
    seed: int,
    place: SamplingPlace,
    progress: Progress,
    whole: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """Sequences that ``model`` writes, int64 ``[rows, sequence_length]`` on the CPU.

    Every other row goes on from the model's start token, the others from one token that is drawn evenly from the
    vocabulary (LLM-QAT, arXiv 2305.17888, section 3.1), behind the start token where the tokenizer begins every text
    with it. SmolLM2-Instruct at 20 % by `fast`, beside an encyclopaedia: perplexity on program code 24 with such rows,
    53 with the start token before all of them, which in that model opens a turn of a chat.

    Temperature 1 and nothing cut off, whatever the model's generation settings. An end-of-text token is kept
    and writing goes on after it, as in pretraining text. Row i depends on the seed and i alone, and batches
    are cached on disk. The global random state and the model's settings are left as they were. Raises
    UserError when the model cannot generate, LillamaError when it gives no valid probabilities.

    ``whole`` gives the model with all its weights in memory, where ``model`` has not: it is asked if there is something
    to be written, and dropped afterwards.
    """
    check_can_sample(model)
    width = batch_rows(sequence_length)
    start = _start_token(model, tokenizer)
    vocabulary = int(text_config(model).vocab_size)
    kept = start is not None and _begins_every_text(tokenizer, start)
    conditions = {
        "model": place.model_fingerprint,
        "sequence_length": sequence_length,
        "batch_rows": width,
        "seed": seed,
        "temperature": TEMPERATURE,
        "start": start,
        "start_kept": kept,
        # The same seed gives other text when rounding differs.
        "precision": f"{place.autocast_dtype or torch.float32}/{place.device.type}",
        "sampler": SAMPLER_VERSION,
    }
    cache = BatchCache(place.cache_dir or default_cache_dir(), conditions, (width, sequence_length), vocabulary)
    count = -(-rows // width)
    found = {number: cache.load(number) for number in range(count)}
    missing = [number for number, batch in found.items() if batch is None]
    if len(missing) < count:
        progress.detail(f"sampled text: {count - len(missing)} of {count} batches from {cache.folder}")
    if missing:
        progress.phase("Sampling text from the model", len(missing))
        writer = model if whole is None else whole()
        dtype = place.autocast_dtype or torch.float32
        if any(p.dtype != dtype for p in writer.parameters() if p.is_floating_point()):
            # Autocast would convert every weight again for every token, and without it weights of several dtypes do
            # not meet; a converted copy does it once.
            writer = converted(writer, dtype)
        with _prepared(writer):
            sampler = _Sampler(writer, start, kept, vocabulary, width, sequence_length, place, progress)
            for number in missing:
                batch = sampler.batch(seed, number)
                found[number] = batch
                try:
                    cache.save(number, batch)
                except OSError as error:
                    progress.line(f"sampled text is not kept for the next run: {error}")
                progress.step(f"{width} x {sequence_length} tokens")
    return torch.cat([batch for batch in found.values() if batch is not None])[:rows]


def converted(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of ``model`` with parameters of ``dtype``; those that have it already are shared, not copied.

    Tables such as rotary frequencies stay in fp32, as ``from_pretrained`` leaves them.
    """
    known: dict[int, Any] = {
        id(p): p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
        if p.is_floating_point()
    }
    return copy.deepcopy(model, known)


def _start_token(model: Any, tokenizer: Any) -> int | None:
    """The token that every row starts with, or None when neither model nor tokenizer has one."""
    config = text_config(model)
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, config):
            token = getattr(holder, name, None)
            if isinstance(token, list):  # a model may have several ends
                token = token[0] if token else None
            if token is not None:
                return int(token)
    return None


def _begins_every_text(tokenizer: Any, start: int) -> bool:
    """Whether ``tokenizer`` puts ``start`` before every text, so that the model never read any without it."""
    return callable(tokenizer) and tokenizer("the")["input_ids"][:1] == [start]


@contextlib.contextmanager
def _prepared(model: Any) -> Iterator[None]:
    """Set evaluation mode and mute transformers; restore the mode and the settings, which sampling replaces."""
    training = model.training
    settings = getattr(model, "generation_config", None)
    model.eval()
    try:
        with quiet():
            yield
    finally:
        model.train(training)
        model.generation_config = settings


class _Second:
    """A processor of logits for `generate` that gives every other row its second token: ``tokens`` [rows // 2, 1]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def __call__(self, written: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if written.shape[1] == 1:
            logits = logits.clone()
            logits[1::2] = torch.full_like(logits[1::2], float("-inf")).scatter(1, self._tokens, 0.0)
        return logits


class _Sampler:
    """Draws batch after batch; each depends on its seed and number alone."""

    def __init__(
        self,
        model: Any,
        start: int | None,
        start_kept: bool,
        vocabulary: int,
        width: int,
        sequence_length: int,
        place: SamplingPlace,
        progress: Progress,
    ) -> None:
        self._model = model
        self._start = start
        self._start_kept = start_kept
        self._vocabulary = vocabulary
        self._shape = (width, sequence_length)
        self._place = place
        self._progress = progress
        # Appending to a growing cache copies all of it for every token; a static one is written in place.
        self._static = can_use_static_cache(model)

    def batch(self, seed: int, number: int) -> torch.Tensor:
        """int64 ``[width, sequence_length]`` on the CPU."""
        if self._static:
            try:
                return self._draw(seed, number)
            except (LillamaError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the claim to support a static cache may be wrong in any way
                self._progress.detail(f"sampling without a static cache: {error}")
                self._static = False
        return self._draw(seed, number)

    def _draw(self, seed: int, number: int) -> torch.Tensor:
        from transformers import GenerationConfig

        width, length = self._shape
        device = self._place.device
        drawn = torch.randint(self._vocabulary, (width, 1), generator=stream(seed, "start", number)).to(device)
        first, second = drawn, None
        if self._start is not None:
            first = torch.full_like(drawn, self._start)
            if self._start_kept:
                second = _Second(drawn[1::2])
            else:
                first[1::2] = drawn[1::2]
        settings = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            pad_token_id=self._start or 0,
            disable_compile=True,
        )
        # Options left open would be filled in from the model's own settings: its end tokens, penalties, …
        self._model.generation_config = settings
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, "sample", number))
            try:
                rows = self._model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    generation_config=settings,
                    logits_processor=[] if second is None else [second],
                    **({"past_key_values": self._static_cache()} if self._static else {}),
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise LillamaError(
                    "the model gives no valid probabilities (inf or nan), so it cannot write calibration "
                    "data; check its weights, or load it in float32 or bfloat16"
                ) from error
        if tuple(rows.shape) != self._shape:
            raise LillamaError(
                f"the model stopped after {rows.shape[1]} of {length} tokens while writing calibration data; "
                "name a file or a dataset and set the self share to 0"
            )
        return rows.to("cpu", torch.int64)

    def _static_cache(self) -> Any:
        """An empty cache for one batch."""
        from transformers import StaticCache

        return StaticCache(config=text_config(self._model), max_cache_len=self._shape[1])
