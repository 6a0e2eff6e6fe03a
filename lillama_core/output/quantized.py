"""What is said of a quantised model: its record, and the card of one that was dense before."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lillama_core.data.modality import modality_of
from lillama_core.output.card import environment
from lillama_core.output.front_matter import TASKS, find_license, hub_id
from lillama_core.output.numbers import code
from lillama_core.output.origin import Described
from lillama_core.output.quantization_rows import quantization_rows
from lillama_core.output.record import versions
from lillama_core.output.run_directory import RunDirectory
from lillama_core.quantization.packing import GROUP
from lillama_core.system.files import apply_umask, weight_hashes, write_json

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.models.source import ModelSource


@dataclass(frozen=True)
class QuantizedRecord:
    """How a model was quantised, and what it came to."""

    model: str
    """By name."""
    model_fingerprint: str
    architecture: str
    bits: int
    """That were asked for."""
    table_bits: int
    """Of token embeddings and output heads."""
    matrices: dict[str, int]
    """Number of bits -> how many matrices are held in them."""
    bytes_before: int
    """Of all parameters, in the dtype that they were in."""
    bytes_after: int
    """Of the files of weights."""
    seconds: float
    group: int = GROUP
    """Columns that share a scale at 4 bits; at 8 a row shares one."""
    with_feedback: int = 0
    """How many matrices were rounded for what they read, see `lillama_core.quantization.feedback`."""
    calibration: dict[str, Any] | None = None
    """The data that they read then."""
    parameters: int = 0
    """Numbers that the model has, before as after."""
    target_size: int | None = None
    """Bytes that were asked for in place of bits."""
    exclude: list[str] = field(default_factory=list)
    """Paths of modules that keep their numbers."""
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


def publish_dense(
    record: QuantizedRecord, source: ModelSource, config: Any, architecture: Architecture, directory: RunDirectory
) -> None:
    """Write the record and card of a quantised model that is not compressed, and let the output directory appear."""
    from huggingface_hub import ModelCard, ModelCardData

    result = directory.result
    # The record has the form of a compression's where both say the same.
    said = {
        **record.to_dict(),
        "recipe": {},
        "data": {},
        "plan": {},
        "dtype": str(getattr(config, "dtype", None)).removeprefix("torch."),
        "parameters": {"parameters_before": record.parameters, "parameters_after": record.parameters, "reduction": 0.0},
        "bytes": {"dense": record.bytes_before, "compressed": record.bytes_after},
        "seconds": {"total": record.seconds},
        "quantization": record.to_dict(),
        "sha256": weight_hashes(result),
    }
    write_json(result / "lillama.json", said)
    data = ModelCardData(
        base_model=hub_id(source),
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag=TASKS.get(architecture.auto_class),
        tags=["lillama", "quantized"],
        **find_license(Described(source, config, architecture)),
    )
    text = (
        environment(autoescape=False)
        .get_template("quantized.md.j2")
        .render(
            card_data=data.to_yaml(),
            name=code(record.model),
            bits=" and ".join(record.matrices) if record.target_size else record.bits,
            rows=quantization_rows(record.to_dict()),
            auto_class=architecture.auto_class,
            processor_class=modality_of(architecture).processor_class,
            remote_code=source.trust_remote_code,
            versions=[(code(k), code(v)) for k, v in record.versions.items()],
        )
    )
    ModelCard(text).save(result / "README.md")
    # safetensors makes its files readable for their owner alone.
    apply_umask(result)
    directory.publish()
