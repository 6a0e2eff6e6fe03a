"""What must hold of every architecture, each in a check that computes its expectation by another way than the core.

A check takes a specimen and raises when something is wrong; the message says what, and where.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.auto import AUTO
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, find_blocks
from lillama_core.architecture.targets.convolution import ConvolutionTarget
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, matches_any
from lillama_core.data.modality import Inputs, modality_of
from lillama_core.distillation.training import trained_parameters
from lillama_core.errors import LillamaError, one_line
from lillama_core.models.loading import auto_class, count_parameters
from lillama_core.models.outputs import main_output
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.spec import prepare
from lillama_core.runtime.block_runner import BlockInputs, BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.strategies import make
from lillama_testing.tiny import TinyModel, make_tiny_model

TOLERANCE = 1e-3
"""Relative difference, in the norm, of two computations of one thing in fp32; a mistake shows as more than this."""
NEW_TOKENS = 4
CPU = torch.device("cpu")

Check = Callable[[TinyModel], None]


class CheckFailed(AssertionError):  # noqa: N818  it reads as what happened
    """An architecture does not do what it must."""


@dataclass(frozen=True)
class Outcome:
    """How one check of one kind of model ended."""

    architecture: str
    model_type: str
    check: str
    error: str | None
    """What was wrong, in one line; None: the check passed."""

    @property
    def passed(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class Case:
    """One check of one model type, to be called by a test."""

    architecture: Architecture
    model_type: str
    check: str

    def __str__(self) -> str:
        return f"{self.architecture.name}-{self.model_type}-{self.check}"

    def __call__(self) -> None:
        """Raise what the check raises."""
        CHECKS[self.check](_kept_specimen(self.architecture, self.model_type))


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _kept_specimen(architecture: Architecture, model_type: str) -> TinyModel:
    """The tiny model of a type, made once for all checks of a process."""
    _SCRATCH.append(tempfile.TemporaryDirectory())
    return make_tiny_model(architecture, model_type, Path(_SCRATCH[-1].name))


def require(condition: object, message: str) -> None:
    """Raise CheckFailed with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailed(message)


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise CheckFailed when ``found`` differs from ``expected`` by more than TOLERANCE of its norm."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    require(difference <= TOLERANCE, f"{what} differ by {difference:.2g} of their norm")


# What the checks look at


def all_blocks(tiny: TinyModel, model: nn.Module, choice: MapChoice | None = None) -> list[Block]:
    """The blocks of all stacks."""
    return [b for stack in find_blocks(tiny.architecture, model, choice=choice).values() for b in stack]


def probes(tiny: TinyModel, model: Any) -> Iterator[Inputs]:
    """Made-up inputs of the model: the modality's, and for token models the same with padding on the left."""
    inputs = modality_of(tiny.architecture).dummy_inputs(model.config)
    yield inputs
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :3] = 0
        yield {**inputs, "attention_mask": mask}


def block_calls(
    tiny: TinyModel, model: nn.Module, inputs: Inputs
) -> Iterator[tuple[Block, nn.Module, torch.Tensor, BlockInputs]]:
    """Every block of every stack with the hidden states and other arguments that it gets in the model's own pass."""
    for blocks in find_blocks(tiny.architecture, model).values():
        entering: dict[int, torch.Tensor] = {}

        def note(index: int, entering: dict[int, torch.Tensor] = entering) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering[index] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach().clone()

            return hook

        modules = [model.get_submodule(block.path) for block in blocks]
        handles = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(modules)]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        _, calls = StackHarness(model, tiny.architecture, blocks).record(inputs)
        for block, module, call in zip(blocks, modules, calls, strict=True):
            yield block, module, entering[block.index], call


