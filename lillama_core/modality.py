"""What a model is fed: how its calibration data is read, and what else of it belongs beside the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lillama_core.models import ModelSource
    from lillama_core.progress import Progress
    from lillama_core.recipe import Recipe

Inputs = dict[str, torch.Tensor]
"""The keyword arguments of one forward pass of the model; the first dimension of each counts rows."""

IGNORED = -100
"""Target at a position where nothing is to be predicted."""
PROBE_LENGTH = 16


@dataclass(frozen=True)
class Samples:
    """Calibration data, ready for the model."""

    inputs: Inputs
    """Tensors [rows, ...]."""
    description: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What went in, by source; can be written as JSON."""
    sha256: str = ""
    """Of all the data."""
    tokens: int = 0
    """How many tokens, frames or patches the rows hold, for the record."""
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By stack: what each position of its hidden stream counts for [rows, length], 0 at padding; none: all alike."""
    targets: torch.Tensor | None = None
    """The tokens that the model's logits are to predict [rows, length], IGNORED where there is none to predict; None
    when its outputs are not predictions of tokens."""
    output_mask: torch.Tensor | None = None
    """What each position of the logits counts for [rows, length]; None: all alike."""
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By stack that has been run on them already: what its last block gives [rows, length, width]."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def part(self, start: int, stop: int) -> Samples:
        """Rows ``start`` to ``stop`` in the same memory; ``description`` and ``sha256`` stay those of the whole."""
        rows = slice(start, min(stop, len(self)))
        return Samples(
            {k: v[rows] for k, v in self.inputs.items()},
            self.description,
            self.sha256,
            self.tokens * (rows.stop - start) // max(1, len(self)),
            {k: v[rows] for k, v in self.masks.items()},
            None if self.targets is None else self.targets[rows],
            None if self.output_mask is None else self.output_mask[rows],
            {k: v[rows] for k, v in self.outputs.items()},
        )

    def to(self, device: torch.device) -> Samples:
        """These samples on ``device``."""
        return replace(
            self,
            inputs={k: v.to(device) for k, v in self.inputs.items()},
            masks={k: v.to(device) for k, v in self.masks.items()},
            output_mask=None if self.output_mask is None else self.output_mask.to(device),
            outputs={k: v.to(device) for k, v in self.outputs.items()},
        )

    def after(self, stack: str, output: torch.Tensor) -> Samples:
        """These samples, and what the last block of a stack gives for them."""
        return replace(self, outputs={**self.outputs, stack: output})


@dataclass(frozen=True)
class SampleRequest:
    """What a modality gets to load calibration data with."""

    recipe: Recipe
    model: Any
    """The dense model on ``device``."""
    processor: Any
    model_fingerprint: str
    device: torch.device
    autocast: torch.dtype | None
    progress: Progress


class Modality(ABC):
    """Text, speech, images: everything about a model's input that the engine does not need to know."""

    name: str
    processor_class: str = "AutoTokenizer"
    """The transformers class that loads the processor again, for the model card."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise UserError for what is wrong with the recipe's data, as far as is known without a model."""

    @abstractmethod
    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        """The tokenizer or processor at ``spec``, or the model's own; raises UserError when there is none."""

    @abstractmethod
    def save_processor(self, processor: Any, folder: Path) -> None:
        """Write the processor's files, all of them, into ``folder``."""

    @abstractmethod
    def probe(self, config: Any) -> Inputs:
        """Two rows of input of the right shape, the same at every call, made without a processor."""

    @abstractmethod
    def load(self, request: SampleRequest) -> Samples:
        """The calibration data that the recipe asks for; raises UserError when it cannot be had."""


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """``inputs`` with its real numbers (sound, pixels) in ``dtype``; tokens and masks of positions stay whole."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def random_tokens(config: Any, length: int = PROBE_LENGTH) -> torch.Tensor:
    """Two rows of ``length`` tokens [2, length] out of the vocabulary, the same at every call."""
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))


def next_tokens(rows: torch.Tensor) -> torch.Tensor:
    """For each position of token rows [rows, length] the token that follows, IGNORED at the end."""
    return torch.cat((rows[:, 1:], torch.full_like(rows[:, :1], IGNORED)), dim=1)


class Text(Modality):
    """Rows of tokens without padding, for models that predict the next token."""

    name = "text"

    def check(self, recipe: Recipe) -> None:
        from lillama_core.calibration import check_sources
        from lillama_core.errors import UserError

        check_sources(self._options(recipe))
        rows = recipe.tokens // recipe.sequence_length
        if rows < 2 * recipe.batch_size:
            raise UserError(
                f"{recipe.tokens} tokens are {rows} rows of {recipe.sequence_length};"
                f" at least two batches of {recipe.batch_size} rows are needed: raise --tokens or lower --batch-size"
            )

    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        from lillama_core.models import load_tokenizer

        return load_tokenizer(source, spec)

    def save_processor(self, processor: Any, folder: Path) -> None:
        processor.save_pretrained(str(folder))

    def probe(self, config: Any) -> Inputs:
        return {"input_ids": random_tokens(config)}

    def load(self, request: SampleRequest) -> Samples:
        from lillama_core.calibration import load_calibration
        from lillama_core.errors import UserError

        recipe = request.recipe
        data = load_calibration(
            self._options(recipe),
            request.model,
            request.processor,
            model_fingerprint=request.model_fingerprint,
            device=request.device,
            autocast_dtype=request.autocast,
            progress=request.progress,
        )
        if len(data.rows) < 2 * recipe.batch_size:
            # Possible with --use-all-tokens only.
            raise UserError(
                f"the data has {len(data.rows)} rows of {recipe.sequence_length} tokens; at least two batches of"
                f" {recipe.batch_size} rows are needed: lower --batch-size or --sequence-length"
            )
        return self.samples(data.rows, data.description, data.sha256)

    def samples(self, rows: torch.Tensor, description: Mapping[str, dict[str, Any]], sha256: str) -> Samples:
        """The samples made of token rows [rows, length]."""
        return Samples({"input_ids": rows}, description, sha256, rows.numel(), targets=next_tokens(rows))

    @staticmethod
    def _options(recipe: Recipe) -> Any:
        from lillama_core.calibration import CalibrationOptions, Source

        return CalibrationOptions(
            sources=tuple(Source.parse(s) for s in recipe.calibration),
            tokens=recipe.tokens,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            self_share=recipe.self_share,
            use_all=recipe.use_all_tokens,
        )
