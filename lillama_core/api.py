"""What a notebook or a script calls: `compress`, `evaluate` and `load`, with results that show themselves.

Every mistake in an argument is a `UserError` that says what is accepted, before any work is done.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import html
import inspect
import json as json_module
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lillama_core import pipeline
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.data.objects import BatchData, given_data
from lillama_core.data.sources import Source
from lillama_core.data.sources import locate as locate_source
from lillama_core.errors import LillamaError, UserError, nearest, one_line
from lillama_core.evaluation.base import EvaluationOptions, Measurement
from lillama_core.evaluation.comparison import Evaluated, by_model, comparison_rows, show_comparison
from lillama_core.models.loading import DTYPES, load_config, load_model
from lillama_core.models.source import QUANT_METHOD, ModelSource, locate
from lillama_core.output.record import RunRecord
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.evaluate import EvaluationRequest, compare
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.model import Recipe
from lillama_core.system.devices import choose_device
from lillama_core.system.names import safe_file_stem

TrainingData: TypeAlias = Iterable[Any] | Mapping[str, Any] | torch.Tensor
"""Texts, a data set, or batches."""

__all__ = ["CompressionResult", "EvaluationResult", "compress", "evaluate", "load"]


class CompressionResult:
    """A compressed model on disk and what is known of it; in a notebook its table of sizes and losses."""

    def __init__(self, path: Path, record: RunRecord, open_model: Callable[[], Any]) -> None:
        self.path = path
        """The directory that `load`, and transformers' ``from_pretrained``, take."""
        self.record = record
        """Everything that lillama.json says."""
        self._open_model = open_model

    @cached_property
    def model(self) -> Any:
        """The compressed model, loaded on the CPU at first use."""
        return self._open_model()

    @property
    def losses(self) -> dict[str, tuple[float, float]]:
        """By block, in the order of the run: the distillation loss before and after training."""
        return {b["name"]: (b["loss_before"], b["loss_after"]) for b in self.record.blocks}

    @property
    def table(self) -> list[tuple[str, str, str, str]]:
        """What is measured, before, after, and the change."""
        numbers, sizes, fidelity = self.record.parameters, self.record.bytes, self.record.fidelity or {}
        rows = [
            _row("parameters", numbers["parameters_before"], numbers["parameters_after"], ",.0f"),
            _row(f"bytes ({self.record.dtype})", sizes["dense"], sizes["compressed"], ",.0f"),
        ]
        if fidelity.get("perplexity_after") is not None:
            name = f"perplexity ({fidelity['tokens']} held-out tokens)"
            rows.append(_row(name, fidelity["perplexity_before"], fidelity["perplexity_after"], ",.2f"))
        return rows

    def __repr__(self) -> str:
        rows = [("", "before", "after", "change"), *self.table]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([f"CompressionResult {str(self.path)!r}", *lines])

    def _repr_html_(self) -> str:
        losses = [
            (name, f"{before:.4g}", f"{after:.4g}", _change(before, after))
            for name, (before, after) in self.losses.items()
        ]
        took = f"{self.record.seconds['total']:.0f} s, at most {self.record.peak_memory_bytes / 1e6:,.0f} MB of memory"
        return (
            f"<p><code>{html.escape(str(self.path))}</code>, {html.escape(took)}</p>"
            + _html_table([("", "before", "after", "change"), *self.table])
            + "<details><summary>Losses</summary>"
            + _html_table([("block", "loss before", "loss after", "change"), *losses])
            + "</details>"
        )


