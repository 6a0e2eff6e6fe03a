"""The model that is exported: a compressed directory, read one block at a time, dense or as it is."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.data.modality import Inputs, as_dtype, made_up_inputs
from lillama_core.errors import LillamaError
from lillama_core.exporting.settings import copy_small_files
from lillama_core.models.loading import load_model, meta_model
from lillama_core.models.outputs import main_output
from lillama_core.models.shards import SHELL
from lillama_core.models.transformers_adapter import as_saved, dtypes_kept, save_settings, without_ties
from lillama_core.output.directory import MERGE_BELOW
from lillama_core.output.quantizer import TargetConfig
from lillama_core.output.shards import assemble, compressed_reader
from lillama_core.runtime.weight_source import run_blocks_from
from lillama_core.strategies import get
from lillama_core.system.files import write_tensors
from lillama_core.system.quiet import quiet

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.models.source import ModelSource
    from lillama_core.system.progress import Progress

Tensors = dict[str, torch.Tensor]
"""By path in the model."""


class CompressedModel:
    """A compressed directory, of which one block at a time is in memory, beside what is in no block."""

    def __init__(self, source: ModelSource, config: Any, architecture: Architecture) -> None:
        """``config`` is the directory's. Raises UserError for one that is broken, before a weight is read."""
        self.source = source
        self.config = config
        self.architecture = architecture
        self.reader, self.targets = compressed_reader(source, config, architecture)
        self.dtype: torch.dtype = self.reader.model.dtype
        """Of the weights on disk."""
        self._loaded = False

    @property
    def shell(self) -> Any:
        """The model with the weights that are in no block; its blocks are on the meta device, low rank."""
        if not self._loaded:
            self.reader.load_shell()
            self._loaded = True
        return self.reader.model

    @property
    def outline(self) -> Any:
        """The low-rank model, of which no weights need be there: for classes, names and shapes."""
        return self.reader.model

    @property
    def folder(self) -> Path:
        """The compressed directory."""
        return Path(self.source.location)

    def dense_config(self, dtype: torch.dtype | None = None) -> Any:
        """The config of the dense model, a copy."""
        config = copy.deepcopy(self.config)
        del config.quantization_config
        config.dtype = dtype or self.dtype
        return config

    def dense_outline(self, dtype: torch.dtype | None = None) -> Any:
        """The dense model on the meta device, with the settings for generation of the compressed one."""
        model: Any = meta_model(self.dense_config(dtype), self.architecture, self.source.trust_remote_code)
        model.generation_config = getattr(self.outline, "generation_config", None)
        return model

    def inputs(self) -> Inputs:
        """Inputs to compare outputs on."""
        return made_up_inputs(self.architecture, self.config)

    @contextlib.contextmanager
    def running(self, noise: float = 0.0) -> Iterator[Any]:
        """While open, give the low-rank model as one that computes in fp32: its blocks are read one after the other.

        In half precision the rounding of activations would hide what an export has changed. ``noise`` is by which part
        of itself, at most, each weight of the blocks is changed, at random.
        """
        model = self.shell
        kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if not t.is_meta and t.is_floating_point()]
        run_blocks_from(model, self.reader.paths, lambda path: _noisy(self.reader.block(path).float(), noise))
        try:
            for tensor, data in kept:
                tensor.data = data.float()
            with torch.no_grad():
                yield model
        finally:
            for tensor, data in kept:
                tensor.data = data
            for path in self.reader.paths:
                model.get_submodule(path).__dict__.pop("forward", None)

    def output(self, inputs: Inputs, noise: float = 0.0) -> torch.Tensor:
        """The main output for ``inputs``, computed in fp32; ``noise`` as in `running`."""
        with self.running(noise) as model:
            found: torch.Tensor = main_output(model(**as_dtype(inputs, torch.float32))).float()
        return found

    def rounding(self, dtype: torch.dtype) -> float:
        """||y - y0|| / ||y0|| of the main output where every weight of the blocks is off by a rounding to ``dtype``.

        What so small a change does depends on the model: after 30 blocks that a bad compression has left it may be 50
        times as large.
        """
        inputs = self.inputs()
        exact = self.output(inputs)
        return ((self.output(inputs, torch.finfo(dtype).eps / 2) - exact).norm() / exact.norm()).item()

    def copy_small_files(self, folder: Path) -> None:
        """Copy tokenizer, processor and templates into ``folder``; files that are there already stay."""
        copy_small_files(self.folder, folder)

    def resident(self, dtype: torch.dtype) -> nn.Module:
        """The low-rank model with all its weights in memory, in ``dtype``."""
        return load_model(self.source, self.architecture, dtype)

    # Parts: what is in no block, then block by block

    def parts(self) -> Iterator[Tensors]:
        """The tensors of the low-rank model as they are, by path in the model; of tied ones a single one."""
        for path, module in self._modules():
            yield without_ties(self.outline, _under(path, self._state(path, module)))

    def dense_parts(self, dtype: torch.dtype | None = None) -> Iterator[Tensors]:
        """The tensors of the dense model in ``dtype``, products multiplied out, by path in the model.

        Tied tensors come under all their names, as one object.
        """
        dense, wanted = self.dense_outline(dtype), dtype or self.dtype
        kept = dtypes_kept(dense, wanted)
        ignored = set(getattr(dense, "_keys_to_ignore_on_save", None) or ())
        left = {name: tensor for name, tensor in dense.state_dict().items() if name not in ignored}
        for path, module in self._modules():
            place = dense.get_submodule(path)
            tensors = self._state(path, module)
            for name, entry in self._targets_in(path):
                target = get("targets", entry.kind).at(name, module.get_submodule(name))
                target.runs = entry.runs
                replaced = target.paths(module)
                tensors = {k: t for k, t in tensors.items() if not any(k.startswith(f"{p}.") for p in replaced)}
                tensors |= target.dense_tensors(module, place)
            made = {k: _as(t, k, wanted, kept) for k, t in _once(_under(path, tensors)).items()}
            for name, tensor in made.items():
                expected = left.pop(name, None)
                if expected is not None and expected.shape != tensor.shape:
                    raise LillamaError(f"{name} became {list(tensor.shape)} where it should be {list(expected.shape)}")
            yield made
        if left:
            raise LillamaError(f"the dense model would lack {min(left)}")

    def write_dense(
        self, folder: Path, scratch: Path, dtype: torch.dtype | None = None, progress: Progress | None = None
    ) -> None:
        """Write the dense model's config and weights, as transformers writes them, into the folder ``folder``.

        ``scratch`` is a folder in which parts lie for a while. Of the weights one block is in memory at a time.
        """
        outline = self.dense_outline(dtype)
        with quiet():
            save_settings(outline, folder)
        if progress is not None:
            progress.phase("Multiplying the factors out", len(self.reader.paths) + 1)
        write_parts(folder, scratch, (as_saved(outline, part) for part in self.dense_parts(dtype)), progress)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield SHELL, self.shell
        for path in self.reader.paths:
            yield path, self.reader.block(path)

    def _state(self, path: str, module: nn.Module) -> Tensors:
        state = module.state_dict()
        if path == SHELL:
            return {k: t for k, t in state.items() if not any(k.startswith(f"{p}.") for p in self.reader.paths)}
        return state

    def _targets_in(self, path: str) -> Iterator[tuple[str, TargetConfig]]:
        """What is low rank in the block at ``path``, or in no block: name from there, and how."""
        for name, entry in self.targets.parsed.items():
            home = next((p for p in self.reader.paths if name.startswith(f"{p}.")), SHELL)
            if home == path:
                yield name.removeprefix(f"{path}.") if path else name, entry


