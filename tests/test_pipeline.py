"""The pipeline: stages that say what they read and give, and a plugin's stage among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lillama_core.allocation.plan import RankPlan
from lillama_core.data.split import CalibrationSplit
from lillama_core.errors import LillamaError
from lillama_core.pipeline import CompressionPipeline, Context, Stage
from lillama_core.pipeline.context import CalibrationRows, CompressedModel, CompressedStacks, DenseModel, Statistics


class Silent(Stage):
    """A stage that does nothing."""

    name = "silent"

    def run(self, context: Context) -> None:
        pass


def stage(reads: tuple[type, ...] = (), gives: tuple[type, ...] = (), do: Callable[[Context], Any] = id) -> Stage:
    class Made(Silent):
        def run(self, context: Context) -> None:
            do(context)

    Made.reads, Made.gives = reads, gives
    return Made()


def bare_context() -> Context:
    """A context without services, for stages that use none."""
    context = object.__new__(Context)
    context._results, context._running = {}, None
    return context


def test_the_stages_of_lillama_in_their_order() -> None:
    stages = CompressionPipeline.registered().stages
    assert [type(s).__name__ for s in stages] == [
        f"{name}Stage" for name in ("Load", "Calibrate", "Statistics", "Allocate", "Blocks", "Report", "Heal", "Write")
    ]
    given = {result for s in stages for result in s.gives}
    assert given == {
        DenseModel,
        CalibrationRows,
        CalibrationSplit,
        Statistics,
        RankPlan,
        CompressedStacks,
        CompressedModel,
    }


def test_what_is_read_must_be_given_before() -> None:
    giver, reader = stage(gives=(RankPlan,)), stage(reads=(RankPlan,))
    CompressionPipeline([giver, reader])
    with pytest.raises(LillamaError, match="'silent' reads RankPlan, which no earlier stage gives"):
        CompressionPipeline([reader, giver])


def test_a_stage_takes_and_puts_what_it_declares_and_nothing_else() -> None:
    plan = RankPlan("pivoted", {})
    context = bare_context()
    giver = stage(gives=(RankPlan,), do=lambda c: c.put(plan))
    context.enter(giver)
    giver.run(context)
    with pytest.raises(LillamaError, match="puts CalibrationSplit, which it does not declare in 'gives'"):
        context.put(CalibrationSplit((), (), (), (), ()))
    context.enter(stage(reads=(RankPlan,)))
    assert context.get(RankPlan) is plan
    context.enter(stage())
    with pytest.raises(LillamaError, match="takes RankPlan, which it does not declare in 'reads'"):
        context.get(RankPlan)


class Late(Silent):
    after: ClassVar[str | None] = "allocate"


class Lost(Silent):
    after: ClassVar[str | None] = "alocate"


def test_a_stage_of_a_plugin_runs_behind_the_one_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from lillama_core import hookimpl
    from lillama_core.errors import UserError
    from lillama_registry import Registry

    def registry_with(**stages: type[Stage]) -> Registry:
        class Plugin:
            @staticmethod
            @hookimpl
            def lillama_stages() -> dict[str, type[Stage]]:
                return stages

        found = Registry()
        found.load_entry_points()
        found.add(Plugin, "mine")
        return found

    with_late, with_lost = registry_with(late=Late), registry_with(lost=Lost)
    monkeypatch.setattr("lillama_registry.registry", lambda: with_late)
    names = [type(s).__name__ for s in CompressionPipeline.registered().stages]
    assert names[names.index("AllocateStage") + 1] == "Late"
    assert len(names) == 9
    monkeypatch.setattr("lillama_registry.registry", lambda: with_lost)
    with pytest.raises(UserError, match="stage 'lost' of a plugin is to run after 'alocate'; stages are load, "):
        CompressionPipeline.registered()


def test_a_resumed_run_says_what_is_there(
    tmp_path: Path, tiny_model: Path, calibration_text: Path, run_cli: Callable[..., Any]
) -> None:
    from conftest import QUICK

    words = ("compress", tiny_model, "-o", tmp_path / "out", "--calibration", calibration_text, *QUICK)
    # Killed once the first block was written: the result cannot be, since a file stands in its place.
    from lillama_core.distillation.stack import StackCompressor

    compress_block = StackCompressor._compress_block

    def once(self: StackCompressor, block: Any, *rest: Any) -> None:
        if block.index == 1:
            raise LillamaError("stopped on purpose")
        compress_block(self, block, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StackCompressor, "_compress_block", once)
        assert "stopped on purpose" in run_cli(*words).stderr
    done = run_cli(*words, "--resume")
    assert done.status == 0, done
    assert "Resuming: there are statistics of " in done.stderr
    assert "measured losses, 1 finished blocks" in done.stderr
