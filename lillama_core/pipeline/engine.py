"""Compression from beginning to end: checks, data, profile, plan, blocks, output."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan, describe_plan
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, dense_blocks
from lillama_core.architecture.targets.embedding import embedding_target
from lillama_core.data.modality import SampleRequest, Samples, modality_of
from lillama_core.data.objects import given_data
from lillama_core.distillation.losses import Loss
from lillama_core.errors import LillamaError, UserError, in_one_line
from lillama_core.evaluation.fidelity import measure_fidelity
from lillama_core.initialization import Initializer
from lillama_core.models.loading import check_dtype, check_finite, count_parameters, load_model
from lillama_core.models.source import model_fingerprint
from lillama_core.output import write_result
from lillama_core.output.record import RunRecord, versions
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.finished_blocks import FinishedBlocks, rounded
from lillama_core.pipeline.spec import CompressionSpec, make_plan, prepare
from lillama_core.pipeline.stack import CalibrationSplit, StackCompressor, StackOutputs
from lillama_core.recipe.model import Recipe
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.modules import swapped_modules
from lillama_core.runtime.recording import RecordedInputs, Recorder
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.dense_pass import profile_blocks, report_undersampled_experts
from lillama_core.statistics.embedding import EmbeddingObserver
from lillama_core.statistics.loss_calibration import (
    PARTS,
    Ablation,
    Ranks,
    kinds_of,
    measure_scales,
    parts_of,
    truncation_error,
)
from lillama_core.statistics.sensitivity import measure_sensitivity
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import make
from lillama_core.system.devices import choose_autocast, choose_device
from lillama_core.system.files import read_json, read_tensors, write_json, write_tensors
from lillama_core.system.memory import limit_kernel_caches, release_memory
from lillama_core.system.progress import Progress, Verbosity
from lillama_registry import registry


@dataclass(frozen=True)
class Request:
    """What to compress and where to; how is the recipe's business."""

    model: str
    output: Path
    recipe: Recipe
    architecture: str | Architecture | None = None
    """By name, or one that no plugin brings; None: the one that claims the model's type."""
    tokenizer: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    data: Any = None
    """Calibration data as objects, see `lillama_core.data.objects.given_data`; None: what the recipe names."""


def compress(request: Request, verbosity: Verbosity = "normal") -> RunRecord:
    """Compress a model as ``request`` says; the output directory appears only when all is done.

    Raises UserError for what can be known before the first block, leaving nothing behind, and LillamaError for
    what fails later, leaving ``OUTPUT.partial``, from which ``resume`` goes on.
    """
    limit_kernel_caches()
    recipe = request.recipe
    given = None if request.data is None else given_data(request.data)
    request = replace(request, data=given)
    directory = RunDirectory(request.output)
    directory.check(request.overwrite, request.resume)
    device = choose_device(request.device)
    prepared = prepare(request.model, recipe, request.architecture, request.trust_remote_code)
    if not make("allocators", recipe.allocation).needs_spectra:
        # An allocator may refuse what the budget allows, and this one can be asked already.
        make_plan(prepared, recipe.allocation, None)
    modality = modality_of(prepared.architecture)
    if given is None:
        modality.check(recipe)
    else:
        modality.check_given(recipe, given)
    processor = modality.load_processor(prepared.source, request.tokenizer)
    advice = "what was finished is kept, and --resume goes on from there"
    with directory.locked(), in_one_line(advice), Progress(verbosity) as progress:
        for failure in registry().failures:
            progress.line(f"Plugin {failure.name} of {failure.distribution} is skipped: {failure.reason}")
        for remark in prepared.architecture.remarks:
            progress.line(remark)
        return _Run(request, prepared, processor, device, directory, progress).run()


