"""Writing the result: weights, config, tokenizer, record, card, report; then loading it in a fresh process."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.data.modality import Inputs, as_dtype, made_up_inputs, modality_of
from lillama_core.errors import LillamaError, UserError, is_out_of_memory, one_line
from lillama_core.models.outputs import main_output
from lillama_core.models.source import ModelSource, local_file
from lillama_core.output.card import write_card
from lillama_core.output.checkpoint import CompressedCheckpoint
from lillama_core.output.origin import Origin
from lillama_core.output.public import public_name, public_recipe, public_sources
from lillama_core.output.record import RunRecord
from lillama_core.output.report import write_report
from lillama_core.output.run_directory import RunDirectory
from lillama_core.output.shards import assemble
from lillama_core.output.verify import BY_BLOCK, TRUST, WHOLE
from lillama_core.runtime.weight_source import run_blocks_from
from lillama_core.system.files import apply_umask, weight_hashes, write_json, write_tensors
from lillama_core.system.progress import Progress
from lillama_core.system.quiet import quiet
from lillama_core.system.regular import leads_out

if TYPE_CHECKING:
    from lillama_core.pipeline.spec import CompressionSpec


MERGE_BELOW = 5_000_000_000
"""Bytes of weights from which they stay in several files: what the hub's tools once split at, and still read well."""
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files that say how images, video and sound are made into input: small, and there is nothing in them to run."""


@dataclass(frozen=True)
class FinishedModel:
    """The compressed model: what is around its blocks in memory, and the blocks in files."""

    shell: nn.Module
    """The model, of whose blocks nothing is looked at; its parameters are in the dtype of the result."""
    checkpoint: CompressedCheckpoint
    blocks: Mapping[str, Path]
    """Path of a block -> the file with its weights, in forward order."""
    streams: bool
    """Whether the model is too large to be held: it is run block by block, here and where it is loaded again."""

    def shell_tensors(self) -> dict[str, torch.Tensor]:
        """What is in no block, by its path in the model."""
        return {
            name: tensor
            for name, tensor in self.shell.state_dict().items()
            if not any(name.startswith(f"{path}.") for path in self.blocks)
        }

    def output(self, inputs: Inputs) -> torch.Tensor:
        """The model's main output for ``inputs``, in fp32; its blocks are read one after the other."""
        run_blocks_from(self.shell, self.blocks, self._block)
        with torch.no_grad():
            return main_output(self.shell(**as_dtype(inputs, next(self.shell.parameters()).dtype))).float()

    def _block(self, path: str) -> nn.Module:
        return self.checkpoint.block(path, self.blocks[path]).eval()


def write_result(
    model: FinishedModel,
    processor: Any,
    prepared: CompressionSpec,
    record: RunRecord,
    directory: RunDirectory,
    progress: Progress,
) -> None:
    """Write ``model`` and publish the directory once it has been loaded back."""
    result = directory.result
    result.mkdir(exist_ok=True)
    with quiet():
        model.checkpoint.save_settings(result)
    shell = directory.path / "shell.safetensors"
    write_tensors(shell, model.checkpoint.on_disk(model.shell_tensors()))
    assemble(result, [shell, *model.blocks.values()], MERGE_BELOW)
    modality = modality_of(prepared.architecture)
    modality.save_processor(processor, result)
    copy_processors(prepared.source, result)
    record.bytes = {
        "dense": prepared.total_parameters * next(model.shell.parameters()).dtype.itemsize,
        "compressed": sum(f.stat().st_size for f in result.glob("*.safetensors")),
    }
    progress.line("Checking that a fresh process loads the result")
    architecture = prepared.architecture
    inputs = made_up_inputs(architecture, prepared.config)
    # What was made in fp32 meets weights of the model's dtype.
    check_reload(
        model.output(inputs),
        inputs,
        result,
        (BY_BLOCK, architecture.name) if model.streams else (WHOLE, architecture.auto_class),
        prepared.source.trust_remote_code,
    )
    record.stop()
    publish(record, prepared, directory)


def publish(record: RunRecord, origin: Origin, directory: RunDirectory) -> None:
    """Write the record, the card and the report beside the weights, and let the output directory appear."""
    result = directory.result
    record.sha256 = weight_hashes(result)
    tell(record, origin, result)
    # safetensors makes its files readable for their owner alone.
    apply_umask(result)
    directory.publish()


def tell(record: RunRecord, origin: Origin, folder: Path) -> None:
    """Write the record, the card and the report into ``folder``."""
    write_json(folder / "lillama.json", published(record))
    write_card(folder, record, origin)
    write_report(folder, record)


def check_publishable(record: RunRecord, origin: Origin, model: str) -> None:
    """Raise UserError unless a card and a report can be made of a record that was read.

    Hours of work on the directory ``model`` are not to end with an error in its lillama.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tell(record, origin, Path(folder))
        except OSError:
            raise
        # Whatever the numbers in it are taken for.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"the lillama.json of {model!r} is damaged: no report can be made of it ({what})") from None


def copy_processors(source: ModelSource, result: Path) -> None:
    """Copy what a model has to read images, video and sound, where calibrating on text took a tokenizer alone."""
    for name in PROCESSORS if source.gguf_file is None else ():
        # A hub that cannot be reached is no reason to lose a finished run.
        with contextlib.suppress(UserError):
            found = None if (result / name).exists() else local_file(source, name)
            if found is not None and not leads_out(found):
                shutil.copyfile(found, result / name)


def published(record: RunRecord) -> dict[str, Any]:
    """Return the record as it is published: local models and files by name, without their folders."""
    return {
        **record.to_dict(),
        "model": public_name(record.model),
        "tokenizer": None if record.tokenizer is None else public_name(record.tokenizer),
        "recipe": public_recipe(record.recipe),
        "healing": [
            {**told, "teacher": None if told.get("teacher") is None else public_name(told["teacher"])}
            for told in record.healing
        ],
        "data": {**record.data, "sources": public_sources(record.data["sources"])},
    }


def check_reload(
    expected: torch.Tensor, inputs: Inputs, result: Path, how: tuple[str, str], trust_remote_code: bool = False
) -> None:
    """Load ``result`` in a new process and compare its outputs for ``inputs`` with those ``expected``.

    ``how`` is WHOLE and the name of a class of transformers, or BY_BLOCK and that of an architecture. Raises
    LillamaError if they differ.
    """
    probe = result.with_name("probe.safetensors")
    write_tensors(probe, {"expected": expected, **{f"inputs.{k}": v.contiguous() for k, v in inputs.items()}})
    # -P: files of the working directory, which may be an untrusted model, are not to be taken for modules.
    command = [sys.executable, "-P", "-m", "lillama_core.output.verify", str(result), str(probe), *how]
    if trust_remote_code:
        command.append(TRUST)
    # Nobody could answer what it might ask.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LillamaError(f"the written model does not load as it was: {reason}")
    probe.unlink()
