"""``lillama finetune``: train a compressed model as a whole, by what the dense model says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import Modality, SampleRequest, Samples, as_dtype, made_up_inputs, modality_of
from lillama_core.data.objects import given_data
from lillama_core.data.self_generated.sampling import converted
from lillama_core.data.sharing import shared_samples
from lillama_core.data.sources import SELF, Source
from lillama_core.data.split import CalibrationSplit
from lillama_core.errors import LillamaError, UserError, in_one_line
from lillama_core.healing.objective import Objective
from lillama_core.healing.options import DATA_FIELDS, EPOCHS, TOKENS, HealingOptions
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.loading import check_dtype, check_finite, load_config, load_model
from lillama_core.models.outputs import main_output
from lillama_core.models.source import QUANT_METHOD, ModelSource, locate, model_fingerprint
from lillama_core.output.directory import check_publishable, check_reload, copy_processors, publish
from lillama_core.output.origin import Described, Origin
from lillama_core.output.public import public_data, public_name, public_sources
from lillama_core.output.quantizer import narrow_paths
from lillama_core.output.record import RunRecord, peak_memory_bytes, read_record, versions
from lillama_core.output.run_directory import RunDirectory
from lillama_core.output.shards import quantization_of
from lillama_core.output.verify import WHOLE
from lillama_core.pipeline.alike import check_alike
from lillama_core.pipeline.heal import heal
from lillama_core.recipe.model import COMMAND_LINE, Recipe
from lillama_core.system.devices import choose_autocast, choose_device
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import World, joined
from lillama_core.system.progress import Progress, Verbosity
from lillama_core.system.quiet import quiet
from lillama_core.system.tracking import check_tracker


def data_recipe(objective: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe of which the `DATA_FIELDS` count, some of them ``given`` by the user.

    Without a dense model there is none that could write text. Raises UserError for values that it does not take.
    """
    values = {"tokens": TOKENS, **given}
    if objective == "lm":
        values.setdefault("self_share", 0.0)
    recipe = Recipe().with_options({k.replace("_", "-"): v for k, v in values.items()}, COMMAND_LINE)
    if objective == "lm" and recipe.self_share > 0:
        raise UserError("--self-share: with --objective lm there is no dense model that could write text")
    return recipe


@dataclass(frozen=True)
class FinetuneRequest:
    """What to train, on what, and where to."""

    model: str
    """A directory that ``lillama compress`` or ``lillama finetune`` has made."""
    output: Path
    teacher: str | None = None
    """The dense model; None where the objective looks at no teacher."""
    recipe: Recipe = field(default_factory=lambda: Recipe())
    """Of which the fields of data count."""
    options: HealingOptions = field(default_factory=lambda: HealingOptions())
    epochs: float = EPOCHS
    data: Any = None
    """Data as objects, see `lillama_core.data.objects.given_data`."""
    architecture: str | Architecture | None = None
    tokenizer: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    track: str | None = None
    """The tracker, by the name that accelerate has for it, which gets the numbers of the run as it goes."""
    overwrite: bool = False
    resume: bool = False


def finetune(request: FinetuneRequest, verbosity: Verbosity = "normal") -> RunRecord:
    """Train a compressed model as ``request`` says; the output directory appears only when all is done.

    Raises UserError for what can be known before the training, leaving nothing behind, and LillamaError for what fails
    later, leaving ``OUTPUT.partial``, from which ``resume`` goes on. Several processes share the rows of every step.
    """
    with joined() as world, parsed_once(request.teacher or ""):
        return _finetune(request, verbosity, world)


