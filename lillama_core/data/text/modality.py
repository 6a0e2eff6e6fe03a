"""Rows of text for models that predict the next token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.modality import IGNORE_INDEX, Inputs, Modality, SampleRequest, Samples

if TYPE_CHECKING:
    from lillama_core.models.source import ModelSource
    from lillama_core.recipe.model import Recipe

PROBE_LENGTH = 16


def random_tokens(config: Any, length: int = PROBE_LENGTH) -> torch.Tensor:
    """Two rows of ``length`` tokens [2, length] out of the vocabulary, the same at every call."""
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))


def next_tokens(rows: torch.Tensor) -> torch.Tensor:
    """For each position of token rows [rows, length] the token that follows, IGNORE_INDEX at the end."""
    return torch.cat((rows[:, 1:], torch.full_like(rows[:, :1], IGNORE_INDEX)), dim=1)


class Text(Modality):
    """Rows of tokens without padding, for models that predict the next token."""

    name = "text"

    def check(self, recipe: Recipe) -> None:
        from lillama_core.data.text.checks import check_sources
        from lillama_core.errors import UserError

        check_sources(self._options(recipe))
        rows = recipe.tokens // recipe.sequence_length
        if rows < 2 * recipe.batch_size:
            raise UserError(
                f"{recipe.tokens} tokens are {rows} rows of {recipe.sequence_length};"
                f" at least two batches of {recipe.batch_size} rows are needed: raise --tokens or lower --batch-size"
            )

    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        from lillama_core.models.loading import load_tokenizer

        return load_tokenizer(source, spec)

    def save_processor(self, processor: Any, folder: Path) -> None:
        processor.save_pretrained(str(folder))

    def dummy_inputs(self, config: Any) -> Inputs:
        return {"input_ids": random_tokens(config)}

    def load(self, request: SampleRequest) -> Samples:
        from lillama_core.data.text.calibration import load_calibration
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
        from lillama_core.data.sources import Source
        from lillama_core.data.text.options import CalibrationOptions

        return CalibrationOptions(
            sources=tuple(Source.parse(s) for s in recipe.calibration),
            tokens=recipe.tokens,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            self_share=recipe.self_share,
            use_all=recipe.use_all_tokens,
        )
