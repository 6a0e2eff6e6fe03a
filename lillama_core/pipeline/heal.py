"""Healing as the command and the stage of a recipe do it: trained on some rows, compared on others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.data.split import CalibrationSplit
from lillama_core.evaluation.fidelity import compare_models
from lillama_core.healing.options import HealingOptions
from lillama_core.healing.training import Healing
from lillama_core.system.processes import World
from lillama_core.system.progress import Progress


def heal(
    student: nn.Module,
    teacher: nn.Module | None,
    split: CalibrationSplit,
    options: HealingOptions,
    epochs: float,
    tokens: int,
    seed: int,
    autocast: torch.dtype | None,
    progress: Progress,
    folder: Path,
    world: World,
    narrow: Collection[str],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train ``student`` in place; return how it went, and how it predicts beside ``teacher`` on rows that report.

    ``split`` has the rows of this process; ``tokens`` are those of all rows of all processes; ``narrow`` as in
    `Healing`.
    """
    fit, choose, report = ([split.batches[i] for i in part] for part in (split.fit, split.choose, split.report))
    progress.line("Comparing the models on rows that are not trained on")
    before = None if teacher is None else compare_models(teacher, student, report, autocast, world)
    of_fit = round(tokens * split.fitted_rows / max(1, sum(split.sizes)))
    found = Healing(
        student, teacher, fit, choose, options, epochs, seed, of_fit, autocast, progress, folder, world, narrow
    ).run()
    after = None if teacher is None else compare_models(teacher, student, report, autocast, world)
    told = {
        **options.model_dump(),
        "epochs": epochs,
        "curve": [{"step": p.step, "tokens": p.tokens, "loss": p.loss} for p in found.curve],
        "kept_step": found.kept_step,
        "ended": found.ended,
        "fidelity_before": before,
    }
    return told, after