def output_of(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The model's main output, without gradients."""
    with torch.no_grad():
        return main_output(model(**inputs)).float()


def full_rank_factors(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) with B A = ``weight`` [out, in], at the full rank, through a random orthogonal matrix Q."""
    out_features, in_features = weight.shape
    rank = min(out_features, in_features)
    Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    W = weight.detach().double()
    B, A = (Q, Q.T @ W) if out_features <= in_features else (W @ Q, Q.T)
    return B.to(weight.dtype).contiguous(), A.to(weight.dtype).contiguous()


def replace_at_full_rank(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Put exact factors in the place of every map of ``blocks``."""
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        module = model.get_submodule(block.path)
        for target in block.targets:
            layers: dict[str, nn.Module] = {}
            for map_ in target.maps:
                B, A = full_rank_factors(target.weight(module, map_), generator)
                bias = target.bias(module, map_)
                layers[map_.name] = make("formats", "factored").from_factors(B, A, bias)
            target.replace(module, layers)


# The checks


def linear_parameters(block: nn.Module) -> set[str]:
    """Names of all parameters of ``block`` that hold linear maps: of linear modules, and fused ones of experts."""
    found = set()
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fused = parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if fused or (parameter.dim() == 2 and (isinstance(module, nn.Linear) or LinearTarget.accepts(module))):
                found.add(f"{path}.{name}".removeprefix("."))
    return found


def convolution_parameters(block: nn.Module, asked: tuple[str, ...]) -> set[str]:
    """Names of the weights of the convolutions that are ``asked`` for: no others are maps."""
    return {f"{n}.weight" for n, m in block.named_modules() if ConvolutionTarget.accepts(m) and matches_any(n, asked)}


def covered_parameters(block: nn.Module, description: Block) -> set[str]:
    """Names of the parameters that the maps of ``description`` are views on.

    Found by writing: every map adds one to its own weight, and a parameter must end up as all ones. Raises
    CheckFailed when a map covers an element twice or not at all.
    """
    marked = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in marked.parameters():
            parameter.zero_()
        for target in description.targets:
            for map_ in target.maps:
                weight = target.weight(marked, map_)
                shape = (map_.out_features, map_.in_features)
                require(weight.shape == shape, f"{map_.name} is said to be {shape}, its weight {tuple(weight.shape)}")
                weight.add_(1)
            for tensor in target.idle(marked):
                tensor.add_(1)
    covered = {name for name, p in marked.named_parameters() if p.any()}
    for name, parameter in marked.named_parameters():
        if name in covered:
            require(
                (parameter == 1).all(),
                f"the maps cover {description.path}.{name} in part, or some of it more than once",
            )
    return covered


def check_maps(tiny: TinyModel) -> None:
    """The maps are all linear weights of the blocks, minus the declared exceptions, each element once."""
    architecture = tiny.architecture
    model = tiny.load()
    for include, exceptions in (
        ((), (*architecture.exclude, *architecture.optional)),
        (architecture.optional, architecture.exclude),
    ):
        for description in all_blocks(tiny, model, MapChoice(include=include)):
            block = model.get_submodule(description.path)
            asked = (*architecture.maps, *include)
            expected = linear_parameters(block) | convolution_parameters(block, asked)
            expected = {n for n in expected if not _excepted(n, exceptions)}
            covered = covered_parameters(block, description)
            missed, more = sorted(expected - covered), sorted(covered - expected)
            where = f"of {description.path}"
            require(not missed, f"{missed} {where} are linear maps, neither found nor declared as exceptions")
            require(not more, f"{more} {where} are taken for linear maps, or in spite of an exception")


def _excepted(parameter: str, patterns: tuple[str, ...]) -> bool:
    return matches_any(parameter, patterns) or matches_any(parameter.removesuffix(".weight"), patterns)


def check_observing(tiny: TinyModel) -> None:
    """Watching a site shows exactly the rows that its maps multiply, and what comes of them.

    Through each map's outputs y = W x + b, and through autograd: the gradient of W is the sum over all rows of g x^T,
    with g the gradient at y, so that a row too many or too few shows in it.
    """
    model = tiny.load()
    seen_maps = 0
    for inputs in probes(tiny, model):
        for description, original, hidden, call in block_calls(tiny, model, inputs):
            # The engine works on copies of blocks, in fp32 and apart from the model.
            block = ResidentSource(model, CPU).block(description).requires_grad_(True)
            require(type(block) is type(original), "a copy of a block is of another type")
            rows: dict[str, list[torch.Tensor]] = {m.name: [] for m in description.maps}
            outs: dict[str, list[torch.Tensor]] = {m.name: [] for m in description.maps}
            shown: dict[str, list[torch.Tensor]] = {m.name: [] for m in description.maps}

            def on_input(map_: TargetLinear, x: torch.Tensor, rows: dict[str, list[torch.Tensor]] = rows) -> None:
                rows[map_.name].append(x)

            def on_output(
                map_: TargetLinear,
                y: torch.Tensor,
                outs: dict[str, list[torch.Tensor]] = outs,
                shown: dict[str, list[torch.Tensor]] = shown,
            ) -> None:
                y.retain_grad()
                outs[map_.name].append(y)
                # A block may add something to it in place.
                shown[map_.name].append(y.detach().clone())

            handles = [target.observe(block, on_input, on_output) for target in description.targets]
            for handle in handles:
                handle.__enter__()
            out = tiny.architecture.call_block(block, hidden.requires_grad_(True), call.args, call.kwargs)
            for handle in handles:
                handle.__exit__(None, None, None)
            generator = torch.Generator().manual_seed(0)
            (out * torch.randn(out.shape, generator=generator)).sum().backward()

            # Not a copy of ``block``: it may hold what is on the graph.
            gradients = ResidentSource(model, CPU).block(description)
            for there, here in zip(gradients.parameters(), block.parameters(), strict=True):
                there.data = torch.zeros_like(here) if here.grad is None else here.grad
            for target in description.targets:
                for map_ in target.maps:
                    where = description.full_name(map_)
                    x = _stacked(rows[map_.name], map_.in_features)
                    y = _stacked(shown[map_.name], map_.out_features)
                    require(len(x) == len(y), f"{where} is shown {len(x)} rows and {len(y)} outputs")
                    seen_maps += len(x) > 0
                    W, b = target.weight(block, map_).detach(), target.bias(block, map_)
                    if len(x):
                        multiplied = x @ W.T + (0 if b is None else b.detach())
                        require_close(y, multiplied, f"outputs shown of {where} and W x + b")
                    g = _stacked([_gradient(t) for t in outs[map_.name]], map_.out_features)
                    truth = target.weight(gradients, map_).detach()
                    if truth.norm() == 0 and not len(x):
                        continue
                    require_close(g.T @ x, truth, f"the gradient of {where} and that of the rows shown")
    require(seen_maps, "no map was shown a row")


def _stacked(tensors: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1, width) for t in tensors]) if tensors else torch.zeros(0, width)


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def check_chain(tiny: TinyModel) -> None:
    """Blocks run one after the other, with the arguments recorded for each, give what the whole model gives."""
    model = tiny.load()
    source = ResidentSource(model, CPU)
    for inputs in probes(tiny, model):
        expected = output_of(model, inputs)
        for stack, blocks in find_blocks(tiny.architecture, model).items():
            parent = StackHarness(model, tiny.architecture, blocks)
            hidden, calls = parent.record(inputs)
            runner = BlockRunner(tiny.architecture, [calls], CPU, None)
            with torch.no_grad():
                for block in blocks:
                    hidden = runner(source.block(block), block, 0, hidden)
                found = main_output(parent.outputs(inputs, hidden)).float()
            shown = "with padding" if "attention_mask" in inputs else "without padding"
            require_close(found, expected, f"outputs of the chained {stack} blocks and of the model, {shown},")


