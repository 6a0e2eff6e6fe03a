"""``lillama compress --target-size``: few bits as far as they go, and ranks for what is still too large.

At equal bytes 8 bits cost less than 4, and 4 less than a low rank (docs/quantize.md): so all is held in 8 bits where
that fits, else as much in 4 as need be; where even that is too large, ranks take away the rest before it is rounded.
"""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lillama_core.architecture.targets.quantized import weights_of
from lillama_core.errors import LillamaError, UserError
from lillama_core.estimates.sizes import show_size
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.loading import check_dtype
from lillama_core.models.source import locate, model_fingerprint
from lillama_core.output.public import public_recipe
from lillama_core.output.quantizer import LillamaConfig, target_entries
from lillama_core.output.record import RunRecord, read_record
from lillama_core.output.run_directory import RunDirectory
from lillama_core.output.shards import compressed_meta_model
from lillama_core.pipeline.fitting import least_bytes, whole_bytes
from lillama_core.pipeline.pipeline import check, compress
from lillama_core.pipeline.quantize import QuantizeRequest, left_alone, quantize, separated
from lillama_core.pipeline.quantize import check as check_rounding
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.spec import CompressionSpec, make_plan, prepare
from lillama_core.quantization.options import DATA_FIELDS, TOKENS
from lillama_core.quantization.packing import GROUP
from lillama_core.recipe.model import Recipe
from lillama_core.recipe.reading import OFF
from lillama_core.strategies import StrategyChoice, make
from lillama_core.system.processes import world_of_environment
from lillama_core.system.progress import Verbosity

MARGIN = 0.005
"""Part of the parameters that is taken away beyond what a plan of even ranks would need: other ranks fill groups of
columns otherwise."""
WIDE = 8 * GROUP
"""Width from which on ranks are multiples of a group; in narrower models there would be few to choose among."""
READ_BY_ROUNDING = frozenset((*DATA_FIELDS, "calibration", "dtype"))
"""Fields of the recipe that count where no ranks are lowered."""
TRIES = 8
"""Reductions that are tried on the shapes alone; each is nearer by what the last one was too large."""


@dataclass(frozen=True)
class Way:
    """How a size is reached."""

    reduction: float
    """Part of the parameters that ranks take away before anything is rounded; 0: none."""
    recipe: Recipe
    """That of the compression, where there is one."""


def way_to(request: Request, target: int) -> Way:
    """How a model gets into ``target`` bytes, from its config alone.

    Raises UserError for a size that it has already, one out of reach, and options that leave no choice.
    """
    recipe = request.recipe
    if request.evaluate:
        raise UserError("--evaluate does not go with --target-size: run 'lillama evaluate' on the result")
    for layer in recipe.layers:
        for name in ("reduction", "target_parameters", "target_speedup", "format"):
            if name in layer.spelled:
                raise UserError(f"{layer.spelled[name]} does nothing: --target-size says how much is removed, and how")
    if world_of_environment().size > 1:
        raise UserError("--target-size works in one process: start it without torchrun")
    spec = prepare(request.model, recipe, request.architecture, request.trust_remote_code)
    from_gguf = spec.source.gguf_file is not None
    dtype = check_dtype(recipe.dtype, getattr(spec.config, "dtype", None) or torch.float32, from_gguf)
    model: Any = spec.meta.to(dtype)
    separated(model)
    weights = weights_of(model, left_alone(model, spec.architecture))
    if target >= (now := whole_bytes(model)):
        how = "as they are" if recipe.dtype is None else f"in {recipe.dtype}"
        raise UserError(
            f"a --target-size of {show_size(target)} is nothing to do: the weights take {show_size(now)} {how}"
        )
    least = least_bytes(model, weights)
    if target >= least:
        _check_read_by_rounding(request)
        return Way(0.0, recipe)
    reduction = 1 - target / least
    for _ in range(TRIES):
        chosen, within = _within(request, reduction + MARGIN, target, spec)
        if (taken := _in_four_bits(request, within, chosen, dtype)) <= target:
            break
        # Just below 1: what cannot be met is told by what the maps can give.
        reduction = min(reduction + (taken - target) / least, 0.99)
    return Way(chosen.reduction, chosen)


def _check_read_by_rounding(request: Request) -> None:
    """Raise UserError for an option that does nothing where no ranks are lowered; recipes are for where they are."""
    of_run = {"--stream": request.stream, "--max-memory": request.max_memory, "--track": request.track}
    unread = [name for name, value in of_run.items() if value not in (None, False)]
    unread += ["--no-stream"] if request.stream is False else []
    for layer in request.recipe.layers:
        if not layer.where.startswith("recipe"):
            off = {name for name, value in OFF.items() if name in layer.spelled and layer.values[name] == value}
            unread += [written for name, written in layer.spelled.items() if name not in READ_BY_ROUNDING | off]
    if unread:
        raise UserError(f"{unread[0]} does nothing: this --target-size is reached by bits alone; leave it out")


