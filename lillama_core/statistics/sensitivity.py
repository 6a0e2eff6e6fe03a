"""One backward pass through the dense model, block by block: how much its predictions depend on each map."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lillama_core.architecture.blocks import Block
from lillama_core.data.modality import Inputs
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.statistics.observers import GradientObserver
from lillama_core.system.memory import release_memory
from lillama_core.system.progress import Progress


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
        labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(part.device)
        # d(-log p(label))/d logits = p - onehot(label)
        out.copy_(probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32)))
    if output_mask is not None:
        gradient *= output_mask.to(gradient)[..., None]
    logits.backward(gradient)
    assert last_hidden.grad is not None
    return last_hidden.grad


def measure_sensitivity(
    harness: StackHarness,
    source: WeightSource,
    activations: StackActivations,
    seed: int,
    progress: Progress,
    entry: SecondMoment | None = None,
) -> Iterator[tuple[Block, dict[str, torch.Tensor]]]:
    """Second moments of the gradients for every block of the harness's stack, as named tensors.

    They are given out block by block and forgotten, since together they are as large as the model. Each block is run
    once more with gradients, one at a time, so that memory is the blocks' inputs of one batch and the graph of one
    block. ``entry`` gets the gradients at the entry of the first block.
    """
    runner = activations.runner
    blocks = harness.blocks
    observers = {block.name: GradientObserver(block) for block in blocks}
    generator = torch.Generator().manual_seed(seed)
    progress.phase("Sensitivity of the predictions", len(activations.batches) * len(blocks))
    for index, batch in enumerate(activations.batches):
        inputs, masks = batch.inputs, activations.masks[index]
        hidden = activations.hidden[index]
        entering: list[torch.Tensor] = []
        with torch.no_grad():
            for block in blocks:
                entering.append(hidden)
                hidden = runner(source.block(block), block, index, hidden)
        with runner.autocast():
            # Row by row: the logits and their gradients would be the largest tensors of the whole run.
            gradient = torch.cat(
                [
                    output_gradient(
                        harness,
                        {k: v[i : i + 1] for k, v in inputs.items()},
                        hidden[i : i + 1],
                        generator,
                        None if batch.output_mask is None else batch.output_mask[i : i + 1],
                    )
                    for i in range(hidden.shape[0])
                ]
            )
        for block in reversed(blocks):
            observer = observers[block.name]
            observer.output.add(*flat_rows(gradient, masks))
            module = source.block(block)
            hidden = entering.pop().to(runner.device).detach().requires_grad_(True)
            call = runner.inputs(block, index)
            with observer.observe(module, masks, (call.args, call.kwargs)):
                runner(module, block, index, hidden).backward(gradient)
            assert hidden.grad is not None
            gradient = hidden.grad
            progress.step(block.name)
        if entry is not None:
            entry.add(*flat_rows(gradient, masks))
        release_memory()
    for block in blocks:
        yield block, observers.pop(block.name).statistics()
