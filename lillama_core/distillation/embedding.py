"""The token embedding made low rank: factored, written, put into the model. Its factors are not trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.embedding import embedding_target
from lillama_core.distillation.finished_blocks import FinishedBlocks, rounded
from lillama_core.initialization import Initializer
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
        (map_,) = block.maps
        path = finished.path(block)
        if self.world.is_main and not finished.has(block):
            found = store.load(block, ranks)
            generator = torch.Generator().manual_seed(self.seed)
            weight = target.weight(model, map_).cpu()
            B, A = self.initializer.factors(weight, ranks[map_.name], found[map_.name], generator)
            write_tensors(path, rounded(finished.format.from_factors(B, A, None), finished.dtype, target.name))
        self.world.barrier()
        layer = finished.format.module(
            map_.out_features, map_.in_features, ranks[map_.name], False, torch.float32, "cpu"
        )
        layer.load_state_dict(read_tensors(path))
        dense = target.modules(model)
        target.replace(model, {target.name: layer.to(finished.device).eval().requires_grad_(False)})
        self.progress.line(f"{target.name}: rank {ranks[map_.name]}, read at {', '.join(dense)}")
        return dense
