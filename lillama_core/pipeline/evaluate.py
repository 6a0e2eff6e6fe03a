"""``lillama evaluate``: the metrics of an architecture's plugin, for one model or several side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.errors import UserError, one_line
from lillama_core.evaluation.base import Evaluation, EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.comparison import Evaluated, by_model
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.loading import DTYPES, load_config
from lillama_core.models.source import ModelSource, locate
from lillama_core.pipeline.alike import check_alike
from lillama_core.pipeline.opening import lacks_room, open_model
from lillama_core.strategies.validation import LARGEST, shown
from lillama_core.system.devices import choose_device
from lillama_core.system.files import write_json
from lillama_core.system.memory import release_memory
from lillama_core.system.names import safe_file_stem
from lillama_core.system.processes import World, joined
from lillama_core.system.progress import Progress
from lillama_core.system.regular import check_folder, check_new_file, check_new_folder


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure; the first model is the one that the others are compared with."""

    models: tuple[str, ...]
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Its ``details`` get a folder for each model."""
    metrics: tuple[str, ...] = ()
    """Names of those of the architectures' metrics that are measured; empty: all."""
    baseline_details: Path | None = None
    """Such a folder of an earlier run: its model stands before ``models``, and is not measured again."""
    architecture: str | Architecture | None = None
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str | None = None
    """What to compute in: a name of `DTYPES`, or ``auto``, what each model is stored in; None: float32 on a CPU, and
    ``auto`` elsewhere."""
    trust_remote_code: bool = False
    stream: bool | None = None
    """Whether the models' blocks are read from disk whenever they run; None: those of models that do not fit."""
    json_file: Path | None = None
    quiet: bool = False


