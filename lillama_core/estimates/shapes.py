"""The sizes that an estimate is made of: of the model, from its meta model, and of the run, from its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.data.modality import Inputs
from lillama_core.estimates.probe import BlockCost, by_parameters, kind_of_block, probe_stacks
from lillama_core.estimates.work import Work
from lillama_core.formats import Format
from lillama_core.models.shards import copy_sharing_configs


@dataclass(frozen=True)
class MapShape:
    """A map of a block: W [out, in], and the rank that it will have; None: it stays dense."""

    out: int
    inputs: int
    fraction: float
    """Of the tokens that it multiplies."""
    rank: int | None
    leads: bool
    """Whether it is the first that reads its input."""
    kept: int
    """Parameters that are written for it."""

    @property
    def side(self) -> int:
        """The smaller side, on which it is taken apart."""
        return min(self.out, self.inputs)

    @property
    def parameters(self) -> int:
        return self.out * self.inputs


@dataclass(frozen=True)
class BlockShape:
    """Blocks of a stack that are alike."""

    stack: str
    count: int
    parameters: int
    maps: tuple[MapShape, ...]
    length: int
    """Positions in a row."""
    width: int
    cost: BlockCost
    groups: bool
    """Whether some maps are experts, so that the teacher's routing is noted."""
    channels: tuple[int, ...] = ()
    """Of nets whose channels may be taken out, how many there are."""
    kinds_of_nets: int = 0
    """Nets of experts count once."""
    given: float = 0.0
    """Bytes that a row's blocks are given of what earlier stacks say."""

    @property
    def input_squares(self) -> int:
        """Entries of the second moments of all distinct inputs."""
        return sum(m.inputs**2 for m in self.maps if m.leads)

    @property
    def side_squares(self) -> int:
        """Entries of one matrix of vectors for each map."""
        return sum(m.side**2 for m in self.maps)

    @property
    def kept(self) -> int:
        """Parameters of the finished block."""
        return self.parameters - sum(m.parameters - m.kept for m in self.maps)

    @property
    def factors(self) -> int:
        """Parameters that are trained: plain factors."""
        return sum(m.rank * (m.out + m.inputs) for m in self.maps if m.rank is not None)

    @property
    def active_share(self) -> float:
        """What products of the maps cost as factors in training, relative to dense ones."""
        dense = sum(m.fraction * m.parameters for m in self.maps)
        low = sum(m.fraction * (m.parameters if m.rank is None else m.rank * (m.out + m.inputs)) for m in self.maps)
        return low / dense if dense else 1.0


@dataclass(frozen=True)
class ModelShape:
    """A model and its ranks."""

    parameters: int
    stored: int
    """Bytes of a parameter as the model is loaded."""
    written: int
    """Bytes of a parameter in the result."""
    blocks: tuple[BlockShape, ...]
    around: Work
    """Of what stands around the blocks of the last stack, for one row."""
    outputs: float
    """Numbers in the model's main output for a row."""
    predicts: bool
    embedding: tuple[MapShape, ...] = ()
    """The bands of the token embedding, when it is compressed."""
    row: float = 0.0
    """Bytes of a row of calibration data as the model is fed it."""
    entering: float = 0.0
    """Bytes that are alive at once, for a row, before the first block."""
    remembered: int = 0
    """Numbers that the model remembers of every position while it writes text."""

    @property
    def in_blocks(self) -> int:
        return sum(b.parameters * b.count for b in self.blocks)

    @property
    def shell(self) -> int:
        """Parameters outside of blocks."""
        return self.parameters - self.in_blocks

    @property
    def kept(self) -> int:
        """Parameters of the result."""
        shell = self.shell - sum(m.parameters - m.kept for m in self.embedding)
        return shell + sum(b.kept * b.count for b in self.blocks)

    @property
    def resident(self) -> int:
        """Bytes of the loaded model, everything but the blocks in fp32."""
        return self.stored * self.in_blocks + 4 * self.shell


@dataclass(frozen=True)
class Job:
    """What a run does with a model, in rows of calibration data."""

    fit: int
    choose: int
    report: int
    batch: int
    sampled: int = 0
    """Rows that the model writes itself."""
    steps: int = 0
    streams_trained: int = 1
    sensitivity: int = 0
    """Rows of the backward pass; 0: there is none."""
    rescaling: int = 0
    """Rows on which losses are measured before ranks are shared out; 0: none."""
    parts: int = 10
    """Runs of blocks whose loss is measured apart."""
    correction: int = 0
    adapts: bool = False
    """Whether factors are fitted again to what the compressed model reads; the time of that is not estimated."""
    healing: float = 0.0
    """Times that the whole model goes through the rows that are fitted to at the end."""
    evaluations: int = 8
    """Times that rows which choose are looked at meanwhile."""
    looks: bool = True
    """Whether second moments of inputs are summed up."""
    weighs: bool = True
    """Whether losses weigh errors by the metric of the block's output."""
    pivots: bool = True
    """Whether finished factors are brought into pivoted form."""
    state_size: int = 4
    """Bytes of a number of the hidden states that are kept."""
    half: bool = False
    """Whether products run in half precision."""

    @property
    def passed(self) -> int:
        """Rows that the forward pass carries."""
        fit = self.fit if self.looks or self.steps or self.sensitivity else 0
        return fit + self.choose + self.report

    @property
    def followed(self) -> int:
        """Rows that are followed through the compressed blocks."""
        return (self.fit if self.steps or self.adapts else self.correction) + self.choose + self.report

    def calls(self, rows: float) -> float:
        """Batches that hold so many rows."""
        return max(1.0, rows / self.batch) if rows else 0.0

    def kept_rows(self, on_device: bool) -> int:
        """Rows whose hidden states are kept at the entry of every block."""
        if self.steps or self.adapts:
            return self.passed
        fit = self.fit if self.sensitivity and on_device else min(self.fit, _whole(self.sensitivity, self.batch))
        return max(fit, self.correction) + self.choose + self.report


