"""Tokenizers, texts in every kind of file, and a tiny model with a head, for the tests of what text people have."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LETTERS = "ACGT"
CHAT = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <end> {% endfor %}"


def letters(frame: bool = True) -> Any:
    """One token for each of A, C, G, T and no other letter: `<s> $A </s>`, ids 1 and 2; 7 is the mark of a chat."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i for i, letter in enumerate(LETTERS, 3)}, "<|user|>": 7}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    if frame:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_tokens([tokenizers.AddedToken("<|user|>", special=True)], special_tokens=True)
    return made


def words() -> Any:
    """w0 to w29 and <|user|>, <|assistant|>, <end> (the end of text), no frame, an unknown word, a chat template."""
    import tokenizers
    import transformers

    names = ["<unk>", "<end>", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(30))]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<end>", extra_special_tokens=["<|user|>", "<|assistant|>"]
    )
    made.chat_template = CHAT
    return made


def write_model(folder: Path) -> Path:
    """A random two-layer Llama of width 16 over `words`, in the files that transformers reads."""
    import torch
    import transformers

    words().save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=34, max_position_embeddings=64, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(count: int = 400) -> list[str]:
    """Documents of 1 to 40 words, always the same."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(30)}" for _ in range(draw.randint(1, 40))) for _ in range(count)]


def chats(count: int = 300) -> list[list[dict[str, str]]]:
    found = texts(2 * count)
    return [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        for ask, say in zip(found[::2], found[1::2], strict=True)
    ]


def as_lines(field: str, values: list[Any]) -> bytes:
    return "".join(json.dumps({"id": i, field: value}) + "\n" for i, value in enumerate(values)).encode()


def ids(count: int = 400) -> list[list[int]]:
    """Token ids of `texts`, each with its end of text."""
    return [[int(word[1:]) + 4 for word in text.split()] + [1] for text in texts(count)]


def _parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": list(range(400)), "body": texts()})
    parquet.write_table(table, folder / "a.parquet", row_group_size=90)
    return folder / "a.parquet"


def _zst(folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(as_lines("body", texts())))
    return folder / "a.jsonl.zst"


def _file(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return write


def _npy(folder: Path) -> Path:
    np.save(folder / "a.npy", np.array([row for rows in ids() for row in rows], dtype=np.int32))
    return folder / "a.npy"


def _datasets(folder: Path) -> str:
    pytest.importorskip("datasets", reason="datasets is not installed")
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_bytes(as_lines("body", texts()))
    return f"datasets:{folder / 'rows'}"


SOURCES: dict[str, tuple[Callable[[Path], Path | str], dict[str, str]]] = {
    "one line": (_file("a.txt", lambda: " ".join(texts()).encode()), {}),
    "CR": (_file("a.txt", lambda: "\r".join(texts()).encode()), {}),
    "CRLF": (_file("a.txt", lambda: "\r\n".join(texts()).encode()), {}),
    "gz": (_file("a.txt.gz", lambda: gzip.compress("\n".join(texts()).encode())), {}),
    "zst": (_zst, {"field": "body"}),
    "chats": (_file("a.jsonl", lambda: as_lines("messages", chats())), {"field": "messages"}),
    "parquet": (_parquet, {"field": "body"}),
    "npy": (_npy, {}),
    "bin": (_file("a.bin", lambda: np.concatenate(ids()).astype("<u4").tobytes()), {"token_type": "uint32"}),
    "datasets": (_datasets, {"field": "body"}),
}
"""How to write each kind of source, and the settings of `load_text` for it."""
