"""What ``--evaluate`` adds to a finished compression: both models measured, for the record and the card."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lillama_core.errors import LillamaError, in_one_line
from lillama_core.evaluation.base import EvaluationOptions
from lillama_core.evaluation.comparison import answers_side_by_side
from lillama_core.output.directory import tell
from lillama_core.output.origin import Origin
from lillama_core.pipeline.evaluate import EvaluationRequest, compare_in
from lillama_core.system.files import apply_umask
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import ALONE

if TYPE_CHECKING:
    from lillama_core.output.record import RunRecord
    from lillama_core.pipeline.request import Request
    from lillama_core.system.progress import Verbosity


ANSWERS = 4
"""Answers of each model that the report shows."""


def options_for(config: Any) -> EvaluationOptions:
    """What ``lillama evaluate`` takes by default, in windows that the model has room for."""
    asked = EvaluationOptions()
    room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return replace(asked, sequence_length=min(asked.sequence_length, room)) if isinstance(room, int) else asked


def evaluate_result(request: Request, record: RunRecord, origin: Origin, verbosity: Verbosity) -> None:
    """Measure the dense model and the finished result by their architecture's evaluation, and tell it in the result.

    The result is complete without: where measuring fails, a LillamaError says so, and how to measure it later.
    """
    # What the compression held has to make room for two more models.
    release_memory()
    started = time.monotonic()
    output = str(request.output)
    advice = f"{output!r} is complete but for that; 'lillama evaluate {output}' measures it"
    options = options_for(origin.config)
    if origin.architecture.evaluation.gives_answers:
        options = replace(options, answers=ANSWERS)
    asked = EvaluationRequest(
        models=(request.model, output),
        options=options,
        architecture=request.architecture,
        tokenizer=request.tokenizer,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        # As the run held it: what --stream asks for, or --max-memory.
        stream=True if record.residency == "streamed" else None,
        quiet=verbosity == "quiet",
    )
    with in_one_line(advice):
        try:
            both = compare_in(ALONE, asked)
        except LillamaError as error:
            raise LillamaError(f"the evaluation failed: {error}; {advice}") from error
        except KeyboardInterrupt:
            # There is nothing to resume.
            raise LillamaError(f"interrupted; {advice}") from None
        record.evaluation = {
            "windows": asked.options.windows,
            "sequence_length": asked.options.sequence_length,
            **{
                name: [asdict(measurement) for measurement in evaluated.measurements]
                for name, evaluated in zip(("dense", "compressed"), both, strict=True)
            },
            "left_out": list(dict.fromkeys(line for evaluated in both for line in evaluated.left_out)),
            "answers": [
                {"prompt": prompt, "dense": dense, "compressed": compressed}
                for prompt, (dense, compressed) in answers_side_by_side(both)
            ],
        }
        record.seconds["evaluation"] = round(time.monotonic() - started, 3)
        record.seconds["total"] = record.elapsed()
        tell(record, origin, request.output)
        apply_umask(request.output)