def _check(request: EvaluationRequest) -> None:
    """Raise UserError for what is wrong with the request whatever the models are."""
    options = request.options
    for name, value, least in (
        ("--sequence-length", options.sequence_length, 2),
        ("--windows", options.windows, 0),
        ("--limit", options.limit, 1),
        ("--shots", options.shots, 0),
        ("--answers", options.answers, 0),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
        if value is not None and value > LARGEST:
            raise UserError(f"{name} must be at most 10^15, not {shown(value)}")
    if request.dtype not in (None, "auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, not {request.dtype!r}")
    if request.json_file is not None:
        check_new_file(request.json_file, "--json")
    if options.details is not None:
        # It is made when there is something to write.
        check_new_folder(options.details, "--details")


def check_measurable(
    architecture: Architecture, processor: Any, options: EvaluationOptions, metrics: tuple[str, ...] = ()
) -> Evaluation:
    """The evaluation of models of ``architecture``, ``metrics`` alone if there are any.

    Raises UserError for what stands against measuring them.
    """
    if not architecture.evaluation.metrics:
        raise UserError(f"architecture {architecture.name!r} has no evaluation")
    evaluation = architecture.evaluation.only(metrics)
    evaluation.check(options)
    evaluation.check_with(processor, options)
    return evaluation


def _dtype(request: EvaluationRequest, device: torch.device) -> torch.dtype | str:
    if request.dtype is not None:
        return DTYPES.get(request.dtype, "auto")
    # Half precision is slow on many a CPU, and rounds what is to be compared.
    return torch.float32 if device.type == "cpu" else "auto"


def _recalled(folder: Path, architecture: Architecture, device: torch.device) -> Subject:
    """The model of which an earlier evaluation left its details in ``folder``."""
    if not folder.is_dir():
        raise UserError(f"--baseline-details {str(folder)!r} is not a directory")
    check_folder(folder)
    try:
        notes = architecture.evaluation.load_saved(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--baseline-details {str(folder)!r} cannot be read: {one_line(error)}") from None
    if not notes:
        raise UserError(
            f"--baseline-details {str(folder)!r} holds nothing that the metrics of architecture {architecture.name!r}"
            " can compare with; measure the model itself with --baseline"
        )
    return Subject(folder.name, None, None, device, notes=notes)


def compare(request: EvaluationRequest) -> list[Evaluated]:
    """Measure every model of ``request`` in turn; raises UserError before the first if one cannot be measured.

    Processes that ``torchrun`` has started share the work; what the main one gives and writes is the whole.
    """
    with joined() as world:
        asked = {"models": list(request.models), "options": str(request.options), "dtype": request.dtype}
        check_alike(world, {**asked, "stream": request.stream, "metrics": list(request.metrics)})
        return compare_in(world, request)


def compare_in(world: World, request: EvaluationRequest) -> list[Evaluated]:
    """`compare` in a job that this process has joined; all processes of ``world`` must call it."""
    with parsed_once(*request.models):
        return _compare(request, world)


@dataclass(frozen=True)
class _Prepared:
    """A model that is known to be one that can be measured."""

    spec: str
    source: ModelSource
    config: Any
    architecture: Architecture
    evaluation: Evaluation
    processor: Any


def _prepared(spec: str, request: EvaluationRequest) -> _Prepared:
    source = locate(spec, request.trust_remote_code)
    config = load_config(source, allow_compressed=True)
    architecture = find_architecture(config, request.architecture, request.trust_remote_code)
    processor = modality_of(architecture).load_processor(source, request.tokenizer)
    evaluation = check_measurable(architecture, processor, request.options, request.metrics)
    return _Prepared(spec, source, config, architecture, evaluation, processor)


def _compare(request: EvaluationRequest, world: World) -> list[Evaluated]:
    _check(request)
    device = world.device(choose_device(request.device))
    options = request.options
    prepared = [_prepared(spec, request) for spec in request.models]
    found: list[Evaluated] = []
    recalled = request.baseline_details
    baseline = None if recalled is None else _recalled(recalled, prepared[0].architecture, device)
    turns = frozenset[str]()
    if baseline is None and len(prepared) > 1:
        turns = frozenset.intersection(*(model.evaluation.in_turns for model in prepared))
    with Progress("quiet" if request.quiet or not world.is_main else "normal") as progress:
        progress.release()
        for number, model in enumerate(prepared, start=1):
            opened = open_model(
                model.source, model.config, model.architecture, _dtype(request, device), device, request.stream
            )
            # Not before: what cannot be loaded ends in the one line that says so.
            how = "" if opened.streamed is None else f", block by block from disk: {opened.streamed}"
            progress.line(f"Measuring {model.spec}{how}")
            name = model.source.short_name
            subject = Subject(
                name,
                opened.model,
                model.processor,
                device,
                baseline=baseline,
                streamed=opened.streamed is not None,
                world=world,
            )
            own = options
            if options.details is not None:
                own = replace(options, details=options.details / f"{number}-{safe_file_stem(name)}")
            measurements = model.evaluation.run(subject, own, progress.line, turns)
            found.append(Evaluated(model.spec, measurements, subject.answers, subject.left_out))
            if turns and number > 1 and world.is_main and not subject.streamed:
                beside = _measure_in_turns(model, prepared[0], subject, own, turns, progress.line)
                measurements += beside[0]
                if number == 2:
                    found[0].measurements.extend(beside[1])
            subject.model = None
            baseline = baseline or subject
            del opened, subject
            release_memory()
    if request.json_file is not None and world.is_main:
        write_json(request.json_file, by_model(found))
    return found


def _measure_in_turns(
    model: _Prepared,
    first: _Prepared,
    subject: Subject,
    options: EvaluationOptions,
    names: frozenset[str],
    report: Report,
) -> tuple[list[Measurement], list[Measurement]]:
    """The metrics of ``names``, of ``subject`` and of its baseline, which is loaded again beside it, in its dtype.

    Nothing where there is no room for both; that is said.
    """
    assert subject.baseline is not None
    dtype = subject.model.dtype
    why = lacks_room(first.source, first.config, first.architecture, dtype, subject.device)
    if why is not None:
        for name in sorted(names):
            subject.left_out.append(f"{name}: left out, it needs {subject.baseline.name!r} in memory as well: {why}")
            report(subject.left_out[-1])
        return [], []
    report(f"Measuring {first.spec} and {model.spec} in turns")
    baseline = open_model(first.source, first.config, first.architecture, dtype, subject.device, stream=False)
    subject.baseline.model = baseline.model
    try:
        return model.evaluation.run_in_turns(subject, options, names, report)
    finally:
        subject.baseline.model = None
