"""What a language model writes, for people to read: no number says as much of a model that has become worse."""

from __future__ import annotations

from typing import Any

import torch

from lillama_core.evaluation.base import Answer, EvaluationOptions, Measurement, Report, Subject

NEW_TOKENS = 64
"""Tokens of an answer, at most."""
QUESTIONS = (
    "What causes the seasons on Earth? Answer in two sentences.",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "Give me three tips for writing a clear email.",
    "A train leaves at nine and arrives at half past eleven. How long does it take?",
    "Tell me the beginning of a story about a fisherman.",
    "Translate into French: The library is closed on Sundays.",
)
"""For models with a chat template."""
BEGINNINGS = (
    "The seasons on Earth are caused by",
    "def sum_of_squares(numbers):",
    "Three tips for writing a clear email:\n1.",
    "The capital of Italy is",
    "Once upon a time, a fisherman",
    "The library is closed on Sundays, because",
)
"""For models without one, to be continued."""


class Answers:
    """Greedy answers to the first of `QUESTIONS`, or of `BEGINNINGS`: as many as ``options.answers``, or all."""

    name = "answers"
    gives_answers = True

    def wanted(self, options: EvaluationOptions) -> bool:
        return options.answers > 0

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """No measurement: ``subject.answers`` gets what the model writes."""
        chats = getattr(subject.tokenizer, "chat_template", None) is not None
        prompts = (QUESTIONS if chats else BEGINNINGS)[: options.answers]
        report(f"answers: {len(prompts)}, of {NEW_TOKENS} tokens at most")
        subject.answers += [Answer(prompt, _written(subject, prompt, chats)) for prompt in prompts]
        return []


@torch.inference_mode()
def _written(subject: Subject, prompt: str, chats: bool) -> str:
    tokenizer: Any = subject.tokenizer
    if chats:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    # A template has written the special tokens itself.
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=not chats)["input_ids"]], device=subject.device)
    room = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    written = subject.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS if room is None else max(1, min(NEW_TOKENS, room - ids.shape[1])),
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()
