"""What enters the blocks of a stack: recorded for every batch, once, and looked at before it is relied on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.modality import Inputs
from lillama_core.errors import LillamaError, UserError, is_out_of_memory, one_line
from lillama_core.runtime.block_runner import BlockInputs, BlockRunner, share_equal
from lillama_core.runtime.effects import Effects
from lillama_core.runtime.harness import StackHarness

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.runtime.weight_source import WeightSource

RecordedInputs = tuple[list[list[BlockInputs]], list[torch.Tensor]]
"""For every batch the other arguments of each block of a stack, and the hidden states that enter the first."""
TOLERANCE = 0.02
"""Relative error below which two ways of running a model are the same but for rounding."""


@dataclass(frozen=True)
class Recorder:
    """Records what enters blocks, and makes the runners that play it back, on one device in one arithmetic."""

    architecture: Architecture
    device: torch.device
    autocast_dtype: torch.dtype | None
    """Of matrix products; None: fp32."""

    def record(
        self,
        harness: StackHarness,
        batches: Sequence[Inputs],
        upstream: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> RecordedInputs:
        """Record the arguments of all blocks for every batch, and the hidden states that enter the first.

        ``upstream`` gives by batch what the last blocks of all earlier stacks give: these are not run then.
        """
        calls: list[list[BlockInputs]] = []
        stream: list[torch.Tensor] = []
        for index, inputs in enumerate(batches):
            earlier = [upstream[below.stack][index] for below in harness.earlier] if upstream else ()
            hidden, found = self._record(harness, inputs, earlier)
            calls.append(share_equal(calls[-1] if calls else None, found))
            stream.append(hidden.cpu())
        return calls, stream

    def _record(
        self, harness: StackHarness, inputs: Inputs, earlier: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[BlockInputs]]:
        # Another stack's blocks may run for real on the way to this one's: they deserve the fast arithmetic, too.
        runs_blocks = len(self.architecture.stacks) > 1
        with self.runner([]).autocast() if runs_blocks else contextlib.nullcontext():
            return harness.record(self.on_device(inputs), [hidden.to(self.device) for hidden in earlier])

    def runner(self, calls: list[list[BlockInputs]]) -> BlockRunner:
        return BlockRunner(self.architecture, calls, self.device, self.autocast_dtype)

    def on_device(self, inputs: Inputs) -> Inputs:
        return {k: v.to(self.device) for k, v in inputs.items()}

    def check(
        self,
        harness: StackHarness,
        inputs: Inputs,
        source: WeightSource,
        upstream: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Blocks run one after the other must give what the model gives, or nothing that follows means anything.

        Raises UserError where they do not, and where maps have no effect, see `Effects`; that is looked at the first
        time. Also finds out whether earlier stacks hand on what their last blocks give, and nothing else. Returns what
        leaves the stack for the first two rows of ``inputs``; ``upstream`` is that of earlier stacks, where it is
        known. Reads every block once.
        """
        # Two rows: what a block is given besides the hidden states may depend on their number.
        short = {k: v[:2] for k, v in self.on_device(inputs).items()}
        calls, stream = self.record(harness, [short])
        runner = self.runner(calls)
        chained = stream[0].to(self.device)
        unsuitable = f"architecture {self.architecture.name!r} does not describe this model"
        effects = Effects() if harness.idle_maps is None else None

        def both(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            nonlocal chained
            block = harness.blocks[index]
            module = source.block(block, self.autocast_dtype)
            try:
                entering = chained.clone()
                chained = runner(module, block, 0, chained)
                if effects is not None:
                    again = effects.look(block, module, runner, entering)
                    if not _relative(again, chained) < TOLERANCE:
                        raise UserError(
                            f"block {block.path} gives something else when it is run again with the same arguments:"
                            " it keeps something of the first run, or draws random numbers"
                        )
            except LillamaError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise UserError(
                    f"the blocks of {harness.stack!r} cannot be run one by one: {unsuitable} ({one_line(error)})"
                ) from error
            with runner.autocast():
                return self.architecture.call_block(module, hidden.float(), args, kwargs)

        expected = harness.last_output(short, both)
        difference = _relative(chained, expected)
        if not difference < TOLERANCE:
            raise UserError(
                f"the blocks of {harness.stack!r} run one by one differ from the whole model by"
                f" {difference:.2%}: {unsuitable}"
            )
        if effects is not None:
            harness.idle_maps = effects.idle()
        harness.depends_only_on_upstream_output = bool(harness.earlier) and self._hand_on(
            harness, short, source, (stream[0], calls[0]), upstream
        )
        return expected

    def stack_output(self, harness: StackHarness, inputs: Inputs, source: WeightSource) -> torch.Tensor:
        """What leaves a stack in a forward pass of the model, whose blocks get what the model passes at that moment."""

        def block(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            with self.runner([]).autocast():
                module = source.block(harness.blocks[index], self.autocast_dtype)
                return self.architecture.call_block(module, hidden.float(), args, kwargs)

        return harness.last_output(self.on_device(inputs), block)

    def _hand_on(
        self,
        harness: StackHarness,
        inputs: Inputs,
        source: WeightSource,
        real: Any,
        upstream: Mapping[str, torch.Tensor],
    ) -> bool:
        """Whether the blocks get the same as in the ``real`` pass if the earlier stacks only say what they gave."""
        try:
            known = [
                upstream[below.stack] if below.stack in upstream else self.stack_output(below, inputs, source)
                for below in harness.earlier
            ]
            handed = self._record(harness, inputs, known)
        except Exception as error:  # a stack that cannot be run like that is run by the model
            if is_out_of_memory(error):
                raise
            return False
        found, expected = list(_tensors(handed)), list(_tensors(real))
        return len(found) == len(expected) and all(map(_same, found, expected))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; rounding alone makes some, a wrong argument one of the order of the values."""
    found, expected = found.float(), expected.to(found.device).float()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    expected = expected.to(found.device)
    # Equal infinities in a mask have no difference that is a number.
    return found.shape == expected.shape and (torch.equal(found, expected) or _relative(found, expected) < TOLERANCE)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what blocks are given."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, BlockInputs):
        yield from _tensors((value.args, value.kwargs, value.added))
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
