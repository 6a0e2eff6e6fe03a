"""``standalone``: the low-rank model with the code that runs it beside the weights, by ``trust_remote_code=True``.

The code is a subclass of transformers' own classes that puts low-rank modules in place after they are built, so that
attention, caches and generation stay transformers'. Names in the weight files are those of the modules. The model type
is a new one: a transformers that does not run the code refuses the directory, instead of filling maps with random
numbers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch

from lillama_core.architecture.targets import (
    bands,
    convolution,
    embedding_modules,
    expert_modules,
    grouped,
    sorted_rows,
)
from lillama_core.data.modality import as_dtype
from lillama_core.exporting import low_rank_code
from lillama_core.exporting.base import Agreement, Exporter, ExportJob
from lillama_core.exporting.fresh import PLAIN_CHECK, allowed, run_without_lillama, write_probe
from lillama_core.exporting.model import CompressedModel, write_parts
from lillama_core.formats import factored, pivoted
from lillama_core.models.transformers_adapter import save_settings
from lillama_core.system.files import write_json
from lillama_core.system.quiet import quiet

MODULE = "modeling_lillama"
PREFIX = "LowRank"
EMBEDDINGS, EXPERTS = {"embedding", "banded-embedding"}, {"experts", "shared-experts"}
"""Kinds of target by the code that they need."""


class StandaloneExporter(Exporter):
    """The low-rank model and the code that runs it, for transformers without lillama and engines built on it."""

    name = "standalone"

    def cannot_hold(self, model: CompressedModel) -> str | None:
        kinds, formats = used(model)
        if others := sorted(kinds - set(low_rank_code.KINDS)):
            return f"it has modules of kind {others[0]!r}, whose code is not among what is written"
        if others := sorted(formats - set(low_rank_code.FORMATS)):
            return f"its maps are in format {others[0]!r}, whose code is a plugin's"
        for of in (*model_classes(model), type(model.config)):
            if not of.__module__.startswith("transformers."):
                return f"its class {of.__name__} is not one of transformers"
        return None

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        outline = model.dense_outline(job.dtype)
        with quiet():
            save_settings(outline, job.folder)
        write_config(model, job.folder)
        (job.folder / f"{MODULE}.py").write_text(code_of(model), encoding="utf-8")
        job.progress.phase("Writing the weights", len(model.reader.paths) + 1)
        dtype = job.dtype or model.dtype
        write_parts(job.folder, job.scratch, (as_dtype(part, dtype) for part in model.parts()), job.progress)
        model.copy_small_files(job.folder)

    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        inputs = model.inputs()
        expected = {"logits": model.output(inputs)}
        if len(model_classes(model)) > 1:
            expected["states"] = states(model)
        probe = write_probe(job.scratch / "probe.safetensors", inputs, expected)
        trust = "--trust-remote-code"
        found = run_without_lillama(PLAIN_CHECK, job.scratch, job.folder, probe, model.architecture.auto_class, trust)
        # The numbers are the same, unless they are to be of another dtype.
        most = allowed(model, torch.float32 if job.dtype in (None, model.dtype) else job.dtype)
        return [Agreement(k, v, most) for k, v in found.items()]

    def usage(self, model: CompressedModel) -> str:
        auto_class = model.architecture.auto_class
        return (
            f"The low-rank model, smaller than the original, with the code that runs it: `{MODULE}.py` subclasses"
            " transformers' own classes. It needs torch and transformers, not lillama, and runs only where code that"
            " comes with a model is allowed.\n\n"
            f"```python\nfrom transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained(".", dtype="auto", trust_remote_code=True)\n```\n'
        )


def states(model: CompressedModel) -> torch.Tensor:
    """What the model without its head gives for the same inputs, in fp32."""
    with model.running() as whole:
        found: torch.Tensor = whole.base_model(**as_dtype(model.inputs(), torch.float32))[0].float()
    return found


def used(model: CompressedModel) -> tuple[set[str], set[str]]:
    """The kinds of target and the formats that occur in ``model``."""
    entries = model.targets.parsed.values()
    return {entry.kind for entry in entries}, {entry.format for entry in entries if entry.ranks}


def model_classes(model: CompressedModel) -> list[type]:
    """The class without a head and the one with it; one where they are the same."""
    head = model.outline
    return list(dict.fromkeys([type(head.base_model), type(head)]))


def model_type_of(model: CompressedModel) -> str:
    return f"lillama_{model.config.model_type}"


def write_config(model: CompressedModel, folder: Path) -> None:
    """Say in config.json which class of the code is which, and what is of low rank."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    base, head = (model_classes(model) * 2)[:2]
    config |= {
        "architectures": [f"{PREFIX}{head.__name__}"],
        "model_type": model_type_of(model),
        "auto_map": {
            "AutoConfig": f"{MODULE}.{PREFIX}{type(model.config).__name__}",
            "AutoModel": f"{MODULE}.{PREFIX}{base.__name__}",
            model.architecture.auto_class: f"{MODULE}.{PREFIX}{head.__name__}",
        },
        "low_rank": model.targets.targets,
    }
    write_json(path, config)


