"""What the factors of the token embedding are chosen by; the formulas are in `architecture.targets.embedding`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.embedding import BandedEmbeddingTarget, embedding_target, is_embedding, scale_of
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.data.modality import Samples
from lillama_core.initialization import Initializer, MapStatistics
from lillama_core.models.outputs import main_output
from lillama_core.runtime.masks import StackMasks
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.statistics.reduction import reduce_moments
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.devices import exact_device
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.processes import World

SPREAD = 0.1
"""Part of what tokens are needed for that is shared out evenly: text of another kind has other tokens. Of 0.02,
0.1 and 0.3 this was the best on SmolLM2 at 20 %, one run each: perplexity 30.1, 29.5, 29.9 on WikiText-2, and 35.0,
34.5, 35.5 on tales."""


class HeadCall:
    """One call of an output head within a forward pass, and what comes back to it; holds nothing of the graph."""

    def __init__(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        self.rows = rows.detach()
        """What the head reads [..., width]."""
        self.scores = scores.detach()
        """The head's output [..., vocabulary], then the logits that the model makes of it."""
        self.gain: float | torch.Tensor = 1.0
        """What the head's output is multiplied by to be the logits, in root mean square, once gradients came back."""
        self._at_logits: torch.Tensor | None = None
        scores.register_hook(self._note_scores)

    def ends_in(self, logits: torch.Tensor) -> None:
        """Take what the model puts out for what it makes of this call, if that has the same shape."""
        if logits.shape == self.scores.shape:
            self.scores = logits.detach()
            logits.register_hook(self._note_logits)

    def _note_logits(self, gradient: torch.Tensor) -> None:
        self._at_logits = torch.linalg.vector_norm(gradient, dtype=torch.float32)

    def _note_scores(self, gradient: torch.Tensor) -> None:
        if self._at_logits is not None:
            self.gain = torch.linalg.vector_norm(gradient, dtype=torch.float32) / self._at_logits


