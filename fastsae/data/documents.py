"""A document: a text, a chat or token ids; how it is read from a row of data, and how it is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jinja2
import numpy as np

Document: TypeAlias = str | list[dict[str, Any]] | np.ndarray
"""One document: its text, the messages of a chat ({"role": ..., "content": ...}, ...), or its token ids (n,)."""
TokenType = Literal["uint16", "uint32"]
FIELD = "text"
TOKEN_TYPE: TokenType = "uint16"


def field_of(content: dict[str, Any], field: str, where: str) -> Document:
    """The document in a field of a JSON object or a row: a text, or the messages of a chat; "" where it is null.

    Raises ValueError, beginning with `where`, for a field that is not there or holds something else.
    """
    if field not in content:
        raise ValueError(
            f"{where}: expected a text in the field {field!r}, got an object with the fields "
            f"{', '.join(map(str, content)) or '(none)'}; name one of them (--text-field)"
        )
    value = content[field]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        return [dict(one) for one in value]
    raise ValueError(
        f"{where}: expected a text in the field {field!r}, or messages that have texts as 'role' and 'content', got "
        f"{str(value)[:60]!r}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def ids_of(document: Document, tokenizer: Any, where: str) -> np.ndarray:
    """Token ids (n,) int64 of a document, without special tokens around it.

    Raises ValueError, beginning with `where`, for ids that the tokenizer does not have, and for a chat that its
    template refuses, or if it has none.
    """
    if isinstance(document, np.ndarray):
        least, most = (int(document.min()), int(document.max())) if len(document) else (0, 0)
        if least < 0 or (tokenizer is not None and most >= len(tokenizer)):
            raise ValueError(
                f"{where} holds the token id {least if least < 0 else most}, but the tokenizer has ids 0 to "
                f"{len(tokenizer) - 1 if tokenizer is not None else '...'}: is it of another tokenizer or number type?"
            )
        return document.astype(np.int64)
    if tokenizer is None:
        raise ValueError(f"{where} holds text, but the model has no tokenizer; give token ids")
    text = document if isinstance(document, str) else _chat_text(document, tokenizer, where)
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def _chat_text(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} holds chats, but the tokenizer has no chat template; use an instruction-tuned model")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses {str(messages)[:60]!r}: {error}") from error


def joined(documents: Sequence[np.ndarray], tokenizer: Any) -> np.ndarray:
    """Documents as one text (n,) int64, separated by the tokenizer's end-of-text token if it has one."""
    end = getattr(tokenizer, "eos_token_id", None)
    parts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    begun = False
    for ids in documents:
        if begun and end is not None:
            parts.append(np.array([end], dtype=np.int64))
        parts.append(ids)
        begun = begun or len(ids) > 0
    return np.concatenate(parts)


def apart(ids: np.ndarray, tokenizer: Any) -> list[np.ndarray]:
    """The documents (n,) in a row of ids: the ids between end-of-text tokens."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        return [ids]
    places = np.flatnonzero(ids == end)
    parts = np.split(ids, places)
    return [part for part in (parts[0], *(part[1:] for part in parts[1:])) if len(part)]


def chosen(field: str, token_type: TokenType = TOKEN_TYPE) -> dict[str, str]:
    """The settings of a text for its record, without those that are not given."""
    given = {"field": (field, FIELD), "token_type": (token_type, TOKEN_TYPE)}
    return {name: value for name, (value, default) in given.items() if value != default}
