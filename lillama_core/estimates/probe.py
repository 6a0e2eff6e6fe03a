"""What running one block costs for one row, counted while it runs on the meta device, where nothing is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.sorted_rows import SortedTarget
from lillama_core.data.modality import Inputs
from lillama_core.estimates.work import Work
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.runtime.block_runner import BlockInputs
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.modules import shared_copy

META, CPU = torch.device("meta"), torch.device("cpu")
_GROUPED = torch.ops.aten._grouped_mm.default if hasattr(torch.ops.aten, "_grouped_mm") else None


class Counter(TorchDispatchMode):
    """While open, counts what is run: operations of products, bytes that everything else moves, kernels."""

    def __init__(self, apart: Collection[int] | None = None) -> None:
        """``apart`` are the storages of weights, which do not count as results; None: what is alive is not watched."""
        super().__init__()
        self._apart = apart
        self.products = self.moved = self.operations = 0.0
        self.live = 0
        """Bytes of results that were alive at once, at the most; if that is watched."""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # What is asked of masks is whether nothing is masked.
            return 1
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if _GROUPED is not None and func is _GROUPED:
            rows, weights = args[0], args[1]
            self.products += 2.0 * rows.numel() * weights.shape[-1]
            self.operations += 1
            return rows.new_empty((*rows.shape[:-1], weights.shape[-1]))
        out = func(*args, **kwargs)
        if not any(isinstance(t, torch.Tensor) for t in tree_leaves(out)):
            return out
        packet = func._overloadpacket
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "dot_product" in str(func):
            # The attention of a CPU, for which no formula is registered: scores, and values by scores.
            queries, keys, values = args[:3]
            positions = queries.shape[:-1].numel() * keys.shape[-2]
            self.products += 2.0 * positions * (queries.shape[-1] + values.shape[-1])
        elif not func.is_view:
            self.moved += sum(_bytes(t) for t in tree_leaves((args, kwargs, out)))
        if not func.is_view:
            self.operations += 1
        if self._apart is not None:
            self._watch(out)
        return out

    def _watch(self, out: Any) -> None:
        assert self._apart is not None
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self._apart:
                    continue
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.live = max(self.live, sum(size for _, size in self._alive.values()))

    def work(self) -> Work:
        return Work(products=self.products, moved=self.moved, operations=self.operations)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


@dataclass(frozen=True)
class BlockCost:
    """What a block does for one row of its stack's input."""

    forward: Work
    graph: float
    """Bytes that a backward pass needs of the forward pass, the weights left out."""
    live: float
    """Bytes that are alive at once on the way without gradients, at the most, the weights left out."""
    leaders: dict[str, str]
    """Name of a map -> that of the first map that reads the same tensor."""
    observed: float = 0.0
    """As ``live``, while what the maps read is watched, and held until the next batch."""


@dataclass(frozen=True)
class StackCost:
    """What a stack does for one row, by the position of a block; a block that is like an earlier one is not there."""

    length: int
    width: int
    blocks: dict[int, BlockCost]
    around: Work
    """Of what stands before the first block and behind the last."""
    outputs: float
    """Numbers in the model's main output for a row."""
    predicts: bool
    """Whether these are scores of classes."""
    given: float = 0.0
    """Bytes that the blocks are given of what earlier stacks say, for a row."""
    entering: float = 0.0
    """Bytes that are alive at once, for a row, on the way to the first block of all: the layers of sounds or images."""


def probe_stacks(
    model: nn.Module, architecture: Architecture, stacks: Sequence[Sequence[Block]], inputs: Inputs
) -> dict[str, StackCost]:
    """Run every kind of block of ``model``, which is on the meta device, on one row of ``inputs``.

    A block that cannot run without numbers is counted by its parameters.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretend(model, mode)
        return _probe(model, architecture, stacks, inputs)


def pretend(model: nn.Module, mode: FakeTensorMode) -> None:
    """Let the tensors of ``model``, which are on the meta device, say that they are on the CPU.

    Some blocks take another way where there is an accelerator, and some another on the meta device.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in known:
                    numbers = tensor.detach().to(META, torch.float32 if tensor.is_floating_point() else None)
                    fake = FakeTensor(mode, numbers, CPU)
                    own = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
                    known[id(tensor)] = own
                if tensor is not None:
                    held[name] = known[id(tensor)]
        if SortedTarget.accepts(module):
            # How many rows each expert has is not known: any matrix costs as much for a row.
            module.forward = lambda rows, _, stack=module: nn.functional.linear(rows, stack.weight[0])


