"""``onnx``: graphs of the low-rank model for ONNX Runtime; a low-rank map stays two small matrix products.

A language model is one graph, ``model.onnx``, from tokens, a mask and what earlier tokens left in the cache (nothing,
at first) to logits and the new cache. An encoder-decoder is two, ``encoder_model.onnx`` and ``decoder_model.onnx``,
without a cache. Other models are one graph from their inputs to their main output. Inputs have the names that they have
in transformers.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lillama_core.architecture.targets.expert_layouts import fused_experts
from lillama_core.data.modality import Inputs, as_dtype
from lillama_core.errors import LillamaError, one_line
from lillama_core.exporting.base import Agreement, Exporter, ExportJob
from lillama_core.exporting.fresh import allowed, run_without_lillama, write_probe
from lillama_core.exporting.model import CompressedModel
from lillama_core.models.outputs import main_output
from lillama_core.system.files import write_json
from lillama_core.system.memory import release_memory

CHECK = Path(__file__).with_name("onnx_check.py")
MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
LARGEST_FILE = 1_500_000_000
"""Bytes of weights from which they lie in a file beside the graph: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Graph:
    """A part of the model that becomes one file."""

    file: str
    module: nn.Module
    """Called with the values of ``inputs`` in their order."""
    inputs: dict[str, Any]
    """Example values: tensors, or a list of pairs of tensors, the cache."""
    shapes: tuple[Any, ...]
    """Names of the axes that may have any length, in the form of the values."""
    outputs: list[str]

    @property
    def names(self) -> list[str]:
        """The names of all tensors that go in."""
        found: list[str] = []
        for name, value in self.inputs.items():
            found += [name] if isinstance(value, torch.Tensor) else cache_names(name, len(value))
        return found


class OnnxExporter(Exporter):
    """Graphs of the low-rank model for ONNX Runtime."""

    name = "onnx"
    dtypes = ("float32", "float16")
    needs: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("onnx", "onnxscript", "onnxruntime"), "pip install 'lillama[onnx]'"
    )

    def cannot_hold(self, model: CompressedModel) -> str | None:
        experts = {"experts", "shared-experts"} & {entry.kind for entry in model.targets.parsed.values()}
        if experts or fused_experts(model.outline):
            return "which of its experts run depends on the tokens, and a graph is the same for all"
        if getattr(model.outline, "_is_stateful", False):
            return "it goes through its positions one by one, and a graph has as many steps for every text"
        return None

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        dtype = job.dtype or torch.float32
        whole: Any = model.resident(dtype)
        size = sum(p.numel() * p.element_size() for p in whole.parameters())
        graphs = graphs_of(whole, as_dtype(model.inputs(), dtype))
        job.progress.phase("Exporting graphs", len(graphs))
        for graph in graphs:
            write_graph(graph, job.folder, size > LARGEST_FILE)
            job.progress.step(graph.file)
        write_json(job.folder / "config.json", json.loads(model.dense_config(dtype).to_json_string(use_diff=False)))
        settings = model.folder / "generation_config.json"
        if settings.is_file():
            shutil.copyfile(settings, job.folder / settings.name)
        model.copy_small_files(job.folder)
        del whole, graphs
        release_memory()

    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        inputs = model.inputs()
        probe = write_probe(job.scratch / "probe.safetensors", inputs, {"logits": model.output(inputs)})
        found = run_without_lillama(CHECK, job.scratch, job.folder, probe)
        most = allowed(model, job.dtype or torch.float32)
        return [Agreement(k, v, most) for k, v in found.items()]

    def usage(self, model: CompressedModel) -> str:
        return (
            "Graphs for ONNX Runtime (`pip install onnxruntime`). Low-rank maps are two small matrix products in them,"
            " so they are smaller than those of the original model. Inputs have transformers' names;"
            " `past_key_values.N.key` and `.value`, where a graph has them, begin with length 0 and are then the"
            " `present.N.key` and `.value` of the step before.\n\n"
            "```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{MODEL}")  # or {ENCODER} and {DECODER}\n'
            "print([(i.name, i.shape) for i in session.get_inputs()])\n```\n"
        )