def write_parts(folder: Path, scratch: Path, parts: Iterable[Tensors], progress: Progress | None = None) -> None:
    """Make the weights of the directory ``folder`` of ``parts``, by name on disk, which are written one by one."""
    shards = []
    for number, tensors in enumerate(parts):
        if tensors:
            shards.append(scratch / f"part-{number:05d}.safetensors")
            write_tensors(shards[-1], tensors, durable=False)
        if progress is not None:
            progress.step()
    assemble(folder, shards, MERGE_BELOW)
    for shard in shards:
        shard.unlink()


def _noisy(block: nn.Module, noise: float) -> nn.Module:
    if noise:
        generator = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data = parameter.data * (1 + noise * uniform)
    return block


def _under(path: str, tensors: Tensors) -> Tensors:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()} if path else tensors


def _once(tensors: Tensors) -> Tensors:
    """The same tensors, those of one parameter as one object, by which they are known to be tied."""
    seen: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    return {k: seen.setdefault((t.data_ptr(), tuple(t.shape)), t) if t.numel() else t for k, t in tensors.items()}


def _as(tensor: torch.Tensor, name: str, dtype: torch.dtype, kept: dict[str, torch.dtype]) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    own = next((found for pattern, found in kept.items() if re.search(pattern, name)), dtype)
    return tensor.to(own)
