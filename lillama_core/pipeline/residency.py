"""Whether a run fits, and whether the model is held in memory or read from disk block by block."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lillama_core import strategies
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import dense_blocks
from lillama_core.data.modality import modality_of
from lillama_core.errors import UserError, one_line
from lillama_core.estimates.estimate import Estimate, estimate
from lillama_core.estimates.machine import Machine
from lillama_core.estimates.measure import this_machine_unmeasured
from lillama_core.estimates.memory import Memory
from lillama_core.estimates.shapes import Job, ModelShape, shape_of, split_rows
from lillama_core.estimates.sizes import show_size
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.spec import CompressionSpec, make_plan
from lillama_core.recipe.model import Recipe
from lillama_core.recipe.reading import make_stage

SENTENCE = 48
"""Positions of a short text that goes with other input, such as what is said in a recording."""
FILLED = 0.5
"""Part of a row of sound or the like that is no padding: 0.49 of the recordings that come with lillama."""


@dataclass(frozen=True)
class Residency:
    """How the dense model is held, why, and what the run is expected to take."""

    streamed: bool
    reason: str
    estimate: Estimate | None
    """None where it cannot be told."""

    @property
    def name(self) -> str:
        return "streamed" if self.streamed else "resident"


@dataclass(frozen=True)
class Estimates:
    """What a compression needs on a machine, either way of holding the model."""

    model: ModelShape
    job: Job
    machine: Machine

    def of(self, streamed: bool) -> Estimate:
        return estimate(self.model, self.job, self.machine, streamed)

    @classmethod
    def make(
        cls, spec: CompressionSpec, recipe: Recipe, machine: Machine, half: bool, rows: int | None = None
    ) -> Estimates:
        """From the shapes alone; ``half``: products run in half precision; ``rows`` of data, if that is known."""
        model = _model_shape(spec, recipe)
        return cls(model, job_of(spec, recipe, half, max(b.length for b in model.blocks), rows), machine)


def fits_for_sampling(found: Estimates) -> bool:
    """Whether the whole model fits where it would write its own text."""
    model, machine = found.model, found.machine
    whole = Memory(model, found.job, False, machine.device_memory is not None, machine.libraries)
    needed = model.resident + whole.writing()
    free = machine.device_memory if machine.device_memory is not None else machine.host_memory - machine.libraries
    return needed <= free


def choose_streaming(
    spec: CompressionSpec,
    request: Request,
    device: torch.device,
    half: bool,
) -> Residency:
    """Whether a run on ``device`` holds its model in memory or reads it by blocks, and why.

    Seconds are estimated where ``lillama plan`` has measured this machine before; a compression does not wait for that.
    Raises UserError for a run that does not fit. A model that no estimate can be made of is held in memory, unless
    ``--stream`` asks otherwise.
    """
    try:
        found = Estimates.make(spec, request.recipe, this_machine_unmeasured(device)[0], half)
    except UserError:
        raise
    except Exception as error:  # a model whose forward pass asks for numbers that are not there
        if request.max_memory is not None:
            raise UserError(
                f"what {request.model!r} needs cannot be told ({one_line(error)}): leave out --max-memory"
            ) from None
        return Residency(request.stream is True, f"what it needs cannot be told ({one_line(error)})", None)
    # Once more: to make the estimate has loaded libraries that count as the process's own.
    machine, timed = this_machine_unmeasured(device)
    chosen = choose_residency(request, replace(found, machine=machine))
    if timed or chosen.estimate is None:
        return chosen
    return replace(chosen, estimate=replace(chosen.estimate, seconds={}))


def choose_residency(request: Request, found: Estimates, look_at_disk: bool = True) -> Residency:
    """Hold the model in memory where that fits, else read its blocks one at a time; ``request`` may say which.

    Raises UserError, before anything is loaded, for a run that fits in neither way, and for one that the disk of the
    output has no room for.
    """
    resident, streamed = found.of(False), found.of(True)
    limit = request.max_memory
    lacks_resident = lacks(resident, found.machine, limit)
    lacks_streamed = lacks(streamed, found.machine, limit)
    if request.stream is True:
        chosen = Residency(True, "--stream asks for it", streamed)
        missing = lacks_streamed
    elif request.stream is False:
        chosen = Residency(False, "--no-stream asks for it", resident)
        missing = lacks_resident
    elif lacks_resident is None:
        chosen = Residency(False, "the model fits in memory", resident)
        missing = None
    else:
        chosen = Residency(True, f"held in memory, {lacks_resident}", streamed)
        missing = lacks_streamed
    if missing is not None:
        raise UserError(f"{request.model!r} does not fit: {missing}; {advice(chosen, found, limit, lacks_streamed)}")
    if chosen.streamed and found.job.sampled and not fits_for_sampling(found):
        raise UserError(
            f"{request.model!r} needs the whole model to write its own text: pass --self-share 0 and name data with"
            " --calibration"
        )
    if look_at_disk and chosen.estimate is not None:
        check_disk(request, found, chosen)
    return chosen


def check_streamed(chosen: Residency, request: Request, architecture: Architecture) -> None:
    """Raise UserError for what ``request`` asks for that cannot be done where blocks are read from disk."""
    if not chosen.streamed:
        return
    how = f"the blocks are read from disk one at a time ({chosen.reason})"
    if request.recipe.healing_epochs > 0:
        raise UserError(
            f"--healing-epochs: {how}, and healing needs all of them in memory, of the dense model as well; pass"
            " --no-stream, or run 'lillama finetune' on the result where there is room"
        )
    if request.recipe.target_speedup is not None:
        raise UserError(
            f"--target-speedup: {how}, and a speed can only be measured of a model in memory; pass --no-stream, or give"
            " --reduction instead"
        )
    if request.evaluate and not architecture.evaluation.by_block:
        raise UserError(
            f"--evaluate: {how}, and no metric of architecture {architecture.name!r} measures a model so; pass"
            " --no-stream, or run 'lillama evaluate' on the result where there is room"
        )


def lacks(found: Estimate, machine: Machine, limit: int | None) -> str | None:
    """What a run needs more of than there is, in words; None: it fits."""
    if limit is not None and found.host > limit:
        return f"it needs {show_size(found.host)} of memory, and --max-memory allows {show_size(limit)}"
    if found.needed_host > machine.host_memory:
        return f"it needs {show_size(found.needed_host)} of memory, and {show_size(machine.host_memory)} are available"
    if found.device is not None and machine.device_memory is not None and found.device > machine.device_memory:
        return (
            f"it needs {show_size(found.device)} of memory on the device, and {show_size(machine.device_memory)} are"
            " available"
        )
    return None


def advice(chosen: Residency, found: Estimates, limit: int | None, lacks_streamed: str | None) -> str:
    """Which option would make the run fit, tried on the estimate itself."""
    if not chosen.streamed and lacks_streamed is None:
        return "with --stream it fits"
    job, tried = found.job, []
    if job.batch > 1:
        rows = job.fit + job.choose + job.report
        fewer = split_rows(rows, 1, job.report / rows, bool(job.choose))
        tried.append(("--batch-size 1", _with(job, 1, *fewer)))
    for share in (2, 4, 8, 16):
        whole = [max(job.batch, n // share // job.batch * job.batch) if n else 0 for n in _parts(job)]
        fewer_tokens = f"a {_ORDINALS[share]} of the --tokens"
        tried.append((fewer_tokens, _with(job, job.batch, *whole)))
        if job.batch > 1:
            tried.append((f"{fewer_tokens} and --batch-size 1", _with(job, 1, *whole)))
    for option, other in tried:
        if lacks(estimate(found.model, other, found.machine, True), found.machine, limit) is None:
            return f"with {'--stream and ' if not chosen.streamed else ''}{option} it fits"
    if limit is not None and lacks(found.of(True), found.machine, None) is None:
        return f"raise --max-memory to {show_size(found.of(True).host * 1.02)}"
    return "neither fewer --tokens nor a smaller --batch-size would make it fit: it needs a larger machine"


_ORDINALS = {2: "half", 4: "quarter", 8: "eighth", 16: "sixteenth"}


def _parts(job: Job) -> tuple[int, int, int]:
    return job.fit, job.choose, job.report


def _with(job: Job, batch: int, fit: int, choose: int, report: int) -> Job:
    return replace(
        job,
        fit=fit,
        choose=choose,
        report=report,
        batch=batch,
        sensitivity=min(job.sensitivity, fit),
        rescaling=min(job.rescaling, fit),
        correction=min(job.correction, fit),
    )


def check_disk(request: Request, found: Estimates, chosen: Residency) -> None:
    """Raise UserError where the disk of the output has less room than the run needs, and say what would need less."""
    assert chosen.estimate is not None
    needed = chosen.estimate.disk
    folder = Path(request.output).absolute()
    left = 0
    partial = folder.with_name(folder.name + ".partial")
    if partial.is_dir():
        # What an unfinished run left is gone on with, or removed.
        left = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + left
    if needed > free:
        whole = replace(found.model, blocks=tuple(replace(block, channels=()) for block in found.model.blocks))
        without = replace(found, model=whole).of(chosen.streamed).disk
        channels = f"; with --no-remove-channels {show_size(without)} do" if without < needed else ""
        raise UserError(
            f"the run needs {show_size(needed)} of disk, and {show_size(free)} are free at {str(folder)!r}: name an"
            f" --output on another disk, or pass fewer --tokens{channels}"
        )


def job_of(spec: CompressionSpec, recipe: Recipe, half: bool, length: int, rows: int | None = None) -> Job:
    """What a run of ``recipe`` does, in rows of ``length`` positions."""
    text = modality_of(spec.architecture).name == "text"
    given = rows or (recipe.tokens // recipe.sequence_length if text else recipe.samples)
    tokens = recipe.tokens if text else min(recipe.tokens, max(1, int(given * length * FILLED)))
    initializer = strategies.make("initializers", recipe.init)
    loss = strategies.make("losses", recipe.loss)
    allocator = strategies.make("allocators", recipe.allocation)
    corrects = recipe.correction_tokens > 0 and initializer.corrects
    chooses = recipe.steps > 0 or corrects or recipe.healing_epochs > 0
    fit, choose, report = split_rows(given, recipe.batch_size, recipe.held_out, chooses)
    goes_back = (
        initializer.needs_gradients
        or (loss.needs_sensitivity and recipe.steps > 0)
        or (spec.embedding is not None and initializer.needs_inputs)
    )

    def part(wanted: int) -> int:
        return max(1, round(given * min(1.0, wanted / tokens))) if wanted else 0

    measures = allocator.needs_spectra and initializer.needs_gradients
    options = make_stage(recipe, "allocate").options
    return Job(
        fit=fit,
        choose=choose,
        report=report,
        batch=recipe.batch_size,
        sampled=sampled_rows(recipe, given) if text else 0,
        steps=recipe.steps,
        streams_trained=2 if recipe.mode == "teacher+student" else 1,
        sensitivity=min(fit, part(recipe.sensitivity_tokens)) if goes_back else 0,
        rescaling=min(fit, part(recipe.rescaling_tokens)) if measures else 0,
        parts=int(getattr(options, "parts", 10)),
        correction=min(fit, part(recipe.correction_tokens)) if corrects else 0,
        adapts=initializer.adapts,
        healing=recipe.healing_epochs,
        evaluations=int(getattr(make_stage(recipe, "heal").options, "evaluations", 8)),
        looks=initializer.needs_inputs,
        weighs=loss.needs_sensitivity,
        pivots=any(spec.format.index_bytes(m.map.out_features, m.map.in_features) for m in spec.maps),
        state_size=2 if half else 4,
        half=half,
    )


def sampled_rows(recipe: Recipe, rows: int) -> int:
    """Rows of calibration data that the model writes itself."""
    names = [name.partition("@")[0] for name in recipe.calibration]
    if not names or names == ["self"]:
        return rows
    if "self" in names:
        return round(rows / len(names))
    return round(rows * recipe.self_share)


def _model_shape(spec: CompressionSpec, recipe: Recipe) -> ModelShape:
    architecture = spec.architecture
    modality = modality_of(architecture)
    inputs = dict(modality.dummy_inputs(spec.config))
    for name, tensor in inputs.items():
        if not tensor.is_floating_point() and tensor.dim() == 2:
            length = recipe.sequence_length if modality.name == "text" else SENTENCE
            inputs[name] = torch.zeros(2, length, dtype=tensor.dtype)
    stacks = [spec.blocks.get(name) or dense_blocks(architecture, spec.meta, name) for name in architecture.stacks]
    allocator = strategies.make("allocators", recipe.allocation)
    plan = make_plan(spec, "uniform" if allocator.needs_spectra else recipe.allocation, None)
    stored = stored_dtype(spec)
    written = stored if recipe.dtype is None else getattr(torch, recipe.dtype)
    sizes = stored.itemsize, written.itemsize
    found = (spec.embedding, spec.removes_channels)
    return shape_of(architecture, spec.meta, stacks, plan.ranks, spec.format, inputs, *sizes, *found)


def stored_dtype(spec: CompressionSpec) -> torch.dtype:
    """In which the weights are loaded: float16 of a GGUF file, else as the config says."""
    if spec.source.gguf_file is not None:
        return torch.float16
    found = getattr(spec.config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32
