"""The passes over the dense model that take every map apart, ready for any rank: forward, then backward.

Forward, the hidden states that enter each block are kept, and the second moments of what its maps read are summed up.
Backward, from the last block to the first, the gradients join them, and the maps of the block are decomposed at once:
the moments of one block are in memory, whatever the depth of the model.

Several processes go through the blocks together, each with its own rows. What they sum up for a block is added together
in the process that owns it, and as many blocks as there are processes are decomposed at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lillama_core.allocation import ChannelCurve
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.channels import Channels, are_channels
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.initialization import Decomposition, Initializer, MapStatistics
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.states import StateStore
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.last_map import find_last_map
from lillama_core.statistics.observers import GradientObserver, InputObserver, map_statistics
from lillama_core.statistics.sensitivity import SensitivityPass
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.devices import exact_device
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class DensePass:
    """What both directions of the pass have in common."""

    source: WeightSource
    states: StateStore
    store: DecompositionStore
    initializer: Initializer
    numbers: tuple[int, ...]
    """Of the batches that the forward pass carries, by which states are kept."""
    fitted: int
    """How many of these, from the first, are fitted to."""
    sequences: int
    """Rows in these batches."""
    kept: frozenset[int]
    """Numbers of the batches whose states later passes read."""
    goes_back: bool
    """Whether a backward pass follows, which decomposes the maps."""
    keeps_moments: bool
    """Whether the moments of the forward pass wait for it in files, instead of blocks being run again."""
    done: frozenset[str]
    """Names of the blocks that an earlier run has decomposed; the same in all processes."""
    with_moments: frozenset[str]
    """Likewise of those of which an earlier run has kept the moments."""
    finds_last_maps: bool
    """Whether blocks may be corrected by the map that ends them, so that it has to be known."""
    takes_out: bool
    """Whether channels may be taken out, so that what that costs has to be known."""
    arithmetic: torch.dtype | None
    """Of matrix products under autocast; None: fp32."""
    progress: Progress
    world: World = ALONE
    _kept_whole: set[str] = field(default_factory=set)
    """Names of what turned out to be no channels, said once."""
    _waiting: list[Callable[[], None]] = field(default_factory=list)
    """To decompose the block that this process owns, as soon as the others have one, too."""

    def forward(self, harness: StackHarness, activations: StackActivations, with_states: bool = True) -> None:
        """Carry the stream of ``activations`` through a stack; maps are decomposed here if nothing else is to come.

        ``with_states``: keep what enters each block. A block that has been seen to is only passed through.
        """
        runner, stream, blocks = activations.runner, activations.hidden, harness.blocks
        device = runner.device
        first = self._enter(harness, stream)
        self.progress.phase(f"Statistics of {harness.stack}: forward", len(blocks) - first)
        if with_states and first == 0:
            self._keep(harness.stack, 0, stream)
        for block in blocks[first:]:
            module = self.source.block(block, self.arithmetic)
            observer = self._observer(block)
            with torch.no_grad():
                if observer is not None:
                    with observer.observe(module):
                        for index in range(self.fitted):
                            call = runner.inputs(block, index)
                            observer.next_batch(activations.masks[index], (call.args, call.kwargs))
                            stream[index] = runner(module, block, index, stream[index]).to(stream[index].device)
                for index in range(0 if observer is None else self.fitted, len(stream)):
                    stream[index] = runner(module, block, index, stream[index]).to(stream[index].device)
            if observer is not None:
                observer = observer.reduced(self.world, self._owner(block), device)
            if observer is not None and self.goes_back:
                if self._owns(block):
                    self.store.save_moments(block, observer.tensors())
            elif not self.goes_back and self._is_missing(block) and self._owns(block):
                self._wait_to_decompose(block, module, observer, None, runner)
            if not self.goes_back and (block.index + 1) % self.world.size == 0:
                self._decompose_waiting()
            if with_states:
                self._keep(harness.stack, block.index + 1, stream)
            release_memory()
            self.progress.step(block.name)
        self._decompose_waiting()

    def backward(
        self, harness: StackHarness, sensitivity: SensitivityPass, activations: StackActivations, reached: int
    ) -> None:
        """Carry the gradients down through a stack from the entry of block ``reached``, and decompose its maps.

        ``activations`` hold the recorded arguments of the blocks for all batches; their stream is not looked at.
        """
        self.progress.phase(f"Statistics of {harness.stack}: backward", reached)
        device, passed = activations.runner.device, list[Block]()
        for block in reversed(harness.blocks[:reached]):
            module = self.source.block(block, self.arithmetic)
            observer, missing = None, self._is_missing(block)
            if missing and self.initializer.needs_inputs:
                observer = self._moments(block, module, activations)
            seen = sensitivity.block(block, module)
            if missing:
                seen = seen.reduced(self.world, self._owner(block), device)
                if self._owns(block):
                    self._wait_to_decompose(block, module, observer, seen, activations.runner)
            passed.append(block)
            if block.index % self.world.size == 0:
                self._decompose_waiting()
                for done in passed:
                    sensitivity.forget(done)
                passed.clear()
            release_memory()
            self.progress.step(block.name)

    def _enter(self, harness: StackHarness, stream: list[torch.Tensor]) -> int:
        """The block to begin with: behind those that an earlier run has seen to, if their states are all there."""
        seen_to = next((b.index for b in harness.blocks if self._observer(b) is not None), len(harness.blocks))
        kept = self.world.all_true(
            [self.states.has_all(harness.stack, i + 1, self.numbers) for i in range(len(harness.blocks))]
        )
        for index in range(seen_to, 0, -1):
            if kept[index - 1]:
                stream[:] = list(self.states.read(harness.stack, index, self.numbers))
                return index
        return 0

    def _observer(self, block: Block) -> InputObserver | None:
        """An observer of what the maps of ``block`` read, if that has to be seen in the forward pass."""
        if not self.initializer.needs_inputs or not self._is_missing(block):
            return None
        if self.goes_back and (not self.keeps_moments or block.name in self.with_moments):
            return None
        return InputObserver(block)

    def _keep(self, stack: str, position: int, stream: Sequence[torch.Tensor]) -> None:
        if not self.states.has(stack, position):
            self.states.write(
                stack, position, {n: h for n, h in zip(self.numbers, stream, strict=True) if n in self.kept}
            )

    def _is_missing(self, block: Block) -> bool:
        """Whether there are maps of ``block`` to decompose."""
        return bool(block.targets) and block.name not in self.done

    def _owner(self, block: Block) -> int:
        """The process that decomposes ``block``: after an interruption the same one."""
        return block.index % self.world.size

    def _owns(self, block: Block) -> bool:
        return self._owner(block) == self.world.rank

    def _wait_to_decompose(
        self,
        block: Block,
        module: nn.Module,
        observer: InputObserver | None,
        seen: GradientObserver | None,
        runner: BlockRunner,
    ) -> None:
        """Keep what was seen of ``block`` until every process has one to decompose; in a job of one that is now."""
        looks = self.finds_last_maps or (self.takes_out and block.channels)
        entering = self.states.read(block.stack, block.index, self.numbers[:1]) if looks else ()

        def decompose() -> None:
            self._decompose(block, module, observer, {} if seen is None else seen.statistics(), runner, entering)
            self.store.forget_moments(block)

        self._waiting.append(decompose)

    def _decompose_waiting(self) -> None:
        """Decompose what each process has; all have to call this at the same block."""
        for decompose in self._waiting:
            decompose()
        self._waiting.clear()
        self.world.barrier()

    def _moments(self, block: Block, module: nn.Module, activations: StackActivations) -> InputObserver | None:
        """What the maps of ``block`` read, in the process that owns it; elsewhere perhaps None."""
        if self.keeps_moments:
            return InputObserver.of(block, self.store.moments(block)) if self._owns(block) else None
        observer = self._run_again(block, module, activations)
        return observer.reduced(self.world, self._owner(block), activations.runner.device)

    def _run_again(self, block: Block, module: nn.Module, activations: StackActivations) -> InputObserver:
        observer = InputObserver(block)
        entering = self.states.read(block.stack, block.index, self.numbers[: self.fitted])
        with torch.no_grad(), observer.observe(module):
            for index, hidden in enumerate(entering):
                call = activations.runner.inputs(block, index)
                observer.next_batch(activations.masks[index], (call.args, call.kwargs))
                activations.runner(module, block, index, hidden)
        return observer

    def _decompose(
        self,
        block: Block,
        module: nn.Module,
        observer: InputObserver | None,
        seen: dict[str, torch.Tensor],
        runner: BlockRunner,
        entering: Sequence[torch.Tensor],
    ) -> None:
        """Take the maps of ``block`` apart; ``seen`` is what the backward pass found."""
        device = exact_device(runner.device)
        nets = self._channels(block, module, runner, entering) if len(entering) and self.takes_out else {}
        found: dict[str, Decomposition] = {}
        curves: dict[str, ChannelCurve] = {}
        for target in block.targets:
            for map_ in target.maps:
                weight = target.weight(module, map_).to(device)
                has_bias = target.bias(module, map_) is not None
                statistics = (
                    map_statistics(map_, weight, observer, seen, self.sequences, device, has_bias)
                    if observer is not None
                    else MapStatistics()
                )
                found[map_.name] = self.initializer.decompose(weight, statistics)
                elimination = self.initializer.eliminate(weight, statistics) if map_.name in nets else None
                if elimination is not None:
                    self.store.save_elimination(block, nets[map_.name].name, elimination)
                    curves[nets[map_.name].name] = elimination.curve
        counts = {} if observer is None else {m.name: observer.count(m.name) for m in block.maps}
        last = None
        if len(entering) and self.finds_last_maps:
            # How a block ends does not depend on what enters it: one batch will do.
            last = find_last_map(block, module, lambda: runner(module, block, 0, entering[0]))
        self.store.save(block, found, seen, counts, None if last is None else last[1].name, curves)

    def _channels(
        self, block: Block, module: nn.Module, runner: BlockRunner, entering: Sequence[torch.Tensor]
    ) -> dict[str, Channels]:
        """Channels of ``block`` that can be taken out, by the map that reads them; says which cannot."""
        found: dict[str, Channels] = {}
        for nets in block.nets:
            if are_channels(block, module, nets, lambda changed: runner(changed, block, 0, entering[0])):
                found |= {channels.sink.name: channels for channels in nets}
                continue
            kind = kind_of(nets[0].sink.name)
            if kind not in self._kept_whole:
                self._kept_whole.add(kind)
                self.progress.line(
                    f"{block.name}: all channels of {kind} stay, something else depends on them; ranks alone are"
                    " lowered there"
                )
        return found


def report_undersampled_experts(blocks: list[Block], store: DecompositionStore, progress: Progress) -> dict[str, float]:
    """How many rows each map of a group saw, by its path; says which saw too few to span their inputs."""
    seen: dict[str, float] = {}
    rare, never = 0, []
    for block in blocks:
        if all(m.group is None for m in block.maps):
            continue
        counts = store.counts(block)
        for map_ in block.maps:
            if map_.group is not None and map_.name in counts:
                seen[block.full_name(map_)] = counts[map_.name]
                rare += 0 < counts[map_.name] < map_.in_features
                never += [block.full_name(map_)] if not counts[map_.name] else []
    if rare:
        progress.line(
            f"{rare} of {len(seen)} maps of experts saw fewer rows than they have inputs: the others help out"
        )
    if never:
        progress.line(f"{len(never)} maps of experts saw no row, their weights alone decide; the first is {never[0]}")
    return seen
