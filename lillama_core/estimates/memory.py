"""The most that each phase of a run holds, of the host's memory and of the device's, and what it puts on disk."""

from __future__ import annotations

from dataclasses import dataclass

from lillama_core.estimates.phases import ROWS_WITH_GRADIENTS, Phases
from lillama_core.estimates.shapes import BlockShape, Job, ModelShape
from lillama_core.statistics.store import strips

SLACK = 24e6
"""Bytes of small things: kernels of oneDNN, rows of text, tables, what glibc keeps. Measured on made models."""


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
        phases = [self.loading(), self.heads(self.job.report)]
        for block in self.model.blocks:
            phases += [self.forward(block), self.compressing(block)]
            phases += [self.backward(block), self.gradients_of_outputs()] if self.job.sensitivity else []
            phases += [self.measuring(block)] if self.job.rescaling else []
        phases += [self.healing()] if self.job.healing else []
        return self.always() + most(*phases)

    def checking(self) -> float:
        """Bytes on the host while a fresh process loads the result beside this one."""
        size = self.model.written * self.model.kept
        largest = max(self.model.written * b.kept for b in self.model.blocks)
        loaded = 4.0 * self.model.shell + 2 * largest if self.streamed else size
        return self.libraries * 2 + self.held_model() + loaded

    def held_model(self) -> float:
        return 4.0 * self.model.shell if self.streamed else float(self.model.resident)

    def always(self) -> Held:
        held = self.held_model()
        return Held(self.libraries + SLACK, held) if self.accelerator else Held(self.libraries + SLACK + held)

    def here(self, size: float) -> Held:
        """Bytes where tensors are computed."""
        return Held(0.0, size) if self.accelerator else Held(size)

    def loading(self) -> Held:
        """The model passes through the host on its way, and what is not in blocks is made fp32."""
        if self.accelerator and not self.streamed:
            return Held(float(self.model.stored * self.model.parameters))
        return Held(float(self.model.stored * self.model.shell))

    def weights(self, block: BlockShape) -> Held:
        """A block in fp32; from disk the next one is being read meanwhile, and no more is left of the file."""
        own = self.here(4.0 * block.parameters)
        return own + Held(1.0 * self.model.stored * block.parameters) if self.streamed else own

    def stream(self, block: BlockShape, rows: float) -> float:
        return 4.0 * rows * block.length * block.width

    def run(self, block: BlockShape, rows: float) -> float:
        """What is alive while a block runs on so many rows without gradients."""
        return block.cost.live * rows

    def forward(self, block: BlockShape) -> Held:
        job = self.job
        held = self.weights(block) + Held(self.stream(block, job.passed))
        moments = 4.0 * block.input_squares if job.looks else 0.0
        states = self.stream(block, job.kept_rows(self.accelerator)) * (1 if job.state_size == 4 else 1.0)
        running = self.here(moments + self.run(block, job.batch))
        if not block.maps or (self.accelerator and job.sensitivity):
            running = self.here(self.run(block, job.batch))
            return held + most(running, Held(states))
        if not job.sensitivity:
            return held + self.here(moments) + most(running, Held(states), self.decomposing(block))
        return held + self.here(moments) + most(running, Held(states + moments))

    def decomposing(self, block: BlockShape) -> Held:
        """Vectors of all maps, and the fp64 matrices of the one that needs most; then their copies for the file."""
        largest = max(self.exact(m.out, m.inputs) for m in block.maps)
        # Four matrices of a net's channels at a time while they are put in order; of each one is kept.
        nets = [8.0 * (4 * n * n + 2 * n * block.width) for n in block.channels]
        largest = max([largest, *nets])
        vectors = 8.0 * block.side_squares + self.roots(block)
        return self.here(vectors) + most(self.here(largest), Held(vectors))

    @staticmethod
    def roots(block: BlockShape) -> float:
        """Bytes of what refits the maps behind channels."""
        return 4.0 * sum(n * n for n in block.channels)

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
        held += Held(self.stream(block, job.sensitivity))
        moments = 4.0 * block.input_squares if job.looks and block.maps else 0.0
        gradients = 4.0 * (block.side_squares + block.width**2)
        graph = rows * block.cost.graph + self.run(block, rows)
        held += self.here(moments + gradients)
        if not block.maps:
            return held + self.here(graph)
        again = self.run(block, job.batch) if self.accelerator else 0.0
        # The means of the gradients' moments are taken while their sums are there.
        return held + most(self.here(max(graph, again)), self.here(gradients), self.decomposing(block))

    def gradients_of_outputs(self) -> Held:
        """Scores of one row, their gradients, and the way back."""
        last = self.model.blocks[-1]
        return self.here(4.0 * 3 * self.model.outputs) + Held(self.stream(last, self.job.sensitivity))

    def heads(self, rows: float) -> Held:
        """The scores of one row by two models."""
        last = self.model.blocks[-1]
        return self.here(4.0 * 3 * self.model.outputs) + Held(2 * self.stream(last, rows))

    def measuring(self, block: BlockShape) -> Held:
        """A stream for every variant, the block, and a copy of it with factors."""
        runs, kinds = Phases(self.model, self.job, self.streamed, self.accelerator).variants()
        streams = (runs + kinds + 1) * self.stream(block, self.job.rescaling)
        factors = 4.0 * block.factors + 8.0 * block.side_squares + self.roots(block)
        held = self.weights(block) + Held(streams) + self.here(self.run(block, ROWS_WITH_GRADIENTS))
        return held + (self.here(factors) if block.maps else Held())

    def compressing(self, block: BlockShape) -> Held:
        job = self.job
        held = Held(self.stream(block, job.followed)) + self.weights(block)
        factors = 4.0 * block.factors
        written = float(self.model.written * block.kept)
        finished = self.here(4.0 * block.kept) + Held(2 * written)
        if not block.maps:
            return held + finished
        vectors = 8.0 * block.side_squares + self.roots(block)
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