class EmbeddingObserver:
    """Accumulates what the factors of the embedding are chosen by, during the sensitivity pass."""

    def __init__(self, target: BandedEmbeddingTarget) -> None:
        self.target = target
        self.inputs = SecondMoment()
        """G, of the rows that the heads read, times what makes logits of their outputs."""
        self.entry = SecondMoment()
        """S, of the gradients at the entry of the first block, times the `gain` of the rows there."""
        self.predicted = torch.zeros(target.vocabulary, dtype=torch.float64)
        """Sum of the probabilities that the model gives each token, over the rows in `inputs`."""
        self.entered: set[str] = set()
        """Stacks whose gradients are in `entry`: a run that goes on adds none twice."""

    @classmethod
    def of(cls, block: Block) -> EmbeddingObserver:
        """The observer of what `embedding_block` gave."""
        return cls(embedding_target(block))

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """While open, forward and backward passes through the heads are observed."""

        seen: list[torch.Tensor] = []
        calls: list[HeadCall] = []

        def observe_input(_: TargetLinear, x: torch.Tensor) -> None:
            seen[:] = [x]

        def observe_output(_: TargetLinear, y: torch.Tensor) -> None:
            (x,) = seen
            if x.requires_grad:
                calls.append(HeadCall(x, y))
                x.register_hook(functools.partial(self._add, calls[-1]))

        def observe_outputs(_: nn.Module, __: Any, outputs: Any) -> None:
            for call in calls:
                call.ends_in(main_output(outputs))
            calls.clear()

        handle = model.register_forward_hook(observe_outputs)
        try:
            with self.target.observe(model, observe_input, observe_output):
                yield
        finally:
            handle.remove()

    def gain(self, model: nn.Module, run: Callable[[], Sequence[torch.Tensor]]) -> float:
        """What rows of the table are multiplied by, in root mean square, on their way into what ``run`` gives.

        It gives what enters a stack. 0 where that stays the same when all rows that are looked up are zero: below an
        encoder of sounds or images nothing is looked up, or nothing of it read.
        """
        rows: list[torch.Tensor] = []

        def take_out(module: nn.Module, _: Any, found: torch.Tensor) -> torch.Tensor:
            rows.append(found / scale_of(module))
            return torch.zeros_like(found)

        before = run()
        tables = [m for m in self.target.modules(model).values() if is_embedding(m)]
        handles = [m.register_forward_hook(take_out) for m in tables]
        try:
            after = run()
        finally:
            for handle in handles:
                handle.remove()
        entered = _mean_square([a - b for a, b in zip(before, after, strict=True)])
        return math.sqrt(entered / _mean_square(rows)) if entered else 0.0

    def write(self, path: Path) -> None:
        """Keep what was seen so far in a file."""
        tensors = {"predicted": self.predicted, **{f"entered.{stack}": torch.ones(1) for stack in self.entered}}
        for name, moment in self._moments().items():
            tensors |= {f"{name}.{key}": value for key, value in moment.tensors().items()}
        write_tensors(path, tensors, durable=False)

    def read(self, path: Path, device: torch.device) -> None:
        """Go on from what `write` has kept, with a model on ``device``."""
        tensors = read_tensors(path)
        self.predicted = tensors["predicted"]
        self.entered = {name.removeprefix("entered.") for name in tensors if name.startswith("entered.")}
        for name, moment in self._moments().items():
            kept = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            moment.restore(kept, device)

    def reduce(self, world: World, device: torch.device) -> None:
        """Add what all processes saw together, in the main one, on ``device``."""
        if world.size == 1:
            return
        world.sum_([self.predicted])
        own = self._moments()
        found = reduce_moments(world, own, list(own), 0, device)
        self.inputs, self.entry = (found.get(name, SecondMoment()) for name in own)

    def _moments(self) -> dict[str, SecondMoment]:
        return {"inputs": self.inputs, "entry": self.entry}

    def _add(self, call: HeadCall, gradients: torch.Tensor) -> None:
        gradients, rows, scores = (t.flatten(0, -2) for t in (gradients, call.rows, call.scores))
        # Where nothing is predicted, behind the end of a row, there is no gradient: what is read there is no matter.
        counted = (gradients != 0).any(-1)
        self.inputs.add(rows[counted] * call.gain)
        # Some rows at a time: the table of probabilities is as wide as the vocabulary.
        for part in scores[counted].split(64):
            self.predicted += part.float().softmax(-1).sum(0).cpu()

    def decompose(
        self, block: Block, model: nn.Module, data: Samples, initializer: Initializer, store: DecompositionStore
    ) -> None:
        """Decompose the table of ``block`` by bands into ``store``, and keep the order of its tokens.

        ``data`` are the rows whose tokens are counted.
        """
        needed, tokens = self.needed(data)
        order = needed.argsort(descending=True, stable=True)
        self.target.order = order
        found = {}
        for map_, (start, stop) in zip(self.target.maps, self.target.bounds, strict=True):
            weight = self.target.weight(model, map_)
            device = exact_device(weight)
            statistics = self.statistics(weight, needed[order[start:stop]], tokens / max(1, len(data)))
            found[map_.name] = initializer.decompose(weight.to(device), statistics.to(device))
        write_tensors(order_file(store), {"order": order}, durable=False)
        # Last: it says that the block is done.
        store.save(block, found)

    def needed(self, data: Samples) -> tuple[torch.Tensor, float]:
        """How often each token is needed [vocabulary], in fp64; all together 1. And how many tokens were counted."""
        vocabulary = self.target.vocabulary
        looked_up = torch.zeros(vocabulary, dtype=torch.float64)
        for name, ids in data.inputs.items():
            if name.endswith("input_ids"):
                # Padding is looked up as well, and matters to nothing.
                rows, counts = flat_rows(ids[..., None].cpu(), _masks_of(name, data))
                counts = torch.ones(len(rows)) if counts is None else counts.float()
                looked_up += torch.bincount(rows[:, 0], counts.double(), vocabulary)[:vocabulary]
        tokens = float(looked_up.sum().item())
        found = looked_up / max(1.0, tokens)
        if self.predicted.sum() > 0:
            found = (found + self.predicted / self.predicted.sum()) / 2
        return (1 - SPREAD) * found + SPREAD / vocabulary, tokens

    def statistics(self, weight: torch.Tensor, needed: torch.Tensor, rows: float) -> MapStatistics:
        """What an initialiser needs for the rows W [n, width] of a band; nothing if no gradient came by.

        ``needed`` [n] says how often each row is, in ``rows`` tokens of a row of data.
        """
        moments = [m.mean().to(weight.device) for m in (self.entry, self.inputs) if m.count]
        # A model may project the rows to another width before its first block.
        inputs = sum((m for m in moments if len(m) == weight.shape[1]), torch.zeros((), device=weight.device))
        if not inputs.dim():
            return MapStatistics()
        often = needed.to(weight.device).float()
        # See `MapStatistics`: on the smaller side.
        wide = weight.shape[0] <= weight.shape[1]
        W = weight.float()
        moment = often.diag() if wide else W.T @ (often[:, None] * W)
        return MapStatistics(inputs, moment, float(often.mean().item()), rows)


def _mean_square(tensors: Sequence[torch.Tensor]) -> float:
    """Mean over rows of |x|^2, of the rows x [..., width] that are not zero; 0 if all are."""
    squares = [t.float().square().sum(-1) for t in tensors]
    total, rows = sum(s.sum().item() for s in squares), sum(int((s > 0).sum().item()) for s in squares)
    return total / rows if rows else 0.0


def order_file(store: DecompositionStore) -> Path:
    """Where the order of the tokens is kept beside the decompositions."""
    return store.folder / "embedding-order.safetensors"


def _masks_of(name: str, data: Samples) -> StackMasks:
    """The masks of the stack that reads the tokens called ``name``: ``decoder_input_ids`` are the decoder's."""
    stack = next((stack for stack in data.masks if name.startswith(stack)), None)
    own = None if stack is None else data.masks[stack]
    others = tuple(mask for other, mask in data.masks.items() if not any(n.startswith(other) for n in data.inputs))
    return StackMasks(own, () if own is not None else others)
