"""The backward pass through the dense model, one block at a time: how much its predictions depend on each map.

The stream of gradients is all that goes from block to block. The hidden states that entered each block come from the
forward pass, so that memory is the graph of one block and the moments of its maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.data.modality import Inputs
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.links import LinkedInputs
from lillama_core.runtime.masks import StackMasks
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.states import StateStore, rows_of
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.statistics.observers import GradientObserver
from lillama_core.system import seeds
from lillama_core.system.devices import exact_device
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.memory import release_memory
from lillama_core.system.names import safe_file_stem
from lillama_core.system.processes import ALONE, World


def output_gradient(
    harness: StackHarness,
    inputs: Inputs,
    last_hidden: torch.Tensor,
    generator: torch.Generator,
    output_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the model's log-likelihood of labels that it draws itself, at the last block's output.

    Labels from the model's own predictions make the second moment of the gradients the Fisher information, and need
    no ground truth (Martens, arXiv 1412.1193, section 9.2). The sum runs over all tokens that ``output_mask``
    [rows, length] keeps. Outputs that are no scores of classes count as the mean of a normal distribution of unit
    variance.
    """
    last_hidden = last_hidden.detach().requires_grad_(True)
    outputs = harness.outputs(inputs, last_hidden)
    logits = class_logits(harness.model, outputs)
    if logits is None:
        states = main_output(outputs)
        noise = torch.randn(states.shape, generator=generator).to(states)
        states.backward(noise if output_mask is None else noise * output_mask.to(noise)[..., None])
        assert last_hidden.grad is not None
        return last_hidden.grad
    gradient = torch.empty_like(logits)
    # Some tokens at a time: the table of probabilities in fp32 is the largest tensor of the whole run.
    for part, out in zip(logits.detach().flatten(0, -2).split(64), gradient.flatten(0, -2).split(64), strict=True):
        probabilities = part.float().softmax(-1)
        labels = draw_labels(probabilities, generator)
        # d(-log p(label))/d logits = p - onehot(label)
        out.copy_(probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32)))
    if output_mask is not None:
        gradient *= output_mask.to(gradient)[..., None]
    logits.backward(gradient)
    assert last_hidden.grad is not None
    return last_hidden.grad


