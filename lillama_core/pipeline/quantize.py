"""``lillama quantize``: hold the weights of a compressed model, or of a dense one, in 8 or 4 bits."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.expert_layouts import fused_experts
from lillama_core.architecture.targets.experts import ExpertsTarget
from lillama_core.architecture.targets.linear_map import matches_any
from lillama_core.architecture.targets.quantized import hold, matrix, weights_of
from lillama_core.data.modality import Modality, SampleRequest, as_dtype, made_up_inputs, modality_of
from lillama_core.data.objects import given_data
from lillama_core.errors import UserError, in_one_line, nearest
from lillama_core.formats import Factored, FactoredLinear
from lillama_core.healing.factors import balanced
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.loading import DTYPES, check_finite, count_parameters, load_config, load_model
from lillama_core.models.outputs import main_output
from lillama_core.models.source import QUANT_METHOD, ModelSource, locate, model_fingerprint
from lillama_core.output.directory import check_publishable, check_reload, copy_processors, publish
from lillama_core.output.origin import Described
from lillama_core.output.public import public_data, public_name, public_sources
from lillama_core.output.quantized import QuantizedRecord, publish_dense
from lillama_core.output.quantizer import LillamaConfig, attach, bits_entry
from lillama_core.output.record import RunRecord, peak_memory_bytes, read_record
from lillama_core.output.run_directory import RunDirectory
from lillama_core.output.verify import WHOLE
from lillama_core.pipeline.calibrated import FEEDBACK_BITS, Calibration, plain, round_by_blocks
from lillama_core.pipeline.fitting import bits_within, check_target
from lillama_core.quantization.options import DATA_FIELDS, TOKENS
from lillama_core.quantization.packing import BITS, packing_of
from lillama_core.recipe.model import COMMAND_LINE, Recipe
from lillama_core.runtime.modules import replace_module
from lillama_core.system.devices import choose_autocast, choose_device
from lillama_core.system.progress import Progress, Verbosity
from lillama_core.system.quiet import quiet


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantise, to what, and where to."""

    model: str
    output: Path
    bits: int = 8
    table_bits: int = 8
    """Of token embeddings and output heads."""
    target_size: int | None = None
    """Bytes that the files of weights may take: what is held in 8 and what in 4 bits follows from it, not from ``bits``
    and ``table_bits``."""
    exclude: tuple[str, ...] = ()
    """Paths of modules that keep their numbers."""
    architecture: str | Architecture | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    calibration: Recipe | None = None
    """Of which the `DATA_FIELDS` count: data that weights in 4 bits are rounded for; None: they are rounded plainly."""
    dtype: str | None = None
    """In which the model is loaded and the weights are saved that keep their numbers; None: its own."""
    data: Any = None
    """Such data as objects, see `lillama_core.data.objects.given_data`; it needs a ``calibration``."""
    device: str = "auto"


def calibration_recipe(given: Mapping[str, Any]) -> Recipe:
    """The recipe of which the `DATA_FIELDS` count, some of them ``given`` by the user; raises UserError for values."""
    values = {"tokens": TOKENS, "self_share": 0.0, **given}
    return Recipe().with_options({k.replace("_", "-"): v for k, v in values.items()}, COMMAND_LINE)


def quantize(request: QuantizeRequest, verbosity: Verbosity = "normal") -> QuantizedRecord:
    """Quantise as ``request`` says; the output directory appears only once a fresh process has loaded it.

    Raises UserError for what can be known before the work, leaving nothing behind.
    """
    with parsed_once(request.model), in_one_line("the output was not written"):
        return _quantize(request, verbosity)


@dataclass(frozen=True)
class Checked:
    """What is known of a request before a weight is read."""

    directory: RunDirectory
    source: ModelSource
    config: Any
    targets: Mapping[str, Any] | None
    """Of a compressed model, see `_targets`."""
    record: RunRecord | None
    origin: Described | None
    """Of a compressed model, as its record."""
    architecture: Architecture
    modality: Modality
    given: Any
    processor: Any
    device: torch.device


