"""README.md of a result: the model card, and the recipe as a file that repeats the run.

What the record says is put into words here for the card and the report alike. A result is meant to be published, so
folders of the machine that made it appear in neither.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from lillama_core.data.modality import modality_of
from lillama_core.errors import one_line
from lillama_core.output.evaluation_rows import evaluation_rows, left_out_rows
from lillama_core.output.front_matter import front_matter
from lillama_core.output.healing_rows import healing_rows
from lillama_core.output.later import later_commands
from lillama_core.output.numbers import code, count, duration, number, percent, signed_percent, size
from lillama_core.output.origin import Origin
from lillama_core.output.public import public_name, public_recipe
from lillama_core.output.quantization_rows import quantization_rows
from lillama_core.output.record import RunRecord
from lillama_core.recipe.model import Recipe
from lillama_core.strategies import StrategyChoice

RECIPE_FILE = "lillama_recipe.yaml"

STAGE_PARTS = {"profile": ("sensitivity", "statistics")}
"""Stages of a run that are timed both whole and in parts."""

STAGE_LABELS = {
    "load model": "loading the model",
    "sensitivity": "sensitivity pass",
    "statistics": "activation statistics",
    "profile": "rest of the profile",
    "blocks": "compressing blocks",
    "report": "measuring fidelity",
    "healing": "training the whole model",
    "quantization": "rounding the weights",
    "output": "writing the result",
    "evaluation": "evaluating both models",
}


def write_card(result: Path, record: RunRecord, origin: Origin) -> None:
    """Write README.md, whose front matter the Hugging Face Hub reads, and the recipe as YAML, to ``result``."""
    from huggingface_hub import ModelCard

    source = origin.source
    data = front_matter(record, origin)
    modality = modality_of(origin.architecture)
    processor_class = modality.processor_class
    name = source.short_name if source.is_local else record.model
    text = (
        environment(autoescape=False)
        .get_template("card.md.j2")
        .render(
            card_data=data.to_yaml(),
            name=code(name),
            share=percent(record.parameters["parameters_after"] / record.parameters["parameters_before"]),
            removed=percent(record.parameters["reduction"]),
            sizes=size_rows(record),
            fidelity=fidelity_rows(record),
            evaluation=[(code(name), *rest) for name, *rest in evaluation_rows(record)],
            left_out=[code(line) for line in left_out_rows(record)],
            fidelity_tokens=(record.fidelity or {}).get("tokens"),
            parts=part_rows(record),
            healing=[(code(teacher), *told) for teacher, *told in healing_rows(record.healing, record.fidelity)],
            quantization=quantization_rows(record.quantization),
            whole_blocks=bool(record.recipe.get("steps")) and record.recipe.get("train") == "block",
            plan=record.plan,
            maps=len(record.shapes),
            format=code(record.plan["format"]),
            auto_class=origin.architecture.auto_class,
            processor_class=processor_class,
            processor_name="tokenizer" if processor_class == "AutoTokenizer" else "processor",
            causal=modality.name == "text",
            remote_code=source.trust_remote_code,
            recipe=[(code(k), code(v), meaning) for k, v, meaning in recipe_rows(record)],
            data=record.data,
            sources=[
                (code(s["name"]), s["what"], s["rows"], s["tokens"], code(s["sha256"])) for s in source_rows(record)
            ],
            cost=cost_rows(record),
            versions=[(code(k), code(v)) for k, v in record.versions.items()],
            command=reproduce_command(record, origin),
            later=later_commands(record, outside_choices(record, origin)),
            trained_later=any("data" in told for told in record.healing),
            recipe_file=RECIPE_FILE,
        )
    )
    ModelCard(text).save(result / "README.md")
    header = "# Repeats this run. Files of calibration data are named without their folders: run it beside them.\n"
    recipe = header + yaml.safe_dump(public_recipe(record.recipe), sort_keys=False, allow_unicode=True)
    (result / RECIPE_FILE).write_text(recipe, encoding="utf-8")


@functools.cache
def environment(autoescape: bool) -> jinja2.Environment:
    """Where the templates are; a name that one of them lacks is an error, not an empty string."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def reproduce_command(record: RunRecord, origin: Origin) -> str:
    """The command line that repeats the run, given the recipe file."""
    source = origin.source
    model = (source.gguf_file or source.short_name) if source.is_local else record.model
    parts = ["lillama", "compress", one_line(model, None), "--recipe", RECIPE_FILE, "--output", "OUTPUT"]
    if record.tokenizer is not None:
        parts += ["--tokenizer", one_line(public_name(record.tokenizer), None)]
    return shlex.join(parts + outside_choices(record, origin))


def outside_choices(record: RunRecord, origin: Origin) -> list[str]:
    """The options that no recipe holds, and every command on the model needs."""
    known = getattr(origin.config, "model_type", None) in origin.architecture.model_types
    architecture = [] if known else ["--architecture", record.architecture]
    return architecture + (["--trust-remote-code"] if origin.source.trust_remote_code else [])


# What the record says


@dataclasses.dataclass(frozen=True)
class Change:
    """A quantity of the dense model and of the compressed one."""

    label: str
    before: int
    after: int
    unit: Callable[[float], str]
    """Writes a value for people: `count` or `size`."""

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0


