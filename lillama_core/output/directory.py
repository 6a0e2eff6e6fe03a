"""Writing the result: weights, config, tokenizer, record, card, report; then loading it in a fresh process."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.errors import LillamaError
from lillama_core.maps import LinearSite
from lillama_core.output.card import public_name, public_recipe, write_card
from lillama_core.output.report import write_report
from lillama_core.plan import RankPlan
from lillama_core.progress import Progress
from lillama_core.quantizer import LillamaConfig, attach
from lillama_core.record import RunRecord
from lillama_core.run_directory import RunDirectory, write_json, write_tensors

if TYPE_CHECKING:
    from lillama_core.preparation import Preparation

PROBE_TOKENS = 16


def write_result(
    model: Any,
    tokenizer: Any,
    prepared: Preparation,
    plan: RankPlan,
    record: RunRecord,
    directory: RunDirectory,
    progress: Progress,
) -> None:
    """Write ``model``, whose maps are low rank already, and publish the directory once it has been loaded back."""
    result = directory.result
    sites = {name: {"kind": LinearSite.kind, "format": plan.format, "rank": rank} for name, rank in plan.ranks.items()}
    model.config.dtype = next(model.parameters()).dtype
    attach(model, LillamaConfig(sites))
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model.save_pretrained(str(result))
    finally:
        logger.setLevel(level)
    tokenizer.save_pretrained(str(result))
    record.bytes = {
        "dense": prepared.total_parameters * next(model.parameters()).dtype.itemsize,
        "compressed": sum(f.stat().st_size for f in result.glob("*.safetensors")),
    }
    progress.line("Checking that a fresh process loads the result")
    check_reload(model, result, prepared.architecture.auto_class)
    record.stop()
    write_json(result / "lillama.json", published(record))
    write_card(result, record, prepared)
    write_report(result, record)
    directory.publish()


def published(record: RunRecord) -> dict[str, Any]:
    """The record as strangers may read it: local models and files by name, without their folders."""
    data = dict(record.data)
    data["sources"] = {
        public_name(name): {k: public_name(v) if k == "path" else v for k, v in description.items()}
        for name, description in record.data["sources"].items()
    }
    return {
        **record.to_dict(),
        "model": public_name(record.model),
        "recipe": public_recipe(record),
        "data": data,
    }


def check_reload(model: Any, result: Path, auto_class: str) -> None:
    """Load ``result`` in a new process and compare its outputs with the model's; raises LillamaError if they differ."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.float()
    probe = result.with_name("probe.safetensors")
    write_tensors(probe, {"tokens": tokens, "expected": expected})
    command = [sys.executable, "-m", "lillama_core.output.verify", str(result), str(probe), auto_class]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LillamaError(f"the written model does not load as it was: {reason}")
    probe.unlink()
