"""Which options a recipe's choices read: one that does nothing is a mistake of whoever set it.

Each file and command line is checked against the recipe that resulted there. What a preset sets for training is thus no
mistake of somebody who lays ``steps: 0`` over it, and options of a strategy go with it when another one is chosen.
"""

from __future__ import annotations

from typing import Any

from lillama_core.errors import UserError
from lillama_core.recipe.model import SLOTS, STAGES, Recipe
from lillama_core.strategies import ChosenStrategies, Strategy, StrategyChoice, get, make, names

TRAINING = ("mode", "train", "learning_rate", "schedule", "warmup", "weight_decay", "gradient_clip")
"""Fields that only distillation reads."""

OFF = {
    "compress_embeddings": False,
    "correction_tokens": 0,
    "rescaling_tokens": 0,
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
    "warmup": 0.0,
}
"""Values by which a field says that something is not to be done: not a mistake where it cannot be done."""


def choose(recipe: Recipe) -> ChosenStrategies:
    """The strategies of a recipe; raises UserError for an unknown name or an option that one of them does not have."""
    written = {key: text for layer in recipe.layers for key, text in layer.spelled.items()}

    def made(slot: str) -> Any:
        spelled = {key.partition(".")[2]: text for key, text in written.items() if key.startswith(f"{slot}.")}
        return make(SLOTS[slot], getattr(recipe, slot), spelled)

    return ChosenStrategies(made("init"), made("allocation"), made("loss"), made("format"), recipe)


def make_stage(recipe: Recipe, stage: str) -> Any:
    """The stage registered under this name, with the options that ``recipe`` has for it; raises UserError."""
    own = recipe.stages.get(stage, {})
    written = {key: text for layer in recipe.layers for key, text in layer.spelled.items()}
    spelled = {name: written.get(f"{STAGES}.{stage}.{name}", f"{STAGES}.{stage}.{name}") for name in own}
    return make("stages", StrategyChoice(name=stage, options=own), spelled)


def unread_options(recipe: Recipe, chosen: ChosenStrategies) -> dict[str, str]:
    """Fields, and options as ``init.input_damping``, that nothing reads beside the ``chosen`` strategies, and why."""
    found: dict[str, str] = {}
    init, allocation, loss = recipe.init.name, recipe.allocation.name, recipe.loss.name
    gradients = getattr(chosen.init, "needs_gradients", False)
    for slot in SLOTS:
        strategy = getattr(chosen, slot)
        if isinstance(strategy, Strategy):
            found |= {f"{slot}.{name}": reason for name, reason in strategy.unread_options(chosen).items()}
    for stage, own in recipe.stages.items():
        reasons = make_stage(recipe, stage).unread_options(chosen)
        found |= {f"{STAGES}.{stage}.{name}": reasons[name] for name in own if name in reasons}
    if recipe.steps == 0:
        reason = "with --steps 0 nothing is trained"
        found |= dict.fromkeys(TRAINING, reason)
        if not (recipe.correction_tokens and gradients and getattr(chosen.init, "corrects", False)):
            # The correction minimises the loss's metric as well.
            found |= dict.fromkeys(("loss", *(f"loss.{name}" for name in recipe.loss.options)), reason)
    embedding = recipe.compress_embeddings and getattr(chosen.init, "needs_inputs", False)
    if not (gradients or embedding or (recipe.steps > 0 and getattr(chosen.loss, "needs_sensitivity", False))):
        nor = f", nor does the loss {loss!r}" if recipe.steps > 0 else ""
        found["sensitivity_tokens"] = f"the initialiser {init!r} needs no gradients{nor}"
    if recipe.target_parameters is not None:
        found["reduction"] = "--target-parameters says how much is removed"
    if recipe.target_speedup is None:
        found["speedup_work"] = "it says what --target-speedup is about, which is not given"
    else:
        found |= dict.fromkeys(("reduction", "target_parameters"), "--target-speedup says how much is removed")
        found["compress_embeddings"] = "a smaller embedding makes nothing faster, and --target-speedup is given"
    if recipe.remove_channels:
        if not getattr(chosen.allocation, "removes_channels", False):
            found["remove_channels"] = f"the allocator {allocation!r} shares out ranks alone"
        elif not gradients and getattr(chosen.allocation, "compares_channels", True):
            found["remove_channels"] = f"the initialiser {init!r} predicts no losses that could be compared"
    if not getattr(chosen.init, "corrects", False):
        found["correction_tokens"] = f"the initialiser {init!r} makes no correction{_those_that_correct()}"
    measures = getattr(chosen.allocation, "needs_measurements", False)
    if not (measures or getattr(chosen.allocation, "needs_spectra", False)):
        found["rescaling_tokens"] = f"the allocator {allocation!r} looks at no spectra"
    elif not (measures or gradients):
        found["rescaling_tokens"] = f"the initialiser {init!r} needs no gradients, so that its spectra predict no loss"
    return found


def check_options_are_read(recipe: Recipe) -> None:
    """Raise UserError for the first option that a file or command line sets and that its choices do not read.

    The recipe's strategies are made, which says what is wrong with their options.
    """
    choose(recipe)
    for stage in recipe.stages:
        make_stage(recipe, stage)
    for layer in recipe.layers:
        there = Recipe.model_construct(**layer.values)
        try:
            chosen = choose(there)
        except UserError:
            # Chosen below and replaced above: it need not even be installed.
            continue
        unread = unread_options(there, chosen)
        for key, written in layer.spelled.items():
            if key in unread and not (key in OFF and layer.values[key] == OFF[key]):
                raise UserError(f"{written} does nothing: {unread[key]}")


def _those_that_correct() -> str:
    """``; 'fisher' and 'whitened' do``."""
    able = []
    for name in names("initializers"):
        try:
            if getattr(get("initializers", name), "corrects", False):
                able.append(repr(name))
        except UserError:
            continue
    return f"; {' and '.join(able)} {'does' if len(able) == 1 else 'do'}" if able else ""
