"""Word and character error rates, how far they can be trusted, and the tables of transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lillama_core.data.speech.audio import require_extra

RESAMPLES = 2000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Scored:
    """One utterance as transcribed, both texts normalised."""

    name: str
    reference: str
    hypothesis: str
    word_errors: int
    """Substitutions, deletions and insertions (Levenshtein)."""
    words: int
    """In the reference."""
    character_errors: int
    characters: int


def score(name: str, reference: str, hypothesis: str) -> Scored:
    """The errors in ``hypothesis``; both texts are normalised already, ``reference`` is not empty."""
    jiwer = require_extra("jiwer")
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return Scored(
        name,
        reference,
        hypothesis,
        words.substitutions + words.deletions + words.insertions,
        words.substitutions + words.deletions + words.hits,
        characters.substitutions + characters.deletions + characters.insertions,
        characters.substitutions + characters.deletions + characters.hits,
    )


def word_error_rate(scored: Sequence[Scored]) -> float:
    """Errors per word of the references, of all utterances together, in %."""
    return 100 * sum(s.word_errors for s in scored) / sum(s.words for s in scored)


def character_error_rate(scored: Sequence[Scored]) -> float:
    """Errors per character of the references, of all utterances together, in %."""
    return 100 * sum(s.character_errors for s in scored) / sum(s.characters for s in scored)


def _bootstrap(errors: Sequence[int], lengths: Sequence[int], seed: int) -> Any:
    """The rate sum(errors) / sum(lengths), in %, of resampled utterances: scipy's BootstrapResult for 95 %."""
    from scipy.stats import bootstrap

    def rate(errors: np.ndarray, lengths: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * errors.sum(axis) / lengths.sum(axis)

    return bootstrap(
        (errors, lengths),
        rate,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=100,
        random_state=np.random.default_rng(seed),
    )


def standard_error(errors: Sequence[int], lengths: Sequence[int], seed: int) -> float | None:
    """Return that of the rate sum(errors) / sum(lengths), in %, by resampling utterances; None for a single one."""
    return None if len(errors) < 2 else float(_bootstrap(errors, lengths, seed).standard_error)


@dataclass(frozen=True)
class Difference:
    """One model's word error rate minus another's on the same utterances, in points of %."""

    value: float
    standard_error: float | None
    low: float
    high: float
    """The middle 95 % of the resamples."""


def paired_difference(baseline: Sequence[Scored], other: Sequence[Scored], seed: int = 0) -> Difference:
    """Word error rate of ``other`` minus that of ``baseline``, with a paired bootstrap over utterances.

    Both must hold the same utterances in the same order (ValueError); resampling draws them together, so what makes an
    utterance hard for both does not widen the interval (Bisani & Ney 2004).
    """
    if [(s.name, s.reference) for s in baseline] != [(s.name, s.reference) for s in other] or not baseline:
        raise ValueError("a paired comparison needs the same utterances on both sides")
    change = [b.word_errors - a.word_errors for a, b in zip(baseline, other, strict=True)]
    words = [s.words for s in baseline]
    value = 100 * sum(change) / sum(words)
    if len(words) < 2:
        return Difference(value, None, value, value)
    found = _bootstrap(change, words, seed)
    return Difference(value, float(found.standard_error), *map(float, found.confidence_interval))


def write_transcripts(scored: Sequence[Scored], folder: Path, name: str) -> None:
    """``NAME.jsonl``, one `Scored` a line, and ``NAME.txt``, every utterance with its alignment, worst first."""
    jiwer = require_extra("jiwer")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scored]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    parts = [f"{name}: {word_error_rate(scored):.2f} % word errors, {len(scored)} utterances\n"]
    for one in sorted(scored, key=lambda s: -s.word_errors / s.words):
        aligned = jiwer.visualize_alignment(
            jiwer.process_words(one.reference, one.hypothesis), show_measures=False, skip_correct=False
        )
        # Its heading counts the sentences of one comparison; here that is always the first.
        body = "\n".join(line.rstrip() for line in aligned.splitlines() if not line.startswith("===")).strip("\n")
        parts.append(f"\n{one.name}: {one.word_errors} of {one.words} words\n{body}\n")
    (folder / f"{name}.txt").write_text("".join(parts), encoding="utf-8")


def read_transcripts(path: Path) -> list[Scored]:
    """What `write_transcripts` wrote into a ``.jsonl``; raises ValueError when it holds anything else."""
    try:
        return [Scored(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} does not hold transcripts: {error}") from None