class EvaluationResult:
    """What was measured of a model, and of its baseline; in a notebook the table of both."""

    def __init__(self, found: Sequence[Evaluated]) -> None:
        self.evaluated = list(found)
        """The baseline, if there is one, and the model."""

    @property
    def measurements(self) -> list[Measurement]:
        """Those of the model."""
        return self.evaluated[-1].measurements

    @property
    def baseline(self) -> list[Measurement] | None:
        """Those of the baseline; None when there is none."""
        return self.evaluated[0].measurements if len(self.evaluated) > 1 else None

    def __getitem__(self, name: str) -> float:
        """The model's number of this name: ``result["perplexity"]``; raises KeyError that names those there are."""
        found = {m.name: m.value for m in self.measurements}
        if name not in found:
            raise KeyError(f"{name!r} was not measured{nearest(name, list(found))}; there are: {', '.join(found)}")
        return found[name]

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The measurements by model, ready for JSON."""
        return by_model(self.evaluated)

    def __repr__(self) -> str:
        return show_comparison(self.evaluated)

    def _repr_html_(self) -> str:
        rows, meanings = comparison_rows(self.evaluated)
        said = "".join(f"<li>{html.escape(line)}</li>" for line in meanings)
        return f"{_html_table(rows)}<details><summary>What they mean</summary><ul>{said}</ul></details>"


def compress(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe = "default",
    tokenizer: Any = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data: TrainingData | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> CompressionResult:
    """Make a model smaller and write it to the directory ``output``.

    ``model`` is a Hub id, a directory, a .gguf file, or a loaded transformers model, which stays as it is: what is
    compressed is a copy on disk beside ``output``, removed at the end. ``recipe`` is a name, a YAML file, a mapping of
    options (its key ``recipe`` names the base) or a `Recipe`; ``options`` go over it, named as on the command line:
    ``reduction=0.2, tokens=65536``. ``tokenizer`` is an id, a directory or an object, needed where the model brings
    none.

    ``calibration`` names sources of data as the command line does. ``data`` takes objects: a list of texts, a
    `datasets.Dataset` with a column of texts or messages, or an iterable of batches of the model's inputs. Texts are
    read in their order until there are enough, and may be mixed with named sources; batches are used as they stand.

    Raises UserError for what can be known before the first block, leaving nothing behind, and LillamaError for what
    fails later, leaving ``OUTPUT.partial``, from which ``resume=True`` goes on.
    """
    with _python_terms():
        path = Path(_path(output, "output"))
        chosen = _recipe(recipe, calibration, options)
        given = None if data is None else given_data(data)
        _check_architecture(architecture)
        RunDirectory(path).check(bool(overwrite), bool(resume))
        with contextlib.ExitStack() as stack:
            # Beside the output, where there must be room for a model.
            scratch = _Scratch(stack, path.absolute().parent)
            request = pipeline.Request(
                model=_model_spec(model, tokenizer, architecture, trust_remote_code, scratch),
                output=path,
                recipe=chosen,
                architecture=architecture,
                tokenizer=None if isinstance(model, nn.Module) else _tokenizer_spec(tokenizer, scratch),
                device=str(device),
                trust_remote_code=bool(trust_remote_code),
                overwrite=bool(overwrite),
                resume=bool(resume),
                data=given,
            )
            record = pipeline.compress(request, "quiet" if quiet else "verbose" if verbose else "normal")
    return CompressionResult(
        path, record, lambda: load(path, architecture=architecture, trust_remote_code=trust_remote_code)
    )


def evaluate(
    model: str | os.PathLike[str] | nn.Module | CompressionResult,
    *,
    baseline: str | os.PathLike[str] | nn.Module | None = None,
    baseline_details: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    data: str | os.PathLike[str] | TrainingData | None = None,
    tasks: str | Sequence[str] = (),
    sequence_length: int = 512,
    windows: int = 40,
    limit: int | None = None,
    seed: int = 0,
    details: str | os.PathLike[str] | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
    **unknown: Any,
) -> EvaluationResult:
    """Measure a model with the metrics of its architecture's plugin, beside ``baseline`` where one is given.

    Both are ids, directories, .gguf files or loaded transformers models, which stay as they are; ``model`` may be what
    `compress` gave. ``data`` is the text for perplexity: a source as the command line names it, a list of texts, or a
    `datasets.Dataset`; None: the text that comes with lillama. The other options are those of the command line.
    Raises UserError for what cannot be measured.
    """
    with _python_terms(), contextlib.ExitStack() as stack:
        _refuse_unknown(unknown, evaluate)
        scratch = _Scratch(stack, None)
        options = EvaluationOptions(
            data=None if data is None else _evaluation_data(data, scratch),
            tasks=_strings(tasks, "tasks"),
            sequence_length=_whole(sequence_length, "sequence_length"),
            windows=_whole(windows, "windows"),
            limit=None if limit is None else _whole(limit, "limit"),
            seed=_whole(seed, "seed"),
            details=None if details is None else Path(_path(details, "details")),
        )
        _check_architecture(architecture)
        measured = [model] if baseline is None else [baseline, model]
        specs = [_model_spec(m, tokenizer, architecture, trust_remote_code, scratch, True) for m in measured]
        request = EvaluationRequest(
            models=tuple(specs),
            options=options,
            baseline_details=None if baseline_details is None else Path(_path(baseline_details, "baseline_details")),
            architecture=architecture,
            tokenizer=_tokenizer_spec(tokenizer, scratch),
            device=str(device),
            trust_remote_code=bool(trust_remote_code),
            quiet=bool(quiet),
        )
        found = compare(request)
        labels = [Path(spec).name if Path(spec).exists() else spec for spec in specs]
        if len(set(labels)) < len(labels):
            labels[0] += " (baseline)"
        return EvaluationResult([replace(e, model=label) for e, label in zip(found, labels, strict=True)])


def load(
    model: str | os.PathLike[str] | CompressionResult,
    *,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **unknown: Any,
) -> Any:
    """Load a model, compressed or dense, by the transformers class of its architecture, in eval mode.

    ``model`` is a directory, an id, a .gguf file or what `compress` gave; ``dtype`` is that of the weights: ``auto``
    (the one on disk), ``float32``, ``bfloat16`` or ``float16``. Raises UserError when there is no such model.
    """
    with _python_terms():
        _refuse_unknown(unknown, load)
        _check_architecture(architecture)
        spec = str(model.path) if isinstance(model, CompressionResult) else _path(model, "model", "a Hub id")
        chosen: Any = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if chosen != "auto" and chosen not in DTYPES.values():
            raise UserError(
                f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}{nearest(str(dtype), list(DTYPES))}"
            )
        where = choose_device(str(device))
        source = locate(spec, bool(trust_remote_code))
        config = load_config(source, allow_compressed=True)
        found = load_model(source, find_architecture(config, architecture, bool(trust_remote_code)), chosen)
        # As from_pretrained gives it: it may be trained further.
        return found.requires_grad_(True).to(where)


class _Scratch:
    """A folder for what has to be on disk for a while, made at first use and removed at the end."""

    def __init__(self, stack: contextlib.ExitStack, beside: Path | None) -> None:
        self._stack, self._beside = stack, beside
        self._number = 0

    @cached_property
    def _folder(self) -> Path:
        beside = self._beside
        while beside is not None and not beside.exists():
            beside = beside.parent
        try:
            return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".lillama-", dir=beside)))
        except OSError as error:
            raise UserError(f"no temporary folder can be made: {error.strerror or error}") from None

    def path(self, name: str) -> Path:
        """A path of this name that nothing else has; the folder that it is in exists."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return folder / name


