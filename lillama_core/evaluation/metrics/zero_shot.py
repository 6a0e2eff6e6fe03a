"""Accuracy on multiple-choice tasks, by default without examples in the prompt, by way of lm-eval."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lillama_core.errors import UserError, nearest
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.metrics.batching import sequences_per_batch
from lillama_core.system.processes import ALONE
from lillama_core.system.quiet import quiet

TASKS_FOLDER = Path(__file__).parent / "tasks"
OFFLINE_TASKS = ("lillama_continuation", "lillama_cloze")
"""The tasks that ship with the package and need no network."""
ALIASES = {
    "paper": (
        "arc_easy",
        "arc_challenge",
        "piqa",
        "social_iqa",
        "logiqa",
        "truthfulqa_mc2",
        "winogrande",
        "boolq",
        "openbookqa",
    ),
    # lm-eval has five prompts for every language; the first stands for the set.
    "afrimmlu": ("afrimmlu_tasks_prompt_1",),
}
"""Short names for sets of lm-eval's tasks; ``paper`` is the set of the low-rank distillation paper."""
NORMALISED = frozenset({"arc_easy", "arc_challenge", "hellaswag", "logiqa", "mathqa", "openbookqa", "piqa"})
"""Tasks whose usual figure divides the likelihood of an answer by its length (acc_norm)."""
OFFLINE_LENGTH = 64
"""Tokens of the longest offline question, which decides how many go into a batch."""
NAMED_LENGTH = 512
"""The same for tasks of unknown length, with a margin for their longest questions."""


