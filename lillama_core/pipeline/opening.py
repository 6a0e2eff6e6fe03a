"""Open a model to be measured: held in memory where that fits, else its blocks are read whenever they are run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.estimates.measure import free_device, free_host
from lillama_core.estimates.sizes import show_size
from lillama_core.models.loading import load_model, meta_model
from lillama_core.models.shards import BlockReader
from lillama_core.models.source import ModelSource
from lillama_core.output.shards import compressed_reader
from lillama_core.runtime.modules import move
from lillama_core.runtime.weight_source import run_blocks_from

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture


@dataclass(frozen=True)
class Opened:
    """A model in eval mode on its device, without gradients."""

    model: Any
    streamed: str | None = None
    """Why its blocks are read from disk each time that they run; None: it is held in memory."""


def open_model(
    source: ModelSource,
    config: Any,
    architecture: Architecture,
    dtype: torch.dtype | str,
    device: torch.device,
    stream: bool | None = None,
) -> Opened:
    """Open the model at ``source``, dense or compressed, in ``dtype``, or in ``auto``: what it is stored in.

    ``config`` is the model's, and is not changed. ``stream`` says whether its blocks are read from disk, None: where it
    does not fit into the memory of the host, through which it is loaded, and of ``device``. Raises UserError for a
    model that cannot be opened so.
    """
    asked = None if isinstance(dtype, str) else dtype
    if stream is None:
        why = lacks_room(source, config, architecture, asked, device)
    else:
        why = "--stream asks for it" if stream else None
    if why is not None:
        return Opened(_reading(_reader(source, config, architecture, asked), device), why)
    model: Any = load_model(source, architecture, dtype)
    return Opened(model.to(device))


def _is_compressed(source: ModelSource, config: Any) -> bool:
    return source.gguf_file is None and getattr(config, "quantization_config", None) is not None


def _reader(source: ModelSource, config: Any, architecture: Architecture, dtype: torch.dtype | None) -> BlockReader:
    """What reads the blocks of a model in ``dtype``, None: in what it is stored in."""
    if not _is_compressed(source, config):
        return BlockReader.of(source, architecture, config, dtype)
    config = copy.deepcopy(config)
    config.dtype = dtype or config.dtype
    return compressed_reader(source, config, architecture)[0]


def lacks_room(
    source: ModelSource, config: Any, architecture: Architecture, dtype: torch.dtype | None, device: torch.device
) -> str | None:
    """Which memory has no room now for a model's weights, told from their shapes; None: they fit."""
    model: Any
    if _is_compressed(source, config):
        model = _reader(source, config, architecture, dtype).model
    else:
        model = meta_model(config, architecture, source.trust_remote_code)
    needed = sum(
        t.numel() * (dtype if dtype is not None and t.is_floating_point() else t.dtype).itemsize
        for t in [*model.parameters(), *model.buffers()]
    )
    on_device = free_device(device)
    for place, free in (("memory", free_host()), (f"memory on {device}", on_device)):
        if free is not None and needed > free:
            return f"its weights take {show_size(needed)}, and {show_size(free)} of {place} are available"
    return None


def _reading(reader: BlockReader, device: torch.device) -> nn.Module:
    """The reader's model, all of it but its blocks on ``device``; they are read and put there whenever they run."""
    reader.load_shell()
    move(reader.model, device)
    paths = reader.paths
    after = dict(zip(paths, [*paths[1:], paths[0]], strict=True))

    def load(path: str) -> nn.Module:
        module = reader.block(path)
        # After the last one the first, for the next batch.
        reader.prefetch(after[path])
        return module.to(device)

    run_blocks_from(reader.model, paths, load)
    return reader.model
