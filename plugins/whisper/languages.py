"""Which language a Whisper of several is to write, and the prompt that tells its decoder."""

from __future__ import annotations

from typing import Any

from lillama_core.errors import UserError


def is_multilingual(settings: Any) -> bool:
    """Whether a model with this generation config is told a language and a task."""
    return bool(
        getattr(settings, "is_multilingual", False)
        and getattr(settings, "lang_to_id", None)
        and getattr(settings, "task_to_id", None)
    )


def language_code(settings: Any, language: str) -> str:
    """``fr`` for ``fr``, ``French`` or ``<|fr|>``; raises UserError for a language that the model does not know."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = language.strip().lower().removeprefix("<|").removesuffix("|>")
    code = TO_LANGUAGE_CODE.get(name, name)
    if f"<|{code}|>" not in settings.lang_to_id:
        known = ", ".join(sorted(token.strip("<|>") for token in settings.lang_to_id))
        raise UserError(f"this model does not know the language {language!r}; it knows {known}")
    return code


def usual_language(settings: Any, tokenizer: Any) -> str | None:
    """The language that a model was tuned to, where its generation config or its tokenizer says so."""
    found = getattr(settings, "language", None) or getattr(tokenizer, "language", None)
    return None if found is None else str(found)


def prompt(settings: Any, tokenizer: Any, code: str | None) -> list[int]:
    """What the decoder is given before it writes the first token of its own; ``code`` None for English alone."""
    if code is None:
        return list(tokenizer.prefix_tokens)
    silent = getattr(settings, "no_timestamps_token_id", None)
    return [
        settings.decoder_start_token_id,
        settings.lang_to_id[f"<|{code}|>"],
        settings.task_to_id["transcribe"],
        tokenizer.convert_tokens_to_ids("<|notimestamps|>") if silent is None else silent,
    ]
