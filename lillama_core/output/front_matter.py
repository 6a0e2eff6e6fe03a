"""The front matter of a card, which the Hugging Face Hub reads: base model, licence, task and measured results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama_core.output.numbers import percent
from lillama_core.output.origin import Origin
from lillama_core.output.public import public_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from lillama_core.models.source import ModelSource
    from lillama_core.output.record import RunRecord

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
}
"""Class of transformers -> task as the Hub calls it; other classes are for more than one."""

LICENSE_KEYS = ("license", "license_name", "license_link")

OF_THE_MACHINE = ("speed", "speed_up", "footprint")
"""First parts of the names of measurements that say more of a machine than of a model."""

HELD_OUT = "calibration rows that nothing was fitted to or chosen by"
SHIPPED = "text shipped with lillama"
TYPES = {HELD_OUT: "calibration", SHIPPED: "lillama"}
"""Data for people -> as a type, which is for machines; others are called by the name of their task."""


def front_matter(record: RunRecord, origin: Origin) -> ModelCardData:
    """What the Hub reads of a compressed model."""
    from huggingface_hub import ModelCardData

    source, results = origin.source, eval_results(record, origin)
    base = base_model(record, source)
    # Somebody else's model may have the name of one that was in a directory.
    told: dict[str, Any] = record.license or (find_license(origin) if source.is_local or base is not None else {})
    smaller = f"{public_name(record.model)}, {percent(record.parameters['reduction'])} smaller"
    return ModelCardData(
        base_model=base,
        datasets=hub_datasets(record) or None,
        library_name="transformers",
        pipeline_tag=TASKS.get(origin.architecture.auto_class),
        tags=["lillama", "low-rank"],
        model_name=smaller if results else None,
        eval_results=results or None,
        **{key: told[key] for key in LICENSE_KEYS if key in told},
    )


# Where the model is from


def hub_id(source: ModelSource) -> str | None:
    """The name on the Hub of the model at ``source``; None for one in a directory that does not tell."""
    if not source.is_local:
        return source.location
    # The cache of the Hub: models--OWNER--NAME/snapshots/COMMIT.
    folder = Path(source.location).resolve()
    kind, *parts = folder.parent.parent.name.split("--")
    return "/".join(parts) if kind == "models" and parts and folder.parent.name == "snapshots" else None


def base_model(record: RunRecord, source: ModelSource) -> str | None:
    """The name on the Hub of the dense model, if it is known.

    A record of an earlier version tells it by a model that has an owner, as no local one that is named in public has.
    """
    if record.base_model is not None or source.is_local:
        return record.base_model
    return record.model if record.model.count("/") == 1 else None


def find_license(origin: Origin) -> dict[str, Any]:
    """``license`` and its companions from the front matter of the base model's README; empty when unknown."""
    from huggingface_hub import ModelCard, hf_hub_download

    source = origin.source
    try:
        readme = (
            Path(source.location) / "README.md" if source.is_local else hf_hub_download(source.location, "README.md")
        )
        found = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    # A README that is missing, unreadable or out of reach must not cost a finished run.
    except Exception:
        found = {}
    found = {"license": getattr(origin.config, "license", None), **found}
    return {k: found[k] for k in LICENSE_KEYS if isinstance(found.get(k), str) and 0 < len(found[k]) <= 200}


def hub_datasets(record: RunRecord) -> list[str]:
    """Datasets of the Hugging Face Hub among the calibration data."""
    sources = record.data.get("sources", {}).values()
    return sorted({s["dataset"] for s in sources if s.get("kind") == "dataset"})


# What was measured


def eval_results(record: RunRecord, origin: Origin) -> list[EvalResult]:
    """What was measured of the model that is published; nothing of one that was rounded to few bits afterwards."""
    from huggingface_hub import EvalResult

    task = TASKS.get(origin.architecture.auto_class)
    if task is None or record.quantization is not None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=TYPES.get(dataset, dataset),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for dataset, metric, name, value in [*_fidelity(record), *_evaluation(record)]
        if math.isfinite(value)
    ]


def _fidelity(record: RunRecord) -> list[tuple[str, str, str, float]]:
    """Data, metric, its name for people and its value."""
    named = {
        "perplexity_after": ("perplexity", "perplexity"),
        "divergence": ("kl-divergence", "divergence from the dense model, nats a token"),
        "agreement": ("agreement", "part of the tokens that both models find the most likely"),
    }
    found: dict[str, Any] = record.fidelity or {}
    return [(HELD_OUT, *names, found[key]) for key, names in named.items() if found.get(key) is not None]


def _evaluation(record: RunRecord) -> list[tuple[str, str, str, float]]:
    """The same of ``--evaluate``."""
    rows = []
    for measured in (record.evaluation or {}).get("compressed", []):
        metric, _, data = measured["name"].partition("/")
        # The mean of other numbers was measured on no data of its own.
        if metric not in OF_THE_MACHINE and data != "mean":
            unit = f", {measured['unit']}" if measured["unit"] else ""
            rows.append((data or SHIPPED, metric, metric + unit, measured["value"]))
    return rows
