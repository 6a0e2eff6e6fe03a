"""``lillama plan``: what a recipe would do, from the config and the shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lillama_core.allocation.plan import describe_plan, parameters_of, rank_range
from lillama_core.architecture.base import Architecture
from lillama_core.errors import UserError
from lillama_core.estimates.estimate import show_estimate
from lillama_core.estimates.machine import named_machine
from lillama_core.estimates.measure import this_machine
from lillama_core.models.gguf_header import parsed_once
from lillama_core.models.loading import check_dtype
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.residency import Estimates, Residency, check_streamed, choose_residency, lacks
from lillama_core.pipeline.spec import CompressionSpec, make_plan, prepare
from lillama_core.recipe.model import Recipe
from lillama_core.strategies import make
from lillama_core.system.devices import choose_autocast, choose_device


def dry_run(
    model: str,
    recipe: Recipe,
    architecture: str | Architecture | None = None,
    trust_remote_code: bool = False,
    *,
    machine: str | None = None,
    stream: bool | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    output: Path | None = None,
    evaluate: bool = False,
    with_estimate: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ranks by map, totals, and a note when the real ranks will follow measurements; JSON-serialisable.

    ``with_estimate``: memory, disk and time on ``machine``, or on this one, whose rates are measured at first use, and
    why a run would be refused that holds the model so, on ``device``, and for ``output``, if given, on its disk.

    Of a local model the directory may hold its config alone. An allocator that needs spectra cannot be run without
    weights: ``uniform`` ranks at the same budget stand in, and the totals are the same.
    """
    with parsed_once(model):
        prepared = prepare(model, recipe, architecture, trust_remote_code, with_weights=False)
    asked = Request(model, output or Path("."), recipe, None, None, None, device, stream, max_memory, evaluate=evaluate)
    measured = make("allocators", recipe.allocation).needs_spectra
    plan = make_plan(prepared, "uniform" if measured else recipe.allocation, None)
    dtype = check_dtype(recipe.dtype, _config_dtype(prepared.config), prepared.source.gguf_file is not None)
    totals = describe_plan(prepared.maps, plan, prepared.format, prepared.total_parameters, dtype.itemsize)
    note = (
        f"allocation {recipe.allocation.name!r} chooses ranks from measured spectra; shown are uniform ranks at the"
        " same budget, and the totals hold for both"
        if measured
        else None
    )
    if recipe.target_speedup is not None:
        note = (
            f"ranks for {recipe.target_speedup:g} times the speed follow times that are measured; shown is what it"
            " would take if time were parameters of the maps"
        )
    maps = [
        {
            "name": m.name,
            "out": m.map.out_features,
            "in": m.map.in_features,
            "rank": plan.ranks.get(m.name),
            "parameters": parameters_of(m, plan, prepared.format),
        }
        for m in prepared.maps
    ]
    return {
        "model": model,
        "architecture": prepared.architecture.name,
        "remarks": list(prepared.architecture.remarks),
        "allocation": recipe.allocation.to_plain(),
        "format": recipe.format.to_plain(),
        "dtype": str(dtype).removeprefix("torch."),
        "note": note,
        **totals,
        "estimate": _estimate(prepared, asked, machine, output is not None, say) if with_estimate else None,
        "maps": maps,
    }


def _estimate(
    prepared: CompressionSpec, request: Request, machine: str | None, look_at_disk: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a run would take, how the model would be held and why; ``refused`` says why it would not run."""
    recipe, stream, limit = request.recipe, request.stream, request.max_memory
    device = choose_device(request.device)
    found = this_machine(device, say) if machine is None else named_machine(machine)
    half = choose_autocast(recipe.compute, device) is not None
    if machine is not None:
        half = recipe.compute == "bfloat16" or (recipe.compute == "auto" and found.bfloat16 is not None)
    estimates = Estimates.make(prepared, recipe, found, half)
    refused = None
    try:
        chosen = choose_residency(request, estimates, look_at_disk)
        check_streamed(chosen, request, prepared.architecture)
    except UserError as error:
        refused = str(error)
        streamed = stream if stream is not None else lacks(estimates.of(False), found, limit) is not None
        chosen = Residency(streamed, "", estimates.of(streamed))
    assert chosen.estimate is not None
    return {"machine": found.name, "reason": chosen.reason, "refused": refused, **chosen.estimate.to_dict()}


def _config_dtype(config: Any) -> Any:
    import torch

    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def show_plan(found: dict[str, Any]) -> str:
    """The plan as text: totals, then one line for each kind of map with its ranks by block."""
    lines = [
        f"{found['model']}  (architecture {found['architecture']}, {found['allocation']}, {found['format']},"
        f" {found['dtype']})",
        f"parameters              {found['parameters_before']:>16,} -> {found['parameters_after']:,}"
        f"  ({-found['reduction']:+.2%})",
        f"multiply-adds per token {found['multiply_adds_per_token_before']:>16,} ->"
        f" {found['multiply_adds_per_token_after']:,}  (linear maps)",
        f"bytes                   {found['bytes_before']:>16,} -> {found['bytes_after']:,}",
    ]
    if found["estimate"] is not None:
        lines += show_estimate(found["estimate"])
    lines += found["remarks"]
    if found["note"]:
        lines.append(f"note: {found['note']}")
    groups: dict[tuple[str, int, int], dict[str, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    for m in found["maps"]:
        # The first numeric component of the path is the block's number, later ones are those of its experts.
        parts = m["name"].split(".")
        kind = ".".join(part for part in parts if not part.isdigit())
        block = next((part for part in parts if part.isdigit()), "")
        groups[kind, m["out"], m["in"]][block].append(m["rank"])
    width = max(len(kind) for kind, _, _ in groups)
    lines.append("")
    lines.append(f"{'map':<{width}}  {'shape':>13}  ranks by block")
    for (kind, rows, columns), blocks in groups.items():
        ranks = [rank_range(of_block) for of_block in blocks.values()]
        shown = f"{ranks[0]} in all {len(ranks)}" if len(set(ranks)) == 1 else " ".join(ranks)
        lines.append(f"{kind:<{width}}  {f'{rows} x {columns}':>13}  {shown}")
    return "\n".join(lines)
