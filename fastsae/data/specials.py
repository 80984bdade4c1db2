"""A tokenizer's special tokens: those that it adds around a text, all of them, and tokens by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

PROBES = 1000  # ordinary tokens tried before giving up


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text ([CLS] and [SEP], or BOS, or nothing).

    The tokenizer's own mask says which ids it has added. The text between them must be one that it can read: "a", or a
    token of its vocabulary. Raises ValueError if the mask marks every token of every such text as special.
    """
    if tokenizer is None:
        return [], []
    tried = ""
    for tried in itertools.islice(_probes(tokenizer), PROBES):
        plain = tokenizer(tried, add_special_tokens=False)["input_ids"]
        whole = tokenizer(tried, return_special_tokens_mask=True)
        ids, mask = whole["input_ids"], whole["special_tokens_mask"]
        for start in range(len(ids) - len(plain) + 1 if plain else 0):
            end = start + len(plain)
            if ids[start:end] == plain and all(mask[:start]) and all(mask[end:]) and not any(mask[start:end]):
                return ids[:start], ids[end:]
    raise ValueError(
        f"cannot tell the special tokens of {type(tokenizer).__name__}: its mask marks none of its tokens as text "
        f"(last tried: {tried!r})"
    )


def _probes(tokenizer: Any) -> Iterator[str]:
    yield "a"
    special = set(special_ids(tokenizer))
    for number in range(len(tokenizer)):
        if number not in special:
            yield tokenizer.decode([number])


def special_ids(tokenizer: Any) -> dict[int, str]:
    """{id: name} of a tokenizer's special tokens, without its unknown-word token.

    If no text produces that token, or it has another role too, it counts as special: byte-level vocabularies give that
    name to their end of text.
    """
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number: str(token) for number, token in added.items() if token.special}
    found |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    roles = ("bos", "eos", "sep", "cls", "pad", "mask")
    unknown = tokenizer.unk_token_id
    other = [getattr(tokenizer, f"{role}_token_id", None) for role in roles]
    if unknown is not None and unknown not in other and _writes_unknown(tokenizer):
        found.pop(unknown, None)
    return dict(sorted(found.items()))


def _writes_unknown(tokenizer: Any) -> bool:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return True
    return any(getattr(fast.model, name, None) is not None for name in ("unk_token", "unk_id"))


def named_ids(names: Sequence[str], tokenizer: Any) -> dict[int, str]:
    """{id: name} of tokens, each given as the tokenizer writes it, as the text of a single token, or as "#ID".

    Raises ValueError for a name that is no token.
    """
    found = {}
    for name in names:
        number = int(name[1:]) if name.startswith("#") and name[1:].isdecimal() else _id_of(name, tokenizer)
        if number is None or (tokenizer is not None and number >= len(tokenizer)):
            known = ", ".join(special_ids(tokenizer).values()) or "none"
            raise ValueError(f"the tokenizer has no token {name!r}; its special tokens: {known}; or give an id like #7")
        found[number] = name
    return found


def _id_of(name: str, tokenizer: Any) -> int | None:
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return vocabulary[name]
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None
