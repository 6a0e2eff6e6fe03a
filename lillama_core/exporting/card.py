"""README.md of an export: what the directory is, what it was made of, and how it was checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lillama_core.errors import one_line
from lillama_core.output.numbers import code, percent
from lillama_core.output.record import RunRecord, versions

if TYPE_CHECKING:
    from lillama_core.exporting.base import Agreement, Exporter
    from lillama_core.exporting.model import CompressedModel


def write_card(
    folder: Path,
    exporter: Exporter,
    model: CompressedModel,
    record: RunRecord | None,
    agreements: list[Agreement],
) -> None:
    """Write README.md, whose front matter the Hugging Face Hub reads, into ``folder``."""
    from huggingface_hub import ModelCard, ModelCardData

    front = _front_matter(model)
    causal = model.architecture.auto_class == "AutoModelForCausalLM"
    data = ModelCardData(
        base_model=front.get("base_model"),
        pipeline_tag="text-generation" if causal else None,
        tags=["lillama", "low-rank", exporter.name],
        license=front.get("license"),
        license_name=front.get("license_name"),
        license_link=front.get("license_link"),
    )
    name = one_line(model.folder.resolve().name if record is None else record.model, 100)
    lines = [
        f"---\n{data}\n---\n",
        f"# {name}, compressed by lillama, exported as {exporter.name}\n",
        _origin(record),
        exporter.usage(model),
        "## Checked\n",
        "A process in which lillama cannot be imported loaded the directory and compared it with the compressed model"
        " on two rows of random input:\n",
        "| compared | difference | allowed |\n|---|---:|---:|",
        *(f"| {a.what} | {a.difference:.2g} | {a.allowed:.2g} |" for a in agreements),
        "\nDifferences are those of the outputs, relative to their norm; 0 is equality.\n",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions().items()) + ".\n",
    ]
    ModelCard("\n".join(lines), ignore_metadata_errors=True).save(folder / "README.md")


def _origin(record: RunRecord | None) -> str:
    if record is None:
        return "Made of a model that lillama has compressed.\n"
    before, after = (record.parameters.get(f"parameters_{when}") for when in ("before", "after"))
    removed = ""
    if isinstance(before, int) and isinstance(after, int) and before > 0:
        removed = f" {percent(1 - after / before)} of its {before:,} parameters were removed;"
    return f"Made of {code(record.model)} by low-rank linear maps;{removed} lillama.json says how.\n"


def _front_matter(model: CompressedModel) -> dict[str, str]:
    """Licence and base model from the card of the compressed directory; what is unreadable is left out."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(model.folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a README may hold anything
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and 0 < len(v) <= 200}