def _finetune(request: FinetuneRequest, verbosity: Verbosity, world: World) -> RunRecord:
    # Caches of kernels stay as they are: all blocks run in every step, forward and back, each in shapes of its own, and
    # kernels that do not fit would be made anew each time.
    recipe, options = request.recipe, request.options
    given = None if request.data is None else given_data(request.data)
    directory = RunDirectory(request.output)
    if world.is_main:
        directory.check(request.overwrite, request.resume)
    if request.track is not None:
        check_tracker(request.track)
    device = world.device(choose_device(request.device))
    source, config = _compressed(request.model, request.trust_remote_code)
    record = read_record(Path(source.location))
    architecture = find_architecture(config, request.architecture, request.trust_remote_code)
    origin = Described.by_name(record.model, config, architecture, request.trust_remote_code)
    check_publishable(record, origin, request.model)
    objective = Objective.named(options.objective)
    teacher_source = _teacher(request, config, objective)
    sources = [Source.parse(text).name for text in recipe.calibration]
    if teacher_source is None and (SELF in sources or (not sources and given is None)):
        raise UserError("--objective lm needs text that the model did not write: name it by --data, and not 'self'")
    modality = modality_of(architecture)
    if given is None:
        modality.check(recipe)
    else:
        modality.check_given(recipe, given)
    processor = modality.load_processor(source, request.tokenizer)
    with contextlib.ExitStack() as held:
        if world.is_main:
            held.enter_context(directory.locked())
        held.enter_context(in_one_line("what was learnt is kept, and --resume goes on from there"))
        progress = held.enter_context(Progress(verbosity if world.is_main else "quiet"))
        autocast = choose_autocast(recipe.compute, device)
        teacher = None
        if teacher_source is not None:
            progress.line(f"Loading {request.teacher}")
            # Converted from what is stored, as a compression does it: text that was sampled then is the same text.
            stored: Any = torch.float16 if teacher_source.gguf_file is not None else "auto"
            teacher = converted(_open(teacher_source, request, stored, device), autocast or torch.float32)
        progress.line(f"Loading {request.model}")
        student = _open(source, request, torch.float32, device)
        check_finite(student)
        asked = SampleRequest(
            recipe,
            student if teacher is None else teacher,
            processor,
            model_fingerprint(teacher_source or source),
            device,
            autocast,
            progress,
            given,
        )
        data = shared_samples(world, lambda: _load(modality, asked))
        split = CalibrationSplit.of(data, recipe.batch_size, recipe.held_out, chooses=True)
        fingerprint = _fingerprint(request, source, teacher_source, data, device, autocast, world)
        check_alike(world, fingerprint)
        if world.is_main:
            directory.open(fingerprint, request.overwrite)
        world.barrier()
        progress.release()
        settings = {**options.model_dump(), "epochs": request.epochs, **recipe.to_dict()}
        progress.track(request.track if world.is_main else None, request.output.name, settings)
        healing, fidelity = heal(
            student, teacher, split.share(world), options, request.epochs, data.tokens, recipe.seed, autocast,
            progress, directory.healing, world, narrow_paths(student),
        )  # fmt: skip
        record = _described(record, request, healing, fidelity, data, split, world)
        if world.is_main:
            dtype = check_dtype(None, config.dtype or torch.float32, False)
            _write(student, dtype, source, processor, modality, record, origin, directory)
        return record


def _compressed(model: str, trust_remote_code: bool) -> tuple[ModelSource, Any]:
    """Where a compressed model is, and its config; raises UserError for one that is not."""
    source = locate(model, trust_remote_code)
    config = load_config(source, allow_compressed=True)
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    method = method or getattr(quantization, "quant_method", None)
    if str(method) != QUANT_METHOD or not source.is_local or source.gguf_file is not None:
        raise UserError(f"{model!r} is not a directory that 'lillama compress' has made")
    if quantization_of(config).get("quantization"):
        raise UserError(f"{model!r} is quantised: train what it was made of, and quantise that")
    return source, config


