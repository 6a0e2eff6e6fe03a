"""The pipeline: the list of the stages, the checks before the first, and the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lillama_core import strategies
from lillama_core.data.modality import Modality, modality_of
from lillama_core.data.objects import given_data
from lillama_core.errors import LillamaError, UserError, in_one_line
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.source import model_fingerprint
from lillama_core.output.front_matter import find_license, hub_id
from lillama_core.output.record import RunRecord
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.alike import check_alike
from lillama_core.pipeline.context import Context
from lillama_core.pipeline.evaluate import check_measurable
from lillama_core.pipeline.evaluate_result import evaluate_result, options_for
from lillama_core.pipeline.planning import speed_workload
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.residency import check_streamed, choose_streaming
from lillama_core.pipeline.spec import CompressionSpec, make_plan, prepare
from lillama_core.pipeline.stage import Stage
from lillama_core.recipe.model import Recipe
from lillama_core.recipe.reading import make_stage
from lillama_core.runtime.recording import Recorder
from lillama_core.system.devices import choose_autocast, choose_device
from lillama_core.system.memory import limit_kernel_caches
from lillama_core.system.processes import ALONE, World, joined
from lillama_core.system.progress import Progress, Verbosity
from lillama_core.system.tracking import check_tracker
from lillama_registry import registry

ORDER = ("load", "calibrate", "statistics", "allocate", "blocks", "report", "heal", "write")
"""The stages of lillama by the names under which they are registered, in their order."""


ADVICE = "what was finished is kept, and --resume goes on from there"
"""How the message ends of what fails once the work has begun."""


class CompressionPipeline:
    """Stages in the order in which they run."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Raise LillamaError, naming the stage, when one reads what no earlier one gives."""
        self.stages = list(stages)
        given: set[type] = set()
        for stage in self.stages:
            for needed in stage.reads:
                if needed not in given:
                    raise LillamaError(f"stage {stage.name!r} reads {needed.__name__}, which no earlier stage gives")
            given |= set(stage.gives)

    @classmethod
    def registered(cls, recipe: Recipe | None = None) -> CompressionPipeline:
        """The stages of lillama, and those of plugins behind the stages that they name in ``after``.

        Their options are those of ``recipe``. Raises UserError for a stage that has no place, or options that one does
        not have.
        """
        recipe = recipe or Recipe()
        order = list(ORDER)
        stages: dict[str, Stage] = {name: make_stage(recipe, name) for name in ORDER}
        for name in strategies.names("stages"):
            if name in stages:
                continue
            stage: Stage = make_stage(recipe, name)
            if stage.after not in order:
                raise UserError(
                    f"stage {name!r} of a plugin is to run after {stage.after!r}; stages are {', '.join(order)}"
                )
            stages[name] = stage
            order.insert(order.index(stage.after) + 1, name)
        return cls([stages[name] for name in order])

    def run(self, context: Context) -> RunRecord:
        """Run the stages one after the other; a request that turns out wrong before the first block leaves nothing."""
        if context.request.resume:
            left = [line for stage in self.stages if (line := stage.found(context)) is not None]
            if left:
                context.progress.line(f"Resuming: there are {', '.join(left)}")
        try:
            for stage in self.stages:
                context.enter(stage)
                with context.record.timed(stage.name):
                    stage.run(context)
        except UserError:
            if context.world.is_main and context.directory.is_mere_beginning:
                context.directory.discard()
            raise
        return context.record


def compress(request: Request, verbosity: Verbosity = "normal") -> RunRecord:
    """Compress a model as ``request`` says; the output directory appears only when all is done.

    Raises UserError for what can be known before the first block, leaving nothing behind, and LillamaError for
    what fails later, leaving ``OUTPUT.partial``, from which ``resume`` goes on.

    Of several processes that ``torchrun`` has started the main one writes the result, and its record is the whole one.
    """
    with joined() as world, parsed_once(request.model), begun(request, verbosity, world) as (checked, context):
        record, spec = checked.pipeline.run(context), checked.spec
    # Of several processes the main one goes on alone.
    if request.evaluate and record.bytes:
        evaluate_result(request, record, spec, verbosity)
    return record


