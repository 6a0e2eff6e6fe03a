"""The harness around a stack: what the model passes to each block, recorded without computing any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.data.modality import Inputs
from lillama_core.errors import UserError
from lillama_core.models.outputs import main_output
from lillama_core.runtime.block_runner import BlockInputs
from lillama_core.runtime.weight_source import ResidentSource

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.architecture.blocks import Block
    from lillama_core.runtime.weight_source import WeightSource

RunBlock = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]
"""Takes a block's index, hidden states and other arguments, and returns hidden states."""


class StopForward(Exception):  # noqa: N818  not an error: it ends a pass early
    """Ends a forward pass whose rest is of no interest."""


class StackHarness:
    """The model around the blocks of one stack: it makes their arguments, and turns their result into outputs.

    The blocks themselves are bypassed: each hands on the hidden states that it got. So the arguments of all blocks
    (masks, rotary tables, an encoder's output) cost no more than the embedding.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        blocks: list[Block],
        earlier: Sequence[StackHarness] = (),
        source: WeightSource | None = None,
    ) -> None:
        """``earlier`` are the harnesses of the stacks that are run before this one.

        ``source`` has the blocks' weights; None: ``model`` itself.
        """
        self.model = model
        self.source = source or ResidentSource(model, next(model.parameters()).device)
        self.architecture = architecture
        self.blocks = blocks
        self.earlier = earlier
        self.depends_only_on_upstream_output = False
        """Whether nothing of the earlier stacks reaches these blocks but what their last blocks give; see `record`."""
        self.adds_between = False
        """Whether the model adds to the hidden states between two of these blocks; found out when it is recorded."""
        self._without_earlier: bool | None = None if earlier else False
        """Whether outputs are the same when the earlier stacks are bypassed, too; None: not tried yet."""
        self._extra_outputs: dict[tuple[int, ...], tuple[Any, ...] | None] = {}
        """What a block returns besides the hidden states, by their shape; None: it returns them alone."""
        self.idle_maps: tuple[str, ...] | None = None
        """Paths from the model of the maps that multiply rows in vain, of those chosen; None: not looked yet."""
        self._caching = _caching_configs(model)

    @property
    def stack(self) -> str:
        """The name of the stack that these blocks are."""
        return self.blocks[0].stack

    def record(
        self, inputs: Inputs, earlier: Sequence[torch.Tensor] = (), with_graph: bool = False
    ) -> tuple[torch.Tensor, list[BlockInputs]]:
        """The hidden states that enter the first block, and the other arguments of every block.

        And what the model adds between blocks, as it may put what it sees in a picture in some places of the text.
        ``earlier`` is what the last blocks of the earlier stacks give, if that is known: they are not run then. What is
        recorded hangs on it by the autograd graph if it shall come ``with_graph``.
        """
        calls: list[BlockInputs] = []
        first: list[torch.Tensor] = []
        left: list[torch.Tensor] = []

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            if index == 0:
                first.append(hidden)
            else:
                calls[-1].added = self._added(index - 1, left.pop(), hidden)
            left.append(hidden)
            calls.append(BlockInputs(args, kwargs))
            if index == len(self.blocks) - 1:
                raise StopForward
            return hidden

        with (
            torch.set_grad_enabled(with_graph),
            contextlib.ExitStack() as bypassed,
            contextlib.suppress(StopForward),
        ):
            for below, last_hidden in zip(self.earlier, earlier, strict=True) if earlier else ():
                bypassed.enter_context(below._bypassed(below._giving(last_hidden)))
            bypassed.enter_context(self._bypassed(bypass))
            self._forward(inputs)
        return first[0].float() if with_graph else first[0].detach().float(), calls

    def _added(self, index: int, left: torch.Tensor, entering: torch.Tensor) -> torch.Tensor | None:
        """What the model has added to ``left``, which left block ``index``, when it enters the next one; None: nothing.

        Whether it is a sum at all is seen when the blocks are run one after the other.
        """
        if entering is left or entering.shape != left.shape:
            return None
        added = entering.float() - self.architecture.between_blocks(index, left.float())
        if not added.any():
            return None
        self.adds_between = True
        return added

    def last_output(self, inputs: Inputs, run: RunBlock) -> torch.Tensor:
        """What the last block returns in a forward pass of the model in which ``run`` stands for every block.

        ``run`` gets a block's index, the hidden states and the other arguments that the model passes at that moment.
        """
        last: list[torch.Tensor] = []

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            out = run(index, hidden, args, kwargs)
            if index == len(self.blocks) - 1:
                last.append(out)
                raise StopForward
            return out

        with torch.no_grad(), self._bypassed(bypass), contextlib.suppress(StopForward):
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
        return self._outputs(inputs, last_hidden, self.outputs_need_no_earlier(inputs, last_hidden))

    def outputs_need_no_earlier(self, inputs: Inputs, last_hidden: torch.Tensor) -> bool:
        """Whether what earlier stacks give reaches the outputs through these blocks alone; tried once."""
        if self._without_earlier is None:
            with torch.no_grad():
                whole, short = (main_output(self._outputs(inputs, last_hidden, skip)) for skip in (False, True))
            self._without_earlier = torch.equal(whole, short)
        return self._without_earlier

    def formal_outputs(self, inputs: Inputs) -> Any:
        """The model's outputs when all blocks hand on what they get: of the right form, without their numbers."""
        with torch.no_grad(), contextlib.ExitStack() as bypassed:
            for stack in (*self.earlier, self):
                bypassed.enter_context(stack._bypassed(lambda index, hidden, args, kwargs: hidden))
            return self._forward(inputs)

    def _outputs(self, inputs: Inputs, last_hidden: torch.Tensor, skip_earlier: bool) -> Any:
        """As `outputs`. What an encoder says is of no use to blocks that are bypassed, and costs most of the time."""

        with contextlib.ExitStack() as bypassed:
            for below in self.earlier if skip_earlier else ():
                bypassed.enter_context(below._bypassed(lambda index, hidden, args, kwargs: hidden))
            bypassed.enter_context(self._bypassed(self._giving(last_hidden)))
            return self._forward(inputs)

    def _giving(self, last_hidden: torch.Tensor) -> RunBlock:
        """In place of the blocks: the last gives ``last_hidden``, the others what they get."""

        def bypass(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            return last_hidden if index == len(self.blocks) - 1 else hidden

        return bypass

    def _forward(self, inputs: Inputs) -> Any:
        # What a block finds in a cache it does not compute: run a second time with the same arguments, it would look
        # back at the keys and values of the first. Parts of a model have configs of their own, and not every model
        # takes an argument that says it.
        try:
            for config in self._caching:
                config.use_cache = False
            return self.model(**inputs)
        finally:
            for config in self._caching:
                config.use_cache = True

    @contextlib.contextmanager
    def _bypassed(self, bypass: RunBlock) -> Iterator[None]:
        modules = [self.model.get_submodule(block.path) for block in self.blocks]

        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                shape = tuple((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape)
                if shape not in self._extra_outputs:
                    # What a block returns besides is its own business: see once what it does. Without its hooks, which
                    # run for the call that this stands in for: they may note what a model reads of its blocks.
                    with torch.no_grad():
                        result = self.source.block(self.blocks[index]).forward(*args, **kwargs)
                    self._extra_outputs[shape] = tuple(result[1:]) if isinstance(result, tuple | list) else None
                if "hidden_states" in kwargs:
                    rest = dict(kwargs)
                    hidden = bypass(index, rest.pop("hidden_states"), args, rest)
                else:
                    hidden = bypass(index, args[0], args[1:], kwargs)
                rest_of_result = self._extra_outputs[shape]
                return hidden if rest_of_result is None else (hidden, *rest_of_result)

            return forward

        own = [module.__dict__.get("forward") for module in modules]
        for index, module in enumerate(modules):
            module.forward = replaced(index)
        try:
            yield
        finally:
            for module, forward in zip(modules, own, strict=True):
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = forward


def _caching_configs(model: nn.Module) -> list[Any]:
    """The configs of ``model`` and its parts that ask for a cache."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, "use_cache", None)]