def _teacher(request: FinetuneRequest, config: Any, objective: Objective) -> ModelSource | None:
    """Where the dense model is; raises UserError where one is missing, useless or speaks another vocabulary."""
    if request.teacher is None:
        if objective.kd:
            raise UserError("--objective kd needs the dense model: pass --teacher MODEL")
        return None
    if not objective.kd:
        raise UserError("--teacher does nothing with --objective lm, which looks at the data's own tokens alone")
    source = locate(request.teacher, request.trust_remote_code)
    own, other = (c.get_text_config(decoder=True) for c in (config, load_config(source)))
    sizes = [getattr(c, "vocab_size", None) for c in (own, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher {request.teacher!r} has a vocabulary of {sizes[1]}, and model {request.model!r} one of"
            f" {sizes[0]}: predictions can only be compared over the same one"
        )
    return source


def _open(source: ModelSource, request: FinetuneRequest, dtype: Any, device: torch.device) -> nn.Module:
    config = load_config(source, allow_compressed=True)
    found = find_architecture(config, request.architecture, request.trust_remote_code)
    return load_model(source, found, dtype).to(device)


def _load(modality: Modality, asked: SampleRequest) -> Samples:
    return modality.load(asked) if asked.data is None else modality.load_given(asked)


def _fingerprint(
    request: FinetuneRequest,
    source: ModelSource,
    teacher: ModelSource | None,
    data: Samples,
    device: torch.device,
    autocast: torch.dtype | None,
    world: World,
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it goes on with."""
    return {
        "model": model_fingerprint(source),
        "teacher": None if teacher is None else model_fingerprint(teacher),
        "data": data.sha256,
        "options": {**request.options.model_dump(), "epochs": request.epochs},
        "batches": {name: getattr(request.recipe, name) for name in ("batch_size", "held_out", "seed")},
        "versions": versions(),
        "compute": str(autocast),
        "device": device.type,
        "processes": world.size,
    }


def _described(
    record: RunRecord,
    request: FinetuneRequest,
    healing: dict[str, Any],
    fidelity: dict[str, Any] | None,
    data: Samples,
    split: CalibrationSplit,
    world: World,
) -> RunRecord:
    """The record of the compression with what the training adds."""
    seconds = record.elapsed()
    healing |= {
        "teacher": None if request.teacher is None else public_name(request.teacher),
        "data": {
            "sha256": data.sha256,
            "rows": len(data),
            "tokens": data.tokens,
            "sources": public_sources(data.description),
            "recipe": public_data(request.recipe, DATA_FIELDS),
            "parts": split.describe(),
        },
        "seconds": seconds,
        "processes": world.size,
    }
    spent = {**record.seconds, "healing": record.seconds.get("healing", 0.0) + seconds}
    spent["total"] = round(record.seconds.get("total", 0.0) + seconds, 3)
    return replace(
        record,
        healing=[*record.healing, healing],
        # What was measured before the training says nothing of the model after it.
        fidelity=fidelity,
        evaluation=None,
        seconds=spent,
        peak_memory_bytes=max(record.peak_memory_bytes, peak_memory_bytes()),
    )


def _write(
    student: Any,
    dtype: torch.dtype,
    source: ModelSource,
    processor: Any,
    modality: Modality,
    record: RunRecord,
    origin: Origin,
    directory: RunDirectory,
) -> None:
    """Write the trained model and publish the directory once a fresh process has loaded it."""
    result = directory.result
    result.mkdir(exist_ok=True)
    student.to("cpu")
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        check_finite(student)
    except UserError as error:
        raise LillamaError(f"{error} in {str(dtype).removeprefix('torch.')} after the training") from None
    student.config.dtype = dtype
    with quiet():
        student.save_pretrained(result)
    modality.save_processor(processor, result)
    copy_processors(source, result)
    record.bytes["compressed"] = sum(file.stat().st_size for file in result.glob("*.safetensors"))
    inputs = made_up_inputs(origin.architecture, student.config)
    with torch.no_grad():
        expected = main_output(student(**as_dtype(inputs, dtype))).float()
    check_reload(expected, inputs, result, (WHOLE, origin.architecture.auto_class), source.trust_remote_code)
    release_memory()
    publish(record, origin, directory)
