"""The text around a stored row, as token strings that the folder itself stores: no model needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from fastsae.data.files import ShardError
from fastsae.data.padding import PAD
from fastsae.data.reader import ShardContext


@dataclasses.dataclass(frozen=True)
class Context:
    """One row's token and its neighbours in the same window of text.

    `tokens[center]` belongs to the row itself. `rows[i]` is the id of the row of `tokens[i]`, or -1 if that token's row
    was not stored (first position, norm filter): encode the stored rows to shade every token.
    """

    row: int
    center: int
    tokens: list[str]
    token_ids: list[int]
    rows: list[int]


def context_of(shard: ShardContext, local: int, first_row: int, width: int, strings: list[str] | None) -> Context:
    """The context of the shard's row `local`, at most `width` tokens to either side; row ids start at `first_row`."""
    window, position = int(shard.window[local]), int(shard.position[local])
    start = max(position - width, 0)
    ids = [token for token in shard.token_ids[window, start : position + width + 1].tolist() if token != PAD]
    # The rows of a window are contiguous and ordered: find them by bisection, then by position in the window.
    wanted = torch.tensor([window, window + 1], dtype=shard.window.dtype, device="cpu")
    low, high = torch.searchsorted(shard.window, wanted).tolist()
    row_at = {int(place): first_row + low + i for i, place in enumerate(shard.position[low:high])}
    return Context(
        row=first_row + local,
        center=position - start,
        tokens=[_string(token, strings) for token in ids],
        token_ids=ids,
        rows=[row_at.get(place, -1) for place in range(start, start + len(ids))],
    )


def token_strings(tokenizer: Any) -> list[str]:
    """The text of every token id of a Hugging Face tokenizer, including a token's leading space.

    A token that is only part of a character becomes U+FFFD.
    """
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    if any(piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") for piece in pieces):
        # SentencePiece: decoding a lone token would drop the leading space that the block stands for.
        return [piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for piece in pieces]
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None and type(fast.model).__name__ == "WordPiece":
        # A token begins a word unless "##" marks it as a continuation. (In other vocabularies "##" is a heading.)
        return [piece[2:] if piece.startswith("##") else " " + piece for piece in pieces]
    return tokenizer.batch_decode([[i] for i in range(len(pieces))], clean_up_tokenization_spaces=False)


def vocabulary_bytes(strings: list[str]) -> bytes:
    return json.dumps(strings, ensure_ascii=False).encode()


def read_vocabulary(path: Path) -> list[str]:
    """Raises ShardError if the file is not a JSON list of strings."""
    try:
        strings = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is damaged ({error}); harvest again") from error
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise ShardError(f"{path} is damaged: expected a JSON list of token strings")
    return strings


def _string(token: int, strings: list[str] | None) -> str:
    return strings[token] if strings is not None and 0 <= token < len(strings) else f"#{token}"