@dataclass(frozen=True)
class Checked:
    """A request that nothing speaks against, as far as can be told without weights."""

    request: Request
    directory: RunDirectory
    device: torch.device
    spec: CompressionSpec
    pipeline: CompressionPipeline
    modality: Modality
    processor: Any


def check(request: Request, world: World = ALONE) -> Checked:
    """Find out what can be known of ``request`` before the weights are read, and raise UserError for what is wrong."""
    recipe = request.recipe
    given = None if request.data is None else given_data(request.data)
    directory = RunDirectory(request.output)
    if world.is_main:
        directory.check(request.overwrite, request.resume)
    if request.track is not None:
        check_tracker(request.track)
    device = world.device(choose_device(request.device))
    spec = prepare(request.model, recipe, request.architecture, request.trust_remote_code)
    if not strategies.make("allocators", recipe.allocation).needs_spectra:
        # An allocator may refuse what the budget allows, and this one can be asked already.
        make_plan(spec, recipe.allocation, None)
    pipeline = CompressionPipeline.registered(recipe)
    modality = modality_of(spec.architecture)
    if given is None:
        modality.check(recipe)
    else:
        modality.check_given(recipe, given)
    if recipe.target_speedup is not None:
        speed_workload(modality, spec.config, recipe.speedup_work)
    processor = modality.load_processor(spec.source, request.tokenizer)
    if request.evaluate:
        check_measurable(spec.architecture, processor, options_for(spec.config))
    return Checked(replace(request, data=given), directory, device, spec, pipeline, modality, processor)


@contextlib.contextmanager
def begun(request: Request, verbosity: Verbosity, world: World = ALONE) -> Iterator[tuple[Checked, Context]]:
    """All that the stages of ``request`` need, before the first of them; the lock of its directory is held while open.

    Raises UserError for what is wrong with the request; an error inside is told in one line.
    """
    recipe = request.recipe
    if recipe.healing_epochs <= 0:
        # In a step of healing all blocks run, forward and back: kernels that are not kept are made anew each time.
        limit_kernel_caches()
    checked = check(request, world)
    request, directory, device, spec = checked.request, checked.directory, checked.device, checked.spec
    with contextlib.ExitStack() as held:
        if world.is_main:
            held.enter_context(directory.locked())
        held.enter_context(in_one_line(ADVICE))
        progress = held.enter_context(Progress(verbosity if world.is_main else "quiet"))
        for failure in registry().failures:
            progress.line(f"Plugin {failure.name} of {failure.distribution} is skipped: {failure.reason}")
        for remark in spec.architecture.remarks:
            progress.line(remark)
        autocast = choose_autocast(recipe.compute, device)
        residency = choose_streaming(spec, request, device, autocast is not None)
        check_streamed(residency, request, spec.architecture)
        if residency.streamed:
            progress.line(f"Blocks are read from disk one at a time: {residency.reason}")
        record = RunRecord(
            model=request.model,
            model_fingerprint=model_fingerprint(spec.source),
            architecture=spec.architecture.name,
            recipe=recipe.to_dict(),
            data={},
            base_model=hub_id(spec.source),
            license=find_license(spec) if world.is_main else {},
            tokenizer=request.tokenizer,
            device=str(device),
            compute="float32" if autocast is None else str(autocast).removeprefix("torch."),
            residency=residency.name,
            residency_reason=residency.reason,
            estimate=None if residency.estimate is None else residency.estimate.to_dict(),
            remarks=list(spec.architecture.remarks),
            resumed=world.from_main(lambda: request.resume and directory.path.exists()),
            processes=world.size,
        )
        context = Context(
            request=request,
            recipe=recipe,
            spec=spec,
            architecture=spec.architecture,
            modality=checked.modality,
            processor=checked.processor,
            device=device,
            streams=residency.streamed,
            autocast=autocast,
            recorder=Recorder(spec.architecture, device, autocast),
            initializer=strategies.make("initializers", recipe.init),
            loss=strategies.make("losses", recipe.loss),
            directory=directory,
            record=record,
            progress=progress,
            world=world,
        )
        check_alike(world, context.fingerprint(None))
        progress.track(request.track if world.is_main else None, request.output.name, recipe.to_dict())
        yield checked, context
