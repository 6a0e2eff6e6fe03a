"""Which recordings a speech model is calibrated on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lillama_core.data.speech.utterances import DATASETS, Utterance, read_speech
from lillama_core.errors import UserError
from lillama_core.recipe.model import Recipe


def choose_utterances(recipe: Recipe, report: Callable[[str], None] = lambda line: None) -> list[Utterance]:
    """The recordings to calibrate on: ``recipe.samples`` of them, drawn by the recipe's seed, or all there are.

    Of a dataset, which has to be fetched, the first ``recipe.samples`` but those that are too long; ``report`` hears
    how many these were.
    """
    found: list[Utterance] = []
    for source in recipe.calibration:
        limit = recipe.samples if source.partition(":")[0] in DATASETS else None
        read = read_speech(source, limit, "calibration")
        # Twice the same recording could be trained on and held out.
        earlier = {u.path.resolve() for u in found if u.path is not None}
        twice = next((u.path for u in read if u.path is not None and u.path.resolve() in earlier), None)
        if twice is not None:
            raise UserError(f"{source}: {twice.name} is among the recordings named before; name each once")
        fitting = [u for u in read if not u.too_long]
        if len(fitting) < len(read):
            report(f"{source}: {len(read) - len(fitting)} of {len(read)} recordings are too long; left out")
        found += fitting
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return [found[i] for i in order[: recipe.samples]]


def check_count(found: list[Utterance], recipe: Recipe) -> None:
    """Raise UserError when there are too few recordings for two batches, or one of them cannot be read."""
    if recipe.samples < 2 * recipe.batch_size:
        raise UserError(
            f"--samples {recipe.samples} is less than two batches of {recipe.batch_size}: ask for more, or lower"
            " --batch-size"
        )
    if len(found) < 2 * recipe.batch_size:
        raise UserError(
            f"{', '.join(recipe.calibration)}: {len(found)} recordings; at least two batches of {recipe.batch_size}"
            " are needed: give more, or lower --batch-size"
        )
    for utterance in found:
        utterance.sound()
