"""What the functions of the API are given, turned into what the command line takes; mistakes are UserErrors."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json as json_module
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.data.objects import BatchData, given_data
from lillama_core.data.sources import Source
from lillama_core.data.sources import locate as locate_source
from lillama_core.errors import LillamaError, UserError, nearest, one_line
from lillama_core.models.source import QUANT_METHOD, ModelSource
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.model import Recipe
from lillama_core.system.names import safe_file_stem

TrainingData: TypeAlias = Iterable[Any] | Mapping[str, Any] | torch.Tensor
"""Texts, a data set, or batches."""


class Scratch:
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
def python_terms() -> Iterator[None]:
    """Name options in messages as Python does: ``tokens=`` for ``--tokens``."""
    try:
        yield
    except LillamaError as error:
        error.args = (re.sub(r"--([a-z][a-z0-9-]*)", _keyword, str(error)), *error.args[1:])
        raise


_SWITCHES = {
    *("evaluate", "overwrite", "resume", "trust_remote_code", "use_all_tokens", "share_experts", "compress_embeddings"),
    "remove_channels",
    *("quiet", "verbose", "stream", "no_stream"),
}


def _keyword(match: re.Match[str]) -> str:
    name = match[1].replace("-", "_")
    return f"{name}=True" if name in _SWITCHES else f"{name}="


def _a(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"


def path_of(value: Any, what: str, besides: str = "") -> str:
    """``value`` as a string, if it is one or a path."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise UserError(f"{what} must be {besides + ' or ' if besides else ''}a path, not {_a(value)}")
    if not value:
        raise UserError(f"{what} must not be empty")
    return value


def whole_number(value: Any, what: str) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise UserError(f"{what} must be a whole number, not {value!r}")
    return int(value)


def strings(value: Any, what: str) -> tuple[str, ...]:
    """Strings and paths, in a sequence or alone; alone they may be several, separated by commas."""
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, os.PathLike) else value
    if not isinstance(items, list | tuple | set) or not all(isinstance(i, str | os.PathLike) for i in items):
        raise UserError(f"{what} must be a string or a list of strings, not {value!r}")
    return tuple(str(i) for i in items if str(i))


def refuse_unknown(unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    for name in unknown:
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        raise UserError(
            f"{function.__name__}() has no option {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
        )


def check_architecture(architecture: Any) -> None:
    if isinstance(architecture, type) and issubclass(architecture, Architecture):
        raise UserError(f"architecture must be an object; give {architecture.__name__}(…) instead of the class")
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise UserError(f"architecture must be a name or an Architecture, not {_a(architecture)}")


def recipe_of(recipe: Any, calibration: Any, options: dict[str, Any], function: Callable[..., Any]) -> Recipe:
    """The recipe with everything over it; ``function`` is the one that was called."""
    if isinstance(recipe, Recipe):
        found = recipe
    elif isinstance(recipe, Mapping):
        own = dict(recipe)
        found = load_recipe(path_of(own.pop("recipe", "default"), "the base in recipe=", "a name"))
        found = found.with_options({str(k): _plain(v) for k, v in own.items()}, "recipe=")
    else:
        try:
            found = load_recipe(path_of(recipe, "recipe", "a name, a mapping, a Recipe"))
        except OSError as error:
            raise UserError(f"recipe {recipe!r} cannot be read: {error.strerror or error}") from None
    own_names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name in options:
        # Options of the call itself, misspelt; those of the recipe are known to it.
        if not hasattr(found, name) and difflib.get_close_matches(name, own_names, n=1, cutoff=0.8):
            raise UserError(f"{function.__name__}() has no option {name!r}{nearest(name, own_names)}")
    given = {name: _plain(value) for name, value in options.items()}
    if calibration is not None:
        given["calibration"] = _sources(calibration)
    return found.with_options(given, f"{function.__name__}()") if given else found


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


def model_spec(
    model: Any,
    tokenizer: Any,
    architecture: str | Architecture | None,
    trust_remote_code: bool,
    scratch: Scratch,
    compressed: bool = False,
) -> str:
    """Where ``model`` is; a loaded one is written to ``scratch`` with its tokenizer first."""
    if isinstance(model, CompressionResult) and compressed:
        return str(model.path)
    if isinstance(model, nn.Module):
        return str(saved(model, tokenizer, architecture, trust_remote_code, scratch, compressed))
    return path_of(model, "model", "a Hub id, a loaded transformers model")


def saved(
    model: nn.Module,
    tokenizer: Any,
    architecture: str | Architecture | None,
    trust_remote_code: bool,
    scratch: Scratch,
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
    spec = tokenizer_spec(tokenizer, scratch) or origin
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


def tokenizer_spec(tokenizer: Any, scratch: Scratch) -> str | None:
    """Where the tokenizer is; an object is written to ``scratch`` first."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        return path_of(tokenizer, "tokenizer")
    if isinstance(tokenizer, type) or not callable(getattr(tokenizer, "save_pretrained", None)):
        raise UserError(
            f"tokenizer must be a Hub id, a directory, or a transformers tokenizer or processor, not {_a(tokenizer)}"
        )
    folder = scratch.path("tokenizer")
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def evaluation_data(data: Any, scratch: Scratch) -> str:
    """The source of the evaluation; texts are written to a file first."""
    if isinstance(data, str | os.PathLike):
        return path_of(data, "data", "a dataset")
    given = given_data(data)
    if isinstance(given, BatchData):
        raise UserError("data= takes texts to evaluate on: a list of them, a datasets.Dataset, or the name of a source")
    path = scratch.path("data.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for _, row in given.rows:
            file.write(json_module.dumps(dict(row), default=str) + "\n")
    return str(path)
