"""Metrics of Whisper: the core's, told which language it is to write and how its transcripts are normalised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lillama_core.evaluation.base import Subject
from lillama_core.evaluation.metrics import Footprint, RealTimeFactor, WordErrorRate
from lillama_core.evaluation.metrics.speech import transcribe_one

from .ctranslate2 import NORMALIZER
from .languages import is_multilingual, language_code, usual_language


def language(subject: Subject, spoken: str | None) -> str | None:
    """The language that a multilingual model is to write; None for a model of English alone.

    That of the data, or else of the model's settings, or else English.
    """
    settings = subject.model.generation_config
    if not is_multilingual(settings):
        return None
    return language_code(settings, spoken or usual_language(settings, subject.tokenizer.tokenizer) or "en")


def generation(subject: Subject, spoken: str | None = None) -> dict[str, Any]:
    """Arguments of ``generate``: a model of English alone refuses to be told its language."""
    chosen = language(subject, spoken)
    return {} if chosen is None else {"language": chosen, "task": "transcribe"}


def normalizer(subject: Subject, spoken: str | None = None) -> Callable[[str], str]:
    """Whisper's text normaliser (Radford et al. 2022, appendix C): the English one, or the basic one."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language(subject, spoken) not in (None, "en"):
        return BasicTextNormalizer()
    # Always the same table of spellings: a checkpoint that lost its own would be measured differently.
    return EnglishTextNormalizer(json.loads(NORMALIZER.read_text(encoding="utf-8")))


error_rate = WordErrorRate(normalizer, generation)
real_time_factor = RealTimeFactor(generation)
footprint = Footprint(work=transcribe_one)
