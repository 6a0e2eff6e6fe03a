"""``lillama evaluate``: the metrics of an architecture's plugin, for one model or several side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lillama_core.architecture import Architecture, safe_file_stem
from lillama_core.compute import choose_device
from lillama_core.errors import UserError, one_line
from lillama_core.evaluation import EvaluationOptions, Measurement, Subject
from lillama_core.memory import release_memory
from lillama_core.models import find_architecture, load_config, load_model, locate
from lillama_core.progress import Progress
from lillama_core.run_directory import write_json


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure; the first model is the one that the others are compared with."""

    models: tuple[str, ...]
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Its ``details`` get a folder for each model."""
    baseline_details: Path | None = None
    """Such a folder of an earlier run: its model stands before ``models``, and is not measured again."""
    architecture: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    json_file: Path | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Evaluated:
    """A model and what was measured of it."""

    model: str
    measurements: list[Measurement]


def _check(request: EvaluationRequest) -> None:
    """Raise UserError for what is wrong with the request whatever the models are."""
    options = request.options
    if options.sequence_length < 2:
        raise UserError(f"--sequence-length must be at least 2, not {options.sequence_length}")
    for name, value, least in (
        ("--windows", options.windows, 0),
        ("--limit", options.limit, 1),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    path = request.json_file
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise UserError(f"{str(path)!r} cannot be written")
    folder = options.details
    if folder is not None:
        # It is made when there is something to write.
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"--details {str(folder)!r} cannot be made: {str(there)!r} is not a writable directory")


def _recalled(folder: Path, architecture: Architecture, device: torch.device) -> Subject:
    """The model of which an earlier evaluation left its details in ``folder``."""
    if not folder.is_dir():
        raise UserError(f"--baseline-details {str(folder)!r} is not a directory")
    try:
        notes = architecture.evaluation.recall(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--baseline-details {str(folder)!r} cannot be read: {one_line(error)}") from None
    if not notes:
        raise UserError(
            f"--baseline-details {str(folder)!r} holds nothing that the metrics of architecture {architecture.name!r}"
            " can compare with; measure the model itself with --baseline"
        )
    return Subject(folder.name, None, None, device, notes=notes)


def compare(request: EvaluationRequest) -> list[Evaluated]:
    """Measure every model of ``request`` in turn; raises UserError before the first if one cannot be measured."""
    _check(request)
    device = choose_device(request.device)
    options = request.options
    prepared = []
    for spec in request.models:
        source = locate(spec, request.trust_remote_code)
        config = load_config(source, allow_compressed=True)
        architecture = find_architecture(config, request.architecture, request.trust_remote_code)
        if not architecture.evaluation.metrics:
            raise UserError(f"architecture {architecture.name!r} has no evaluation")
        architecture.evaluation.check(options)
        processor = architecture.modality.load_processor(source, request.tokenizer)
        architecture.evaluation.check_with(processor, options)
        prepared.append((spec, source, architecture, processor))
    found = []
    recalled = request.baseline_details
    baseline = None if recalled is None else _recalled(recalled, prepared[0][2], device)
    with Progress("quiet" if request.quiet else "normal") as progress:
        progress.release()
        for number, (spec, source, architecture, processor) in enumerate(prepared, start=1):
            progress.line(f"Measuring {spec}")
            # Half precision is slow on a CPU, and rounds what is to be compared.
            model: Any = load_model(source, architecture, torch.float32 if device.type == "cpu" else "auto")
            model.to(device)
            subject = Subject(source.short_name, model, processor, device, baseline=baseline)
            own = options
            if options.details is not None:
                own = replace(options, details=options.details / f"{number}-{safe_file_stem(source.short_name)}")
            found.append(Evaluated(spec, architecture.evaluation.run(subject, own, progress.line)))
            subject.model = None
            baseline = baseline or subject
            del model, subject
            release_memory()
    if request.json_file is not None:
        write_json(request.json_file, by_model(found))
    return found


def by_model(found: list[Evaluated]) -> dict[str, list[dict[str, Any]]]:
    """The measurements as JSON, by model; one that is measured again gets a number behind its name."""
    named: dict[str, list[dict[str, Any]]] = {}
    for number, evaluated in enumerate(found, start=1):
        name = evaluated.model if evaluated.model not in named else f"{evaluated.model} ({number})"
        named[name] = [vars(m) for m in evaluated.measurements]
    return named


def show_comparison(found: list[Evaluated]) -> str:
    """A table with a row for each metric and a column for each model, then what each metric means."""
    names = [Path(e.model).name for e in found]
    header = ["metric", *names, *(["change"] if len(found) == 2 else []), "unit", "better"]
    rows, meanings = [header], []
    # Some compare with the first model, which has none of them itself.
    for first in {m.name: m for e in reversed(found) for m in e.measurements}.values():
        values = [next((m for m in e.measurements if m.name == first.name), None) for e in found]
        cells = ["—" if m is None else _number(m) for m in values]
        if len(found) == 2:
            before, after = values
            relative = before is not None and after is not None and before.value != 0
            cells.append(f"{after.value / before.value - 1:+.1%}" if relative and after and before else "")
        rows.append([first.name, *cells, first.unit, first.better])
        meanings.append(f"{first.name}: {first.meaning}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 or i > len(names) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*lines, "", *meanings])


def _number(m: Measurement) -> str:
    digits = 2 if abs(m.value) < 1000 else 0
    # What is small is still not nothing.
    text = f"{m.value:.1e}" if 0 < abs(m.value) < 0.005 else f"{m.value:,.{digits}f}"
    if m.interval is not None:
        low, high = m.interval
        return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
    return text if m.standard_error is None else f"{text} ± {m.standard_error:.{digits}f}"