def check(request: QuantizeRequest) -> Checked:
    """Find out what can be known of ``request`` before the weights are read; raises UserError for what is wrong."""
    for name, bits in (("--bits", request.bits), ("--embedding-bits", request.table_bits)):
        if bits not in BITS:
            raise UserError(f"{name} must be {' or '.join(map(str, BITS))}, not {bits}")
    if request.calibration is not None and request.target_size is None and request.bits != FEEDBACK_BITS:
        raise UserError("--calibration does nothing in 8 bits, where nothing is lost by plain rounding; add --bits 4")
    device = choose_device(request.device)
    directory = RunDirectory(request.output, resumes=False)
    directory.check(request.overwrite, False)
    source = locate(request.model, request.trust_remote_code)
    config = load_config(source, allow_compressed=True)
    targets = _targets(request.model, source, config)
    record = read_record(Path(source.location)) if targets is not None else None
    architecture = find_architecture(config, request.architecture, request.trust_remote_code)
    origin = None
    if record is not None:
        origin = Described.by_name(record.model, config, architecture, request.trust_remote_code)
        check_publishable(record, origin, request.model)
    modality = modality_of(architecture)
    given = None if request.data is None else given_data(request.data)
    if request.calibration is not None:
        modality.check(request.calibration) if given is None else modality.check_given(request.calibration, given)
    processor = modality.load_processor(source, request.tokenizer)
    return Checked(directory, source, config, targets, record, origin, architecture, modality, given, processor, device)


def _quantize(request: QuantizeRequest, verbosity: Verbosity) -> QuantizedRecord:
    started, checked = time.monotonic(), check(request)
    directory, source, config = checked.directory, checked.source, checked.config
    record, origin = checked.record, checked.origin
    architecture, modality, given, device = checked.architecture, checked.modality, checked.given, checked.device
    with directory.locked(), contextlib.ExitStack() as held, Progress(verbosity) as progress:
        progress.line(f"Loading {request.model}")
        dtype: Any = torch.float16 if source.gguf_file is not None else "auto"
        if request.dtype is not None:
            # The record names what is saved.
            dtype = config.dtype = DTYPES[request.dtype]
        model: Any = load_model(source, architecture, dtype)
        check_finite(model)
        parameters = count_parameters(model)
        before = sum(t.numel() * t.element_size() for t in model.parameters())
        sites = {**(checked.targets or {}), **separated(model)}
        if request.bits == 4 or request.target_size is not None:
            level_factors(model)
        weights = _weights(model, architecture, request)
        if request.target_size is not None:
            check_target(model, weights, request.target_size)
        data, calibration = None, None
        if request.calibration is not None:
            autocast = choose_autocast(request.calibration.compute, device)
            fingerprint = model_fingerprint(source)
            asked = SampleRequest(
                request.calibration, model.to(device), checked.processor, fingerprint, device, autocast, progress, given
            )
            data = modality.load(asked) if given is None else modality.load_given(asked)
            size = request.calibration.batch_size
            batches = [data.part(start, start + size) for start in range(0, len(data), size)]
            calibration = Calibration(batches, device, autocast, progress)
        # Published, or not to be: nothing goes on with a part of it.
        held.callback(directory.discard)
        directory.open({"model": model_fingerprint(source), "bits": request.bits}, request.overwrite)
        progress.release()
        if request.target_size is None:
            asked_bits = {path: request.table_bits if table else request.bits for path, table in weights.items()}
            chosen = {path: packing_of(matrix(model, path), bits).bits for path, bits in asked_bits.items()}
        else:
            chosen = bits_within(model, architecture, weights, request.target_size, calibration)
        with_feedback = 0
        if calibration is None:
            progress.phase("Rounding", len(chosen))
            for path, bits in chosen.items():
                hold(model, path, bits, plain)
                progress.step(path)
        else:
            with_feedback = round_by_blocks(model, architecture, chosen, calibration)
        model.to("cpu")
        attach(model, LillamaConfig(sites, quantization=bits_entry(chosen)))
        result = directory.result
        result.mkdir(exist_ok=True)
        with quiet():
            model.save_pretrained(result)
        modality.save_processor(checked.processor, result)
        copy_processors(source, result)
        progress.line("Checking that a fresh process loads the result")
        inputs = made_up_inputs(architecture, model.config)
        with torch.no_grad():
            expected = main_output(model(**as_dtype(inputs, model.dtype))).float()
        check_reload(expected, inputs, result, (WHOLE, architecture.auto_class), request.trust_remote_code)
        found = QuantizedRecord(
            model=public_name(request.model),
            model_fingerprint=model_fingerprint(source),
            architecture=architecture.name,
            bits=request.bits,
            table_bits=request.table_bits,
            matrices={str(b): n for b, n in sorted(Counter(chosen.values()).items())},
            parameters=parameters,
            bytes_before=before,
            bytes_after=sum(file.stat().st_size for file in result.glob("*.safetensors")),
            seconds=round(time.monotonic() - started, 3),
            with_feedback=with_feedback,
            calibration=None
            if data is None or request.calibration is None
            else {
                "sha256": data.sha256,
                "tokens": data.tokens,
                "sources": public_sources(data.description),
                "recipe": public_data(request.calibration, DATA_FIELDS),
            },
            target_size=request.target_size,
            exclude=list(request.exclude),
        )
        if record is not None and origin is not None:
            record.quantization = found.to_dict()
            record.bytes["compressed"] = found.bytes_after
            for name in ("quantization", "total"):
                record.seconds[name] = round(record.seconds.get(name, 0.0) + found.seconds, 3)
            record.peak_memory_bytes = max(record.peak_memory_bytes, peak_memory_bytes())
            publish(record, origin, directory)
        else:
            publish_dense(found, source, config, architecture, directory)
        return found


