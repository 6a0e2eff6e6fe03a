"""Running blocks on their own: what the parent passes to each, recorded without computing any of them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lillama_core.architecture import Architecture, Block
from lillama_core.errors import LillamaError, UserError
from lillama_core.modality import Inputs

RunBlock = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]
"""Takes a block's index, hidden states and other arguments, and returns hidden states."""


@dataclass
class BlockCall:
    """The arguments that a block gets besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):  # noqa: N818  not an error: it ends a pass early
    """Ends a forward pass whose rest is of no interest."""


class Parent:
    """The model around the blocks of one stack: it makes their arguments, and turns their result into outputs.

    The blocks themselves are bypassed: each hands on the hidden states that it got. So the arguments of all blocks
    (masks, rotary tables, an encoder's output) cost no more than the embedding.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, blocks: list[Block], earlier: Sequence[Parent] = ()
    ) -> None:
        """``earlier`` are the parents of the stacks that are run before this one."""
        self.model = model
        self.architecture = architecture
        self.blocks = blocks
        self.earlier = earlier
        self.earlier_hand_on = False
        """Whether nothing of the earlier stacks reaches these blocks but what their last blocks give; see `record`."""
        self._without_earlier: bool | None = None if earlier else False
        """Whether outputs are the same when the earlier stacks are bypassed, too; None: not tried yet."""
        self._rest: dict[tuple[int, ...], tuple[Any, ...] | None] = {}
        """What a block returns besides the hidden states, by their shape; None: it returns no tuple."""
        self._extra = {"use_cache": False} if _takes_use_cache(model) else {}

    @property
    def stack(self) -> str:
        """The name of the stack that these blocks are."""
        return self.blocks[0].stack

    def record(self, inputs: Inputs, earlier: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, list[BlockCall]]:
        """The hidden states that enter the first block, and the other arguments of every block.

        ``earlier`` is what the last blocks of the earlier stacks give, if that is known: they are not run then.
        """
        calls: list[BlockCall] = []
        first: list[torch.Tensor] = []

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            if index == 0:
                first.append(hidden)
            calls.append(BlockCall(args, kwargs))
            if index == len(self.blocks) - 1:
                raise _Enough
            return hidden

        with torch.no_grad(), contextlib.ExitStack() as bypassed, contextlib.suppress(_Enough):
            for parent, last_hidden in zip(self.earlier, earlier, strict=True) if earlier else ():
                bypassed.enter_context(parent._bypassed(parent._giving(last_hidden)))
            bypassed.enter_context(self._bypassed(bypass))
            self._forward(inputs)
        return first[0].detach().float(), calls

    def last_output(self, inputs: Inputs, run: RunBlock) -> torch.Tensor:
        """What the last block returns in a forward pass of the model in which ``run`` stands for every block.

        ``run`` gets a block's index, the hidden states and the other arguments that the model passes at that moment.
        """
        last: list[torch.Tensor] = []

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            out = run(index, hidden, args, kwargs)
            if index == len(self.blocks) - 1:
                last.append(out)
                raise _Enough
            return out

        with torch.no_grad(), self._bypassed(bypass), contextlib.suppress(_Enough):
            self._forward(inputs)
        return last[0].float()

    def check_order(self, inputs: Inputs) -> None:
        """Raise UserError unless a forward pass runs each block once, one after the other.

        All else here takes that for granted, and ends a pass at the first call of the last block.
        """
        order: list[int] = []

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            order.append(index)
            return hidden

        with torch.no_grad(), self._bypassed(bypass):
            self._forward(inputs)
        if order != list(range(len(self.blocks))):
            raise UserError(
                f"the model runs the {len(self.blocks)} blocks of {self.stack!r} in the order"
                f" {', '.join(map(str, order[:12]))}{', …' if len(order) > 12 else ''}; only models that run each block"
                " once, one after the other, can be compressed"
            )

    def outputs(self, inputs: Inputs, last_hidden: torch.Tensor) -> Any:
        """The model's outputs when its last block returns ``last_hidden``; gradients reach ``last_hidden``."""

        if self._without_earlier is None:
            with torch.no_grad():
                whole, short = (main_output(self._outputs(inputs, last_hidden, skip)) for skip in (False, True))
            self._without_earlier = torch.equal(whole, short)
        return self._outputs(inputs, last_hidden, self._without_earlier)

    def _outputs(self, inputs: Inputs, last_hidden: torch.Tensor, skip_earlier: bool) -> Any:
        """As `outputs`. What an encoder says is of no use to blocks that are bypassed, and costs most of the time."""

        with contextlib.ExitStack() as bypassed:
            for parent in self.earlier if skip_earlier else ():
                bypassed.enter_context(parent._bypassed(lambda index, hidden, args, kwargs: hidden))
            bypassed.enter_context(self._bypassed(self._giving(last_hidden)))
            return self._forward(inputs)

    def _giving(self, last_hidden: torch.Tensor) -> RunBlock:
        """In place of the blocks: the last gives ``last_hidden``, the others what they get."""

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            return last_hidden if index == len(self.blocks) - 1 else hidden

        return bypass

    def _forward(self, inputs: Inputs) -> Any:
        return self.model(**inputs, **self._extra)

    @contextlib.contextmanager
    def _bypassed(self, bypass: RunBlock) -> Iterator[None]:
        modules = [self.model.get_submodule(block.path) for block in self.blocks]

        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                shape = tuple((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape)
                if shape not in self._rest:
                    # What a block returns besides is its own business: see once what it does.
                    block = copy.deepcopy(modules[index]).float()
                    del block.__dict__["forward"]  # the bypass itself
                    with torch.no_grad():
                        result = block(*args, **kwargs)
                    self._rest[shape] = result[1:] if isinstance(result, tuple) else None
                if "hidden_states" in kwargs:
                    rest = dict(kwargs)
                    hidden = bypass(index, rest.pop("hidden_states"), args, rest)
                else:
                    hidden = bypass(index, args[0], args[1:], kwargs)
                rest_of_result = self._rest[shape]
                return hidden if rest_of_result is None else (hidden, *rest_of_result)

            return forward

        for index, module in enumerate(modules):
            module.forward = replaced(index)
        try:
            yield
        finally:
            for module in modules:
                del module.__dict__["forward"]


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether the model keeps a cache, which would only be carried along."""
    return (
        getattr(model.config, "use_cache", None) is not None
        and "use_cache" in inspect.signature(model.forward).parameters
    )


def class_logits(model: nn.Module, outputs: Any) -> torch.Tensor | None:
    """The scores of tokens or labels of which one is right; None where the model puts out other numbers.

    A single score (of a reward model) is such a number, and so are those of labels of which several may hold. Scores
    of pixels [rows, classes, height, width] end in no axis of classes.
    """
    logits = getattr(outputs, "logits", None)
    problem = getattr(model.config, "problem_type", None)
    if logits is None or problem in ("regression", "multi_label_classification"):
        return None
    if logits.dim() > 3 or logits.shape[-1] < 2:
        return None
    assert isinstance(logits, torch.Tensor)
    return logits


def main_output(outputs: Any) -> torch.Tensor:
    """The tensor that a model is for: logits, or else the first of its outputs."""
    logits = getattr(outputs, "logits", None)
    found = outputs[0] if logits is None else logits
    assert isinstance(found, torch.Tensor)
    return found


def share_equal(previous: list[BlockCall] | None, calls: list[BlockCall]) -> list[BlockCall]:
    """``calls`` with tensors that equal those of ``previous`` replaced by them.

    Masks and rotary tables are the same for every batch of one shape; holding one copy keeps memory flat.
    """
    if previous is None:
        return calls
    known: dict[int, Any] = {}

    def shared(old: Any, new: Any) -> Any:
        if isinstance(new, torch.Tensor):
            if id(new) not in known:
                same = isinstance(old, torch.Tensor) and old.shape == new.shape and torch.equal(old, new)
                known[id(new)] = (old if same else new, new)
            return known[id(new)][0]
        if isinstance(new, tuple) and isinstance(old, tuple) and len(old) == len(new):
            return tuple(shared(o, n) for o, n in zip(old, new, strict=True))
        return new

    return [
        BlockCall(
            shared(before.args, call.args),
            {k: shared(before.kwargs.get(k), v) for k, v in call.kwargs.items()},
        )
        for before, call in zip(previous, calls, strict=True)
    ]


class BlockRunner:
    """Runs single blocks on batches of hidden states, with the arguments recorded for each batch."""

    def __init__(
        self,
        architecture: Architecture,
        calls: list[list[BlockCall]],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.architecture = architecture
        self.calls = calls
        """For each batch, for each block of the stack."""
        self.device = device
        self.autocast_dtype = autocast_dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Half-precision matrix products where the device is good at them; everything else stays fp32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def __call__(self, module: nn.Module, block: Block, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output in fp32 for the hidden states of ``batch`` [rows, length, width]."""
        call = self.calls[batch][block.index]
        with self.autocast():
            out = self.architecture.call_block(module, hidden.to(self.device), call.args, call.kwargs)
        # Once infinite, every later number is; with gradients the loss is looked at instead.
        if not torch.is_grad_enabled() and not torch.isfinite(out).all():
            raise LillamaError(
                f"block {block.path} gives activations that are infinite or not a number; its weights, or the"
                " rounding of its factors, are too large for the arithmetic"
            )
        return self.architecture.between_blocks(block.index, out.float())

    def over(self, module: nn.Module, block: Block, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        """The block's outputs for every batch of a stream, without gradients."""
        with torch.no_grad():
            return [self(module, block, i, hidden).to(hidden.device) for i, hidden in enumerate(stream)]

    def advance(self, module: nn.Module, block: Block, stream: list[torch.Tensor]) -> None:
        """Replace every batch of a stream by the block's output for it: one stream in memory, not two."""
        with torch.no_grad():
            for i, hidden in enumerate(stream):
                stream[i] = self(module, block, i, hidden).to(hidden.device)