def draw_labels(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one label [tokens, 1] from each row of ``probabilities`` [tokens, classes], by inverting their sums.

    One number of the ``generator``, which is the CPU's, serves a row: several times as fast as torch.multinomial,
    which draws one for every class, and the table stays on its device.
    """
    sums = probabilities.to(exact_device(probabilities)).double().cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64).to(sums.device)
    labels = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
    return labels.clamp_(max=sums.shape[-1] - 1).to(probabilities.device)


@dataclass(frozen=True)
class Piece:
    """Some rows of one batch."""

    batch: int
    """Its number among all batches."""
    rows: slice
    of: int
    """How many rows the batch has."""


class SensitivityPass:
    """Gradients of the log-likelihood, carried from the outputs of a chain of stacks down to its first block."""

    def __init__(
        self,
        stacks: Sequence[StackHarness],
        recorder: Recorder,
        activations: ActivationStore,
        pieces: Sequence[Piece],
        row_numbers: Sequence[int],
        states: StateStore,
        folder: Path,
        seed: int,
        world: World = ALONE,
    ) -> None:
        """``activations`` are of the ``pieces`` of batches whose ``states`` were kept; ``folder`` is the run's.

        ``row_numbers`` are those of the rows of all pieces among the rows of all processes: labels are drawn by them.
        """
        self._stacks = list(stacks)
        self._recorder = recorder
        self._activations = activations
        self._pieces = list(pieces)
        self._row_numbers = row_numbers
        self._world = world
        self._states = states
        self._folder = folder
        self._seed = seed
        self._gradients: dict[str, list[torch.Tensor]] = {}
        """By stack, for every piece: at what leaves the stack, or at the place in it that has been reached."""
        self._links: list[LinkedInputs] = []
        self._runner: BlockRunner | None = None
        self.masks: list[StackMasks] = []
        """Of the stack that is passed, by piece."""

    def resume(self, done: Callable[[Block], bool]) -> tuple[int, int] | None:
        """Go on where an earlier run stopped: the position of the stack, and of the block whose entry is reached.

        ``done`` says of a block whether what belongs to it has been kept. None: nothing was left. All processes go on
        at one place.
        """
        places: list[tuple[int, int]] = []
        for position, harness in reversed(list(enumerate(self._stacks))):
            places += [(position, index) for index in range(len(harness.blocks), -1, -1)]
        blocks = [(self._stacks[position].blocks, index) for position, index in places]
        finished = self._world.all_true([index == len(of) or done(of[index]) for of, index in blocks])
        there = self._world.all_true([self._file(self._stacks[p].stack, index).is_file() for p, index in places])
        # Of blocks that are seen to at the same time a later one may have been done first.
        reached = list(itertools.takewhile(lambda at: finished[at], range(len(places))))
        for at in reversed(reached):
            if there[at]:
                position, index = places[at]
                harness = self._stacks[position]
                path = self._file(harness.stack, index)
                self._load(path)
                self.enter(harness)
                self._load_leaves(path)
                return position, index
        return None

    def start(self) -> None:
        """Draw labels, and find the gradients at what leaves the last stack."""
        harness = self._stacks[-1]
        found, row = [], 0
        for piece, batch in zip(self._pieces, self._activations.batches, strict=True):
            hidden = self._hidden(harness.stack, len(harness.blocks), piece)
            parts = []
            for i in range(len(batch)):
                # Row by row: the logits and their gradients would be the largest tensors of the whole run.
                mask = None if batch.output_mask is None else batch.output_mask[i : i + 1]
                inputs = {k: v[i : i + 1] for k, v in batch.inputs.items()}
                with self._recorder.runner([]).autocast():
                    # A seed of its own for each row: its labels do not depend on who else is there.
                    labels = seeds.stream(self._seed, "labels", self._row_numbers[row + i])
                    parts.append(
                        output_gradient(harness, inputs, rows_of(hidden, slice(i, i + 1), len(batch)), labels, mask)
                    )
            row += len(batch)
            found.append(torch.cat(parts).float())
        self._gradients = {harness.stack: found}
        self.enter(harness)
        self._save(harness.stack, len(harness.blocks))

    def enter(self, harness: StackHarness) -> None:
        """Record what the blocks of a stack are given besides the hidden states."""
        earlier = self._activations.outputs_below(harness)
        self._links = [
            LinkedInputs(self._recorder, harness, batch.inputs, [of[i] for of in earlier])
            for i, batch in enumerate(self._activations.batches)
        ]
        self._runner = self._recorder.runner([link.calls for link in self._links])
        self.masks = [StackMasks.of(harness.stack, batch.masks) for batch in self._activations.batches]

    def block(self, block: Block, module: nn.Module) -> GradientObserver:
        """Carry the gradients from the output of ``block`` to its entry; what was seen on the way."""
        assert self._runner is not None
        observer = GradientObserver(block)
        stream = self._gradients[block.stack]
        for i, piece in enumerate(self._pieces):
            gradient = stream[i].to(self._recorder.device)
            observer.output.add(*flat_rows(gradient, self.masks[i]))
            hidden = self._hidden(block.stack, block.index, piece).detach().requires_grad_(True)
            call = self._runner.inputs(block, i)
            with torch.enable_grad(), observer.observe(module, self.masks[i], (call.args, call.kwargs)):
                self._runner(module, block, i, hidden).backward(gradient)
            assert hidden.grad is not None
            stream[i] = hidden.grad
        self._save(block.stack, block.index)
        # The maps are taken apart next, and find no use for what the graphs leave behind.
        release_memory()
        return observer

    def forget(self, block: Block) -> None:
        """What belongs to ``block`` has been kept: the gradients at its output are needed no more."""
        self._file(block.stack, block.index + 1).unlink(missing_ok=True)

    def leave(self, harness: StackHarness) -> None:
        """Hand the gradients at what the earlier stacks gave to these."""
        earlier = harness.earlier if self._activations.outputs_below(harness) else ()
        pulled = [
            link.pull(gradient) for link, gradient in zip(self._links, self._gradients[harness.stack], strict=True)
        ]
        for number, below in enumerate(earlier):
            given = [of_piece[number] for of_piece in pulled]
            known = self._gradients.get(below.stack)
            self._gradients[below.stack] = (
                given if known is None else [a + b for a, b in zip(known, given, strict=True)]
            )
        del self._gradients[harness.stack]
        # With them the graphs go, before what the stack below is given is recorded.
        self._links = []
        if earlier:
            below = earlier[-1]
            self.enter(below)
            self._save(below.stack, len(below.blocks))

    def add_entry(self, harness: StackHarness, moment: SecondMoment, gain: float) -> None:
        """Add the gradients at the entry of a stack that has been passed, times ``gain``, to ``moment``."""
        for gradient, masks in zip(self._gradients[harness.stack], self.masks, strict=True):
            moment.add(*flat_rows(gain * gradient, masks))

    def _hidden(self, stack: str, position: int, piece: Piece) -> torch.Tensor:
        states = self._states.read(stack, position, [piece.batch])
        return rows_of(states[0], piece.rows, piece.of).to(self._recorder.device)

    def _file(self, stack: str, position: int) -> Path:
        return self._folder / f"{safe_file_stem(f'{stack}.{position}')}.safetensors"

    def _save(self, stack: str, position: int) -> None:
        tensors = {f"at.{name}.{i}": g for name, found in self._gradients.items() for i, g in enumerate(found)}
        for i, link in enumerate(self._links):
            tensors |= {f"leaf.{i}.{j}": leaf.grad for j, leaf in enumerate(link.leaves) if leaf.grad is not None}
        write_tensors(self._file(stack, position), tensors, durable=False)

    def _load(self, path: Path) -> None:
        tensors = read_tensors(path)
        for harness in self._stacks:
            found = [tensors.get(f"at.{harness.stack}.{i}") for i in range(len(self._pieces))]
            if all(g is not None for g in found):
                self._gradients[harness.stack] = [g.to(self._recorder.device) for g in found if g is not None]

    def _load_leaves(self, path: Path) -> None:
        tensors = read_tensors(path)
        for i, link in enumerate(self._links):
            for j, leaf in enumerate(link.leaves):
                if f"leaf.{i}.{j}" in tensors:
                    leaf.grad = tensors[f"leaf.{i}.{j}"].to(leaf.device)
