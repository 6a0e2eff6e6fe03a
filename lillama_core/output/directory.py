"""Writing the result: weights, config, tokenizer, record, card, report; then loading it in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.allocation.plan import RankPlan
from lillama_core.data.modality import Inputs, as_dtype, modality_of
from lillama_core.errors import LillamaError
from lillama_core.models.outputs import main_output
from lillama_core.output.card import public_name, public_recipe, write_card
from lillama_core.output.quantizer import LillamaConfig, attach, target_entries
from lillama_core.output.record import RunRecord
from lillama_core.output.report import write_report
from lillama_core.output.run_directory import RunDirectory
from lillama_core.output.verify import TRUST
from lillama_core.system.files import write_json, write_tensors
from lillama_core.system.progress import Progress
from lillama_core.system.quiet import quiet

if TYPE_CHECKING:
    from lillama_core.pipeline.spec import CompressionSpec


def write_result(
    model: Any,
    processor: Any,
    prepared: CompressionSpec,
    plan: RankPlan,
    record: RunRecord,
    directory: RunDirectory,
    progress: Progress,
) -> None:
    """Write ``model``, whose maps are low rank already, and publish the directory once it has been loaded back."""
    result = directory.result
    targets = target_entries(prepared.all_blocks, plan)
    model.config.dtype = next(model.parameters()).dtype
    attach(model, LillamaConfig(targets))
    with quiet():
        model.save_pretrained(str(result))
    modality = modality_of(prepared.architecture)
    modality.save_processor(processor, result)
    record.bytes = {
        "dense": prepared.total_parameters * next(model.parameters()).dtype.itemsize,
        "compressed": sum(f.stat().st_size for f in result.glob("*.safetensors")),
    }
    progress.line("Checking that a fresh process loads the result")
    trusted = prepared.source.trust_remote_code
    check_reload(model, result, prepared.architecture.auto_class, modality.dummy_inputs(prepared.config), trusted)
    record.stop()
    write_json(result / "lillama.json", published(record))
    write_card(result, record, prepared)
    write_report(result, record)
    directory.publish()


def published(record: RunRecord) -> dict[str, Any]:
    """Return the record as it is published: local models and files by name, without their folders."""
    data = dict(record.data)
    data["sources"] = {
        public_name(name): {k: public_name(v) if k == "path" else v for k, v in description.items()}
        for name, description in record.data["sources"].items()
    }
    return {
        **record.to_dict(),
        "model": public_name(record.model),
        "tokenizer": None if record.tokenizer is None else public_name(record.tokenizer),
        "recipe": public_recipe(record),
        "data": data,
    }


def check_reload(model: Any, result: Path, auto_class: str, inputs: Inputs, trust_remote_code: bool = False) -> None:
    """Load ``result`` in a new process and compare its outputs for ``inputs`` with the model's.

    Raises LillamaError if they differ.
    """
    with torch.no_grad():
        # What was made in fp32 meets weights of the model's dtype.
        expected = main_output(model(**as_dtype(inputs, next(model.parameters()).dtype))).float()
    probe = result.with_name("probe.safetensors")
    write_tensors(probe, {"expected": expected, **{f"inputs.{k}": v.contiguous() for k, v in inputs.items()}})
    # -P: files of the working directory, which may be an untrusted model, are not to be taken for modules.
    command = [sys.executable, "-P", "-m", "lillama_core.output.verify", str(result), str(probe), auto_class]
    if trust_remote_code:
        command.append(TRUST)
    # Nobody could answer what it might ask.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LillamaError(f"the written model does not load as it was: {reason}")
    probe.unlink()
