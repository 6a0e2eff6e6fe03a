"""Answers what readers of the paper ask, each question by one command and one table, on SmolLM2-135M.

    python benchmarks/questions.py --model .venv/smollm2.gguf --work DIR [--only strategy domain] [--seeds 0 1]
    python benchmarks/questions.py --table strategy

Every answer is a compression by the command line with the options of its question, everything else alike, 20 % of all
parameters. It is measured as `figures.py` measures, and on program code, of which one half is calibrated on where
that is asked and the other half measured. A model that is in DIR already is measured as it is. Numbers go to
benchmarks/results/questions.json, of which `--table` prints what docs/questions.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_benchmarks.figures import CPU, DATA, HERE, load, text_perplexities
from lillama_benchmarks.figures import quality as compress_and_measure
from lillama_benchmarks.methods import Method
from lillama_core.data.sources import Source
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.evaluation.metrics.perplexity import perplexity

RESULTS = HERE / "results" / "questions.json"
REDUCTION = 0.2
CODE_WINDOWS = 24
TEXTS = {"wikitext2-test": "WikiText-2", "tales-grimm": "tales", "code": "code"}

RANKS_ALONE = {"compress_embeddings": False, "remove_channels": False}
"""What rules that share out ranks alone can do."""
CODE, MIXED, OWN = "code", "mixed", "self"
"""In place of a source: the first half of the program code; as much of it as of WikiText-2, in turns; no text."""
TURN = 4000
"""Characters of one text at a time, in whole lines: two rows."""


@dataclass(frozen=True)
class Question:
    """Some ways to do one thing, and what they have in common."""

    name: str
    asks: str
    answers: Mapping[str, Mapping[str, Any]]
    """Options by the name that the table has for them."""
    common: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "fast"


QUESTIONS = (
    Question(
        "strategy",
        "Which maps shall lose how much? Ranks alone, the embedding dense, no training.",
        {name: {"allocation": name} for name in ("spectrum", "effective-rank", "uniform", "top-first", "bottom-first")},
        RANKS_ALONE,
    ),
    Question(
        "initialisation",
        "What do factors begin with? The same part of every map, without training and with 45 steps a block.",
        {
            f"{name}, {steps} steps": {"init": name, "steps": steps}
            for name in ("fisher", "whitened", "svd", "random")
            for steps in (0, 45)
        },
        {**RANKS_ALONE, "allocation": "uniform"},
    ),
    Question(
        "domain",
        "What shall the calibration text be about? 16384 tokens each.",
        {
            "encyclopaedia": {"self_share": 0.0},
            "code": {"self_share": 0.0, "calibration": CODE},
            "the model's own text": {"self_share": 1.0, "calibration": OWN},
            "encyclopaedia and own": {"self_share": 0.5},
            "code and own": {"self_share": 0.5, "calibration": CODE},
            "encyclopaedia and code": {"self_share": 0.0, "calibration": MIXED},
            "encyclopaedia, code and own": {"self_share": 0.5, "calibration": MIXED},
        },
    ),
    Question(
        "tokens",
        "How much text? Half of an encyclopaedia, half of the model's own.",
        {f"{tokens}": {"tokens": tokens} for tokens in (2048, 4096, 8192, 16384, 32768, 65536)},
    ),
    Question(
        "loss",
        "By which loss, and fed by which states, are blocks trained? 16384 tokens.",
        {
            f"{loss}, {mode}": {"loss": loss, "mode": mode}
            for loss in ("sensitivity", "mse", "l1+logcos")
            for mode in ("student", "teacher", "teacher+student")
        },
        {"steps": 45},
    ),
)


def halves_of_code(folder: Path) -> tuple[Path, Path]:
    """The first half of the program code, to calibrate on, and the second, to measure on."""
    lines = (DATA / "code-lillama.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    found = folder / "code-first-half.txt", folder / "code-second-half.txt"
    for path, part in zip(found, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return found


def in_turns(folder: Path, texts: Sequence[Path]) -> Path:
    """A file with `TURN` characters of each text in turns, until the first of them ends."""
    left = [text.read_text(encoding="utf-8").splitlines(keepends=True)[::-1] for text in texts]
    found: list[str] = []
    while all(left):
        for lines in left:
            size = 0
            while lines and size < TURN:
                found.append(lines.pop())
                size += len(found[-1])
    path = folder / "mixed.txt"
    path.write_text("".join(found), encoding="utf-8")
    return path


def code_perplexity(spec: str, text: Path) -> float:
    model, tokenizer, _ = load(spec)
    rows = load_text_windows(Source.parse(str(text)), tokenizer, 512, CODE_WINDOWS)
    return round(perplexity(model, rows, CPU)[0], 2)


def answer(model: str, question: Question, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Compress as one answer says, and measure the result."""
    calibrate, measure = halves_of_code(folder)
    options = {**question.common, **question.answers[name], "seed": seed}
    source = options.pop("calibration", None)
    stem = f"{question.name}-{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    prose = DATA / "wikitext2-valid.txt"
    sources = {None: prose, CODE: calibrate, MIXED: in_turns(folder, (prose, calibrate)), OWN: Path(OWN)}
    text = sources[source]
    found = compress_and_measure(model, Method(stem, question.recipe, options), REDUCTION, folder, text)
    found["perplexity"]["code"] = code_perplexity(str(folder / f"{stem}-{REDUCTION:g}"), measure)
    return found


def table(question: Question, results: Mapping[str, Any]) -> str:
    """The rows of a question that were measured, in Markdown; several seeds as mean ± half of the distance between."""
    lines = [f"| {question.name} | {' | '.join(TEXTS.values())} |", "|---|" + "---:|" * len(TEXTS)]
    for name in ("", *question.answers):
        own = f"{question.name}/{name}/" if name else "dense"
        runs = [result for key, result in results.items() if key.startswith(own)]
        if runs:
            cells = [shown([run["perplexity"][text] for run in runs]) for text in TEXTS]
            lines.append(f"| {name or 'dense'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(numbers: list[float]) -> str:
    mean, apart = statistics.mean(numbers), (max(numbers) - min(numbers)) / 2
    digits = 1 if mean < 1000 else 0
    return f"{mean:,.{digits}f}" + (f" ± {apart:,.{digits}f}" if len(numbers) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {question.name: question for question in QUESTIONS}
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="QUESTION")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-questions")
    parser.add_argument("--table", choices=known, metavar="QUESTION", help="print what was measured, and do nothing")
    options = parser.parse_args()
    if options.table:
        print(table(known[options.table], json.loads(RESULTS.read_text())))
        return
    if not options.model:
        parser.error("--model is needed: what is compressed")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)

    def keep(key: str, value: Any) -> None:
        # Read again: another process may be at other questions.
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps({**results, key: value}, indent=1) + "\n")
        print(key, json.dumps(value["perplexity"]), flush=True)

    if not RESULTS.is_file() or "dense" not in json.loads(RESULTS.read_text()):
        code = code_perplexity(options.model, halves_of_code(options.work)[1])
        keep("dense", {"perplexity": {**text_perplexities(options.model), "code": code}})
    for seed in options.seeds:
        for question in (known[name] for name in options.only):
            for name in question.answers:
                keep(f"{question.name}/{name}/{seed}", answer(options.model, question, name, seed, options.work))


if __name__ == "__main__":
    main()
