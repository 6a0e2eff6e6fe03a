"""``lillama reproduce``: repeat a run from its record, and say whether it gives the same bytes."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lillama_core.errors import LillamaError, UserError
from lillama_core.models.loading import load_config
from lillama_core.models.source import locate, model_fingerprint
from lillama_core.output.record import RunRecord, read_record
from lillama_core.output.same import (
    compared_files,
    different_conditions,
    different_files,
    different_plans,
    different_tensors,
)
from lillama_core.pipeline.pipeline import ADVICE, compress
from lillama_core.pipeline.request import Request
from lillama_core.recipe.model import Recipe
from lillama_core.system.processes import world_of_environment
from lillama_core.system.progress import Verbosity


@dataclass(frozen=True)
class ReproduceRequest:
    """Which run to repeat, where what it was made of is now, and where to."""

    folder: Path
    """A directory that ``lillama compress`` has made; of its weights only the record needs to be there."""
    output: Path | None = None
    """None: the new directory is compared and removed."""
    model: str | None = None
    """The dense model; None: under the name that the record has for it."""
    calibration: tuple[str, ...] = ()
    """The sources of data, in their order; empty: under the names that the record has for them."""
    tokenizer: str | None = None
    device: str | None = None
    """None: that of the record."""
    trust_remote_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Reproduction:
    """What came of a run that was repeated."""

    files: int
    """How many were compared."""
    conditions: list[str]
    """What the numbers depend on, and is not as it was."""
    differences: list[str]
    """In what the results differ; empty: the same bytes."""


def reproduce(request: ReproduceRequest, verbosity: Verbosity = "normal") -> Reproduction:
    """Repeat the run whose record is in ``request.folder``, and compare plan, files and tensors with those there.

    Raises UserError, before anything is computed, for a run that its record alone does not repeat, and for another
    model than the one that it was made of; else what `compress` raises.
    """
    record = read_record(request.folder)
    _check(request, record)
    model = _model(request, record)
    moved = _check_model(model, request, record)
    where = f"the record in {str(request.folder)!r}"
    changes = {"calibration": list(request.calibration)} if request.calibration else {}
    recipe = Recipe().with_options({**record.recipe, **changes}, where)
    with contextlib.ExitStack() as stack:
        output = request.output
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lillama-"))) / "reproduced"
        again = Request(
            model=model,
            output=output,
            recipe=recipe,
            architecture=record.architecture,
            tokenizer=request.tokenizer or record.tokenizer,
            device=request.device or record.device,
            trust_remote_code=request.trust_remote_code,
            overwrite=request.overwrite,
        )
        try:
            new = compress(again, verbosity)
        except UserError:
            raise
        except LillamaError as error:
            anew = "repeat the command" + (", with --overwrite" if request.output is not None else "")
            raise LillamaError(str(error).replace(ADVICE, anew)) from error
        if not new.bytes:
            # Of several processes only one writes the result, and compares it.
            return Reproduction(0, [], [])
        conditions = moved + different_conditions(record, new)
        if record.recipe.get("target_speedup") is not None:
            conditions.append("speed: ranks follow times, which were measured anew")
        plans, files = different_plans(record, new), different_files(request.folder, output, record)
        tensors = different_tensors(request.folder, output) if files else []
        return Reproduction(len(compared_files(request.folder, output, record)), conditions, [*plans, *files, *tensors])


def _check(request: ReproduceRequest, record: RunRecord) -> None:
    """Raise UserError for a request that contradicts itself, and a result that no compression alone gives."""
    shown = repr(str(request.folder))
    if request.output is None:
        if request.overwrite:
            raise UserError("--overwrite does nothing without --output, the directory that it is about")
        if world_of_environment().size > 1:
            raise UserError("several processes need one place to write to: pass --output")
    if record.quantization is not None:
        if not record.recipe:
            raise UserError(f"{shown} was quantised and not compressed: there is no compression to repeat")
        gone = "; where --target-size has removed that, README.md says by which commands both are made"
        raise UserError(
            f"{shown} was quantised after its compression: reproduce the directory that it was made of"
            f"{gone if record.quantization.get('target_size') else ''}"
        )
    if len(record.healing) > (record.recipe.get("healing_epochs", 0) > 0):
        raise UserError(f"{shown} was trained by 'lillama finetune': reproduce the directory that it was made of")
    for name, source in record.data.get("sources", {}).items():
        if source.get("kind") in ("texts", "batches"):
            raise UserError(f"{shown} was calibrated on {name!r}, objects of a Python program, which no record holds")


def _model(request: ReproduceRequest, record: RunRecord) -> str:
    """What to compress: as the request, the record or the Hub calls it."""
    if request.model is not None:
        return request.model
    if Path(record.model).exists():
        return record.model
    known = record.base_model or (record.model if record.model.count("/") == 1 else None)
    if known is None:
        raise UserError(f"the record names the model {record.model!r}, which is not here; say where by --model")
    return known


def _check_model(model: str, request: ReproduceRequest, record: RunRecord) -> list[str]:
    """Raise UserError for another model than that of the record; a line where it cannot be told whether it is one."""
    source = locate(model, request.trust_remote_code)
    load_config(source)
    found = model_fingerprint(source)
    if found == record.model_fingerprint:
        return []
    if source.is_local and record.model == record.base_model:
        # What is on the Hub is known by its commit, a directory by its bytes.
        return [f"model: {model!r} is a directory, and the record tells a commit on the Hub"]
    raise UserError(
        f"model {model!r} is not the one that {str(request.folder)!r} was made of: its fingerprint is {found}, and the"
        f" record's {record.model_fingerprint}; say by --model where that one is"
    )