def _whole(rows: int, batch: int) -> int:
    return math.ceil(rows / batch) * batch


def split_rows(rows: int, batch: int, held_out: float, chooses: bool) -> tuple[int, int, int]:
    """Rows that fit, choose and report, as `CalibrationSplit.of` divides them."""
    whole = rows // batch
    held = max(1, min(round(held_out * whole), (whole - 1) // (2 if chooses else 1)))
    if not chooses:
        return max(1, whole - held) * batch, 0, held * batch
    if whole - 2 * held >= 1:
        return (whole - 2 * held) * batch, held * batch, held * batch
    middle = batch // 2
    return max(1, whole - 1) * batch, middle, batch - middle


def shape_of(
    architecture: Architecture,
    model: nn.Module,
    stacks: Sequence[Sequence[Block]],
    ranks: Mapping[str, int],
    format_: Format,
    inputs: Inputs,
    stored: int,
    written: int,
    embedding: Block | None = None,
    removes_channels: bool = False,
) -> ModelShape:
    """The shape of ``model``, which is on the meta device, for rows like those of ``inputs``.

    ``stacks`` are all its stacks in the order of the forward pass; ``ranks`` those of maps by their paths;
    ``embedding`` the token embedding, when it is compressed. ``removes_channels``: what that costs is found out.
    """
    # Which kernels run is chosen when a model is loaded.
    model = copy_sharing_configs(model)
    architecture.adapt(model)
    costs = probe_stacks(model, architecture, stacks, inputs)
    found: list[BlockShape] = []
    for blocks in stacks:
        stack = costs[blocks[0].stack]
        known: dict[tuple[Any, ...], BlockCost] = {}
        for i, block in enumerate(blocks):
            kind = kind_of_block(model, block)
            module = model.get_submodule(block.path)
            if kind not in known:
                known[kind] = stack.blocks.get(i) or by_parameters(block, module, stack.length, stack.width)
            shape = _block_shape(block, module, ranks, format_, stack.length, stack.width, known[kind])
            shape = replace(shape, given=stack.given)
            if removes_channels:
                kinds = {kind_of(c.name) for c in block.channels}
                shape = replace(shape, channels=tuple(c.size for c in block.channels), kinds_of_nets=len(kinds))
            same = [j for j, other in enumerate(found) if replace(other, count=1) == shape]
            if same:
                found[same[0]] = replace(found[same[0]], count=found[same[0]].count + 1)
            else:
                found.append(shape)
    last = costs[stacks[-1][0].stack]
    parameters = sum(p.numel() for p in model.parameters())
    bands = () if embedding is None else tuple(_map_shapes(embedding, ranks, format_, {}))
    row = float(sum(tensor[:1].nbytes for tensor in inputs.values()))
    outputs = (last.around, last.outputs, last.predicts)
    remembered = remembered_numbers(model.config) * len(stacks[-1])
    return ModelShape(parameters, stored, written, tuple(found), *outputs, bands, row, last.entering, remembered)


def remembered_numbers(config: Any) -> int:
    """Numbers of the keys and values that a block remembers of a position, as a config says; none without attention."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * (getattr(config, "num_key_value_heads", None) or heads) * size


def _block_shape(
    block: Block,
    module: nn.Module,
    ranks: Mapping[str, int],
    format_: Format,
    length: int,
    width: int,
    cost: BlockCost,
) -> BlockShape:
    parameters = sum(p.numel() for p in module.parameters())
    groups = any(m.group is not None for m in block.maps)
    maps = tuple(_map_shapes(block, ranks, format_, cost.leaders))
    return BlockShape(block.stack, 1, parameters, maps, length, width, cost, groups)


def _map_shapes(
    block: Block, ranks: Mapping[str, int], format_: Format, leaders: Mapping[str, str]
) -> Iterator[MapShape]:
    for m in block.maps:
        rank = ranks.get(block.full_name(m))
        kept = m.parameters if rank is None else format_.parameters(m.out_features, m.in_features, rank)
        leads = leaders.get(m.name, m.name) == m.name
        yield MapShape(m.out_features, m.in_features, m.token_fraction, rank, leads, kept)
