"""Heal: train the compressed model as a whole, by the predictions of the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lillama_core.data.split import CalibrationSplit
from lillama_core.healing.options import HealingOptions
from lillama_core.models.loading import load_model
from lillama_core.output.quantizer import narrow_paths
from lillama_core.pipeline.context import CompressedModel, Context, DenseModel
from lillama_core.pipeline.heal import heal
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.modules import exact, replace_module
from lillama_core.strategies import ChosenStrategies
from lillama_core.system.memory import release_memory


class HealStage(Stage):
    """Train all blocks together on the calibration rows, as often as ``healing_epochs`` says; 0: leave them."""

    name = "healing"
    Options = HealingOptions
    options: HealingOptions
    reads = (DenseModel, CalibrationSplit, CompressedModel)
    gives = (CompressedModel,)

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        if chosen.recipe.healing_epochs > 0:
            return {}
        return dict.fromkeys(HealingOptions.model_fields, "nothing is healed without --healing-epochs")

    def found(self, context: Context) -> str | None:
        return "a healing begun" if (context.directory.healing / "healing.json").is_file() else None

    def run(self, context: Context) -> None:
        if context.recipe.healing_epochs <= 0:
            return
        dense, found = context.get(DenseModel), context.get(CompressedModel)
        student = dense.model
        folder = context.directory.healing / "blocks"
        for block in found.blocks:
            # From here on the dense model's own blocks are needed no more.
            file = found.finished.path(block)
            replace_module(student, block.path, exact(found.checkpoint.block(block.path, file), context.device))
        release_memory()
        context.progress.line(f"Loading {context.request.model} once more, as the teacher")
        arithmetic = context.autocast or torch.float32
        teacher = load_model(context.spec.source, context.architecture, arithmetic).to(context.device)
        told, fidelity = heal(
            student,
            teacher,
            context.get(CalibrationSplit),
            self.options,
            context.recipe.healing_epochs,
            context.record.data["tokens"],
            context.recipe.seed,
            context.autocast,
            context.progress,
            context.directory.healing,
            context.world,
            narrow_paths(found.checkpoint.model),
        )
        del teacher
        release_memory()
        context.record.healing.append({**told, "teacher": context.request.model})
        context.record.fidelity = fidelity
        healed = replace(found.finished, folder=folder)
        if context.world.is_main:
            folder.mkdir(exist_ok=True)
            for block in found.blocks:
                healed.keep(block, student.get_submodule(block.path), found.finished.note(block))
        context.world.barrier()
        context.put(replace(found, finished=healed))