@dataclass(frozen=True)
class _Score:
    """Accuracy of one lm-eval task."""

    accuracy: float
    items: int
    metric: str


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` with aliases replaced and repetitions dropped; the offline tasks when there are none."""
    if not names:
        return OFFLINE_TASKS
    return tuple(dict.fromkeys(task for name in names for task in ALIASES.get(name, (name,))))


def _installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


@functools.cache
def _index(defaults: bool) -> Any:
    """lm-eval's index of the tasks that come with lillama, and of its own if ``defaults``."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=defaults)


def _task_manager(names: tuple[str, ...]) -> Any:
    """lm-eval's index, checked to know all of ``names``; raises UserError for one that it does not know."""
    manager = _index(False)
    if set(names).issubset(manager.all_tasks):
        return manager
    # Indexing the thousands of tasks that come with lm-eval takes seconds; the offline ones need none of it.
    manager = _index(True)
    known = [*manager.all_tasks, *ALIASES]
    for name in names:
        if name not in known:
            raise UserError(f"task {name!r} is unknown to lm-eval{nearest(name, known)}; `lm-eval ls tasks` lists them")
    return manager


def _load(manager: Any, name: str, shots: int, seed: int) -> dict[str, Any]:
    """The lm-eval tasks behind ``name`` (several for a group), ready with so many examples before each question.

    Where a task draws its examples, ``seed`` says which.

    Raises UserError when the data of one cannot be had.
    """
    try:
        tasks: dict[str, Any] = manager.load(name)["tasks"]
    # Loading runs the task's and the datasets library's code, which fails in many ways: no network, a data
    # set that moved or is gated, a missing package. All mean the same to the user.
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task {name!r}: its data could not be loaded ({cause}); check the network connection, "
            "or leave out --tasks to use the sets that come with lillama"
        ) from error
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed)
    return tasks


def _sha256(tasks: dict[str, Any]) -> str:
    """Of all questions of ``tasks``, whatever part of them is asked."""
    digest = hashlib.sha256()
    for name in sorted(tasks):
        for question in tasks[name].eval_docs:
            digest.update(json.dumps([name, question], sort_keys=True, default=str).encode())
    return digest.hexdigest()


class _Lines(io.StringIO):
    """Where progress bars write; every state of a bar becomes one line of the report."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def write(self, text: str) -> int:
        if text.strip():
            self._report(f"accuracy: {text.strip()}")
        return len(text)


@contextlib.contextmanager
def _quiet(report: Report) -> Iterator[None]:
    """Within, lm-eval and the Hub's libraries log errors only, and lm-eval's progress bars become lines of
    the report, one every ten seconds.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    modules = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    bars = [module.tqdm for module in modules]
    bar = functools.partial(
        bars[0],
        file=_Lines(report),
        mininterval=10,
        miniters=1,
        delay=10,
        leave=False,
        bar_format="{n_fmt} of {total_fmt} answers after {elapsed}",
    )
    for module in modules:
        module.tqdm = bar
    try:
        with quiet("lm_eval", "huggingface_hub", "datasets"):
            yield
    finally:
        for module, former in zip(modules, bars, strict=True):
            module.tqdm = former


def _score(results: dict[str, Any], task: str) -> _Score:
    """The accuracy of ``task`` in lm-eval's results; raises UserError when it has none."""
    values = {key.split(",")[0]: value for key, value in results["results"][task].items()}
    metric = "acc_norm" if task in NORMALISED and "acc_norm" in values else "acc"
    if metric not in values:
        raise UserError(f"task {task!r} is not a multiple-choice task with an accuracy; name tasks that report acc")
    return _Score(float(values[metric]), int(results["n-samples"][task]["effective"]), metric)


def _pool(scores: list[_Score]) -> _Score:
    """Accuracy over all items of several tasks taken together."""
    items = sum(score.items for score in scores)
    return _Score(sum(score.accuracy * score.items for score in scores) / items, items, scores[0].metric)


def _standard_error(score: _Score) -> float:
    """Binomial standard error; for a task with scores between 0 and 1 (truthfulqa_mc2) an upper bound."""
    return math.sqrt(score.accuracy * (1 - score.accuracy) / score.items)


class ZeroShotAccuracy:
    """Accuracy on multiple-choice tasks: the answer to which the model gives the highest likelihood.

    The tasks are those of ``options.tasks``, else those given here, else the offline sets.
    """

    name = "accuracy"
    by_block = shared = True

    def __init__(self, tasks: tuple[str, ...] = ()) -> None:
        self._tasks = tasks

    def check(self, options: EvaluationOptions) -> None:
        """Raise UserError for tasks that lm-eval does not know, and when tasks are named while it is not installed."""
        if not options.tasks:
            return
        if not _installed():
            raise UserError("--tasks needs lm-eval, which is not installed: pip install 'lillama[eval]'")
        with _quiet(lambda line: None):
            _task_manager(expand(options.tasks))

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """One measurement a task or group of tasks, in percent, and their mean when there are several.

        Raises UserError for a task that lm-eval does not know, whose data cannot be had, or that has no
        accuracy, and when tasks are named while lm-eval is not installed. Without lm-eval and named tasks
        the metric is skipped: the list is empty.
        """
        self.check(options)
        if not _installed():
            report("accuracy: skipped, lm-eval is not installed (pip install 'lillama[eval]')")
            return []
        names = expand(options.tasks or self._tasks)
        with _quiet(report):
            manager = _task_manager(names)
            members = {name: _load(manager, name, options.shots, options.seed) for name in names}
            scores = self._run(subject, members, options, report)
        measurements = [self._measurement(name, scores[name], options.shots, _sha256(members[name])) for name in names]
        if len(names) > 1:
            measurements.append(self._mean(measurements))
        return measurements

    def _run(
        self, subject: Subject, members: dict[str, dict[str, Any]], options: EvaluationOptions, report: Report
    ) -> dict[str, _Score]:
        """The pooled score of every name in ``members`` (name to its lm-eval tasks)."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        offline = set(members).issubset(OFFLINE_TASKS)
        length = OFFLINE_LENGTH if offline else NAMED_LENGTH

        class Placed(HFLM):
            """Takes the device of a model from what is known of it: the first weight may be on none, read when run."""

            device = subject.device

        model = Placed(
            pretrained=subject.model,
            # A copy, because HFLM gives a tokenizer without padding token one.
            tokenizer=copy.deepcopy(subject.tokenizer),
            backend="seq2seq" if subject.model.config.is_encoder_decoder else "causal",
            batch_size=sequences_per_batch(subject.model, length, subject.device, subject.streamed),
            softmax_dtype="float32",
        )
        tasks = {task: loaded for group in members.values() for task, loaded in group.items()}
        report(f"accuracy: {', '.join(members)}")
        counts = {name: min(options.limit or len(t.eval_docs), len(t.eval_docs)) for name, t in tasks.items()}
        world = subject.world
        if min(counts.values()) < world.size:
            # lm-eval takes an empty list of questions for all of them: every process answers all.
            world = ALONE
        # evaluate and not simple_evaluate: the latter also reseeds all generators, calls git and lists the
        # machine's software.
        results = evaluate(
            lm=model,
            task_dict={"tasks": tasks},
            samples={name: list(world.numbers(count)) for name, count in counts.items()},
            bootstrap_iters=0,
            log_samples=False,
        )
        own = {name: [asdict(_score(results, task)) for task in group] for name, group in members.items()}
        every = world.gather(own)
        return {name: _pool([_Score(**score) for found in every for score in found[name]]) for name in members}

    def _measurement(self, task: str, score: _Score, shots: int, data: str) -> Measurement:
        rule = "likelihood per character" if score.metric == "acc_norm" else "likelihood"
        return Measurement(
            name=f"{self.name}/{task}",
            value=100 * score.accuracy,
            unit="%",
            better="higher",
            meaning=f"Share of {score.items} questions whose right answer has the highest {rule}"
            + (f", with {shots} examples before each." if shots else "."),
            standard_error=100 * _standard_error(score),
            data=data,
        )

    def _mean(self, measurements: list[Measurement]) -> Measurement:
        count = len(measurements)
        total_error = math.hypot(*(measurement.standard_error or 0 for measurement in measurements))
        return Measurement(
            name=f"{self.name}/mean",
            value=sum(measurement.value for measurement in measurements) / count,
            unit="%",
            better="higher",
            meaning=f"Mean accuracy of the {count} tasks above, each with the same weight.",
            standard_error=total_error / count,
        )