def code_of(model: CompressedModel) -> str:
    """The source of the module beside the weights: no more of the code than this model needs."""
    kinds, formats = used(model)
    classes = model_classes(model)
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(Path(__file__).with_name("modeling.py.j2").read_text(encoding="utf-8"))
    return template.render(
        head=classes[-1].__name__,
        config=type(model.config).__name__,
        classes=[of.__name__ for of in classes],
        imports=imports([type(model.config), *classes]),
        sources=list(sources(kinds, formats)),
        kinds=[(kind, low_rank_code.KINDS[kind].__name__) for kind in sorted(kinds)],
        model_type=model_type_of(model),
        prefix=PREFIX,
        embeddings=bool(kinds & EMBEDDINGS),
        experts=bool(kinds & EXPERTS),
        sequences="sorted" in kinds,
        functional=bool(kinds & (EMBEDDINGS | EXPERTS | {"convolution"})),
    )


def imports(classes: list[type]) -> list[str]:
    """Lines that import transformers' classes, from the top where they are there."""
    import transformers

    homes: dict[str, list[str]] = {}
    for of in classes:
        public = getattr(transformers, of.__name__, None) is of
        homes.setdefault("transformers" if public else of.__module__, []).append(of.__name__)
    return [f"from {home} import {', '.join(names)}" for home, names in sorted(homes.items())]


def sources(kinds: set[str], formats: set[str]) -> Iterator[str]:
    """The source of every class and function that modules of these kinds and formats need, in order."""
    own = low_rank_code
    yield _source(own.LowRankLinear)
    # Embeddings look at the class of a layer.
    if "factored" in formats or kinds & EMBEDDINGS:
        yield _source(factored.FactoredLinear)
    if "pivoted" in formats or kinds & EMBEDDINGS:
        yield _source(pivoted.index_dtype)
        yield _source(pivoted.index_of)
        yield _source(pivoted.InputPivotedLinear)
    if "pivoted" in formats:
        yield _source(pivoted.OutputPivotedLinear)
    for name in sorted(formats):
        yield _source(own.FORMATS[name])
    table = ", ".join(f'"{name}": {own.FORMATS[name].__name__}' for name in sorted(formats))
    yield f"FORMATS = {{{table}}}\n"
    if "convolution" in kinds:
        yield "Convolution = nn.Conv1d | nn.Conv2d\nGeometry = dict[str, tuple[int, ...]]\n"
        for part in ("geometry_of", "patches_of", "positions_of", "PatchLinear"):
            yield _source(getattr(convolution, part))
    if "grouped" in kinds:
        yield _source(grouped.GroupMaps)
    if "sorted" in kinds:
        yield _source(sorted_rows.SortedMaps)
    if kinds & {"grouped", "sorted"}:
        yield _source(own.low_rank_maps)
    if kinds & EXPERTS:
        for part in ("run_experts", "gated"):
            yield _source(getattr(expert_modules, part))
        yield "Gate = Callable[[torch.Tensor], torch.Tensor]\n"
        for part in ("gate_of", "parts_of", "is_transposed", "as_stored", "fused_weight"):
            yield _source(getattr(expert_modules, part))
    if "experts" in kinds:
        for part in ("arguments_of", "identities_of", "fused_bias", "in_order", "run_called", "run_parts"):
            yield _source(getattr(expert_modules, part))
        yield _source(expert_modules.LowRankExperts)
    if "shared-experts" in kinds:
        yield _source(expert_modules.SharedExperts)
    if kinds & EMBEDDINGS:
        for part in ("look_up", "product", "dtype_of"):
            yield _source(getattr(own, part))
        for of in (embedding_modules.PlainProjection, embedding_modules.PivotedProjection):
            yield _source(of)
        yield "Projection = PlainProjection | PivotedProjection\n"
        for function in (own.tied_to, own.scale_of, own.low_rank_rows):
            yield _source(function)
    if "embedding" in kinds:
        for part in ("_hold", "LowRankEmbedding", "LowRankHead"):
            yield _source(getattr(embedding_modules, part))
    if "banded-embedding" in kinds:
        yield f"MOST_HALVINGS = {bands.MOST_HALVINGS}\nLEAST_ROWS = {bands.LEAST_ROWS}\n"
        yield _source(bands.band_sizes)
        for part in ("Band", "BandedEmbedding", "TiedEmbedding", "BandedHead"):
            yield _source(getattr(embedding_modules, part))
    for kind in sorted(kinds):
        yield _source(own.KINDS[kind])
    yield _source(own.own_path)
    yield _source(own.put_low_rank_modules)


def _source(of: Any) -> str:
    return inspect.getsource(of).replace("LillamaError(", "ValueError(").rstrip() + "\n"