class _Run:
    """One compression: the objects that its stages share."""

    def __init__(
        self,
        request: Request,
        prepared: CompressionSpec,
        processor: Any,
        device: torch.device,
        directory: RunDirectory,
        progress: Progress,
    ) -> None:
        self.request = request
        self.recipe = request.recipe
        self.prepared = prepared
        self.architecture = prepared.architecture
        self.modality = modality_of(prepared.architecture)
        self.processor = processor
        self.device = device
        self.progress = progress
        self.autocast = choose_autocast(self.recipe.compute, device)
        self.recorder = Recorder(self.architecture, device, self.autocast)
        self.embedding = None if prepared.embedding is None else EmbeddingObserver(embedding_target(prepared.embedding))
        self.loss: Loss = make("losses", self.recipe.loss)
        self.initializer: Initializer = make("initializers", self.recipe.init)
        self.directory = directory

    def run(self) -> RunRecord:
        prepared, recipe = self.prepared, self.recipe
        fingerprint = model_fingerprint(prepared.source)
        self.record = RunRecord(
            model=self.request.model,
            model_fingerprint=fingerprint,
            architecture=self.architecture.name,
            recipe=recipe.to_dict(),
            data={},
            tokenizer=self.request.tokenizer,
            device=str(self.device),
            compute="float32" if self.autocast is None else str(self.autocast).removeprefix("torch."),
            remarks=list(self.architecture.remarks),
            resumed=self.request.resume and self.directory.path.exists(),
        )
        if self.request.resume:
            # What can be compared before the model is loaded: the data can not.
            self.directory.check_fingerprint(self._fingerprint(None))
        with self.record.timed("load model"):
            self.progress.line(f"Loading {self.request.model}")
            from_gguf = prepared.source.gguf_file is not None
            model = load_model(prepared.source, self.architecture, torch.float16 if from_gguf else "auto")
            check_finite(model)
            self.dtype = check_dtype(recipe.dtype, next(model.parameters()).dtype, from_gguf)
            self.record.dtype = str(self.dtype).removeprefix("torch.")
            self.finished = FinishedBlocks(
                self.directory.blocks, self.initializer, prepared.format, self.dtype, self.device, recipe.seed
            )
            self._upcast(model)
            model.to(self.device)
            self._check_blocks(model)
            release_memory()
        data = self._load_data(model, fingerprint)
        self.directory.open(self._fingerprint(data), self.request.overwrite)
        self.progress.release()
        try:
            return self._compress(model, data)
        except UserError:
            if not any(self.directory.blocks.glob("*.safetensors")):
                self.directory.discard()
            raise

    def _fingerprint(self, data: Samples | None) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with; ``data`` None: not known yet."""
        return {
            "model": self.record.model_fingerprint,
            "architecture": self.architecture.name,
            **({} if data is None else {"data": data.sha256}),
            # The name of a recipe changes nothing.
            "recipe": {k: v for k, v in self.recipe.to_dict().items() if k != "name"},
            "versions": versions(),
            "compute": self.record.compute,
            "device": self.device.type,
        }

    def _upcast(self, model: nn.Module) -> None:
        """Everything but the blocks in fp32: the hidden stream and what the model derives from its dtype follow.

        With several stacks the blocks of one run for real while another is worked on, so that they too are fp32.
        """
        stacks = self.architecture.stacks
        inside: set[int] = set()
        if len(stacks) == 1:
            modules = [model.get_submodule(path) for path in stacks.values()]
            inside = {id(t) for m in modules for t in [*m.parameters(), *m.buffers()]}
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) not in inside and tensor.is_floating_point():
                tensor.data = tensor.data.float()

    def _check_blocks(self, model: nn.Module) -> None:
        """Run the blocks on made-up input: a model that overflows is better named now than by the sampler."""
        inputs = self.modality.dummy_inputs(self.prepared.config)
        source = ResidentSource(model, self.device)
        for blocks in self.prepared.blocks.values():
            parent = StackHarness(model, self.architecture, blocks)
            parent.check_order(self.recorder.on_device(inputs))
            self.recorder.check(parent, inputs, source)

    def _load_data(self, model: nn.Module, fingerprint: str) -> Samples:
        with self.record.timed("calibration data"):
            load = self.modality.load if self.request.data is None else self.modality.load_given
            data = load(
                SampleRequest(
                    self.recipe,
                    model,
                    self.processor,
                    fingerprint,
                    self.device,
                    self.autocast,
                    self.progress,
                    self.request.data,
                )
            )
        self.record.data = {
            "sha256": data.sha256,
            "rows": len(data),
            "tokens": data.tokens,
            "sources": data.description,
        }
        return data

    def _compress(self, model: nn.Module, data: Samples) -> RunRecord:
        prepared, recipe = self.prepared, self.recipe
        whole = len(data) // recipe.batch_size * recipe.batch_size
        batches = [data.part(start, start + recipe.batch_size) for start in range(0, whole, recipe.batch_size)]
        held_out = max(1, round(recipe.held_out * len(batches)))
        source = ResidentSource(model, self.device)
        store = DecompositionStore(self.directory.store)
        stacks: list[StackHarness] = []
        for name in self.architecture.stacks:
            blocks = prepared.blocks.get(name) or dense_blocks(self.architecture, model, name)
            stacks.append(StackHarness(model, self.architecture, blocks, tuple(stacks)))
        parents = {parent.stack: parent for parent in stacks if parent.stack in prepared.blocks}
        *_, last = parents.values()
        for parent in parents.values():
            self.recorder.check(parent, batches[0].inputs, source)
            parent.depends_only_on_upstream_output = parent.depends_only_on_upstream_output and not has_stale_upstream(
                parent, parents
            )

        with self.record.timed("profile"):
            batches = self.run_frozen_stacks(stacks, parents, batches, source)
            training = batches[:-held_out]
            for parent in parents.values():
                training = self._profile(parent, training, source, store)
            # Of the rows that nothing else is fitted to, the frequencies of tokens are not taken either.
            self._profile_embedding(model, data.part(0, len(training) * recipe.batch_size), store)
        self.record.rows_seen = report_undersampled_experts(
            [b for blocks in prepared.blocks.values() for b in blocks], store, self.progress
        )
        with self.record.timed("ranks"):
            plan = self._plan(parents, training, source, store)
        self.record.plan = {"format": plan.format, "ranks": dict(plan.ranks)}
        self.record.shapes = {m.name: [m.map.out_features, m.map.in_features] for m in prepared.maps}
        self.record.parameters = describe_plan(
            prepared.maps, plan, prepared.format, prepared.total_parameters, self.dtype.itemsize
        )
        self.progress.line(
            f"Plan: {len(plan.ranks)} of {len(prepared.maps)} maps low rank,"
            f" {self.record.parameters['parameters_before']:,} ->"
            f" {self.record.parameters['parameters_after']:,} parameters"
        )
        compressor = StackCompressor(
            recipe,
            self.loss,
            self.initializer,
            self.recorder,
            source,
            plan,
            store,
            self.finished,
            self.record,
            self.progress,
        )
        followed = compressor.follow(batches, held_out)
        del training, batches
        with self.record.timed("blocks"):
            ends, dense_embeddings = self._compress_stacks(model, parents, compressor, followed)
        with self.record.timed("report"):
            self.record.fidelity = measure_fidelity(last, ends, self.autocast, dense_embeddings)
        del followed, ends, dense_embeddings
        release_memory()
        with self.record.timed("output"):
            self._finish(model, plan)
        return self.record

    def run_frozen_stacks(
        self,
        stacks: list[StackHarness],
        parents: dict[str, StackHarness],
        batches: list[Samples],
        source: ResidentSource,
    ) -> list[Samples]:
        """``batches``, and what the stacks give of which nothing is chosen, if that is all that others get of them."""
        for parent in stacks:
            if parent.stack in parents or not any(
                parent in later.earlier and later.depends_only_on_upstream_output for later in parents.values()
            ):
                continue
            self.progress.phase(f"Running {parent.stack}", len(batches))
            stack_output = []
            for batch in batches:
                stack_output.append(self.recorder.stack_output(parent, batch.inputs, source).cpu())
                self.progress.step(parent.stack)
            batches = _after(parent, batches, stack_output)
        return batches

    def _compress_stacks(
        self,
        model: nn.Module,
        parents: dict[str, StackHarness],
        compressor: StackCompressor,
        followed: CalibrationSplit,
    ) -> tuple[list[tuple[Samples, torch.Tensor, torch.Tensor]], dict[str, nn.Module]]:
        """Compress the embedding, if asked to, and the stacks, in place.

        Returns what leaves the last stack for each held-out batch, dense and compressed, and the dense modules of the
        embedding.
        """
        dense = followed.batches
        recorded: dict[str, RecordedInputs] = {}
        for name, parent in parents.items():
            if parent.earlier and not parent.depends_only_on_upstream_output:
                # Only the dense model can tell what its blocks get, and parts of it are compressed soon.
                recorded[name] = self.recorder.record(parent, dense)
        dense_embeddings = self._compress_embedding(model, compressor.plan, compressor.store)
        # The student of a later stack lives with the compressed ones below it, its teacher with the dense.
        compressed = dense
        stack_output: StackOutputs = ([], [])
        for position, (name, parent) in enumerate(parents.items()):
            with swapped_modules(model, dense_embeddings):
                teacher = recorded.pop(name, None) or self.recorder.record(parent, dense)
            same = position == 0 and not dense_embeddings
            student = (teacher[0], list(teacher[1])) if same else self.recorder.record(parent, compressed)
            final = position == len(parents) - 1
            if final:
                # What the stacks below gave is in the recordings: some streams less in memory.
                dense, compressed, stack_output = [], [], ([], [])
                followed.batches[:] = [replace(batch, outputs={}) for batch in followed.batches]
            stack_output = compressor.compress(parent, followed, teacher, student)
            self._install(model, parent.blocks, compressor.plan)
            if not final:
                dense, compressed = _after(parent, dense, stack_output[0]), _after(parent, compressed, stack_output[1])
        return [
            (followed.batches[i], stack_output[0][i], stack_output[1][i]) for i in followed.held_out
        ], dense_embeddings

    def _profile(
        self, parent: StackHarness, batches: list[Samples], source: ResidentSource, store: DecompositionStore
    ) -> list[Samples]:
        """Take the maps of one stack apart; the batches, with what the stack gives for them where that came out."""
        blocks = parent.blocks
        needed = self.initializer.needs_gradients or (self.loss.needs_sensitivity and self.recipe.steps > 0)
        # What the embedding's rows are for is only seen in that pass.
        needed = needed or (self.embedding is not None and self.initializer.needs_inputs)
        known = all(store.has_gradients(block) for block in blocks)
        if self.prepared.embedding is not None:
            known = known and store.has(self.prepared.embedding)
        if needed and not known:
            with self.record.timed("sensitivity"):
                self._sensitivity(parent, batches, source, store)
        if all(store.has(block) for block in blocks):
            return batches
        with self.record.timed("statistics"):
            looked_at = batches if self.initializer.needs_inputs else []
            calls, stream = self.recorder.record(parent, looked_at)
            profile_blocks(
                blocks,
                source,
                self.recorder.runner(calls),
                stream,
                self.initializer,
                [tuple(batch.masks.values()) for batch in looked_at],
                store,
                self.progress,
            )
        if parent.stack == list(self.prepared.blocks)[-1] or not looked_at:
            return batches
        return _after(parent, batches, stream)

    def _sensitivity(
        self, parent: StackHarness, batches: list[Samples], source: ResidentSource, store: DecompositionStore
    ) -> None:
        """The sensitivity pass of one stack, into ``profile``."""
        small = self._first_rows(batches, self.recipe.sensitivity_tokens)
        model, entry = parent.model, None
        with contextlib.ExitStack() as observe:
            if self.embedding is None:
                calls, stream = self.recorder.record(parent, small)
            else:
                with self.embedding.lookups(model) as seen:
                    calls, stream = self.recorder.record(parent, small)
                # Only where its rows enter do gradients say what they matter.
                entry = self.embedding.entry if seen else None
                observe.enter_context(self.embedding.observe(model))
            runner = self.recorder.runner(calls)
            for block, found in measure_sensitivity(
                parent, source, runner, small, stream, self.recipe.seed, self.progress, entry
            ):
                store.save_gradients(block, found)

    def _first_rows(self, batches: list[Samples], tokens: int) -> list[Samples]:
        """About ``tokens`` tokens of the data, in batches of two rows: all inputs of all blocks are held for one."""
        # The data may be less than the recipe asks for.
        given = min(self.recipe.tokens, self.record.data["tokens"] or self.recipe.tokens)
        wanted = max(1, round(self.record.data["rows"] * min(1.0, tokens / given)))
        small: list[Samples] = []
        for batch in batches:
            for start in range(0, len(batch), 2):
                if wanted > 0:
                    small.append(batch.part(start, start + min(2, wanted)).to(self.device))
                    wanted -= len(small[-1])
        return small

    def _plan(
        self,
        parents: dict[str, StackHarness],
        batches: list[Samples],
        source: ResidentSource,
        store: DecompositionStore,
    ) -> RankPlan:
        """The ranks of all maps; where energies decide, after they have been set against what they stand for."""
        prepared, recipe = self.prepared, self.recipe
        plan = make_plan(prepared, recipe.allocation, store)
        allocator = make("allocators", recipe.allocation)
        if not (allocator.needs_spectra and self.initializer.needs_gradients and recipe.rescaling_tokens):
            return plan
        path = self.directory.store / "scales.json"
        if not path.is_file():
            small = self._first_rows(batches, recipe.rescaling_tokens)
            ranks = {name: {b.name: r for b in parent.blocks if (r := plan.of(b))} for name, parent in parents.items()}
            steps = sum(len(parts_of(parents[n].blocks, PARTS)) + len(kinds_of(r)) for n, r in ranks.items())
            self.progress.phase("Measuring what each part costs", steps)
            scales: dict[str, float] = {}
            for name, parent in parents.items():
                calls, stream = self.recorder.record(parent, small)

                def low_rank(block: Block, ranks: Ranks) -> nn.Module:
                    module = source.block(block)
                    self.finished.factor(block, module, ranks, store.load(block, ranks)[0])
                    return module.to(self.device).eval()

                trial = Ablation(parent, source, self.recorder.runner(calls), small, stream, low_rank)
                left_out = {
                    block.name: truncation_error(store.load(block)[0], ranks[name].get(block.name, {}))
                    for block in parent.blocks
                }
                scales |= measure_scales(trial, ranks[name], left_out, self.progress.step)
            write_json(path, scales)
            release_memory()
        # Read back: a resumed run has to come to the same ranks.
        self.record.scales = read_json(path)
        return make_plan(prepared, recipe.allocation, store, self.record.scales)

    def _profile_embedding(self, model: nn.Module, data: Samples, store: DecompositionStore) -> None:
        """Take the token embedding apart, if it is to be compressed."""
        block = self.prepared.embedding
        if block is None or self.embedding is None or store.has(block):
            return
        (map_,) = block.maps
        weight = self.embedding.target.weight(model, map_)
        statistics = self.embedding.statistics(weight, data)
        # Decompositions are done in fp64, which not every accelerator has.
        device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
        found = self.initializer.decompose(weight.to(device), statistics.to(device))
        store.save(block, {map_.name: found}, None, {})

    def _compress_embedding(self, model: nn.Module, plan: RankPlan, store: DecompositionStore) -> dict[str, nn.Module]:
        """Put the factors of the token embedding into the model; the dense modules that were there, by path."""
        block = self.prepared.embedding
        if block is None:
            return {}
        ranks = plan.of(block)
        if not ranks:
            self.progress.line(f"{embedding_target(block).name}: stays dense, the plan saves more elsewhere")
            return {}
        target = embedding_target(block)
        (map_,) = block.maps
        path = self.finished.path(block)
        if not self.finished.has(block):
            found, _ = store.load(block)
            generator = torch.Generator().manual_seed(self.recipe.seed)
            weight = target.weight(model, map_).cpu()
            B, A = self.initializer.factors(weight, ranks[map_.name], found[map_.name], generator)
            made = self.prepared.format.from_factors(B, A, None)
            write_tensors(path, rounded(made, self.dtype, target.name))
        layer = self.prepared.format.module(
            map_.out_features, map_.in_features, ranks[map_.name], False, torch.float32, "cpu"
        )
        layer.load_state_dict(read_tensors(path))
        dense = target.modules(model)
        target.replace(model, {target.name: layer.to(self.device).eval().requires_grad_(False)})
        self.progress.line(f"{target.name}: rank {ranks[map_.name]}, read at {', '.join(dense)}")
        return dense

    def _install(self, model: nn.Module, blocks: list[Block], plan: RankPlan) -> None:
        """Put the finished blocks of a stack into the model."""
        for block in blocks:
            # In fp32: what was trained is rounded once, to the dtype of the result.
            finished = self.finished.read(block, model.get_submodule(block.path).float(), plan.of(block))
            if len(self.architecture.stacks) == 1:
                # Nothing runs them again before they are written.
                for parameter in finished.parameters():
                    parameter.data = parameter.data.to(self.dtype)

    def _finish(self, model: nn.Module, plan: RankPlan) -> None:
        """Write the compressed model and make it appear."""
        model.to("cpu")
        # Parameters only: tables such as rotary frequencies are made in fp32, and stay so when the result is loaded.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        counted = count_parameters(model)
        if counted != self.record.parameters["parameters_after"]:
            raise LillamaError(
                f"the model has {counted:,} parameters where the plan promised"
                f" {self.record.parameters['parameters_after']:,}; please report this"
            )
        write_result(model, self.processor, self.prepared, plan, self.record, self.directory, self.progress)


def has_stale_upstream(parent: StackHarness, chosen: Collection[str]) -> bool:
    """Whether an earlier stack stays dense above one that does not: it will say something else, but only when run."""
    return any(
        other.stack not in chosen and any(below.stack in chosen for below in other.earlier) for other in parent.earlier
    )


def _after(parent: StackHarness, batches: list[Samples], stack_output: list[torch.Tensor]) -> list[Samples]:
    """``batches``, and what leaves a stack for each of them."""
    return [batch.after(parent.stack, hidden) for batch, hidden in zip(batches, stack_output, strict=True)]
