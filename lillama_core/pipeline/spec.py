"""What is known before a weight is read: the maps of a model, the budget, and what an allocator makes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from lillama_core.allocation import AllocationRequest
from lillama_core.allocation.base import Measurements, Prices
from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan, make_budget
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, check_apart
from lillama_core.architecture.find import blocks_of, find_architecture
from lillama_core.architecture.targets.channels import bias_of
from lillama_core.architecture.targets.convolution import ConvolutionTarget
from lillama_core.architecture.targets.embedding import embedding_block
from lillama_core.architecture.targets.expert_layouts import fused_experts
from lillama_core.architecture.targets.experts import SharedExpertsTarget
from lillama_core.architecture.targets.grouped import GroupedTarget
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import MapChoice, lies_within, path_matches
from lillama_core.architecture.targets.sorted_rows import SortedTarget
from lillama_core.errors import LillamaError, UserError, nearest
from lillama_core.formats import Format
from lillama_core.formats.trial import check_format
from lillama_core.models.loading import count_parameters, load_config, meta_model
from lillama_core.models.source import ModelSource, locate
from lillama_core.recipe.model import Recipe
from lillama_core.recipe.reading import check_options_are_read
from lillama_core.statistics.loss_calibration import scaled_spectrum
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import StrategyChoice, make


@dataclass(frozen=True)
class CompressionSpec:
    """All that is known before a weight is read."""

    source: ModelSource
    config: Any
    architecture: Architecture
    meta: nn.Module
    """The model without weights: shapes and names."""
    blocks: dict[str, list[Block]]
    maps: list[PlannedMap]
    total_parameters: int
    budget: Budget
    format: Format
    embedding: Block | None = None
    """The token embedding, when it is to be compressed."""
    removes_channels: bool = False
    """Whether whole channels may be taken out of blocks."""

    @property
    def all_blocks(self) -> list[Block]:
        """Everything that holds maps, in forward order."""
        first = [] if self.embedding is None else [self.embedding]
        return first + [block for stack in self.blocks.values() for block in stack]


def prepare(
    model: str,
    recipe: Recipe,
    architecture: str | Architecture | None = None,
    trust_remote_code: bool = False,
    known: CompressionSpec | None = None,
    with_weights: bool = True,
) -> CompressionSpec:
    """Find the maps of a model and the budget from its config alone, on the meta device.

    Its weights need be there only where something is to be done ``with_weights``.
    What is ``known`` of the same model by another recipe need not be read again: a config in GGUF takes two seconds.
    """
    format_ = make("formats", recipe.format)
    check_options_are_read(recipe)
    if not math.isfinite(recipe.reduction) or not 0 < recipe.reduction < 1:
        raise UserError(f"the reduction must be a number between 0 and 1, such as 0.2; got {recipe.reduction:g}")
    if recipe.target_speedup is not None and not getattr(make("allocators", recipe.allocation), "reads_prices", False):
        raise UserError(
            f"--target-speedup: the allocator {recipe.allocation.name!r} shares out parameters, not time;"
            " 'spectrum' does"
        )
    if getattr(make("allocators", recipe.allocation), "needs_measurements", False) and not recipe.rescaling_tokens:
        raise UserError(
            f"--rescaling-tokens 0: the allocator {recipe.allocation.name!r} runs the model on those tokens; give it"
            " some, such as 2048"
        )
    source = locate(model, trust_remote_code, with_weights) if known is None else known.source
    config = load_config(source) if known is None else copy.deepcopy(known.config)
    found = find_architecture(config, architecture, trust_remote_code)
    meta = meta_model(config, found, trust_remote_code)
    choice = MapChoice(recipe.include, recipe.exclude, recipe.share_experts)
    blocks, reference = blocks_of(found, meta, recipe.stacks, choice)
    check_choice(found, meta, choice)
    check_apart(found, meta)
    embedding = _chosen_embedding(recipe, meta, format_)
    whole = blocks if embedding is None else {embedding.stack: [embedding], **blocks}
    targets = [target for stack in whole.values() for block in stack for target in block.targets]
    for target in targets:
        target.check(format_)
    if recipe.share_experts and not any(target.kind == SharedExpertsTarget.kind for target in targets):
        raise UserError(f"--share-experts: model {model!r} has no experts")
    removes_channels = _removes_channels(recipe)
    if recipe.remove_channels and not any(block.channels for stack in blocks.values() for block in stack):
        raise UserError(
            f"--remove-channels: no block of model {model!r} has a net of linear maps that could lose channels"
        )
    maps = planned_maps(whole, meta, removes_channels)
    check_format(format_, {(m.map.out_features, m.map.in_features) for m in maps})
    of_what = "the model" if not recipe.stacks else f"the stacks {', '.join(recipe.stacks)}"
    return CompressionSpec(
        source,
        config,
        found,
        meta,
        blocks,
        maps,
        count_parameters(meta),
        make_budget(
            maps, reference, _reduction(recipe, maps, reference, count_parameters(meta), format_), format_, of_what
        ),
        format_,
        embedding,
        removes_channels,
    )


def _reduction(recipe: Recipe, maps: list[PlannedMap], reference: int, total: int, format_: Format) -> float:
    """What part of ``reference`` parameters to remove, of a model that has ``total``.

    For a speed, what would give it if time were parameters of maps, as far as they can give that.
    """
    if (target := recipe.target_parameters) is not None:
        if target >= total:
            raise UserError(f"--target-parameters {target:,} is nothing to do: the model has {total:,}")
        if total - target >= reference:
            raise UserError(f"--target-parameters {target:,} is out of reach: only {reference:,} are compressed")
        return (total - target) / reference
    if recipe.target_speedup is None:
        return recipe.reduction
    dense = sum(m.dense_parameters for m in maps)
    most = dense - sum(format_.parameters(m.map.out_features, m.map.in_features, 1) for m in maps)
    return min((1 - 1 / recipe.target_speedup) * dense, 0.99 * most) / reference


def _chosen_embedding(recipe: Recipe, model: nn.Module, format_: Format) -> Block | None:
    """The token embedding if it is to be compressed; UserError if that was asked for and cannot be."""
    # As an input the embedding is a table, in which nothing is multiplied.
    if recipe.compress_embeddings is False or recipe.target_speedup is not None:
        return None
    if recipe.compress_embeddings:
        if recipe.stacks:
            raise UserError("--compress-embeddings and --stacks exclude each other: the embedding is in no stack")
        return embedding_block(model)
    comparable = (
        make("initializers", recipe.init).needs_gradients and make("allocators", recipe.allocation).needs_spectra
    )
    if recipe.stacks or not comparable:
        return None
    try:
        block = embedding_block(model)
        for target in block.targets:
            target.check(format_)
    except UserError:
        # Nobody asked for it: images have no tokens.
        return None
    return block


def _removes_channels(recipe: Recipe) -> bool:
    if recipe.remove_channels is not None:
        return recipe.remove_channels
    allocator, initializer = make("allocators", recipe.allocation), make("initializers", recipe.init)
    # A plugin's may be of a class of its own.
    comparable = getattr(initializer, "needs_gradients", False) or not getattr(allocator, "compares_channels", True)
    return getattr(allocator, "removes_channels", False) and comparable


def check_choice(architecture: Architecture, model: nn.Module, choice: MapChoice) -> None:
    """Raise UserError for a pattern that no linear map of any block matches, and no module of experts."""
    modules = [block for path in architecture.stacks.values() for block in model.get_submodule(path).children()]
    experts = {name: known for block in modules for name, known in fused_experts(block).items()}
    unknown = tuple(name for name, known in experts.items() if not known)
    everything = MapChoice(choice.include, unknown, choice.share_experts)
    names = set(experts)
    names |= {m.name for block in modules for target in architecture.targets(block, everything) for m in target.maps}
    single = (LinearTarget, ConvolutionTarget, GroupedTarget, SortedTarget)
    names |= {n for block in modules for n, m in block.named_modules() if any(kind.accepts(m) for kind in single)}
    for option, patterns in (("--include", choice.include), ("--exclude", choice.exclude)):
        for pattern in patterns:
            if not any(path_matches(name, pattern) for name in names):
                raise UserError(
                    f"{option} {pattern!r} matches no linear map of a block{nearest(pattern, sorted(names))};"
                    f" there are: {', '.join(sorted(names)[:12])}"
                )
            forbidden = [n for n in architecture.exclude if path_matches(n, pattern) or lies_within(pattern, n)]
            if option == "--include" and forbidden:
                raise UserError(f"architecture {architecture.name!r} cannot compress {forbidden[0]!r}")


def planned_maps(blocks: dict[str, list[Block]], model: nn.Module, with_channels: bool = False) -> list[PlannedMap]:
    """All maps in forward order, and which of them share what may be channels."""
    found = []
    for block in (b for stack in blocks.values() for b in stack):
        nets = block.channels if with_channels else ()
        writes = {source.name: block.path_of(c.name) for c in nets for source in c.sources}
        reads = {c.sink.name: block.path_of(c.name) for c in nets}
        runs = {source.name: c.runs for c in nets for source in c.sources}
        module = model.get_submodule(block.path)
        for map_ in block.maps:
            writes_to, reads_from = writes.get(map_.name, ""), reads.get(map_.name, "")
            # Only what may lose rows has a bias that matters here.
            has_bias = bool(writes_to) and bias_of(block, module, map_) is not None
            found.append(
                PlannedMap(
                    block.full_name(map_),
                    block.stack,
                    block.index,
                    map_,
                    writes_to,
                    reads_from,
                    has_bias,
                    runs.get(map_.name, 1),
                )
            )
    return found


def make_plan(
    prepared: CompressionSpec,
    allocation: str | StrategyChoice,
    store: DecompositionStore | None,
    scales: Mapping[str, float] = MappingProxyType({}),
    budget: Budget | None = None,
    prices: Prices | None = None,
    measurements: Measurements | None = None,
) -> RankPlan:
    """The plan of an allocator; ``store`` gives the spectra to those that want them, ``measurements`` what they ask.

    ``scales`` says by the names of maps what their energies count for; one that is not named counts as they do on
    average. ``budget`` and ``prices`` stand in for parameters, see `AllocationRequest`.
    """
    (plan,) = make_plans(prepared, allocation, store, scales, [budget or prepared.budget], prices, measurements)
    return plan


def make_plans(
    prepared: CompressionSpec,
    allocation: str | StrategyChoice,
    store: DecompositionStore | None,
    scales: Mapping[str, float],
    budgets: Iterable[Budget],
    prices: Prices | None = None,
    measurements: Measurements | None = None,
) -> Iterator[RankPlan]:
    """The plan of each of ``budgets`` by the same spectra, as `make_plan` makes one."""
    allocator = make("allocators", allocation)
    spectra, channels = {}, {}
    typical = math.exp(sum(map(math.log, scales.values())) / len(scales)) if scales else 1.0
    if allocator.needs_spectra and store is not None:
        for block in (b for b in prepared.all_blocks if b.targets):
            found = store.spectra(block)
            for map_ in block.maps:
                name = block.full_name(map_)
                spectra[name] = scaled_spectrum(found[map_.name], scales.get(name, typical))
            for own, curve in store.curves(block).items():
                channels[block.path_of(own)] = curve.scaled(scales.get(block.path_of(own), typical))
    for budget in budgets:
        request = AllocationRequest(prepared.maps, budget, prepared.format, spectra, channels, prices, measurements)
        plan = allocator.allocate(request)
        _check_plan(plan, request, allocation if isinstance(allocation, str) else allocation.name)
        yield plan


def _check_plan(plan: RankPlan, request: AllocationRequest, allocation: str) -> None:
    """Raise LillamaError for a plan that an allocator, perhaps a plugin's, should not have made."""
    maps = {m.name: m for m in request.maps}
    for name, rank in plan.ranks.items():
        if name not in maps:
            raise LillamaError(f"allocator {allocation!r} gives a rank to {name!r}, which is no map of this model")
        left = maps[name].without(plan.channels)
        largest = request.largest_rank(left, left.dense_parameters - 1)
        if not 1 <= rank <= largest:
            raise LillamaError(
                f"allocator {allocation!r} gives {name} the rank {rank}; between 1 and {largest} it would be smaller"
                " than dense"
            )
    for name, count in plan.channels.items():
        if name not in request.channels or count not in request.channels[name].counts.tolist():
            raise LillamaError(f"allocator {allocation!r} keeps {count} of {name!r}, which is not offered")
    kept = request.kept(plan.ranks, plan.channels)
    if kept > request.budget.maps_kept:
        raise LillamaError(
            f"allocator {allocation!r} keeps {kept:,} {request.unit} of the maps, {request.budget.maps_kept:,} are"
            " allowed"
        )
