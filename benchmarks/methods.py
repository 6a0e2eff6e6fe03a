"""The methods that the suite compares: each a name and options over a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lillama_benchmarks.baselines import (
    aa_svd,
    asvd,
    bolaco,
    d_rank,
    liteasr,
    modegpt,
    obd_llm,
    skipcat,
    svd_llm,
    svd_llm_update,
    wanda_sp,
)


@dataclass(frozen=True)
class Method:
    """A way to compress, the same for every model."""

    name: str
    recipe: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the recipe by their names in YAML."""


METHODS = (
    Method(
        "svd",
        options={
            **{"init": "svd", "allocation": "uniform", "steps": 0, "format": "factored"},
            # The data serves the report alone.
            **{"tokens": 8192, "self_share": 0.0},
        },
    ),
    Method("fast", "fast"),
    Method("default", "default"),
    Method("lillama", "lillama"),
)
"""In the order of the tables; ``svd`` is what everybody tries first: no data, no training."""

BASELINES = tuple(
    # The data of ``fast``, no training: the methods alone differ.
    Method(name, "fast", {**options, "steps": 0})
    for name, options in {
        "svd-llm": svd_llm.OPTIONS,
        "svd-llm-update": svd_llm_update.OPTIONS,
        "aa-svd": aa_svd.OPTIONS,
        "asvd": asvd.OPTIONS,
        "skipcat": skipcat.OPTIONS,
        "d-rank": d_rank.OPTIONS,
        "obd-llm": obd_llm.OPTIONS,
        "liteasr": liteasr.OPTIONS,
        "modegpt": modegpt.OPTIONS,
        "wanda-sp": wanda_sp.OPTIONS,
        "bolaco": bolaco.OPTIONS,
    }.items()
)
"""Published methods that run when they are named; each module has the formula, its source and what deviates from it."""


def find_methods(names: tuple[str, ...]) -> list[Method]:
    """The methods of these names, all when there are none; a recipe's name is a method's too.

    Raises UserError for an unknown name.
    """
    from lillama_core.errors import UserError, nearest
    from lillama_core.recipe.loading import recipe_names

    known = {m.name: m for m in (*METHODS, *BASELINES)}
    recipes = {name: Method(name, name) for name in recipe_names() if name not in known}
    for name in names:
        if name not in known | recipes:
            there = [*known, *recipes]
            raise UserError(f"no method named {name!r} (there are: {', '.join(there)}){nearest(name, there)}")
    return [(known | recipes)[name] for name in names] if names else list(METHODS)
