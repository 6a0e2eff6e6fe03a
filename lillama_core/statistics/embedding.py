"""What the factors of the token embedding are chosen by; the formulas are in `architecture.targets.embedding`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.embedding import EmbeddingTarget, embedding_target, is_embedding
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.data.modality import Samples
from lillama_core.initialization import Initializer, MapStatistics
from lillama_core.runtime.masks import StackMasks
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.statistics.reduction import reduce_moments
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.devices import exact_device
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.processes import World


class EmbeddingObserver:
    """Accumulates what the factors of the embedding are chosen by, during the sensitivity pass."""

    def __init__(self, target: EmbeddingTarget) -> None:
        self.target = target
        self.inputs = SecondMoment()
        """G, of the rows that the heads read."""
        self.gradients = SecondMoment()
        """W^T F W, of the gradients at those rows."""
        self.entry = SecondMoment()
        """S, of the gradients at the entry of the first block."""
        self._squares = 0.0

    @classmethod
    def of(cls, block: Block) -> EmbeddingObserver:
        """The observer of what `embedding_block` gave."""
        return cls(embedding_target(block))

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """While open, forward and backward passes through the heads are observed."""

        def observe_input(_: TargetLinear, x: torch.Tensor) -> None:
            if x.requires_grad:
                rows = x.detach()
                x.register_hook(lambda g: self._add(rows, g))

        def observe_output(_: TargetLinear, y: torch.Tensor) -> None:
            if y.requires_grad:
                y.register_hook(self._add_squares)

        with self.target.observe(model, observe_input, observe_output):
            yield

    def enters(self, model: nn.Module, run: Callable[[], object]) -> bool:
        """Whether rows of the table are looked up while ``run`` is called: none are below an audio encoder."""
        seen: list[int] = []
        tables = [m for m in self.target.modules(model).values() if is_embedding(m)]
        handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in tables]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return bool(seen)

    def write(self, path: Path) -> None:
        """Keep what was seen so far in a file."""
        tensors = {"squares": torch.tensor(self._squares, dtype=torch.float64)}
        for name, moment in self._moments().items():
            tensors |= {f"{name}.{key}": value for key, value in moment.tensors().items()}
        write_tensors(path, tensors, durable=False)

    def read(self, path: Path) -> None:
        """Go on from what `write` has kept."""
        tensors = read_tensors(path)
        self._squares = float(tensors["squares"])
        for name, moment in self._moments().items():
            moment.restore({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})

    def reduce(self, world: World, device: torch.device) -> None:
        """Add what all processes saw together, in the main one, on ``device``."""
        if world.size == 1:
            return
        (self._squares,) = world.sums([self._squares])
        own = self._moments()
        found = reduce_moments(world, own, list(own), 0, device)
        self.inputs, self.gradients, self.entry = (found.get(name, SecondMoment()) for name in own)

    def _moments(self) -> dict[str, SecondMoment]:
        return {"inputs": self.inputs, "gradients": self.gradients, "entry": self.entry}

    def _add(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        rows, gradients = rows.flatten(0, -2), gradients.flatten(0, -2)
        # Where nothing is predicted, behind the end of a row, there is no gradient: what is read there is no matter.
        counted = (gradients != 0).any(-1)
        self.inputs.add(rows[counted])
        self.gradients.add(gradients[counted])

    def _add_squares(self, gradient: torch.Tensor) -> None:
        self._squares += gradient.float().square().sum().item()

    def decompose(
        self, block: Block, model: nn.Module, data: Samples, initializer: Initializer, store: DecompositionStore
    ) -> None:
        """Decompose the table of ``block`` into ``store``; ``data`` are the rows whose tokens are counted."""
        (map_,) = block.maps
        weight = self.target.weight(model, map_)
        statistics = self.statistics(weight, data)
        device = exact_device(weight)
        found = initializer.decompose(weight.to(device), statistics.to(device))
        store.save(block, {map_.name: found})

    def statistics(self, weight: torch.Tensor, data: Samples) -> MapStatistics:
        """What an initialiser needs for W [vocabulary, width]; nothing if no gradient came by."""
        # A gradient at a row that is multiplied on its way in counts as often at the table's.
        parts = ((self.entry, self.target.scale**2), (self.inputs, 1.0))
        moments = [factor * m.mean().to(weight.device) for m, factor in parts if m.count]
        # A model may project the rows to another width before its first block.
        inputs = sum((m for m in moments if len(m) == weight.shape[1]), torch.zeros((), device=weight.device))
        if not inputs.dim():
            return MapStatistics()
        (map_,) = self.target.maps
        frequency = torch.zeros(map_.out_features)
        for name, ids in data.inputs.items():
            if name.endswith("input_ids"):
                # Padding is looked up as well, and matters to nothing.
                rows, counts = flat_rows(ids[..., None].cpu(), _masks_of(name, data))
                counts = torch.ones(len(rows)) if counts is None else counts.float()
                frequency += torch.bincount(rows[:, 0], counts, map_.out_features)[: map_.out_features]
        tokens = frequency.sum().item()
        frequency = (frequency / max(1.0, tokens)).to(weight.device)
        W = weight.float()
        moment, scale = W.T @ (frequency[:, None] * W), 1 / map_.out_features
        if self.inputs.count:
            moment = (moment + self.gradients.mean().to(weight.device)) / 2
            scale = (scale + self._squares / self.inputs.count / map_.out_features) / 2
        return MapStatistics(inputs, moment, scale, tokens / max(1, len(data)))


def _masks_of(name: str, data: Samples) -> StackMasks:
    """The masks of the stack that reads the tokens called ``name``: ``decoder_input_ids`` are the decoder's."""
    stack = next((stack for stack in data.masks if name.startswith(stack)), None)
    own = None if stack is None else data.masks[stack]
    others = tuple(mask for other, mask in data.masks.items() if not any(n.startswith(other) for n in data.inputs))
    return StackMasks(own, () if own is not None else others)
