"""``lillama analyze``: what a model would lose, before anything of it is compressed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lillama_core.allocation.effective_rank import effective_rank, stable_rank
from lillama_core.allocation.plan import PlannedMap
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.errors import UserError
from lillama_core.models.gguf_header import parsed_once
from lillama_core.pipeline.context import Context, DenseModel, Statistics
from lillama_core.pipeline.pipeline import CompressionPipeline, begun
from lillama_core.pipeline.prediction import Prediction, Size
from lillama_core.pipeline.request import Request
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import make
from lillama_core.system.processes import world_of_environment
from lillama_core.system.progress import Verbosity
from lillama_core.system.tables import aligned

REDUCTIONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Parts of the parameters at which the model is looked at, as far as its maps can give them."""
PARTS = (0.75, 0.5, 0.25)
"""Parts of its parameters that a map is left with when it is looked at alone."""


@dataclass(frozen=True)
class MapAnalysis:
    """One map."""

    name: str
    kind: str
    """Its path within the block, the numbers of experts left out."""
    block: int
    shape: tuple[int, int]
    stable_rank: float
    """Of the weight."""
    effective_rank: float
    weighted_effective_rank: float
    """Of the weight as the initialiser weighs it: by what it reads and, of ``fisher``, by what its errors do."""
    losses: dict[str, float]
    """Part of its parameters that the map is left with -> what the model is predicted to lose."""


@dataclass(frozen=True)
class Analysis:
    """What is predicted of a model, nothing of which was compressed."""

    model: str
    architecture: str
    unit: str
    """What losses are in."""
    sizes: list[Size]
    maps: list[MapAnalysis]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("removed", "parameters", "predicted loss", "low rank", "fewer channels")]
        for s in self.sizes:
            loss = f"{s.loss:.4f}"
            rows.append(
                (f"{s.reduction:.0%}", f"{s.parameters:,}", loss, f"{s.low_rank:,} maps", f"{s.channels:,} nets")
            )
        kinds: dict[tuple[str, tuple[int, int]], list[MapAnalysis]] = {}
        for m in self.maps:
            kinds.setdefault((m.kind, m.shape), []).append(m)
        parts = [f"loss at {part:.0%}" for part in PARTS]
        table = [("map", "shape", "count", "stable rank", "effective rank", "weighted", *parts)]
        for (kind, shape), own in kinds.items():
            ranks = [_range([getattr(m, name) for m in own]) for name in _RANKS]
            lost = [f"{sum(m.losses[str(part)] for m in own):.4f}" for part in PARTS]
            table.append((kind, f"{shape[0]} x {shape[1]}", f"{len(own)}", *ranks, *lost))
        head = f"{self.model}  (architecture {self.architecture}; losses in {self.unit}, of untrained maps)"
        return "\n".join([head, "", *aligned(rows), "", *aligned(table)])

    __repr__ = __str__


_RANKS = ("stable_rank", "effective_rank", "weighted_effective_rank")


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def analyze(request: Request, verbosity: Verbosity = "normal") -> Analysis:
    """Run the passes over the dense model that a compression begins with, and tell what it would lose.

    ``request.output`` is not written. Raises UserError for a request that `compress` would refuse, and for a recipe
    that predicts no losses.
    """
    recipe = request.recipe
    allocator, initializer = make("allocators", recipe.allocation), make("initializers", recipe.init)
    measures = getattr(allocator, "needs_measurements", False)
    if not (allocator.needs_spectra and initializer.needs_gradients) or measures:
        raise UserError("'lillama analyze' needs losses that are predicted: --init fisher and --allocation spectrum")
    if recipe.target_speedup is not None:
        raise UserError("--target-speedup does nothing: 'lillama analyze' looks at sizes")
    if world_of_environment().size > 1:
        raise UserError("'lillama analyze' works in one process: start it without torchrun")
    with tempfile.TemporaryDirectory(prefix="lillama-") as folder, parsed_once(request.model):
        asked = replace(request, output=Path(folder) / "analysis")
        with begun(asked, verbosity) as (checked, context):
            names = [stage.name for stage in checked.pipeline.stages]
            CompressionPipeline(checked.pipeline.stages[: names.index("ranks") + 1]).run(context)
            return _analysis(context)


def _analysis(context: Context) -> Analysis:
    # The stages are done: what they gave may be looked at.
    context.leave()
    prediction = Prediction(context, context.get(Statistics).store, context.record.scales)
    sizes, maps = prediction.sizes(REDUCTIONS), _maps(context, prediction.factors)
    return Analysis(context.request.model, context.spec.architecture.name, prediction.unit, sizes, maps)


def _maps(context: Context, factors: dict[str, float]) -> list[MapAnalysis]:
    dense, spec = context.get(DenseModel), context.spec
    store: DecompositionStore = context.get(Statistics).store
    planned = {m.name: m for m in spec.maps}
    found = []
    for block in (b for of_stack in spec.blocks.values() for b in of_stack if b.targets):
        module, spectra = dense.source.block(block), store.spectra(block)
        for target in block.targets:
            for map_ in target.maps:
                name = block.full_name(map_)
                energies = spectra[map_.name].squared_singular_values
                values = torch.linalg.svdvals(target.weight(module, map_).float().cpu()).square()
                found.append(
                    MapAnalysis(
                        name,
                        kind_of(map_.name),
                        block.index,
                        (map_.out_features, map_.in_features),
                        stable_rank(values),
                        effective_rank(values),
                        effective_rank(energies),
                        {str(part): _alone(context, planned[name], energies, part) * factors[name] for part in PARTS},
                    )
                )
    return found


def _alone(context: Context, map_: PlannedMap, energies: torch.Tensor, part: float) -> float:
    """The energy that is left out when a map is left with ``part`` of its parameters; all of it where none fit."""
    sizes = (map_.map.out_features, map_.map.in_features)
    rank = context.spec.format.largest_rank(*sizes, int(part * map_.dense_parameters))
    return float(energies[rank:].sum().item())
