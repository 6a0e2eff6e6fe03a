"""How far a model's output is from that of the model it is compared with: for models without a task of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from lillama_core.data.comparable import ComparableModality
from lillama_core.data.modality import Inputs, Modality, as_dtype
from lillama_core.errors import UserError, is_out_of_memory, one_line
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.models.outputs import main_output
from lillama_core.system.files import read_tensors, write_tensors


class OutputError:
    """||y - y0|| / ||y0|| of the model's main output y (logits, or else its first output) over all rows.

    y0 is what the baseline, measured first, gave on the very same inputs. Its outputs wait on disk: tables of logits
    can be larger than the model.
    """

    name = "output_error"
    needs_live_baseline = True
    by_block = True

    def __init__(self, modality: ComparableModality) -> None:
        self._modality = modality

    def check(self, options: EvaluationOptions) -> None:
        """Raise UserError when ``options.data`` cannot be read."""
        self._modality.check_evaluation(options)

    @torch.inference_mode()
    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """One measurement, or none for the baseline itself, whose outputs are noted instead."""
        if subject.baseline is None or self.name not in subject.baseline.notes:
            rows = self._modality.evaluation(subject.model, subject.tokenizer, options)
            folder = tempfile.TemporaryDirectory(prefix="lillama-outputs-")
            for i, inputs in enumerate(rows.batches):
                write_tensors(Path(folder.name) / f"{i}.safetensors", {"output": _output(subject, inputs)})
            subject.notes[self.name] = (rows, folder)
            report(
                f"output error: measured against {subject.name} on {rows.what}; a model beside it is needed, so name"
                " the dense one with --baseline"
            )
            return []
        rows, folder = subject.baseline.notes[self.name]
        wrong, size = 0.0, 0.0
        shape: tuple[int, ...] = ()
        for i, inputs in enumerate(rows.batches):
            wanted = read_tensors(Path(folder.name) / f"{i}.safetensors")["output"].double()
            found = _comparable(subject, subject.baseline, inputs, wanted).double()
            wrong += (found - wanted).square().sum().item()
            size += wanted.square().sum().item()
            shape = tuple(wanted.shape[1:])
        report(f"output error: {rows.what}")
        return [
            Measurement(
                name=self.name,
                value=100 * (wrong / max(size, 1e-300)) ** 0.5,
                unit="%",
                better="lower",
                meaning=f"||y - y0|| / ||y0|| of the model's output y {list(shape)} against that of"
                f" {subject.baseline.name}, y0, on {rows.what}.",
            )
        ]


def run_once(subject: Subject, modality: Modality) -> None:
    """A forward pass on made-up input: what the model does while its memory is watched."""
    with torch.inference_mode():
        _output(subject, modality.dummy_inputs(subject.model.config))


def _comparable(subject: Subject, baseline: Subject, inputs: Inputs, wanted: torch.Tensor) -> torch.Tensor:
    """The output of ``subject`` where ``baseline`` gave ``wanted``; UserError when they are models of other kinds."""
    advice = "name the dense model that it was made from with --baseline"
    try:
        found = _output(subject, inputs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{subject.name} cannot take the inputs of {baseline.name} ({one_line(error)}); {advice}"
        ) from error
    if found.shape != wanted.shape:
        raise UserError(
            f"{subject.name} gives outputs of shape {list(found.shape)}, {baseline.name} {list(wanted.shape)} for the"
            f" same inputs: they cannot be compared; {advice}"
        )
    return found


def _output(subject: Subject, inputs: Inputs) -> torch.Tensor:
    """The main output on the CPU in fp32."""
    model: Any = subject.model
    dtype = next(model.parameters()).dtype
    placed = {k: v.to(subject.device) for k, v in as_dtype(inputs, dtype).items()}
    return main_output(model(**placed)).float().cpu()