@contextlib.contextmanager
def _python_terms() -> Iterator[None]:
    """Name options in messages as Python does: ``tokens=`` for ``--tokens``."""
    try:
        yield
    except LillamaError as error:
        error.args = (re.sub(r"--([a-z][a-z0-9-]*)", _keyword, str(error)), *error.args[1:])
        raise


_SWITCHES = {
    *("overwrite", "resume", "trust_remote_code", "use_all_tokens", "share_experts", "compress_embeddings"),
    *("quiet", "verbose"),
}


def _keyword(match: re.Match[str]) -> str:
    name = match[1].replace("-", "_")
    return f"{name}=True" if name in _SWITCHES else f"{name}="


def _a(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"


def _path(value: Any, what: str, besides: str = "") -> str:
    """``value`` as a string, if it is one or a path."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise UserError(f"{what} must be {besides + ' or ' if besides else ''}a path, not {_a(value)}")
    if not value:
        raise UserError(f"{what} must not be empty")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise UserError(f"{what} must be a whole number, not {value!r}")
    return int(value)


def _strings(value: Any, what: str) -> tuple[str, ...]:
    """Strings and paths, in a sequence or alone; alone they may be several, separated by commas."""
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, os.PathLike) else value
    if not isinstance(items, list | tuple | set) or not all(isinstance(i, str | os.PathLike) for i in items):
        raise UserError(f"{what} must be a string or a list of strings, not {value!r}")
    return tuple(str(i) for i in items if str(i))


def _refuse_unknown(unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    for name in unknown:
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        raise UserError(
            f"{function.__name__}() has no option {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
        )


def _check_architecture(architecture: Any) -> None:
    if isinstance(architecture, type) and issubclass(architecture, Architecture):
        raise UserError(f"architecture must be an object; give {architecture.__name__}(…) instead of the class")
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise UserError(f"architecture must be a name or an Architecture, not {_a(architecture)}")


def _recipe(recipe: Any, calibration: Any, options: dict[str, Any]) -> Recipe:
    """The recipe with everything over it."""
    if isinstance(recipe, Recipe):
        found = recipe
    elif isinstance(recipe, Mapping):
        own = dict(recipe)
        found = load_recipe(_path(own.pop("recipe", "default"), "the base in recipe=", "a name"))
        found = found.with_options({str(k): _plain(v) for k, v in own.items()}, "recipe=")
    else:
        try:
            found = load_recipe(_path(recipe, "recipe", "a name, a mapping, a Recipe"))
        except OSError as error:
            raise UserError(f"recipe {recipe!r} cannot be read: {error.strerror or error}") from None
    own_names = [p.name for p in inspect.signature(compress).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name in options:
        # Options of the call itself, misspelt; those of the recipe are known to it.
        if not hasattr(found, name) and difflib.get_close_matches(name, own_names, n=1, cutoff=0.8):
            raise UserError(f"compress() has no option {name!r}{nearest(name, own_names)}")
    given = {name: _plain(value) for name, value in options.items()}
    if calibration is not None:
        given["calibration"] = _sources(calibration)
    return found.with_options(given, "compress()") if given else found


def _plain(value: Any) -> Any:
    """Paths as strings, numbers of NumPy and torch as Python's, other values as they are."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def _sources(calibration: Any) -> list[str]:
    """Names of sources; raises UserError for what looks like the data itself."""
    instead = "calibration= names files, datasets or 'self'; data= takes the texts or batches themselves"
    items = [calibration] if isinstance(calibration, str | os.PathLike) else calibration
    if not isinstance(items, list | tuple):
        raise UserError(f"{instead}, such as this {type(items).__name__}")
    found = []
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise UserError(f"{instead}, such as this {type(item).__name__}")
        name = os.fspath(item)
        if not isinstance(name, str):
            raise UserError(f"{instead}; a name is a string, not {_a(name)}")
        if not name.strip() or re.search(r"\s", name.strip()):
            # No name of a dataset has a space; a file's may.
            try:
                locate_source(Source.parse(name).name)
            except UserError as error:
                if "is a directory" not in str(error):
                    shown = name if len(name) <= 60 else name[:59] + "…"
                    raise UserError(f"{shown!r} is no file and no dataset; {instead}") from None
        found.append(name)
    return found


def _model_spec(
    model: Any,
    tokenizer: Any,
    architecture: str | Architecture | None,
    trust_remote_code: bool,
    scratch: _Scratch,
    compressed: bool = False,
) -> str:
    """Where ``model`` is; a loaded one is written to ``scratch`` with its tokenizer first."""
    if isinstance(model, CompressionResult) and compressed:
        return str(model.path)
    if isinstance(model, nn.Module):
        return str(_saved(model, tokenizer, architecture, trust_remote_code, scratch, compressed))
    return _path(model, "model", "a Hub id, a loaded transformers model")


def _saved(
    model: nn.Module,
    tokenizer: Any,
    architecture: str | Architecture | None,
    trust_remote_code: bool,
    scratch: _Scratch,
    compressed: bool,
) -> Path:
    """A loaded model and its tokenizer in a folder of ``scratch``; ``model`` is what it was."""
    from transformers import PreTrainedModel

    what = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        advice = "; merge its adapters first (merge_and_unload)" if hasattr(model, "peft_config") else ""
        raise UserError(
            f"model is a {what}, not a transformers model: its class must be a PreTrainedModel with a config, so that"
            f" it can be saved and loaded again{advice}"
        )
    original: Any = model.config
    quantization = getattr(original, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if str(method) != QUANT_METHOD:
            raise UserError(f"model is a quantized {what} ({method}); start from its unquantized weights")
        if not compressed:
            raise UserError(f"model is a {what} that lillama has compressed already; start from its base model")
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"model is a {what} whose weights are not in memory; load it without offloading")
    origin = str(getattr(model, "name_or_path", "") or "")
    folder = scratch.path(safe_file_stem(Path(origin).name or what))
    modality = modality_of(find_architecture(original, architecture, bool(trust_remote_code)))
    spec = _tokenizer_spec(tokenizer, scratch) or origin
    if not spec:
        raise UserError(f"model is a {what} that was loaded from nowhere; give its tokenizer with tokenizer=")
    processor = modality.load_processor(ModelSource(what, str(folder), None, bool(trust_remote_code)), spec)
    # Saving notes the class and dtype in the configs.
    settings = getattr(model, "generation_config", None)
    try:
        model.config = copy.deepcopy(original)
        if settings is not None:
            model.generation_config = copy.deepcopy(settings)
        model.save_pretrained(str(folder))
        modality.save_processor(processor, folder)
    except LillamaError:
        raise
    except OSError as error:
        raise UserError(f"model cannot be written to {str(folder.parent)!r}: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(f"model is a {what} that cannot be saved: {one_line(error)}") from error
    finally:
        model.config = original
        if settings is not None:
            model.generation_config = settings
    return folder


def _tokenizer_spec(tokenizer: Any, scratch: _Scratch) -> str | None:
    """Where the tokenizer is; an object is written to ``scratch`` first."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        return _path(tokenizer, "tokenizer")
    if isinstance(tokenizer, type) or not callable(getattr(tokenizer, "save_pretrained", None)):
        raise UserError(
            f"tokenizer must be a Hub id, a directory, or a transformers tokenizer or processor, not {_a(tokenizer)}"
        )
    folder = scratch.path("tokenizer")
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def _evaluation_data(data: Any, scratch: _Scratch) -> str:
    """The source of the evaluation; texts are written to a file first."""
    if isinstance(data, str | os.PathLike):
        return _path(data, "data", "a dataset")
    given = given_data(data)
    if isinstance(given, BatchData):
        raise UserError("data= takes texts to evaluate on: a list of them, a datasets.Dataset, or the name of a source")
    path = scratch.path("data.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for _, row in given.rows:
            file.write(json_module.dumps(dict(row), default=str) + "\n")
    return str(path)


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    return name, format(before, form), format(after, form), _change(before, after)


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    head, *body = ["".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) for tag, row in _tagged(rows)]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{r}</tr>' for r in body)}</tbody></table>"


def _tagged(rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    for number, row in enumerate(rows):
        yield ("td" if number else "th"), row