def _within(request: Request, reduction: float, target: int, known: CompressionSpec) -> tuple[Recipe, CompressionSpec]:
    """The compression before all is rounded; raises UserError for a reduction that is out of reach."""
    recipe = request.recipe
    options: dict[str, Any] = {"reduction": reduction, "format": "factored"}
    try:
        chosen = recipe.with_options(options, "--target-size")
        spec = prepare(request.model, chosen, request.architecture, request.trust_remote_code, known)
        allocator, width = make("allocators", recipe.allocation), max(m.map.full_rank for m in spec.maps)
        if hasattr(allocator.options, "rank_multiple") and width >= WIDE:
            # Columns that do not fill a group of codes cost as much as if they did.
            multiple = math.lcm(GROUP, allocator.rank_multiple)
            chosen = chosen.with_options({"rank_multiple": multiple}, "--target-size")
    except UserError as error:
        raise UserError(f"a --target-size of {show_size(target)} cannot be met: {error}") from None
    return chosen, spec


def _in_four_bits(request: Request, spec: CompressionSpec, recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes of the result with even ranks and all weights in 4 bits, by its shapes."""
    multiple = make("allocators", recipe.allocation).rank_multiple
    plan = make_plan(spec, StrategyChoice(name="uniform", options={"rank_multiple": multiple}), None)
    config = copy.deepcopy(spec.config)
    config.dtype = dtype
    sites = LillamaConfig(target_entries(spec.all_blocks, plan))
    model = compressed_meta_model(spec.architecture, config, sites, request.trust_remote_code)
    separated(model)
    return least_bytes(model, weights_of(model, left_alone(model, spec.architecture)))


def compress_to_size(request: Request, target: int, verbosity: Verbosity = "normal") -> RunRecord:
    """Make a model that takes at most ``target`` bytes on disk; the output directory appears only when all is done.

    Where ranks are lowered first, that model stands in ``OUTPUT.low-rank`` until the rounded one is there; ``resume``
    goes on from it. Raises as `compress` and `quantize` do.
    """
    with parsed_once(request.model):
        way, rounding = way_to(request, target), _rounding(request, target)
        directory, low_rank = RunDirectory(request.output), low_rank_of(request.output)
        directory.check(request.overwrite, request.resume, low_rank)
        if not way.reduction:
            quantize(rounding, verbosity)
            return read_record(request.output)
        if _stands(low_rank, request):
            _check_same(low_rank, request, way)
        else:
            compress(lowering(request, way), verbosity)
            if rounding.overwrite and request.output.exists():
                # That it is to be replaced stood in the directory of the first step's run, which is gone.
                with directory.locked():
                    directory.open({}, True)
    try:
        quantize(replace(rounding, model=str(low_rank), tokenizer=None, dtype=None), verbosity)
    except LillamaError as error:
        raise type(error)(f"{error}; the model before it was rounded is in {str(low_rank)!r}") from None
    shutil.rmtree(low_rank)
    return read_record(request.output)


def check_sized(request: Request, target: int) -> Way:
    """`way_to`, and all checks that `compress_to_size` makes before weights are read; raises UserError as these do."""
    way, low_rank = way_to(request, target), low_rank_of(request.output)
    RunDirectory(request.output).check(request.overwrite, request.resume, low_rank)
    if not way.reduction:
        check_rounding(_rounding(request, target))
    elif _stands(low_rank, request):
        _check_same(low_rank, request, way)
    else:
        check(lowering(request, way))
    return way


def lowering(request: Request, way: Way) -> Request:
    """The compression before all is rounded."""
    return replace(request, output=low_rank_of(request.output), recipe=way.recipe)


def _rounding(request: Request, target: int) -> QuantizeRequest:
    return QuantizeRequest(
        model=request.model,
        output=request.output,
        target_size=target,
        architecture=request.architecture,
        tokenizer=request.tokenizer,
        trust_remote_code=request.trust_remote_code,
        # Rounding goes on from nothing: what an interrupted one left is made anew.
        overwrite=request.overwrite or request.resume,
        calibration=_calibration(request.recipe, given=request.data is not None),
        data=request.data,
        device=request.device,
        dtype=request.recipe.dtype,
    )


def _stands(low_rank: Path, request: Request) -> bool:
    """Whether the compression before has been done by the run that ``request`` goes on with."""
    return request.resume and (low_rank / "lillama.json").is_file()


def low_rank_of(output: Path) -> Path:
    """Where the model stands until it is rounded."""
    return output.with_name(f"{output.name}.low-rank")


def _check_same(low_rank: Path, request: Request, way: Way) -> None:
    """Raise UserError unless the model in ``low_rank`` is the one that ``request`` would make before rounding."""
    record = read_record(low_rank)
    source = locate(request.model, request.trust_remote_code)
    if record.recipe != public_recipe(way.recipe.to_dict()) or record.model_fingerprint != model_fingerprint(source):
        raise UserError(
            f"{str(low_rank)!r} is of another request: repeat the one that made it, or remove it and leave out --resume"
        )


def _calibration(recipe: Recipe, given: bool) -> Recipe:
    """Of the data of a compression as much as rounding looks at; ``given`` data need no sources."""
    data = {name: getattr(recipe, name) for name in DATA_FIELDS}
    data |= {
        "tokens": min(recipe.tokens, TOKENS),
        "calibration": list(recipe.calibration) or ([] if given else ["self"]),
    }
    return Recipe().with_options(data, "--target-size")
