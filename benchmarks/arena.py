"""What the suites ``arena`` and ``arena-local`` measure, after LowRankArena's lane for base models.

LowRankArena (github.com/Zishan-Shao/lowrankarena) runs published low-rank checkpoints again under one protocol:
``benchmark/base.yaml`` there names ``ppl.yaml``, ``mcq.yaml`` and ``base/base_math.yaml``, which are followed here as
far as `HUB_PROTOCOL` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABEL = "label"
"""Beside the options of a run of ``lillama evaluate``: what its metrics are called by, as in ``perplexity/LABEL``."""
LENGTH = 2048
"""Tokens in a window of its perplexities."""
TASKS = ("boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa", "mathqa")
SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
"""Of MMLU, with `SHOTS` examples."""
SHOTS = 5
LOCAL_TASKS = ("lillama_continuation", "lillama_cloze")
"""What ``lillama evaluate`` asks when no tasks are named."""


def perplexity(label: str, data: Path | str, windows: int) -> Mapping[str, Any]:
    """Perplexity alone, of so many windows of ``data``; 0: of all there are."""
    return {"metrics": "perplexity", "data": data, "sequence_length": LENGTH, "windows": windows, LABEL: label}


HUB: tuple[Mapping[str, Any], ...] = (
    perplexity("wikitext2", "wikitext2", 0),
    # 262,144 tokens.
    perplexity("c4", "allenai/c4:en:validation", 128),
    {"metrics": "accuracy", "tasks": ",".join(TASKS)},
    {"metrics": "accuracy", "tasks": ",".join(f"mmlu_{s}" for s in SUBJECTS), "shots": SHOTS, LABEL: f"{SHOTS}-shot"},
)
HUB_PROTOCOL = (
    "LowRankArena's lane for base models: perplexity of windows of 2048 tokens without overlap, of all of WikiText-2's"
    " test split and of 262,144 tokens of C4's validation split; accuracy by lm-eval without examples (BoolQ, ARC,"
    " WinoGrande, PIQA, HellaSwag, OpenBookQA, MathQA; by acc_norm where that is usual) and with five (five"
    " mathematical subjects of MMLU). Retention is compressed over dense, of perplexities dense over compressed. What"
    " differs: a token with which the tokenizer begins texts begins each window, revisions of the data are not pinned"
    " (its hashes are told), the subjects of MMLU count one by one, and MathQA is lm-eval's own task."
)
LOCAL_PROTOCOL = (
    "LowRankArena's lane for base models in small, on what comes with the repository: perplexity of windows of 2048"
    " tokens without overlap, of WikiText-2's test split (16 windows), of tales (all there are) and of program code"
    " (16), on which nothing is calibrated; accuracy on the two offline tasks. Retention is compressed over dense, of"
    " perplexities dense over compressed."
)


def local(wikitext: Path, tales: Path, code: Path) -> tuple[Mapping[str, Any], ...]:
    """The same in small, on texts at hand: as much as a CPU reads in minutes."""
    texts = (perplexity("wikitext2", wikitext, 16), perplexity("tales", tales, 0), perplexity("code", code, 16))
    return (*texts, {"metrics": "accuracy"})


def retained(evaluations: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[str, ...]:
    """The metrics of which retentions are taken: all perplexities of ``evaluations``, and accuracies on ``tasks``."""
    texts = (f"perplexity/{e[LABEL]}" for e in evaluations if e["metrics"] == "perplexity")
    return (*texts, *(f"accuracy/{task}" for task in tasks))


HUB_RETAINED = retained(HUB, (*TASKS, *(f"mmlu_{subject}/{SHOTS}-shot" for subject in SUBJECTS)))
