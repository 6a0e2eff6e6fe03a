"""The most that each phase of a run holds, of the host's memory and of the device's, and what it puts on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lillama_core.data.self_generated.sampling import batch_rows
from lillama_core.estimates.phases import ROWS_WITH_GRADIENTS, Phases
from lillama_core.estimates.shapes import BlockShape, Job, ModelShape
from lillama_core.statistics.store import strips

SLACK = 24e6
"""Bytes of small things: kernels of oneDNN, rows of text, tables, what glibc keeps. Measured on made models."""

HOLES = 2.3
"""What the temporaries of a block take on the host, relative to what is alive of them at once.

Measured once: in blocks of an encoder of speech, 384 wide, at most 120 MB were alive, and 275 MB resident. One cause is
that glibc 2.36 gives the place of a freed tensor to no other of its size, since both are aligned. Between blocks all of
it goes back to the system.
"""


@dataclass(frozen=True)
class Held:
    """Bytes on the host and on the device."""

    host: float = 0.0
    device: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(self.host + other.host, self.device + other.device)


def most(*held: Held) -> Held:
    """The larger of each."""
    return Held(max(h.host for h in held), max(h.device for h in held))


@dataclass(frozen=True)
class Memory:
    """What a run holds, phase by phase."""

    model: ModelShape
    job: Job
    streamed: bool
    accelerator: bool
    libraries: float

    def peak(self) -> Held:
        """The most of all phases."""
        return self.always() + most(*self.phases().values())

    def phases(self) -> dict[str, Held]:
        """What each phase holds at the most beside what is always there."""
        job, found = self.job, {"load model": self.loading()}
        if job.sampled and not self.streamed:
            found["calibration data"] = self.here(self.writing())
        for i, block in enumerate(self.model.blocks):
            found[f"record {block.stack}"] = self.recording(block)
            found[f"forward {block.stack} {i}"] = self.forward(block)
            if job.sensitivity:
                found[f"backward {block.stack} {i}"] = self.backward(block)
            if job.rescaling:
                found[f"ranks {block.stack} {i}"] = self.measuring(block)
            found[f"blocks {block.stack} {i}"] = self.bands() + self.compressing(block)
        if job.sensitivity:
            found["gradients of outputs"] = self.gradients_of_outputs()
        if self.model.embedding:
            found["embedding"] = self.embedding()
        if job.rescaling:
            found["ranks outputs"] = self.heads(self.variants_held(self.model.blocks[-1]))
        last = self.model.blocks[-1]
        found["report"] = self.bands() + self.heads(2 * self.stream(last, job.report))
        if job.healing:
            found["healing"] = self.healing()
        return found

    def checking(self) -> float:
        """Bytes on the host while a fresh process loads the result beside this one."""
        size = self.model.written * self.model.kept
        largest = max(self.model.written * b.kept for b in self.model.blocks)
        loaded = 4.0 * self.model.shell + 2 * largest if self.streamed else size
        return self.libraries * 2 + self.held_model() + loaded

    def held_model(self) -> float:
        return 4.0 * self.model.shell if self.streamed else float(self.model.resident)

    def always(self) -> Held:
        """The libraries, the model, and the calibration data."""
        job = self.job
        data = self.model.row * (job.fit + job.choose + job.report)
        return Held(self.libraries + SLACK + data) + self.here(self.held_model())

    def here(self, size: float) -> Held:
        """Bytes where tensors are computed."""
        return Held(0.0, size) if self.accelerator else Held(size)

    def loading(self) -> Held:
        """The model passes through the host on its way, and what is not in blocks is made fp32."""
        if self.accelerator and not self.streamed:
            return Held(float(self.model.stored * self.model.parameters))
        return Held(float(self.model.stored * self.model.shell))

    def writing(self) -> float:
        """Bytes beside the model that writes text: a copy in the run's arithmetic, what it remembers, and scores."""
        model, size = self.model, 2 if self.job.half else 4
        # Of weights that are of that type already there is no copy; those outside of blocks are in fp32.
        copied = (0 if model.stored == size else model.in_blocks) + (0 if size == 4 else model.shell)
        length = max(b.length for b in model.blocks)
        rows = batch_rows(length)
        scores = 4.0 * 3 * model.outputs / length * rows
        return float(size * (copied + rows * length * model.remembered)) + scores

    def weights(self, block: BlockShape) -> Held:
        """A block in fp32; from disk the next one is being read meanwhile, and no more is left of the file."""
        own = self.here(4.0 * block.parameters)
        return own + Held(1.0 * self.model.stored * block.parameters) if self.streamed else own

    def stream(self, block: BlockShape, rows: float) -> float:
        return 4.0 * rows * block.length * block.width

    def run(self, block: BlockShape, rows: float) -> float:
        """What a block takes while it runs on so many rows without gradients."""
        return self.temporaries(block.cost.live * rows)

    def temporaries(self, live: float) -> float:
        """What tensors take that come and go while a block runs."""
        return live if self.accelerator else HOLES * live

    def below(self, block: BlockShape) -> tuple[BlockShape, ...]:
        """A block of each of the stacks that come before that of ``block``."""
        stacks = {b.stack: b for b in self.model.blocks}
        return tuple(b for b in stacks.values() if list(stacks).index(b.stack) < list(stacks).index(block.stack))

    def is_last(self, block: BlockShape) -> bool:
        return block.stack == self.model.blocks[-1].stack

    def back_rows(self) -> float:
        """Rows of the batches of which the way back takes some."""
        whole = math.ceil(self.job.sensitivity / self.job.batch) * self.job.batch
        return min(self.job.fit, whole)

    def chained(self, block: BlockShape, rows: float) -> Held:
        """What earlier stacks gave for ``rows``."""
        return Held(sum(self.stream(b, rows) for b in self.below(block)))

    def recording(self, block: BlockShape) -> Held:
        """A stack begins: what the stacks below gave, and what is made of it for the blocks, of all rows."""
        passed = self.job.passed
        entering = self.here(self.model.entering * self.job.batch + block.given * passed)
        return self.chained(block, passed) + Held(self.stream(block, passed)) + entering

    def forward(self, block: BlockShape) -> Held:
        job = self.job
        held = self.weights(block) + Held(self.stream(block, job.passed)) + self.here(block.given * job.passed)
        # Behind the last recording what lower stacks gave is held for the way back alone.
        held += self.chained(block, self.back_rows() if self.is_last(block) else job.passed)
        moments = 4.0 * block.input_squares if job.looks else 0.0
        states = self.stream(block, job.kept_rows(self.accelerator))
        watched = job.looks and (not self.accelerator or not job.sensitivity)
        running = self.here(
            moments + self.temporaries((block.cost.observed if watched else block.cost.live) * job.batch)
        )
        if not block.maps or (self.accelerator and job.sensitivity):
            running = self.here(self.run(block, job.batch))
            return held + most(running, Held(states))
        if not job.sensitivity:
            return held + self.here(moments) + most(running, Held(states), self.decomposing(block))
        return held + self.here(moments) + most(running, Held(states + moments))

    def decomposing(self, block: BlockShape) -> Held:
        """Vectors of all maps, and the fp64 matrices of the one that needs most; then their copies for the file."""
        largest = max(self.exact(m.out, m.inputs) + 4.0 * m.inputs**2 for m in block.maps)
        # Four matrices of a net's channels while they are put in order, net by net; then one and its copy.
        nets = [8.0 * (4 * n * n + 2 * n * block.width) for n in block.channels]
        largest = max([largest, *nets])
        vectors = 8.0 * block.side_squares
        apart = self.here(vectors) + most(self.here(largest), Held(vectors))
        return most(self.trying(block), apart) if block.channels else apart

    def trying(self, block: BlockShape) -> Held:
        """A copy of a block without some channels; experts are copied whole, since they are one tensor."""
        experts = sum(m.parameters for m in block.maps if m.fraction < 1)
        nets = sum(n * block.width for n in block.channels)
        return self.here(4.0 * max(experts, nets) + self.run(block, self.job.batch))

    @staticmethod
    def root(block: BlockShape) -> float:
        """Bytes of what refits the map behind channels, of the largest net."""
        return 4.0 * max([n * n for n in block.channels], default=0)

    @staticmethod
    def triangles(block: BlockShape) -> float:
        """Bytes of these on disk, where they are strips of a triangle."""
        return 4.0 * sum((b - a) * b for n in block.channels for a, b in strips(n))

    @staticmethod
    def exact(out: int, inputs: int) -> float:
        n = min(out, inputs)
        if out <= inputs:
            return 8.0 * (3 * out * inputs + 2 * inputs * inputs + 6 * n * n)
        return 8.0 * (out * inputs + 9 * n * n)

    def backward(self, block: BlockShape) -> Held:
        job = self.job
        held = self.weights(block)
        rows = min(ROWS_WITH_GRADIENTS, job.sensitivity)
        # The gradients; what earlier stacks gave, what is made of it for the blocks, and the gradients at that.
        stream, given = self.stream(block, job.sensitivity), block.given * job.sensitivity
        held += Held(stream) + self.chained(block, self.back_rows()) + self.here(2 * given)
        if self.accelerator and job.looks:
            # Blocks are run again for what their maps read.
            held += self.here(block.given * job.passed)
        moments = 4.0 * block.input_squares if job.looks and block.maps else 0.0
        gradients = 4.0 * (block.side_squares + block.width**2)
        graph = rows * block.cost.graph + self.run(block, rows)
        held += self.here(moments + gradients)
        # Gradients are copied for the file once the graphs are gone.
        saving = Held(stream + given)
        if not block.maps:
            return held + most(self.here(graph), saving)
        again = block.cost.observed * job.batch if self.accelerator else 0.0
        # The means of the gradients' moments are taken while their sums are there.
        return held + most(self.here(max(graph, again)), saving, self.here(gradients) + self.decomposing(block))

    def gradients_of_outputs(self) -> Held:
        """Scores of one row, their gradients, and the way back."""
        last = self.model.blocks[-1]
        # With the embedding the scores of the positions that count are copied, by a table of which these are.
        tables = 3.25 if self.model.embedding else 3.0
        streams = Held(self.stream(last, self.job.sensitivity)) + self.chained(last, self.back_rows())
        return self.here(4.0 * tables * self.model.outputs) + streams

    def embedding(self) -> Held:
        """The largest band of the embedding, as it is, weighted, and in fp64, beside the vectors of all."""
        largest = max(4.0 * band.parameters + self.exact(band.out, band.inputs) for band in self.model.embedding)
        return self.here(largest + 8.0 * sum(band.side**2 for band in self.model.embedding))

    def bands(self) -> Held:
        """The compressed embedding: the dense one stays beside it for the report."""
        return self.here(4.0 * sum(band.kept for band in self.model.embedding))

    def heads(self, streams: float) -> Held:
        """The scores of one row by two models, whose ``streams`` of all rows are held."""
        return self.here(4.0 * 3 * self.model.outputs) + Held(streams)

    def variants_held(self, block: BlockShape) -> float:
        """The streams of all variants in the stack of ``block``, the dense model's among them.

        In a stack above another every variant of that one is fed what it gave there.
        """
        phases = Phases(self.model, self.job, self.streamed, self.accelerator)
        rows, before = self.job.rescaling, [sum(phases.variants(b.stack)) for b in self.below(block)]
        outputs = sum((sum(before[: i + 1]) + 1) * self.stream(b, rows) for i, b in enumerate(self.below(block)))
        given = (sum(before) + 1) * block.given * rows
        own = (sum(before) + sum(phases.variants(block.stack)) + 1) * self.stream(block, rows)
        return outputs + given + own

    def measuring(self, block: BlockShape) -> Held:
        """A stream for every variant, the block, and two copies of it with factors: one of them without channels."""
        copies = 2 if block.channels else 1
        factors = copies * 4.0 * block.factors + 8.0 * block.side_squares + self.root(block)
        factors += 4.0 * block.parameters if block.channels else 0.0
        held = self.weights(block) + Held(self.variants_held(block)) + self.here(self.run(block, ROWS_WITH_GRADIENTS))
        return held + (self.here(factors) if block.maps else Held())

    def compressing(self, block: BlockShape) -> Held:
        job = self.job
        held = Held(self.stream(block, job.followed)) + self.here(block.given * job.followed) + self.weights(block)
        factors = 4.0 * block.factors
        written = float(self.model.written * block.kept)
        finished = self.here(4.0 * block.kept) + Held(2 * written)
        # The finished block carries on the rows that are followed.
        finished = most(finished, self.here(4.0 * block.kept + self.run(block, min(job.batch, job.followed))))
        if not block.maps:
            return held + finished
        vectors = 8.0 * block.side_squares + self.root(block)
        # Dense weights go as factors come.
        factoring = self.here(factors + vectors)
        metric = self.here(4.0 * 3 * block.width**2 if job.weighs else 0.0)
        training = self.here(factors)
        if job.steps:
            inputs = sum(m.fraction * m.inputs for m in block.maps if m.leads)
            inner = sum(m.fraction * m.rank for m in block.maps if m.rank is not None)
            graph = job.batch * (block.cost.graph + 4.0 * block.length * (inputs + inner))
            # Weights, gradients, two moments, and the best so far.
            training = self.here(5 * factors + graph + self.run(block, job.batch))
        return held + metric + most(factoring, training, finished)

    def healing(self) -> Held:
        """The teacher, the student in fp32 in place of the dense blocks, what training keeps, and one row's graph."""
        model = self.model
        teacher = (2.0 if self.job.half else 4.0) * model.parameters
        # The student's blocks take the place of those of the dense model.
        student = max(0.0, 4.0 * (model.kept - model.shell) - float(model.resident) + 4.0 * model.shell)
        factors = 4.0 * sum(b.count * b.factors for b in model.blocks)
        graph = sum(b.count * b.cost.graph for b in model.blocks)
        # Gradients, two moments, the best so far; the same once more while they are written.
        return self.here(teacher + student + 8 * factors + graph + 4.0 * 3 * model.outputs)

    def disk(self) -> float:
        """The most that lies in the run's directory: states, then decompositions, then the result twice."""
        job, model = self.job, self.model
        rows = job.kept_rows(self.accelerator)
        entries = 0.0
        for stack in dict.fromkeys(b.stack for b in model.blocks):
            of_stack = [b for b in model.blocks if b.stack == stack]
            count = sum(b.count for b in of_stack) + 1
            entries += count * rows * of_stack[0].length * of_stack[0].width
        states = job.state_size * entries
        moments, vectors = 0.0, sum(8.0 * band.side**2 for band in model.embedding)
        for b in model.blocks:
            if b.maps:
                vectors += b.count * (
                    self.triangles(b) + 8.0 * b.side_squares + (4.0 * b.width**2 if job.sensitivity else 0.0)
                )
                moments += b.count * 4.0 * b.input_squares if job.sensitivity and not self.accelerator else 0.0
        result = float(model.written * model.kept)
        return states + max(moments, vectors + 2 * result)
