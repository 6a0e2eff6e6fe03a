"""From text to rows of tokens of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lillama_core.data.documents import Document, UnrenderableChatError
from lillama_core.data.rendering import Render, chat_renderer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` as it stands: no special tokens are added, those written out are recognised."""
    ids: list[int] = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # that the text is longer than the model's context is no news here
    )["input_ids"]
    return ids


WHOLE = 2 << 20
"""Characters of a text that is encoded as one; a longer one is in parts. A tokenizer of the kind that transformers
ships takes 150 bytes of memory for a character of what it encodes at once (SmolLM2's, English)."""
PART = 256 << 10
"""Characters of such a part, at most."""


def parts(text: str) -> list[str]:
    """``text`` as one, or cut at ends of lines, or at least of words, into pieces that are encoded one by one."""
    if len(text) <= WHOLE:
        return [text]
    found, start = [], 0
    while start < len(text):
        stop = min(start + PART, len(text))
        if stop < len(text):
            # Not in the first half: a piece of few characters would be mostly its own edge.
            least = start + PART // 2
            stop = max(text.rfind("\n", least, stop), 0) or max(text.rfind(" ", least, stop), 0) or stop
        found.append(text[start:stop])
        start = stop
    return found


def chunk(ids: list[int], sequence_length: int) -> torch.Tensor:
    """int64 ``[len(ids) // sequence_length, sequence_length]``; the incomplete rest is dropped."""
    count = len(ids) // sequence_length
    return torch.tensor(ids[: count * sequence_length], dtype=torch.int64).view(count, sequence_length)


def with_bos(rows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """``rows`` [rows, length], the first token of each replaced by the one that ``tokenizer`` begins every text with.

    Models that were trained with such a token predict badly without it. Rows stay as they are where there is none.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and tokenizer("the")["input_ids"][:1] == [bos]:
        rows = rows.clone()
        rows[:, 0] = bos
    return rows


@dataclass
class JoinedDocuments:
    """Documents one after the other, with the end-of-text token between them."""

    ids: list[int] = field(default_factory=list)
    documents: int = 0
    skipped: int = 0
    """Conversations that the chat template refused."""
    refusal: str = ""
    """The template's first complaint."""


def join(tokenizer: Any, documents: Iterable[Document], tokens: int | None) -> JoinedDocuments:
    """Encode ``documents`` until there are ``tokens`` tokens, or all of them for None."""
    with chat_renderer(tokenizer) as render:
        return _join(tokenizer, documents, tokens, render)


def _join(tokenizer: Any, documents: Iterable[Document], tokens: int | None, render: Render) -> JoinedDocuments:
    joined = JoinedDocuments()
    end = getattr(tokenizer, "eos_token_id", None)
    between = encode(tokenizer, "\n\n") if end is None else [end]
    for document in documents:
        try:
            text = document if isinstance(document, str) else render(document)
        except UnrenderableChatError as error:
            joined.skipped += 1
            joined.refusal = joined.refusal or str(error)
            continue
        ids = list[int]()
        for piece in parts(text):
            ids += encode(tokenizer, piece)
            if tokens is not None and len(joined.ids) + len(ids) >= tokens:
                break
        if not ids:
            continue
        # A chat template may have ended the document already.
        if joined.ids and joined.ids[-1] != end:
            joined.ids += between
        joined.ids += ids
        joined.documents += 1
        if tokens is not None and len(joined.ids) >= tokens:
            break
    return joined