def check_full_rank(tiny: TinyModel) -> None:
    """A model whose maps are replaced by factors of full rank gives what it gave, and writes the same tokens."""
    model, replaced = tiny.load(), tiny.load()
    blocks = all_blocks(tiny, model)
    replace_at_full_rank(replaced, blocks)
    for inputs in probes(tiny, model):
        require_close(output_of(replaced, inputs), output_of(model, inputs), "outputs at full rank and dense")
    prompt = prompt_of(model, tiny)
    if prompt is not None:
        require(
            torch.equal(generate(replaced, prompt), generate(model, prompt)),
            "the model at full rank writes other tokens than the dense one",
        )


def check_training(tiny: TinyModel) -> None:
    """In training mode a low-rank model gives the same as in eval mode, and a backward pass reaches every factor."""
    model = tiny.load()
    blocks = all_blocks(tiny, model)
    inputs = modality_of(tiny.architecture).dummy_inputs(model.config)
    idle = _maps_without_rows(tiny, model, inputs)
    replace_at_full_rank(model, blocks)
    expected = output_of(model, inputs)
    model.requires_grad_(False)
    factors: dict[int, torch.Tensor] = {}
    for block in blocks:
        if not block.maps:
            continue
        module = model.get_submodule(block.path)
        found = trained_parameters(module, "factors")
        require(found, f"{block.path} has maps, but nothing that could be trained")
        factors |= {id(p): p for p in found}
    for parameter in factors.values():
        parameter.requires_grad_(True)
    model.train()
    output = main_output(model(**inputs)).float()
    require_close(output.detach(), expected, "outputs in training mode and in eval mode")
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for block in blocks:
        module = model.get_submodule(block.path)
        for target in block.targets:
            for map_ in target.maps:
                name = block.full_name(map_)
                layer = target.layer(module, map_)
                for parameter in trained_parameters(layer, "factors"):
                    if name in idle:
                        continue
                    gradient = parameter.grad
                    require(
                        gradient is not None and torch.isfinite(gradient).all() and gradient.any(),
                        f"no gradient reaches a factor of {name} in training mode",
                    )