def graphs_of(model: Any, inputs: Inputs) -> list[Graph]:
    """The graphs of ``model``, which is in eval mode, with ``inputs`` as examples."""
    if model.config.is_encoder_decoder:
        return encoder_and_decoder(model, inputs)
    if set(inputs) == {"input_ids"} and model.can_generate():
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        cache = example_cache(model, inputs)
        if cache is not None:
            return [with_cache(model, inputs, cache)]
    return [Graph(MODEL, _Whole(model, tuple(inputs)), dict(inputs), _axes(inputs), ["logits"])]


class _Whole(nn.Module):
    """The inputs in their order -> the main output."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.options = {"use_cache": False} if model.can_generate() else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return main_output(self.model(**dict(zip(self.names, values, strict=True)), **self.options))


# A language model with its cache

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [rows, heads, positions, width of a head] of each layer."""


def example_cache(model: Any, inputs: Inputs) -> Cache | None:
    """What two positions leave in the cache of ``model``; None where that is more than keys and values of all."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    with torch.no_grad():
        found = model(**{name: value[:, :2] for name, value in inputs.items()}, use_cache=True)
    cache: Any = getattr(found, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def with_cache(model: Any, inputs: Inputs, cache: Cache) -> Graph:
    """Tokens, mask and cache -> logits and cache; the mask is of the positions in the cache too."""
    past = cache[0][0].shape[2]
    mask = nn.functional.pad(inputs["attention_mask"], (past, 0), value=1)
    axes = {0: "batch", 2: "past"}
    return Graph(
        MODEL,
        _Cached(model),
        {"input_ids": inputs["input_ids"], "attention_mask": mask, "past_key_values": cache},
        ({0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}, [(axes, axes) for _ in cache]),
        ["logits", *cache_names("present", len(cache))],
    )


def cache_names(prefix: str, layers: int) -> list[str]:
    """Names of a cache's tensors, in order."""
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


class _Cached(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Cache) -> tuple[torch.Tensor, Cache]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(ddp_cache_data=past)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        new: Any = found.past_key_values
        return found.logits, [(layer.keys, layer.values) for layer in new.layers]


# Encoder and decoder


def encoder_and_decoder(model: Any, inputs: Inputs) -> list[Graph]:
    """The encoder's inputs -> its states; they, with the decoder's tokens -> logits."""
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    encoder = _Encoder(model.get_encoder(), tuple(given))
    with torch.no_grad():
        states = encoder(*given.values())
    decoding = {"decoder_input_ids": inputs["decoder_input_ids"], "encoder_hidden_states": states}
    if "attention_mask" in given:
        decoding["attention_mask"] = given["attention_mask"]
    length = "sequence" if any(not value.is_floating_point() for value in given.values()) else "frames"
    axes = {
        "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
        "encoder_hidden_states": {0: "batch", 1: length},
        "attention_mask": {0: "batch", 1: length},
    }
    return [
        Graph(ENCODER, encoder, given, _axes(given), ["last_hidden_state"]),
        Graph(DECODER, _Decoder(model), decoding, (tuple(axes[name] for name in decoding),), ["logits"]),
    ]


class _Encoder(nn.Module):
    def __init__(self, encoder: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(**dict(zip(self.names, values, strict=True)))[0]
        return found


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        ids, states, *mask = values
        options = {"attention_mask": mask[0]} if mask else {}
        found = self.model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False, **options)
        logits: torch.Tensor = found.logits
        return logits


def _axes(inputs: Inputs) -> tuple[Any, ...]:
    """Rows may be as many as one likes, and tokens as well; sound and images have their size."""
    # In a tuple of their own: they are the values of one parameter, *values.
    return (tuple({0: "batch"} if v.is_floating_point() else {0: "batch", 1: "sequence"} for v in inputs.values()),)


def write_graph(graph: Graph, folder: Path, beside: bool) -> None:
    """Write the file of ``graph``, its weights beside it if so wished. Raises LillamaError where torch cannot."""
    try:
        with _silence():
            program: Any = torch.onnx.export(
                graph.module.eval(),
                tuple(graph.inputs.values()),
                dynamo=True,
                dynamic_shapes=graph.shapes,
                input_names=graph.names,
                output_names=graph.outputs,
                verbose=False,
            )
            # Where each step comes from in the code of this machine is nobody's business.
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()
            program.save(folder / graph.file, external_data=beside)
    except Exception as error:  # whatever the exporter meets in a model's code
        raise LillamaError(f"torch.onnx.export cannot make {graph.file}: {one_line(error)}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints what it does, and logs what it leaves out."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
