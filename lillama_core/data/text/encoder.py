"""Text for models that do not write it: encoders, and pairs of texts for encoder-decoders."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.comparable import ComparableModality, EvaluationRows
from lillama_core.data.hashing import rows_sha256
from lillama_core.data.modality import Inputs, Modality, SampleRequest, Samples
from lillama_core.data.objects import GivenData, TextData
from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.data.sources import SELF, Source
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.data.text.checks import check_evaluation_text
from lillama_core.data.text.modality import Text, fitting, prompts, random_tokens
from lillama_core.data.workload import Meter, Workload, WorkloadOptions, forward, in_batches
from lillama_core.errors import UserError
from lillama_core.recipe.model import Recipe

if TYPE_CHECKING:
    from lillama_core.evaluation.base import EvaluationOptions

ROWS_A_BATCH = 4


class EncoderText(Text, ComparableModality):
    """Rows of tokens as an encoder reads them: with the special tokens that its tokenizer puts at the ends.

    The windows of running text have the length of the recipe; special tokens take the places of the first and last
    ones. The model predicts no next token, so it can write no part of the text itself.
    """

    name = "encoder-text"
    feeds = "input_ids, rows of text"
    calibrates = "named text only (--calibration); --self-share does not apply, since it cannot write text itself"

    def check(self, recipe: Recipe) -> None:
        if not recipe.calibration or any(Source.parse(s).name == SELF for s in recipe.calibration):
            raise UserError(
                "this model predicts no next token and cannot write its calibration text itself:"
                " name a text with --calibration FILE"
            )
        super().check(_without_self(recipe))

    def check_given(self, recipe: Recipe, data: GivenData) -> None:
        super().check_given(recipe.with_options({"self_share": 0.0}), data)

    def load_given(self, request: SampleRequest) -> Samples:
        # Batches are taken as they stand: with whatever special tokens they have.
        return self.load(request) if isinstance(request.data, TextData) else Modality.load_given(self, request)

    def load(self, request: SampleRequest) -> Samples:
        length, longest = request.recipe.sequence_length, longest_row(request.model)
        if longest is not None and length > longest:
            raise UserError(
                f"--sequence-length {length} is more than the {longest} positions that the model knows;"
                f" ask for at most {longest}"
            )
        named = replace(request, recipe=_without_self(request.recipe))
        found = super().load(named)
        made = self.rows(found.inputs["input_ids"], request.model, request.processor)
        # Not of the running text: with other special tokens it is other data.
        hashes = "".join(f"{name} {rows_sha256(rows)}\n" for name, rows in sorted(made.inputs.items()))
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        return replace(made, description=found.description, sha256=sha256, tokens=found.tokens)

    def rows(self, rows: torch.Tensor, model: Any, tokenizer: Any) -> Samples:
        """Samples made of windows of running text [rows, length]."""
        return Samples({"input_ids": with_special_ends(rows, tokenizer)})

    def workloads(self, config: Any, options: WorkloadOptions) -> list[Workload]:
        """Forward passes over texts of each length, in random tokens."""
        room = getattr(config.get_text_config(), "max_position_embeddings", None)
        found = []
        for rows in options.batch_sizes:
            # Some families keep two of their positions for themselves.
            for length in fitting(options.lengths, room, 2):

                def read(model: Any, meter: Meter, length: int = length, rows: int = rows) -> None:
                    forward(model, prompts(model, rows, length), meter)

                name = in_batches(f"texts of {length} tokens", rows)
                found.append(Workload(name, "tokens", rows * length, read))
        return found

    def check_evaluation(self, options: EvaluationOptions) -> None:
        check_evaluation_text(options.data)

    def evaluation(self, model: Any, processor: Any, options: EvaluationOptions) -> EvaluationRows:
        source = Source.parse(options.data) if options.data else Source(str(OFFLINE_TEXT))
        longest = longest_row(model)
        length = options.sequence_length if longest is None else min(options.sequence_length, longest)
        windows = load_text_windows(source, processor, length, options.windows)
        inputs = self.rows(windows, model, processor).inputs
        batches = [
            {k: v[i : i + ROWS_A_BATCH] for k, v in inputs.items()} for i in range(0, len(windows), ROWS_A_BATCH)
        ]
        name = source.name if options.data else "the text shipped"
        return EvaluationRows(batches, f"{len(windows)} rows of {length} tokens of {name}")


class EncoderDecoderText(EncoderText):
    """Rows of running text cut in the middle: the encoder reads the first half, the decoder writes the second."""

    name = "encoder-decoder-text"
    feeds = "input_ids and decoder_input_ids, the two halves of rows of text"

    def workloads(self, config: Any, options: WorkloadOptions) -> list[Workload]:
        return Modality.workloads(self, config, options)

    def check(self, recipe: Recipe) -> None:
        if recipe.sequence_length < 4:
            raise UserError(f"--sequence-length must be at least 4 for two halves, not {recipe.sequence_length}")
        super().check(recipe)

    def dummy_inputs(self, config: Any) -> Inputs:
        tokens = random_tokens(config)
        # Of different lengths, so that a mix-up of the two streams cannot go unnoticed.
        return {"input_ids": tokens[:, :9], "decoder_input_ids": tokens[:, 9:]}

    def rows(self, rows: torch.Tensor, model: Any, tokenizer: Any) -> Samples:
        middle = rows.shape[1] // 2
        read, written = with_special_ends(rows[:, :middle], tokenizer), rows[:, middle:]
        start = torch.full_like(written[:, :1], decoder_start(model))
        shifted = torch.cat((start, written[:, :-1]), dim=1)
        return Samples({"input_ids": read, "decoder_input_ids": shifted.contiguous()}, targets=written.contiguous())


def longest_row(model: Any) -> int | None:
    """How many tokens a row for ``model`` may have; None where its config states no limit."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    # RoBERTa and its relatives number positions from behind that of the padding token.
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    skipped = max((i + 1 for i in (getattr(m, "padding_idx", None) for m in tables) if isinstance(i, int)), default=0)
    return longest - skipped


def decoder_start(model: Any) -> int:
    """The token that the decoder of ``model`` starts from; UserError when its config does not say."""
    for config in (model.config, getattr(model, "generation_config", None)):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise UserError("the model's config has no decoder_start_token_id, the token that its decoder starts from")


def with_special_ends(rows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Token rows [rows, length] whose ends are the special tokens that ``tokenizer`` puts around a text, if any."""
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("the")["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            before, after = dressed[:start], dressed[start + len(plain) :]
            break
    else:
        before, after = [], []
    if len(before) + len(after) >= rows.shape[1]:
        raise UserError(
            f"rows of {rows.shape[1]} tokens have no room beside the {len(before) + len(after)} special tokens at"
            " their ends: raise --sequence-length"
        )
    rows = rows.clone()
    rows[:, : len(before)] = torch.tensor(before, dtype=rows.dtype)
    rows[:, rows.shape[1] - len(after) :] = torch.tensor(after, dtype=rows.dtype)
    return rows


def _without_self(recipe: Recipe) -> Recipe:
    """The recipe with all of its data from the sources that it names: such a model cannot write its own."""
    return recipe.model_copy(update={"self_share": 0.0})
