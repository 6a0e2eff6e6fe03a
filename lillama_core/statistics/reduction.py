"""Moments that several processes have summed up, each over its own rows, added together in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lillama_core.statistics.moments import SecondMoment
from lillama_core.system.processes import World


def reduce_moments(
    world: World,
    moments: Mapping[str, SecondMoment],
    names: Sequence[str],
    owner: int | None,
    device: torch.device,
) -> dict[str, SecondMoment]:
    """The moments of the rows of all processes, in the process ``owner``, or in all if it is None.

    ``names`` are all that there may be, in one order in all processes; a process may have seen no row of some of them,
    and what none has seen is not returned. What other processes than the owner get means nothing. The sums are made in
    place, on ``device``.
    """
    if world.size == 1:
        return dict(moments)
    own = [moments.get(name, SecondMoment()) for name in names]
    sizes = world.greatest([0 if m.total is None else len(m.total) for m in own])
    counts = world.sums([m.count for m in own])
    found: dict[str, SecondMoment] = {}
    sums: list[torch.Tensor] = []
    for name, moment, size, count in zip(names, own, map(int, sizes), counts, strict=True):
        if not size:
            continue
        total = torch.zeros(size, size, device=device) if moment.total is None else moment.total.to(device)
        sums.append(torch.zeros(size, device=device) if moment.sum is None else moment.sum.to(device))
        # One at a time: those of the experts of a block are too many to be packed.
        world.sum_([total], owner)
        found[name] = SecondMoment()
        found[name].restore({"total": total, "sum": sums[-1], "count": torch.tensor(count, dtype=torch.float64)})
    world.sum_(sums, owner)
    return found