def changes(record: RunRecord) -> list[Change]:
    """What became smaller, as far as it was counted."""
    numbers, stored = record.parameters, record.bytes
    candidates = [
        ("parameters", numbers.get("parameters_before"), numbers.get("parameters_after"), count),
        (
            "weights",
            stored.get("dense", numbers.get("bytes_before")),
            stored.get("compressed", numbers.get("bytes_after")),
            size,
        ),
        (
            "multiply-adds per token of the maps",
            numbers.get("multiply_adds_per_token_before"),
            numbers.get("multiply_adds_per_token_after"),
            count,
        ),
    ]
    return [
        Change(label, before, after, unit)
        for label, before, after, unit in candidates
        if before is not None and after is not None
    ]


def size_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """Quantity, before, after and change; exactly."""

    def exactly(change: Change, value: int) -> str:
        return f"{value:,}" if change.unit is count else f"{size(value)} ({value:,} bytes)"

    return [(c.label, exactly(c, c.before), exactly(c, c.after), signed_percent(c.ratio - 1)) for c in changes(record)]


def part_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """What each part of the calibration rows served, how many rows it has, and its hash."""
    served = {
        "fit": "statistics, training and correction",
        "choose": "choosing checkpoints and the size of a correction",
        "report": "the numbers under Fidelity; nothing was chosen by them",
    }
    parts = record.data.get("parts", {})
    return [
        (name, what, f"{parts[name]['rows']:,}", f"`{parts[name]['sha256'][:16]}`" if parts[name]["rows"] else "")
        for name, what in served.items()
        if name in parts
    ]


def fidelity_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Measure, value and what it means, for what was measured."""
    found = record.fidelity or {}
    rows = []
    before, after = found.get("perplexity_before"), found.get("perplexity_after")
    if before is not None and after is not None:
        rows.append(
            (
                "perplexity",
                f"{number(before)} → {number(after)}",
                "how uncertain the next token is, dense model → this model; 1 is certainty",
            )
        )
    if found.get("divergence") is not None:
        rows.append(
            (
                "divergence",
                f"{number(found['divergence'])} nats/token",
                "Kullback-Leibler divergence of the predictions from the dense model's; 0 is equality",
            )
        )
    if found.get("agreement") is not None:
        rows.append(
            (
                "agreement",
                percent(found["agreement"]),
                "tokens at which both models find the same next token the most likely",
            )
        )
    if found.get("relative_error") is not None:
        rows.append(
            (
                "relative error",
                number(found["relative_error"]),
                "squared error of the outputs, relative to their squares",
            )
        )
    return rows


def recipe_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Option, value and meaning."""
    help_ = {name: field.description or "" for name, field in Recipe.model_fields.items()}
    return [(k, _plain(v), help_.get(k, "")) for k, v in public_recipe(record.recipe).items()]


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        if "name" not in value:
            own = [f"{stage}.{option}: {v}" for stage, options in value.items() for option, v in options.items()]
            return ", ".join(own) or "default"
        return str(StrategyChoice.model_validate(value))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def source_rows(record: RunRecord) -> list[dict[str, Any]]:
    """The calibration data by source: name, what it is, rows, tokens and hash."""
    return [
        {
            "name": public_name(name),
            "what": _what(found),
            "rows": f"{found['rows']:,}" if "rows" in found else "",
            "tokens": f"{found['tokens']:,}" if "tokens" in found else "",
            "sha256": found.get("sha256", ""),
        }
        for name, found in record.data.get("sources", {}).items()
    ]


def _what(source: Mapping[str, Any]) -> str:
    kind = source.get("kind")
    if kind == "self":
        return "text sampled from the dense model"
    if kind == "dataset":
        details = (source.get("dataset"), source.get("config"), source.get("split"))
        return "dataset " + ", ".join(one_line(d, None) for d in details if d)
    if kind in ("texts", "batches"):
        return f"{kind} handed over in Python"
    return f"{kind} file"


def stages(record: RunRecord) -> list[tuple[str, float]]:
    """Where the time went: stages that do not overlap, in the order of the run."""
    seconds = {k: v for k, v in record.seconds.items() if not k.startswith("total")}
    for whole, parts in STAGE_PARTS.items():
        if whole in seconds:
            seconds[whole] -= sum(seconds.get(part, 0.0) for part in parts)
    return [(STAGE_LABELS.get(k, k), max(0.0, v)) for k, v in seconds.items()]


def cost_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Time, memory and what they were measured on."""
    rows = []
    if total := record.seconds.get("total") or sum(v for _, v in stages(record)):
        resumed = " (since the run was resumed)" if record.resumed else ""
        rows.append(("time", duration(total) + resumed))
    if record.peak_memory_bytes:
        rows.append(("peak memory", size(record.peak_memory_bytes)))
    if record.peak_device_memory_bytes:
        rows.append(("peak memory of the GPU", size(record.peak_device_memory_bytes)))
    rows.append(("device", record.device))
    labels = {"processor": "processor", "cores": "logical cores", "system": "system"}
    rows += [(label, str(record.machine[k])) for k, label in labels.items() if record.machine.get(k)]
    rows += [("compute dtype", record.compute), ("dtype of the weights", record.dtype)]
    return rows