def _maps_without_rows(tiny: TinyModel, model: nn.Module, inputs: Inputs) -> set[str]:
    """Maps that no row of ``inputs`` reaches, such as those of an expert that nothing is sent to."""
    reached: set[str] = set()
    blocks = all_blocks(tiny, model)
    contexts = []
    for block in blocks:
        module = model.get_submodule(block.path)

        def note(map_: TargetLinear, rows: torch.Tensor, block: Block = block) -> None:
            if rows.numel():
                reached.add(block.full_name(map_))

        contexts += [target.observe(module, on_input=note) for target in block.targets]
    for context in contexts:
        context.__enter__()
    output_of(model, inputs)
    for context in contexts:
        context.__exit__(None, None, None)
    return {block.full_name(m) for block in blocks for m in block.maps} - reached


def prompt_of(model: Any, tiny: TinyModel) -> torch.Tensor | None:
    """What the model goes on from when it generates; None when it does not generate."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return None
    return modality_of(tiny.architecture).dummy_inputs(model.config)[model.main_input_name]


def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Tokens that the model writes greedily after ``prompt``, a fixed number of them."""
    if prompt.is_floating_point():
        prompt = prompt.to(model.dtype)
    with torch.no_grad():
        written: torch.Tensor = model.generate(
            prompt, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
    return written


def check_compression(tiny: TinyModel) -> None:
    """Two blocks from end to end: compressed, loaded (in a fresh process too), generating, saved and loaded again."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result"
        # In its end the run loads the result in a process of its own and compares the outputs.
        tried = AUTO if tiny.architecture.name == AUTO else tiny.architecture
        recipe = tiny.recipe(reduction=possible_reduction(tiny, tried))
        record = compress(Request(str(tiny.folder), result, recipe, architecture=tried), "quiet")
        ranks = record.plan["ranks"]
        require(ranks or record.plan["channels"], "nothing was made smaller")
        loader = auto_class(tiny.architecture)
        loaded = loader.from_pretrained(result).eval()
        promised, counted = record.parameters["parameters_after"], count_parameters(loaded)
        require(counted == promised, f"the plan promised {promised} parameters, the loaded model has {counted}")
        require(counted < record.parameters["parameters_before"], "the model did not become smaller")
        inputs = modality_of(tiny.architecture).dummy_inputs(loaded.config)
        require(output_of(loaded, inputs).isfinite().all(), "the compressed model gives what is no number")
        prompt = prompt_of(loaded, tiny)
        written = None if prompt is None else generate(loaded, prompt)
        again_at = Path(scratch) / "again"
        loaded.save_pretrained(again_at)
        again = loader.from_pretrained(again_at).eval()
        require(
            torch.equal(output_of(again, inputs), output_of(loaded, inputs)),
            "saved and loaded again, the compressed model gives other outputs",
        )
        if prompt is not None and written is not None:
            require(
                torch.equal(generate(again, prompt), written),
                "saved and loaded again, the compressed model writes other tokens",
            )


def possible_reduction(tiny: TinyModel, tried: str | Architecture) -> float:
    """A fifth, or half of what the maps can give where that is less: embeddings may be most of a tiny model."""
    spec = prepare(str(tiny.folder), tiny.recipe(reduction=1e-3), tried)
    smallest = sum(spec.format.parameters(m.map.out_features, m.map.in_features, 1) for m in spec.maps)
    return min(0.2, (spec.budget.maps_dense - smallest) / spec.budget.reference / 2)


CHECKS: dict[str, Check] = {
    "maps": check_maps,
    "observing": check_observing,
    "chain": check_chain,
    "full-rank": check_full_rank,
    "training": check_training,
    "compression": check_compression,
}
"""All checks by name, the quick ones first."""


def run_check(name: str, tiny: TinyModel, tracebacks: bool = False) -> Outcome:
    """One check of one specimen; whatever it raises is its outcome. ``tracebacks`` are for stderr."""
    error: str | None = None
    try:
        CHECKS[name](tiny)
    # A plugin's own code may raise anything.
    except Exception as failed:
        if tracebacks:
            traceback.print_exception(failed)
        told = isinstance(failed, CheckFailed | LillamaError)
        error = one_line(failed) if told else f"{type(failed).__name__}: {one_line(failed)}"
    return Outcome(tiny.architecture.name, tiny.model_type, name, error)


def cases(architectures: Iterable[Architecture]) -> list[Case]:
    """Every check of every model type of ``architectures``."""
    return [Case(a, t, name) for a in architectures for t in a.model_types for name in CHECKS]


def parametrize_with_checks(architectures: Iterable[Architecture]) -> Any:
    """A decorator for a pytest function that takes ``check`` and calls it: one test for each check."""
    import pytest

    return pytest.mark.parametrize("check", cases(architectures), ids=str)


def check_architecture(architecture: Architecture, tiny: TinyModel | None = None) -> None:
    """Run all checks of an architecture: on ``tiny``, or on a tiny model of each of its model types.

    Raises CheckFailed that lists everything that is wrong. The architecture need not be installed.
    """
    outcomes: list[Outcome] = [] if tiny is None else [run_check(name, tiny) for name in CHECKS]
    with tempfile.TemporaryDirectory() as scratch:
        for model_type in architecture.model_types if tiny is None else ():
            try:
                made = make_tiny_model(architecture, model_type, Path(scratch) / model_type)
            except LillamaError as error:
                outcomes.append(Outcome(architecture.name, model_type, "tiny model", one_line(error)))
            else:
                outcomes += [run_check(name, made) for name in CHECKS]
    require(outcomes, f"architecture {architecture.name!r} claims no model type to try it on; give a specimen")
    wrong = [f"{o.model_type}, {o.check}: {o.error}" for o in outcomes if not o.passed]
    require(not wrong, f"architecture {architecture.name!r}: {'; '.join(wrong)}")
