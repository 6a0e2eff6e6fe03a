"""Rows of text for models that predict the next token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.modality import IGNORE_INDEX, Inputs, Modality, SampleRequest, Samples, check_two_batches
from lillama_core.data.workload import (
    SHORT_PROMPT,
    Meter,
    Workload,
    WorkloadOptions,
    decoding,
    in_batches,
    placed,
    reading,
)

if TYPE_CHECKING:
    from lillama_core.data.objects import GivenData, TextData
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


def fitting(lengths: tuple[int, ...], room: int | None, new_tokens: int) -> list[int]:
    """``lengths``, of which those shrink that leave no room for ``new_tokens`` in a model of ``room`` positions."""
    return sorted({n if room is None else max(1, min(n, room - new_tokens)) for n in lengths})


def prompts(model: Any, rows: int, length: int) -> Inputs:
    """``rows`` of ``length`` random tokens, the same at every call, where ``model`` is."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    tokens = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return placed({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, model)


class Text(Modality):
    """Rows of tokens without padding, for models that predict the next token."""

    name = "text"

    def check(self, recipe: Recipe) -> None:
        self._check(recipe)

    def _check(self, recipe: Recipe, given: TextData | None = None) -> None:
        from lillama_core.data.text.checks import check_sources
        from lillama_core.errors import UserError

        check_sources(self._options(recipe, given))
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

    def workloads(self, config: Any, options: WorkloadOptions) -> list[Workload]:
        """Prompts of each length until the first new token, and decoding behind a short one; in random tokens."""
        room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        new = options.new_tokens if room is None else max(2, min(options.new_tokens, room // 2))
        found = []
        for rows in options.batch_sizes:
            for length in fitting(options.lengths, room, 1):

                def read(model: Any, meter: Meter, length: int = length, rows: int = rows) -> None:
                    reading(model, prompts(model, rows, length), meter)

                name = in_batches(f"prompts of {length} tokens", rows)
                found.append(Workload(name, "tokens", rows * length, read))
            (short,) = fitting((SHORT_PROMPT,), room, new)

            def decode(model: Any, meter: Meter, short: int = short, rows: int = rows) -> None:
                decoding(model, prompts(model, rows, short), new, meter)

            found.append(Workload(in_batches("decoding", rows), "tokens", rows * (new - 1), decode))
        return found

    def check_given(self, recipe: Recipe, data: GivenData) -> None:
        from lillama_core.data.objects import TextData

        if isinstance(data, TextData):
            self._check(recipe, data)
        else:
            super().check_given(recipe, data)

    def load_given(self, request: SampleRequest) -> Samples:
        """Samples of texts, put together as those of a file are; of batches the rows as they stand, ``tokens`` in all.

        The model adds no text of its own to batches.
        """
        from lillama_core.data.hashing import rows_sha256
        from lillama_core.data.objects import DATA, BatchData, stack_batches
        from lillama_core.data.text.calibration import check_rows

        recipe, data = request.recipe, request.data
        if not isinstance(data, BatchData):
            return self.load(request)
        rows = stack_batches(data, {"input_ids": self.dummy_inputs(request.model.config)["input_ids"]}, recipe.tokens)
        tokens = rows["input_ids"]
        tokens = tokens[: max(1, recipe.tokens // max(1, tokens.shape[1]))]
        check_two_batches(len(tokens), recipe)
        check_rows(DATA, tokens, request.model)
        sha256 = rows_sha256(tokens)
        described = {"kind": "batches", "rows": len(tokens), "tokens": tokens.numel(), "sha256": sha256}
        return self.samples(tokens, {DATA: described}, sha256)

    def load(self, request: SampleRequest) -> Samples:
        from lillama_core.data.objects import TextData
        from lillama_core.data.text.calibration import load_calibration
        from lillama_core.errors import UserError

        recipe = request.recipe
        given = request.data if isinstance(request.data, TextData) else None
        data = load_calibration(
            self._options(recipe, given),
            request.model,
            request.processor,
            model_fingerprint=request.model_fingerprint,
            device=request.device,
            autocast_dtype=request.autocast,
            progress=request.progress,
            whole_model=request.whole_model,
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
    def _options(recipe: Recipe, given: TextData | None = None) -> Any:
        from lillama_core.data.objects import DATA
        from lillama_core.data.sources import Source
        from lillama_core.data.text.options import CalibrationOptions

        return CalibrationOptions(
            sources=(*(Source.parse(s) for s in recipe.calibration), *((Source(DATA),) if given else ())),
            tokens=recipe.tokens,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            self_share=recipe.self_share,
            use_all=recipe.use_all_tokens,
            given=given,
        )
