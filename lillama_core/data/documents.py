"""Documents from rows of structured data, and how a conversation becomes text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lillama_core.errors import UserError

Message = dict[str, str]
"""One turn of a conversation: ``role`` and ``content``."""

Document = str | list[Message]
"""Plain text, or a conversation that the tokenizer's chat template renders."""

_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_TEXT_COLUMNS = ("text", "content")
_QUESTION_COLUMNS = ("instruction", "prompt", "question", "query")
_ANSWER_COLUMNS = ("output", "response", "completion", "answer")
_SYSTEM_COLUMNS = ("system_prompt", "system")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}

COLUMNS = (
    *_CHAT_COLUMNS,
    *_TEXT_COLUMNS,
    *_QUESTION_COLUMNS,
    "input",
    *_ANSWER_COLUMNS,
    *_SYSTEM_COLUMNS,
)
"""Every column that can contribute to a document."""

DEEPEST_PARTS = 8
"""Of content in parts, which are one deep in all data that is known."""

# Some templates print today's date; the same data must not change from one day to the next.
_FIXED_DATE = "26 Jul 2024"


class UnrenderableChatError(ValueError):
    """The tokenizer's chat template refuses a conversation."""


def _first(names: Iterable[str], columns: Iterable[str]) -> str | None:
    present = set(columns)
    return next((name for name in names if name in present), None)


def has_document(columns: Iterable[str]) -> bool:
    """Whether a row with these columns holds a document."""
    names = list(columns)
    answered = _first(_QUESTION_COLUMNS, names) and _first(_ANSWER_COLUMNS, names)
    return bool(_first((*_CHAT_COLUMNS, *_TEXT_COLUMNS), names) or answered)


def unknown_columns(where: str, columns: Iterable[str]) -> UserError:
    """The error for a row without a document."""
    found = ", ".join(str(column) for column in columns) or "none"
    return UserError(
        f"{where}: no text found in the columns ({found}); rows need 'text' or 'content', "
        "'messages' or 'conversations', or 'instruction'/'prompt' with 'output'/'response'"
    )


def document_of(row: Mapping[str, Any], where: str) -> Document | None:
    """The document in ``row``, or None when its text is empty.

    A conversation goes before a question with its answer, and both before plain text, because instruction
    data often carries a flattened copy that ignores the model's own chat format. ``where`` names the row in
    errors; raises UserError when no column holds text or a value has the wrong type.
    """
    chat = _first(_CHAT_COLUMNS, row)
    if chat is not None:
        return _messages(row[chat], f"{where}, {chat!r}") or None
    question, answer = _first(_QUESTION_COLUMNS, row), _first(_ANSWER_COLUMNS, row)
    if question is not None and answer is not None:
        return _exchange(row, question, answer, where)
    text = _first(_TEXT_COLUMNS, row)
    if text is None:
        raise unknown_columns(where, row)
    return _string(row[text], f"{where}, {text!r}") or None


def replace_surrogates(text: str) -> str:
    """``text`` with halves of characters, as JSON cut in the middle of an emoji holds them, replaced.

    No tokenizer takes them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _string(value: Any, where: str, depth: int = 0) -> str:
    if depth > DEEPEST_PARTS:
        raise UserError(f"{where}: its parts lie in one another deeper than {DEEPEST_PARTS}; write the text alone")
    if value is None:
        return ""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):  # content in parts; parts other than text cannot be used here
        return "".join(
            _string(part.get("text") if isinstance(part, dict) else part, where, depth + 1) for part in value
        )
    raise UserError(f"{where}: expected text, found {type(value).__name__}")


def _messages(value: Any, where: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of messages, found {type(value).__name__}")
    messages = []
    for number, turn in enumerate(value, start=1):
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if not isinstance(role, str):
            raise UserError(f"{where}: message {number} has neither a 'role' nor a 'from'")
        content = _string(turn.get("content", turn.get("value")), f"{where}, message {number}")
        messages.append({"role": _ROLES.get(role.lower(), role.lower()), "content": content})
    return messages if any(message["content"] for message in messages) else []


def _exchange(row: Mapping[str, Any], question: str, answer: str, where: str) -> list[Message] | None:
    asked = _string(row[question], f"{where}, {question!r}")
    answered = _string(row[answer], f"{where}, {answer!r}")
    if question == "instruction" and row.get("input"):
        asked = f"{asked}\n\n{_string(row['input'], where + ', input')}"
    if not asked or not answered:
        return None
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    system = _first(_SYSTEM_COLUMNS, row)
    if system is not None and row[system]:
        messages.insert(0, {"role": "system", "content": _string(row[system], f"{where}, {system!r}")})
    return messages


def render_chat(tokenizer: Any, messages: list[Message]) -> str:
    """``messages`` in the format that the model was trained on, special tokens written out.

    To be tokenised with ``add_special_tokens=False``, since the template writes the start token itself.
    Without a template, paragraphs ``role: content``. Raises UnrenderableChatError when the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    try:
        return _apply_template(tokenizer, messages)
    except Exception as first:  # templates raise what they like
        folded = _system_folded(messages)
        if folded is None:
            raise UnrenderableChatError(str(first)) from first
        try:
            return _apply_template(tokenizer, folded)
        except Exception as second:
            raise UnrenderableChatError(str(second)) from second


def _apply_template(tokenizer: Any, messages: list[Message]) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        # A macro hides the clock that the renderer offers under this name.
        template = "{% macro strftime_now(format) %}" + _FIXED_DATE + "{% endmacro %}" + template
    return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, date_string=_FIXED_DATE))


def _system_folded(messages: list[Message]) -> list[Message] | None:
    """The system message put before the first question, for templates that know no system role."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return None
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
