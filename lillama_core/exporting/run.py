"""One export: find out what is to be written, write it, check it where lillama is not, and let it appear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.errors import LillamaError, UserError, in_one_line, is_out_of_memory, one_line
from lillama_core.exporting.base import Agreement, Exporter, ExportJob
from lillama_core.exporting.card import write_card
from lillama_core.exporting.model import CompressedModel
from lillama_core.models.loading import DTYPES, load_config
from lillama_core.models.source import QUANT_METHOD, locate
from lillama_core.output.record import RunRecord, read_record, versions
from lillama_core.output.run_directory import RunDirectory
from lillama_core.strategies import make, names
from lillama_core.system.files import apply_umask, write_json
from lillama_core.system.memory import release_memory
from lillama_core.system.progress import Progress, Verbosity


@dataclass(frozen=True)
class ExportRequest:
    """What to export, as what, and where to."""

    model: str
    """A directory that ``lillama compress`` or ``lillama finetune`` has made."""
    to: str
    """A name that ``lillama_exporters`` knows."""
    output: Path
    dtype: str | None = None
    """Of the weights, a key of `DTYPES`; None: what suits the format."""
    architecture: str | Architecture | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What an export has made."""

    path: Path
    to: str
    bytes: int
    """Of all files."""
    agreements: list[Agreement] = field(default_factory=list)
    """What a process without lillama has found."""


def export(request: ExportRequest, verbosity: Verbosity = "normal") -> Exported:
    """Write a compressed directory in another format; the output appears when a fresh process has found it to agree.

    Raises UserError for what can be known beforehand, and LillamaError for what fails later; neither leaves anything.
    """
    exporter: Exporter = make("exporters", request.to)
    if (what := exporter.missing()) is not None:
        raise UserError(f"format {request.to!r} needs {what}")
    if request.dtype is not None and request.dtype not in exporter.dtypes:
        raise UserError(f"--dtype of format {request.to!r} must be one of {', '.join(exporter.dtypes)}")
    directory = RunDirectory(request.output, resumes=False)
    directory.check(request.overwrite, False)
    with Progress(verbosity) as progress, in_one_line("nothing was written"):
        progress.line(f"Reading {request.model}")
        model = open_compressed(request)
        refuse_unfit(exporter, model)
        record = _record(model)
        with directory.locked():
            directory.open({"export": request.to, "model": str(model.folder)}, request.overwrite)
            try:
                directory.result.mkdir(exist_ok=True)
                dtype = None if request.dtype is None else DTYPES[request.dtype]
                job = ExportJob(directory.result, directory.store, dtype, progress)
                progress.release()
                return _export(exporter, model, job, record, directory)
            finally:
                # Published, or not to be.
                directory.discard()


def _export(
    exporter: Exporter, model: CompressedModel, job: ExportJob, record: RunRecord | None, directory: RunDirectory
) -> Exported:
    try:
        exporter.write(model, job)
        release_memory()
        job.progress.line("Comparing it with the compressed model in a process without lillama")
        agreements = exporter.verify(model, job)
    except (LillamaError, OSError):
        raise
    except Exception as error:  # libraries, and exporters of plugins
        if is_out_of_memory(error):
            raise
        raise LillamaError(f"format {exporter.name!r} failed ({type(error).__name__}: {one_line(error)})") from error
    for found in agreements:
        if not found.holds:
            raise LillamaError(
                f"the export differs from the compressed model: {found.what} by {found.difference:.3g}, where"
                f" {found.allowed:.3g} is allowed; please report this"
            )
    said = {
        "to": exporter.name,
        "dtype": str(job.dtype or model.dtype).removeprefix("torch."),
        "agreement": {a.what: a.difference for a in agreements},
        "versions": versions(),
    }
    write_json(job.folder / "lillama.json", {"export": said, **({} if record is None else _published(record))})
    write_card(job.folder, exporter, model, record, agreements)
    apply_umask(job.folder)
    size = sum(file.stat().st_size for file in job.folder.rglob("*") if file.is_file())
    directory.publish()
    return Exported(directory.output, exporter.name, size, agreements)


def open_compressed(request: ExportRequest) -> CompressedModel:
    """The model to export; raises UserError for one that is not compressed, or broken."""
    source = locate(request.model, request.trust_remote_code)
    config = load_config(source, allow_compressed=True)
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    method = method or getattr(quantization, "quant_method", None)
    if str(method) != QUANT_METHOD or not source.is_local or source.gguf_file is not None:
        raise UserError(f"{request.model!r} is not a directory that 'lillama compress' has made")
    architecture = find_architecture(config, request.architecture, request.trust_remote_code)
    try:
        found = CompressedModel(source, config, architecture)
        if found.targets.bits:
            raise UserError(f"{request.model!r} holds its weights in few bits; export the directory that was quantized")
        return found
    except UserError:
        raise
    except LillamaError as error:
        raise UserError(f"{request.model!r} cannot be read: {error}") from None


def refuse_unfit(exporter: Exporter, model: CompressedModel) -> None:
    """Raise UserError, naming the formats that can, when a format cannot hold ``model``."""
    reason = exporter.cannot_hold(model)
    if reason is None:
        return
    able = []
    for name in names("exporters"):
        try:
            other: Exporter = make("exporters", name)
            fits = other.cannot_hold(model) is None
        except Exception:  # somebody's exporter must not hide what is wrong with this one
            fits = False
        able += [name] if fits else []
    advice = f"; {', '.join(able)} can hold it" if able else ""
    raise UserError(f"format {exporter.name!r} cannot hold this model: {reason}{advice}")


def _record(model: CompressedModel) -> RunRecord | None:
    """The record of the compression; None where the directory has none, having been saved by transformers."""
    return read_record(model.folder) if (model.folder / "lillama.json").is_file() else None


def _published(record: RunRecord) -> dict[str, Any]:
    """What an export says of the compression: what it was made of, and how."""
    keep = ("model", "model_fingerprint", "architecture", "recipe", "plan", "parameters", "fidelity", "healing", "data")
    return {"compression": {name: getattr(record, name) for name in keep}}
