"""Files of token ids, memory-mapped: NumPy arrays, and raw numbers as nanoGPT and llm.c write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsae.data.documents import Document, TokenType

PIECE_TOKENS = 4096
HEADERS = {20240520: "uint16", 20240801: "uint32"}
"""The first int32 of an llm.c file, and the type of its ids, which begin after HEADER_BYTES."""
HEADER_BYTES = 1024


class TokenFile:
    """Ids of a .npy file, (tokens,) or (documents, tokens), or of a .bin file, raw numbers of `dtype`.

    A piece is a document, or 4,096 tokens of a file that is one row of tokens. A .bin file with the header of llm.c
    states its own type.
    Raises: ValueError for a file that is no such array, or holds numbers of another type than `dtype`.
    """

    def __init__(self, path: Path, *, dtype: TokenType):
        self.path = path
        try:
            self._ids = np.load(path, mmap_mode="r") if path.suffix == ".npy" else _raw(path, dtype)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as token ids: {error}") from error
        if self._ids.ndim not in (1, 2) or not np.issubdtype(self._ids.dtype, np.integer):
            got = f"{self._ids.dtype} {self._ids.shape}"
            raise ValueError(f"{path}: expected integer ids (tokens,) or (documents, tokens), got {got}")

    @property
    def is_stream(self) -> bool:
        """Whether the file is one row of tokens, in which an end of text separates documents."""
        return self._ids.ndim == 1

    def __len__(self) -> int:
        return len(self._ids) if self._ids.ndim == 2 else -(-len(self._ids) // PIECE_TOKENS)

    def documents(self, piece: int) -> list[Document]:
        if self._ids.ndim == 2:
            return [np.asarray(self._ids[piece])]
        return [np.asarray(self._ids[piece * PIECE_TOKENS : (piece + 1) * PIECE_TOKENS])]


def _raw(path: Path, dtype: TokenType) -> np.ndarray:
    size = path.stat().st_size
    if size == 0:
        return np.zeros(0, dtype=dtype)  # an empty file cannot be mapped
    header = np.fromfile(path, dtype="<i4", count=1) if size >= HEADER_BYTES else np.zeros(1, dtype="<i4")
    offset = HEADER_BYTES if int(header[0]) in HEADERS else 0
    kind = np.dtype(HEADERS.get(int(header[0]), dtype)).newbyteorder("<")
    if (size - offset) % kind.itemsize:
        raise ValueError(f"{size - offset:,} bytes are not a whole number of {kind.name} ids; set --token-type")
    ids = np.memmap(path, dtype=kind, mode="r", offset=offset)
    # Ids below 65,536 in 32 bits: read in 16, every second number is 0.
    if kind.itemsize == 2 and len(ids) > 15 and not ids[1:4096:2].any() and ids[:4096:2].any():
        raise ValueError("every second uint16 is 0, as in a file of uint32; set --token-type uint32")
    return ids
