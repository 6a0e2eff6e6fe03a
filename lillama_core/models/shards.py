"""A checkpoint on disk, read one block at a time, for models that are larger than memory.

What a block is made of goes through transformers' own renamings and converters (experts may be separate on disk
and one tensor in memory), so that a block is, bit for bit, the one that ``from_pretrained`` would have loaded.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lillama_core.errors import LillamaError, UserError, one_line
from lillama_core.models.complete import check_complete
from lillama_core.models.conversion import DTYPES, Conversion, Step
from lillama_core.models.gguf import shards_of_gguf
from lillama_core.models.loading import meta_model
from lillama_core.models.shell import complete_buffers, fill_shell, put
from lillama_core.models.source import ModelSource, weight_files
from lillama_core.models.transformers_adapter import set_generation_config, tied_weights

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture

SHELL = ""
"""Stands for all of a model but its blocks, where blocks are told by their paths."""


class BlockReader:
    """Reads the blocks of a model, and what is around them, from safetensors files.

    Nothing is kept: a block is read anew each time, and takes as much memory as its weights. Reading a fused tensor
    takes up to twice its own memory for a moment.
    """

    def __init__(
        self, model: Any, files: Mapping[str, Path], architecture: Architecture, dtype: torch.dtype | None = None
    ) -> None:
        """Plan to read ``files`` (name on disk -> file) as the weights of ``model``, which is on the meta device.

        ``model`` may be compressed, with its quantizer attached, and ``files`` may hold a part of its weights: then
        blocks of that part can be read. ``architecture`` says where the blocks are. ``dtype`` is what the model was
        made in, by default what its config says: with it some classes keep weights in fp32.

        Raises UserError for tensors that are not those of the model, and for weights that several blocks share.
        """
        model.eval().requires_grad_(False)
        self.model = model
        """The model; all of it is on the meta device until `load_shell`, its blocks stay there."""
        self.paths = [path for stack in architecture.stacks for path in architecture.block_paths(model, stack)]
        """Paths of all blocks, stack by stack."""
        self._homes = frozenset(self.paths)
        # Whoever gets the model puts hooks and other modules into it; blocks are made from what it was.
        self._pristine = copy_sharing_configs(model)
        self._dtype = dtype or model.dtype
        self._plan(files, None)
        for pair in tied_weights(model):
            if any(self._block_of(name) for name in pair):
                raise UserError(
                    f"{pair[0]} and {pair[1]} are one weight: blocks that share weights cannot be read alone"
                )

    def over(self, files: Mapping[str, Path]) -> BlockReader:
        """A reader of the same model in other ``files``; cheaper than a new one, which looks at all of the model."""
        found = copy.copy(self)
        found._plan(files, self._conversion)
        return found

    def _plan(self, files: Mapping[str, Path], like: Conversion | None) -> None:
        """Find out which of ``files`` make which block."""
        self._files = dict(files)
        self._conversion = Conversion(self._pristine, self._files, self._dtype, None if like is None else like.names)
        self._steps: dict[str, list[Step]] = {path: [] for path in (SHELL, *self.paths)}
        for step, names in self._conversion.steps:
            home, *others = {self._block_of(name) for name in names}
            if others:
                raise UserError(f"{min(names)} and {max(names)} are stored as one, but do not belong to one block")
            self._steps[home].append(step)
        self._ahead: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, source: ModelSource, architecture: Architecture, config: Any, dtype: torch.dtype | None = None
    ) -> BlockReader:
        """The reader of a model, local or on the hub; ``config`` is the model's, and is not changed.

        ``dtype`` None is what ``from_pretrained(dtype="auto")`` takes: the config's, else that of the first weights.
        The weights of a GGUF file, float16 by default, are unpacked into the cache once.
        Raises UserError like ``load_model``, whose checks are made before a weight is read.

        ``architecture.adapt`` is called here, once, on the model without weights: the blocks that are read later are
        copies of its blocks, with the hooks and flags that it has set. So it may not read weights, nor rename them.
        """
        config = copy.deepcopy(config)
        spec, location = source.spec, source.location
        if source.gguf_file is not None:
            vars(config).pop("quantization_config", None)
            source = ModelSource(
                spec, str(shards_of_gguf(source, architecture, config)), None, source.trust_remote_code
            )
            dtype = dtype or torch.float16
        if getattr(config, "transformers_weights", None) is not None:
            raise UserError(f"the config of model {spec!r} names a weight file of its own, which is not read by blocks")
        files = weight_files(source)
        found = dtype or config.dtype or first_dtype(files)
        config.dtype = getattr(torch, found) if isinstance(found, str) else found
        config.name_or_path = location
        model = meta_model(config, architecture, source.trust_remote_code)
        if location == source.location:
            # GGUF files have none of their own.
            set_generation_config(model, location)
        architecture.adapt(model)
        try:
            reader = cls(model, files, architecture, config.dtype)
        except UserError as error:
            raise UserError(f"cannot load model {spec!r}: {error}") from None
        conversion = reader._conversion
        check_complete(source, architecture, model, conversion.missing, conversion.unexpected)
        return reader

    @property
    def missing(self) -> list[str]:
        """Parameters that the files lack, by name in memory."""
        return sorted(name for name in self._conversion.missing if self._is_parameter(name))

    @property
    def unexpected(self) -> list[str]:
        """Names on disk that are none of the model's."""
        return sorted(self._conversion.unexpected)

    def load_shell(self) -> None:
        """Put the weights of everything but the blocks into `model`, tied as the checkpoint has them, on the CPU.

        Buffers that are not on disk are what ``from_pretrained`` makes them. In eval mode, without gradients. Raises
        UserError when the files lack some of it.
        """
        self._check_whole(SHELL)
        tensors = self._read(SHELL)
        blocks = {self.model.get_submodule(path) for path in self.paths}
        fill_shell(self.model, tensors, blocks)

    def block(self, path: str) -> nn.Module:
        """A new module on the CPU with the weights of the block at ``path``, in eval mode and without gradients.

        Its weights are in the dtypes that ``from_pretrained`` gives them. `model` keeps its block on the meta device.
        Raises LillamaError when the files have become unreadable since they were looked at, and what a `prefetch` of
        this block met.
        """
        self._check_path(path)
        self._check_whole(path)
        with self._lock:
            begun = self._ahead.pop(path, None)
        tensors = begun.result() if begun is not None else self._read(path)
        module = copy_sharing_configs(self._pristine.get_submodule(path), self._pristine)
        for name in list(tensors):
            put(module, name.removeprefix(f"{path}."), tensors.pop(name))
        complete_buffers(module, self._pristine, path)
        return module

    def prefetch(self, path: str) -> None:
        """Begin to read the block at ``path`` in the background; the next `block` of this path takes it.

        One block at a time waits to be taken: another's prefetch that nobody took is forgotten.
        """
        self._check_path(path)
        with self._lock:
            if path in self._ahead:
                return
            for begun in self._ahead.values():
                begun.cancel()
            self._ahead.clear()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lillama-prefetch")
            self._ahead[path] = self._thread.submit(self._read, path)

    def _check_path(self, path: str) -> None:
        if path not in self.paths:
            raise LillamaError(f"{path!r} is none of the model's blocks")

    def _check_whole(self, group: str) -> None:
        missing = [n for n in self._conversion.missing if self._block_of(n) == group and self._is_parameter(n)]
        if missing:
            raise UserError(f"the weight files lack {min(missing)}")

    def _is_parameter(self, name: str) -> bool:
        path, _, own = name.rpartition(".")
        return own in self._pristine.get_submodule(path)._parameters

    def _block_of(self, name: str) -> str:
        """The path of the block that holds the tensor ``name``, or SHELL."""
        return next((path for path in _parents(name) if path in self._homes), SHELL)

    def _read(self, group: str) -> dict[str, torch.Tensor]:
        """The tensors of a block or of the shell, by name in memory from the model."""
        found: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(key: str) -> torch.Tensor:
                file = self._files[key]
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                    tensor: torch.Tensor = opened[file].get_slice(key)[...]
                except (SafetensorError, OSError) as error:
                    # No mistake in the request: all headers were sound before.
                    raise LillamaError(
                        f"weight file {str(file)!r} cannot be read: {one_line(error)}; it could at the start: see to"
                        " its disk and repeat the command, with --resume where it takes that"
                    ) from None
                return tensor

            for step in self._steps[group]:
                found.update(self._conversion.run(step, read))
        return found


def first_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """The dtype of the first real numbers in the first of ``files``, by which transformers loads a model."""
    with safe_open(min(files.values()), framework="pt") as opened:
        found = (DTYPES.get(opened.get_slice(key).get_dtype()) for key in opened.keys())  # noqa: SIM118  no mapping
        # Numbers of one byte are no dtype that a model can be made in.
        return next((d for d in found if d is not None and d.is_floating_point and d.itemsize > 1), torch.float32)


def copy_sharing_configs(module: nn.Module, model: nn.Module | None = None) -> Any:
    """A copy of ``module`` that has the same configs, as objects: a setting of the model is one of its blocks."""
    configs = {id(m.config): m.config for m in (model or module).modules() if hasattr(m, "config")}
    return copy.deepcopy(module, dict(configs))


def _parents(name: str) -> Iterable[str]:
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