class PretendSource:
    """Blocks of a model whose tensors only pretend to be somewhere, and to be in fp32."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def block(self, block: Block, arithmetic: torch.dtype | None = None) -> nn.Module:
        """A module like the block, with the same tensors."""
        module = shared_copy(self.model.get_submodule(block.path))
        module.__dict__.pop("forward", None)
        return module.eval()


def _probe(
    model: nn.Module, architecture: Architecture, stacks: Sequence[Sequence[Block]], inputs: Inputs
) -> dict[str, StackCost]:
    source, harnesses, found = PretendSource(model), list[StackHarness](), dict[str, StackCost]()
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    entering = 0.0
    row = {k: torch.empty((1, *v.shape[1:]), dtype=v.dtype) for k, v in inputs.items()}
    for blocks in stacks:
        harness = StackHarness(model, architecture, list(blocks), tuple(harnesses), source)
        harnesses.append(harness)
        with Counter(weights) as counted:
            hidden, calls = harness.record(row)
        if not harness.earlier:
            # Later stacks are recorded behind it: earlier blocks are bypassed then, and it is run again.
            entering = float(counted.live)
        length, width = int(hidden.shape[1:-1].numel()), int(hidden.shape[-1])
        costs = {}
        for i in first_of_each_kind(model, blocks):
            module = source.block(blocks[i])
            try:
                costs[i] = _probe_block(architecture, blocks[i], module, hidden, calls[i])
            except Exception:  # whatever a block may ask of numbers that are not there
                costs[i] = by_parameters(blocks[i], module, length, width)
        last = torch.empty_like(hidden)
        with torch.no_grad(), Counter():
            # Finds out, once, whether earlier stacks have to run for it.
            outputs = harness.outputs(row, last)
        with torch.no_grad(), Counter() as counter:
            harness.outputs(row, last)
        predicts = class_logits(model, outputs) is not None
        given = given_from(calls, {cost.length for cost in found.values()} - {length})
        found[blocks[0].stack] = StackCost(
            length, width, costs, counter.work(), float(main_output(outputs).numel()), predicts, given, entering
        )
    return found


def given_from(calls: Sequence[BlockInputs], lengths: Collection[int]) -> float:
    """Bytes of the tensors among the arguments ``calls`` of blocks that are as long as an earlier stack's row.

    Others, masks and tables of positions, are the same for all rows and held once.
    """
    tensors = {id(t): t for t in tree_leaves([(c.args, c.kwargs) for c in calls]) if isinstance(t, torch.Tensor)}
    long = [t for t in tensors.values() if t.dim() == 3 and t.shape[-2] in lengths and t.is_floating_point()]
    return float(sum(map(_bytes, long)))


def first_of_each_kind(model: nn.Module, blocks: Sequence[Block]) -> list[int]:
    """The positions of the blocks whose parameters have shapes, or whose maps have names, that no earlier block has."""
    seen, found = set(), []
    for i, block in enumerate(blocks):
        kind = kind_of_block(model, block)
        if kind not in seen:
            seen.add(kind)
            found.append(i)
    return found


def kind_of_block(model: nn.Module, block: Block) -> tuple[Any, ...]:
    """Equal for blocks that cost the same."""
    shapes = tuple((n, tuple(p.shape)) for n, p in model.get_submodule(block.path).named_parameters())
    return (shapes, tuple(m.name for m in block.maps))


def _probe_block(
    architecture: Architecture, block: Block, module: nn.Module, hidden: torch.Tensor, call: Any
) -> BlockCost:
    # The storages themselves: the place of one that is gone may be taken by the next.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        # Nothing goes back. What is packed is in the graph: an output that packs itself would never be freed.
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage

    leaders: dict[str, str] = {}
    seen: list[tuple[str, torch.Tensor]] = []

    def note(map_: Any, tensor: torch.Tensor) -> None:
        leaders[map_.name] = next((name for name, known in seen if known is tensor), map_.name)
        seen.append((map_.name, tensor))

    own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    with torch.no_grad(), Counter(own) as watched:
        architecture.call_block(module, hidden, call.args, call.kwargs)
    with contextlib.ExitStack() as stack:
        for target in block.targets:
            # Which rows experts get is not known here.
            if all(m.group is None for m in target.maps):
                stack.enter_context(target.observe(module, on_input=note))
        with torch.no_grad(), Counter(own) as holding:
            architecture.call_block(module, hidden, call.args, call.kwargs)
        seen.clear()
        leaders.clear()
        stack.enter_context(torch.enable_grad())
        forward = stack.enter_context(Counter())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing))
        architecture.call_block(module, hidden.detach().requires_grad_(True), call.args, call.kwargs)
    graph = sum(storage.nbytes() for place, storage in saved.items() if place not in own)
    every = {m.name: leaders.get(m.name, m.name) for m in block.maps}
    return BlockCost(forward.work(), float(graph), float(watched.live), every, float(holding.live))


def by_parameters(block: Block, module: nn.Module, length: int, width: int) -> BlockCost:
    """A block as if every parameter met every position once, besides the products of attention."""
    listed = {m.name: m for m in block.maps}
    in_maps = sum(m.parameters for m in listed.values())
    other = sum(p.numel() for p in module.parameters()) - in_maps
    active = max(0, other) + sum(m.token_fraction * m.parameters for m in listed.values())
    attention = 4.0 * length * length * width
    # Of a gated transformer block fp32 numbers of some 14 widths are kept for a backward pass, twice that is moved.
    graph = 4.0 * 14 * width * length
    forward = Work(2.0 * active * length + attention, moved=2 * graph, operations=40.0 + 5 * len(listed))
    # A block without its observed tensors holds some 4 widths; what maps read is about as much again.
    live = 4.0 * 4 * width * length
    return BlockCost(forward, graph, live, {name: name for name in listed}, 2 * live)