def _targets(model: str, source: ModelSource, config: Any) -> Mapping[str, Any] | None:
    """The low-rank modules of a compressed model; None for a dense one; raises UserError for one that is quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None or source.gguf_file is not None:
        return None
    said = found if isinstance(found, Mapping) else found.to_dict()
    assert said.get("quant_method") == QUANT_METHOD
    if said.get("quantization"):
        raise UserError(f"model {model!r} is quantised already; start from what it was made of")
    if not source.is_local:
        raise UserError(f"{model!r} is compressed and on the Hub; download it, and name its directory")
    return LillamaConfig(said.get("sites")).targets


def level_factors(model: nn.Module) -> None:
    """Give the columns of each second factor of plain factors the same norm, without a change of what is computed.

    B A = U (S V^T): groups of 4-bit codes lie along the columns, and each has one scale, so that columns of different
    sizes spoil each other, while rows of the first factor have scales of their own. SmolLM2 with 20 % removed, 6
    windows of WikiText-2: perplexity 42.1 as the factors were, 39.9 balanced, 39.7 so (34.1 before rounding); the same
    function pivoted, whose identity cannot be levelled, 46.4.
    """
    for path, module in [(p, m) for p, m in model.named_modules() if isinstance(m, FactoredLinear)]:
        B, A = balanced(*(factor.float() for factor in Factored().to_factors(module)))
        norms = B.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
        B, A = (factor.to(module.up.weight.dtype) for factor in (B / norms, A * norms[:, None]))
        replace_module(model, path, Factored().from_factors(B, A, module.bias).requires_grad_(False))


def separated(model: nn.Module) -> dict[str, Any]:
    """Take fused experts apart into a matrix for each map, and return the config's entries for them."""
    found = {}
    for path in [path for path, known in fused_experts(model).items() if known]:
        ExpertsTarget(path, model.get_submodule(path)).separate(model)
        found[path] = {"kind": ExpertsTarget.kind, "format": "factored", "ranks": {}}
    return found


def _weights(model: Any, architecture: Architecture, request: QuantizeRequest) -> dict[str, bool]:
    """Path of every weight that is held in few bits -> whether it is a table; raises UserError when there is none."""
    known = {path for path, _ in model.named_modules()}
    for name in request.exclude:
        if name not in known:
            raise UserError(f"--exclude {name}: the model has no such module{nearest(name, sorted(known))}")
    weights = weights_of(model, [*request.exclude, *left_alone(model, architecture)])
    if not weights:
        raise UserError(f"model {request.model!r} has no linear layer or table whose weights could be held in few bits")
    return weights


def left_alone(model: Any, architecture: Architecture) -> list[str]:
    """Paths of what decides, whose choices are no numbers that may be a little off, and of what is never compressed."""
    patterns = (*architecture.pinned, *architecture.exclude)
    return [
        f"{stack}.{i}.{name}"
        for stack in architecture.stacks.values()
        for i, block in enumerate(model.get_submodule(stack))
        for name, _ in block.named_modules()
        if matches_any(name, patterns)
    ]
