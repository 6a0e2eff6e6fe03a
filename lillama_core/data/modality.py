"""What a model is fed: how its calibration data is read, and what else of it belongs beside the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.data.workload import Workload, WorkloadOptions, forward, in_batches, placed
from lillama_core.errors import UserError
from lillama_core.strategies import make

if TYPE_CHECKING:
    from lillama_core.data.objects import GivenData
    from lillama_core.models.source import ModelSource
    from lillama_core.recipe.model import Recipe
    from lillama_core.system.progress import Progress

Inputs = dict[str, torch.Tensor]
"""The keyword arguments of one forward pass of the model; the first dimension of each counts rows."""

IGNORE_INDEX = -100
"""Target at a position where nothing is to be predicted."""


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
    """The tokens that the model's logits are to predict [rows, length], IGNORE_INDEX where there is none; None when its
    outputs are not predictions of tokens."""
    output_mask: torch.Tensor | None = None
    """What each position of the logits counts for [rows, length]; None: all alike."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def part(self, start: int, stop: int) -> Samples:
        """Rows ``start`` to ``stop`` in the same memory; ``description`` and ``sha256`` stay those of the whole."""
        return self._rows(slice(start, min(stop, len(self))))

    def every(self, first: int, step: int) -> Samples:
        """Every ``step``-th row from row ``first`` on, otherwise as in `part`; there may be none."""
        return self._rows(slice(first, len(self), step))

    def _rows(self, rows: slice) -> Samples:
        return Samples(
            {k: v[rows] for k, v in self.inputs.items()},
            self.description,
            self.sha256,
            self.tokens * len(range(*rows.indices(len(self)))) // max(1, len(self)),
            {k: v[rows] for k, v in self.masks.items()},
            None if self.targets is None else self.targets[rows],
            None if self.output_mask is None else self.output_mask[rows],
        )

    def to(self, device: torch.device) -> Samples:
        """These samples on ``device``."""
        return replace(
            self,
            inputs={k: v.to(device) for k, v in self.inputs.items()},
            masks={k: v.to(device) for k, v in self.masks.items()},
            output_mask=None if self.output_mask is None else self.output_mask.to(device),
        )


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
    data: GivenData | None = None
    """What was handed over as objects: in place of named sources, or texts beside them."""
    whole_model: Callable[[], Any] | None = None
    """Gives the model with all its weights on ``device``, where ``model`` reads its blocks from disk; else None."""


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
    def dummy_inputs(self, config: Any) -> Inputs:
        """Two rows of input of the right shape, the same at every call, made without a processor."""

    @abstractmethod
    def load(self, request: SampleRequest) -> Samples:
        """The calibration data that the recipe asks for; raises UserError when it cannot be had."""

    def workloads(self, config: Any, options: WorkloadOptions) -> list[Workload]:
        """What ``lillama bench`` measures of a model of this ``config``: what such models do in use.

        Here forward passes over what `dummy_inputs` gives.
        """
        inputs = self.dummy_inputs(config)
        found = []
        for rows in options.batch_sizes:
            batch = {k: v[:1].expand(rows, *v.shape[1:]).contiguous() for k, v in inputs.items()}

            def run(model: Any, meter: Any, batch: Inputs = batch) -> None:
                forward(model, placed(batch, model), meter)

            found.append(Workload(in_batches("forward passes", rows), "rows", rows, run))
        return found

    def check_given(self, recipe: Recipe, data: GivenData) -> None:
        """Do what `check` does where data is handed over as objects, without reading it."""
        from lillama_core.data.objects import BatchData

        if not isinstance(data, BatchData):
            raise UserError(f"a model that is fed {self.name} takes batches of its inputs as data=, not texts")
        if recipe.calibration:
            raise UserError("batches in data= are all that a model is calibrated on; leave out --calibration")

    def load_given(self, request: SampleRequest) -> Samples:
        """The samples made of ``request.data``, at most ``recipe.samples`` rows; raises UserError for unfit data.

        Here batches of the inputs that `dummy_inputs` names.
        """
        from lillama_core.data.objects import DATA, BatchData, inputs_sha256, stack_batches

        assert isinstance(request.data, BatchData)
        inputs = stack_batches(request.data, self.dummy_inputs(request.model.config), request.recipe.samples)
        check_two_batches(len(next(iter(inputs.values()))), request.recipe)
        sha256 = inputs_sha256(inputs)
        description = {"kind": "batches", "rows": len(next(iter(inputs.values()))), "sha256": sha256}
        return Samples(inputs, {DATA: description}, sha256)


def check_two_batches(rows: int, recipe: Recipe) -> None:
    """Raise UserError when ``rows`` of objects that were handed over are too few to train on and to hold some out."""
    if rows < 2 * recipe.batch_size:
        raise UserError(
            f"data= has {rows} rows; at least two batches of {recipe.batch_size} are needed: give more, or lower"
            " --batch-size"
        )


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """``inputs`` with its real numbers (sound, pixels) in ``dtype``; tokens and masks of positions stay whole."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def packed_inputs(inputs: Mapping[str, Any], packed: Mapping[str, int]) -> dict[str, Any]:
    """``inputs`` with those of the samples in one row that ``packed`` names: [samples, n, ...] -> [samples n, ...].

    ``packed`` says how many dimensions they have then; what has them already stays.
    """
    joins = {k for k, v in inputs.items() if k in packed and v is not None and v.dim() == packed[k] + 1}
    return {k: v.flatten(0, 1) if k in joins else v for k, v in inputs.items()}


def pack_on_call(model: nn.Module, packed: Mapping[str, int]) -> None:
    """Make ``model`` take the inputs that ``packed`` names as data has them, too; see `packed_inputs`."""
    model.register_forward_pre_hook(partial(_pack, dict(packed)), with_kwargs=True)


def _pack(
    packed: Mapping[str, int], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, packed_inputs(kwargs, packed)


def modality_of(architecture: Any) -> Modality:
    """What the models of ``architecture`` are fed: the modality that it has, or that is registered under its name."""
    named = architecture.modality
    found = make("modalities", named) if isinstance(named, str) else named
    assert isinstance(found, Modality)
    return found


def made_up_inputs(architecture: Any, config: Any) -> Inputs:
    """Two rows of made-up input as a model of ``architecture`` takes them that nobody has adapted."""
    return packed_inputs(modality_of(architecture).dummy_inputs(config), architecture.packed)
