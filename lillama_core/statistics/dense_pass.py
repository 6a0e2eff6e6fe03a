"""One pass over the dense model that takes every map apart, ready for any rank."""

from __future__ import annotations

import torch

from lillama_core.architecture.blocks import Block
from lillama_core.initialization import Initializer, MapStatistics
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.observers import InputObserver, map_statistics
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.devices import exact_device
from lillama_core.system.memory import release_memory
from lillama_core.system.progress import Progress


def decompose_blocks(
    blocks: list[Block],
    source: WeightSource,
    activations: StackActivations,
    initializer: Initializer,
    store: DecompositionStore,
    progress: Progress,
) -> None:
    """Decompose every map of ``blocks`` into ``store``, which holds what the sensitivity pass found, if it ran.

    The stream of ``activations`` enters the first block, and is in the end what leaves the last one, if the initialiser
    looks at inputs. Blocks that are decomposed already are only passed through, for the sake of the stream.
    """
    runner, stream = activations.runner, activations.hidden
    progress.phase("Statistics of the dense blocks", len(blocks))
    device = exact_device(runner.device)
    sequences = sum(len(hidden) for hidden in stream)
    for block in blocks:
        done = store.has(block)
        module = source.block(block)
        observer = InputObserver(block)
        if initializer.needs_inputs:
            with torch.no_grad(), observer.observe(module):
                for index, hidden in enumerate(stream):
                    call = runner.inputs(block, index)
                    observer.next_batch(activations.masks[index], (call.args, call.kwargs))
                    stream[index] = runner(module, block, index, hidden).to(hidden.device)
        if not done:
            seen = store.gradients(block)
            found = {}
            for target in block.targets:
                for map_ in target.maps:
                    weight = target.weight(module, map_).to(device)
                    has_bias = target.bias(module, map_) is not None
                    statistics = (
                        map_statistics(map_, weight, observer, seen, sequences, device, has_bias)
                        if initializer.needs_inputs
                        else MapStatistics()
                    )
                    found[map_.name] = initializer.decompose(weight, statistics)
            counts = {m.name: observer.count(m.name) for m in block.maps} if initializer.needs_inputs else {}
            store.save(block, found, seen.get("output"), counts)
        release_memory()
        progress.step(block.name)


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
