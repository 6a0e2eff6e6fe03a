"""How much work each phase of a run is, under the names that the record times them by.

The formulas follow the stages: whoever changes what a pass does changes them here. Products count two operations a
multiply-add; a backward pass for the inputs alone costs what the forward pass does, one for the factors as well twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lillama_core.estimates.shapes import BlockShape, Job, MapShape, ModelShape
from lillama_core.estimates.work import Work, total

ROWS_WITH_GRADIENTS = 2
"""Rows of a batch of the passes with gradients."""
SOURCES = 0.2
"""Reading and tokenising of text, relative to a start of a process: 1.4 of 14 s on a made Llama."""
FIDELITY_PASSES = 14
"""Times that the comparison of two tables of predictions reads or writes one of them, in fp32."""


@dataclass(frozen=True)
class Phases:
    """The work of a run by phase."""

    model: ModelShape
    job: Job
    streamed: bool
    accelerator: bool
    """Whether tensors live on a device of its own."""

    def all(self) -> dict[str, Work]:
        """Work by phase, in order; ``profile`` is forward and backward together in a record, and left out here."""
        found = {
            "load model": self.load(),
            "calibration data": self.calibrate(),
            "forward": self.each(self.forward),
            "backward": self.backward_start() + self.each(self.backward) if self.goes_back else Work(),
            "ranks": self.measure() if self.job.rescaling else Work(),
            "blocks": self.each(self.compress),
            "report": self.fidelity(self.job.report),
            "healing": self.heal() if self.job.healing else Work(),
            "output": self.output(),
        }
        return found

    def each(self, of: object) -> Work:
        assert callable(of)
        return total([of(block) * block.count for block in self.model.blocks])

    @property
    def goes_back(self) -> bool:
        return self.job.sensitivity > 0

    def load(self) -> Work:
        size = self.model.stored * (self.model.shell if self.streamed else self.model.parameters)
        crossed = 0 if self.streamed else size
        return Work(read=size, moved=2 * size + 8 * self.model.shell, crossed=crossed)

    def calibrate(self) -> Work:
        """Sampling, if any, and the check that blocks run one by one give what the model gives."""
        found = Work(starts=SOURCES) + self.each(lambda b: self.weights(b) + b.cost.forward.on(4, 2))
        if self.job.sampled:
            longest = max(b.length for b in self.model.blocks)
            batches = math.ceil(self.job.sampled / 32)
            per_row = self.each(lambda b: replace(b.cost.forward, operations=0.0)) + replace(
                self.model.around, operations=0.0
            )
            kernels = self.each(lambda b: Work(operations=b.cost.forward.operations)).operations
            size = (2 if self.job.half else 4) * self.model.parameters
            # Every token reads all weights once for all rows of a batch.
            found += per_row * self.job.sampled + Work(
                moved=size * longest * batches, operations=kernels * longest * batches
            )
        return found

    def weights(self, block: BlockShape) -> Work:
        """Getting a block: a copy in fp32 of the model's, or a new one from disk."""
        size = self.model.stored * block.parameters
        moved = size + 4 * block.parameters
        if self.streamed:
            return Work(read=size, moved=2 * moved, crossed=size)
        return Work(moved=moved + 2 * size)

    def moment(self, size: int, rows: float) -> Work:
        """Adding up second moments [size, size] of so many rows: on a CPU the upper triangle alone."""
        part = 1.0 if self.accelerator else 0.5
        return Work(full=2.0 * rows * size * size * part, moved=4.0 * rows * size * 3, operations=6)

    def moments(self, block: BlockShape) -> Work:
        positions = self.job.fit * block.length
        calls = self.job.calls(self.job.fit)
        return total([self.moment(m.inputs, m.fraction * positions) for m in block.maps if m.leads]) + Work(
            moved=2 * 4.0 * block.input_squares * calls
        )

    def forward(self, block: BlockShape) -> Work:
        job = self.job
        found = self.weights(block) + block.cost.forward.on(job.passed, job.calls(job.passed))
        size = job.kept_rows(self.accelerator) * block.length * block.width
        found += Work(written=job.state_size * size, moved=12 * size, crossed=2 * 4.0 * size)
        sees = job.looks and block.maps
        if sees and (not self.goes_back or not self.accelerator):
            found += self.moments(block)
            if self.goes_back:
                squares = 4.0 * block.input_squares
                found += Work(written=squares, moved=2 * squares)
        if not self.goes_back and block.maps:
            found += self.decompose(block)
        return found

    def backward_start(self) -> Work:
        """Gradients at the outputs: of all scores of a row at once, labels drawn on the host."""
        job, model = self.job, self.model
        found = model.around.on(job.sensitivity, job.sensitivity) * 3
        found += Work(moved=12 * 4.0 * model.outputs * job.sensitivity)
        return found + Work(drawn=model.outputs * job.sensitivity if model.predicts else 0.0)

    def backward(self, block: BlockShape) -> Work:
        job = self.job
        positions = job.sensitivity * block.length
        pieces = max(1.0, job.sensitivity / ROWS_WITH_GRADIENTS)
        once = block.cost.forward.on(job.sensitivity, pieces)
        found = self.weights(block)
        # Forward and back; of what is no product the way back costs twice as much.
        found += Work(products=2 * once.products, moved=3 * once.moved, operations=3 * once.operations)
        if block.maps:
            if job.looks and self.accelerator:
                found += self.moments(block) + block.cost.forward.on(job.fit, job.calls(job.fit))
            elif job.looks:
                found += Work(read=4.0 * block.input_squares, moved=4 * 4.0 * block.input_squares)
            for m in block.maps:
                rows = m.fraction * positions
                found += self.moment(m.side, rows)
                if m.out > m.inputs:
                    found += Work(full=2.0 * rows * m.parameters)
            found += Work(moved=2 * 4.0 * block.side_squares * pieces)
            found += self.decompose(block)
        found += self.moment(block.width, positions)
        return found + Work(written=4.0 * positions * block.width)

    def decompose(self, block: BlockShape) -> Work:
        """Taking the maps of a block apart in fp64, and writing the vectors."""
        found = total([self.decomposition(m) for m in block.maps])
        size = 8.0 * block.side_squares + 4.0 * block.width**2
        for n in block.channels:
            # A product, two roots, an inverse, an update for every step, and the root times the map.
            found += Work(exact=5.0 * n**3 + 4.0 * block.width * n * n, moved=8.0 * 48 * n * n)
            size += 4.0 * n * n
        return found + Work(written=size, moved=3 * size, crossed=size)

    def decomposition(self, m: MapShape) -> Work:
        """One map: root of F and L^T W G W^T L on the outputs, root of G and C^T W^T F W C on the inputs."""
        n, other = m.side, max(m.out, m.inputs)
        if not self.job.looks:
            return Work(exact=2.0 * n * n * other, eigh={n: 1.0})
        if m.out <= m.inputs:
            exact = n**3 / 3 + 2.0 * n * n * other + 2.0 * n * other**2 + 2.0 * n * n * other + 3.0 * n**3
            squares = other**2 + 3.0 * n * other
        else:
            exact = n**3 / 3 + 7.0 * n**3
            squares = 3.0 * n * n
        full = 0.0 if m.out <= m.inputs else 2.0 * n * n * other
        return Work(exact=exact, full=full, eigh={n: 1.0}, moved=8.0 * (2 * squares + 12.0 * n * n))

    def factoring(self, m: MapShape) -> Work:
        """Factors of a map from its vectors."""
        return Work() if m.rank is None else Work(full=2.0 * m.rank * m.parameters, moved=4.0 * 4 * m.parameters)

    def loading(self, block: BlockShape) -> Work:
        """Reading the vectors of a block."""
        size = 8.0 * block.side_squares
        return Work(read=size, moved=size, crossed=size)

    def variants(self, stack: str | None = None) -> tuple[float, float]:
        """Variants of the loss calibration that change runs of blocks, and those that change a kind of map.

        Of all stacks, or of one.
        """
        counts: dict[str, int] = {}
        for b in self.model.blocks:
            if stack in (None, b.stack):
                counts[b.stack] = counts.get(b.stack, 0) + b.count
        chosen = [name for name in counts if any(b.maps for b in self.model.blocks if b.stack == name)]
        runs = sum(min(self.job.parts, counts[name]) for name in chosen)
        return float(runs), float(sum(self.kinds(name) for name in chosen))

    def kinds(self, stack: str) -> int:
        """Kinds of maps in a stack: experts count once."""
        shapes = [b for b in self.model.blocks if b.stack == stack and b.maps]
        widest = max(shapes, key=lambda b: len(b.maps))
        experts = {(m.out, m.inputs) for m in widest.maps if m.fraction < 1}
        return sum(m.fraction == 1 for m in widest.maps) + len(experts) + widest.kinds_of_nets

    def measure(self) -> Work:
        """The loss calibration: runs of blocks join halfway on average, kinds of maps at the first block."""
        rows, found, before = self.job.rescaling, Work(), 0.0
        calls = max(1.0, rows / ROWS_WITH_GRADIENTS)
        for stack in dict.fromkeys(b.stack for b in self.model.blocks):
            runs, kinds = self.variants(stack)
            # What an earlier stack of a variant gives goes through this one, too.
            passes = runs / 2 + kinds + 1 + before
            before += runs + kinds
            for b in self.model.blocks:
                if b.stack != stack:
                    continue
                of_block = self.weights(b) + b.cost.forward.on(rows, calls) * passes
                if b.maps:
                    # Each map is factored twice: in its run of blocks, and in its kind.
                    of_block += total([self.factoring(m) for m in b.maps]) * 2 + self.loading(b) * 2
                found += of_block * b.count
        return found + self.fidelity(rows) * before

    def fidelity(self, rows: float) -> Work:
        """Comparing the predictions of two streams of so many rows."""
        size = 4.0 * self.model.outputs * rows
        parts = self.model.outputs * rows / max(1.0, self.model.outputs) * 10
        return self.model.around.on(rows, rows) * 2 + Work(moved=FIDELITY_PASSES * size, operations=parts * 8)

    def compress(self, block: BlockShape) -> Work:
        """Factoring, training, converting and writing one block, and passing the rows on."""
        job = self.job
        written = float(self.model.written * block.kept)
        found = self.weights(block)
        found += Work(written=written, read=written, moved=3 * written + 8.0 * block.kept, crossed=2 * written)
        rows = block.cost.forward.on(job.followed, job.calls(job.followed))
        # What follows runs the finished block, whose products are those of its parameters.
        share = block.kept / block.parameters
        found += replace(rows, products=rows.products * share)
        positions = job.followed * block.length
        found += Work(read=2.0 * job.state_size * positions * block.width, crossed=3 * 4.0 * positions * block.width)
        if not block.maps:
            return found
        if block.groups:
            found += rows
        found += total([self.factoring(m) + self.conversion(m) for m in block.maps]) + self.loading(block)
        found += self.training(block)
        if job.correction:
            found += self.correcting(block)
        return found

    def conversion(self, m: MapShape) -> Work:
        """Bringing the factors of a map into pivoted form: QR, pivots, a solve, and the other factor's product."""
        if m.rank is None or not self.job.pivots:
            return Work()
        n, r = m.side, m.rank
        qr = 4.0 * n * r * r - 4.0 / 3 * r**3
        solve = 2.0 / 3 * r**3 + 2.0 * r * r * (n - r)
        other = 2.0 * max(m.out, m.inputs) * r * r
        pivots = 2.0 * n * r * r - 2.0 / 3 * r**3
        return Work(exact=qr + solve + other, pivoting=pivots, moved=8.0 * 4 * r * (m.out + m.inputs))

    def training(self, block: BlockShape) -> Work:
        """Steps of training, the evaluations in between, and those before and after."""
        job = self.job
        weigh = 2.0 * block.width**2 * block.length if job.weighs else 0.0
        moved = 4.0 * 6 * block.width * block.length
        one = replace(block.cost.forward, products=block.cost.forward.products * block.active_share)
        one += Work(full=weigh, moved=moved, operations=8)
        evaluated = job.report * (2 if job.steps else 1) + (job.choose * 4 if job.steps else 0)
        found = one.on(evaluated, job.calls(evaluated))
        if job.weighs:
            found += Work(exact=block.width**3 / 3)
        if not job.steps:
            return found
        step = one.on(job.batch, 1)
        # Forward, back to the inputs, and to the factors.
        of_step = Work(
            products=3 * step.products, full=2 * step.full, moved=3 * step.moved, operations=3 * step.operations
        )
        trained = 4.0 * block.factors
        # AdamW reads and writes weights, gradients and two moments, and gradients are made.
        of_step += Work(moved=12 * trained, operations=10.0 * 2 * len(block.maps))
        return found + of_step * (job.steps * job.streams_trained)

    def correcting(self, block: BlockShape) -> Work:
        """The closed-form correction of the last map, taken to be as wide as the block."""
        job = self.job
        last = next((m for m in reversed(block.maps) if m.out == block.width), None)
        if last is None:
            return Work()
        rows = job.correction + job.choose
        found = block.cost.forward.on(rows, job.calls(rows)) * block.active_share
        positions = job.correction * block.length
        found += self.moment(last.inputs, positions) + Work(full=2.0 * positions * last.parameters)
        exact = last.inputs**3 / 3 + 2.0 * last.out * last.inputs**2 * 2
        return found + Work(exact=exact) + self.decomposition(last) + self.factoring(last)

    def heal(self) -> Work:
        """Training the whole model row by row: the dense one forward, the compressed one there and back, AdamW."""
        job = self.job
        rows = job.fit * job.healing
        looked = job.choose * (job.evaluations + 1) + 2 * job.report
        dense = self.each(lambda b: b.cost.forward) + self.model.around
        kept = self.model.kept / self.model.parameters
        forward = replace(dense, products=dense.products * kept)
        back = Work(
            products=2 * forward.products, full=forward.full, moved=2 * forward.moved, operations=2 * forward.operations
        )
        table = Work(moved=FIDELITY_PASSES * 4.0 * self.model.outputs)
        found = (dense + forward + table).on(rows + looked, rows + looked) + back.on(rows, rows)
        trained = 4.0 * sum(b.count * b.factors for b in self.model.blocks)
        found += Work(moved=12 * trained) * (rows / job.batch)
        size = self.model.stored * self.model.parameters
        return found + Work(read=size, moved=2 * size, written=float(self.model.written * self.model.kept))

    def output(self) -> Work:
        """Putting the shards together, and the process that loads the result again."""
        size = float(self.model.written * self.model.kept)
        return Work(written=size, read=2 * size, moved=4 * size, starts=1)
