"""The token embedding made low rank: factored, written, put into the model. Its factors are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.embedding import embedding_target
from lillama_core.distillation.finished_blocks import FinishedBlocks, rounded
from lillama_core.initialization import Initializer
from lillama_core.statistics.embedding import order_file
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class EmbeddingCompressor:
    """Puts the factors of the token embedding into a model."""

    finished: FinishedBlocks
    initializer: Initializer
    seed: int
    progress: Progress
    world: World = ALONE

    def compress(
        self, block: Block, model: nn.Module, plan: RankPlan, store: DecompositionStore
    ) -> dict[str, nn.Module]:
        """Put the factors of the table in the place of the dense modules; return these by path, none if it stays."""
        ranks, target, finished = plan.of(block), embedding_target(block), self.finished
        if not ranks:
            self.progress.line(f"{target.name}: stays dense, the plan saves more elsewhere")
            return {}
        path = finished.path(block)
        target.order = read_tensors(order_file(store))["order"]
        if self.world.is_main and not finished.has(block):
            self._write(path, block, model, ranks, store)
        self.world.barrier()
        written, layers = read_tensors(path), dict[str, nn.Module]()
        for map_ in block.maps:
            if map_.name in ranks:
                layer = finished.format.module(
                    map_.out_features, map_.in_features, ranks[map_.name], False, torch.float32, "cpu"
                )
                layer.load_state_dict(
                    {k.removeprefix(f"{map_.name}/"): v for k, v in written.items() if k.startswith(f"{map_.name}/")}
                )
                layers[map_.name] = layer.to(finished.device).eval().requires_grad_(False)
        dense = target.modules(model)
        target.replace(model, layers)
        shown = ", ".join("dense" if m.name not in ranks else str(ranks[m.name]) for m in block.maps)
        self.progress.line(f"{target.name}: ranks by how often tokens are needed {shown}; read at {', '.join(dense)}")
        return dense

    def _write(
        self, path: Path, block: Block, model: nn.Module, ranks: Mapping[str, int], store: DecompositionStore
    ) -> None:
        """Factor the bands that have ``ranks`` into the file ``path``."""
        target, finished = embedding_target(block), self.finished
        found, generator = store.load(block, ranks), torch.Generator().manual_seed(self.seed)
        tensors: dict[str, torch.Tensor] = {}
        for map_ in block.maps:
            if map_.name in ranks:
                weight = target.weight(model, map_).cpu()
                B, A = self.initializer.factors(weight, ranks[map_.name], found[map_.name], generator)
                state = rounded(finished.format.from_factors(B, A, None), finished.dtype, map_.name)
                tensors |= {f"{map_.name}/{k}": v for k, v in state.items()}
        write_tensors(path, tensors)
