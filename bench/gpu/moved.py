"""The bytes that each GPU backend's kernels move for one call, in place of a time where none has been measured.

Counted from the kernels' headers (kernels/*.py, csrc/cuda/*.cu) for fp32 tensors (w = 4 bytes). A row that an
activation names is counted each time it is gathered; scores of a chunk, tables and whatever else stays in L2 by design
are not; nor are the tiles that a product reads again, cuBLAS's or Triton's own, from L2. The backends take the same
stages in the same order (fastsae/backends/gpu), so most of it is equal. What is not:

  encode_topk of rows   the capacity is M, as AuxK gives it, and one latent in DEAD is listed. triton reads the rows
                        that are listed, while it loads them, and leaves out the rest of the capacity; cuda copies the
                        rows of the whole capacity for cuBLAS: read, written and read again
  by_latent             cuda sorts 4-byte keys with 4-byte numbers, 8 bits a pass and only the bits that M needs; triton
                        is torch.sort(stable=True): int32 keys with int64 indices, all 32 bits. update_latents_ too
  ragged codes          one token in a hundred is a hundred times as long as the others (layouts.py). triton gives a
                        whole token to a program, for decode in tiles of columns; cuda cuts long tokens into pieces,
                        of which it writes and reads the sums, and shares active_dot's slots out evenly. What the
                        multiprocessors could move while they wait for the longest program is counted as moved:
                        MULTIPROCESSORS times what that program moves more than a mean one

Not counted: products. cuBLAS computes the whole capacity of rows as well, triton what is listed.
"""

from __future__ import annotations

from math import ceil

from bench.cases import Case
from bench.gpu.layouts import EVERY, HEAVY
from fastsae.backends.gpu.pieces import SHORTEST
from fastsae.backends.gpu.plan import cdiv, chunk_width

W = 4
BACKENDS = ("cuda", "triton")
MULTIPROCESSORS = 132  # of an H100 or H200
DEAD = 8
COLUMNS = 1024  # of a tile of decode, at most
RESCORED = 1.25  # candidates to each activation that is returned, on Gaussian scores
KINDS = (
    ("encode_topk", "fixed"), ("encode_topk", "rows"), ("encode_above", "fixed"), ("encode_batch_topk", "fixed"),
    ("decode", "fixed"), ("decode", "ragged"), ("decode_error", "fixed"), ("decode_error", "ragged"),
    ("active_dot", "fixed"), ("active_dot", "ragged"), ("active_outer", "fixed"), ("active_outer", "ragged"),
    ("by_latent", "fixed"), ("by_latent", "ragged"), ("update_latents_", "fixed"), ("prepare_screen", "fixed"),
)  # fmt: skip
"""Every op and kind of call, as fastsae.backends.choice tells them apart."""


def narrowed(rows: int, D: int) -> int:
    """Rows read, and written in two bytes an entry."""
    return rows * D * (W + 2)


def encoder(backend: str, op: str, kind: str, case: Case) -> float:
    """The screen is at hand. Chunks of the product, each with all of x̂; exact scores of the candidates; the code."""
    N, D, M, nnz = case.N, case.D, case.M, case.N * case.K
    read = M
    if kind == "rows":
        read = 3 * M if backend == "cuda" else M // DEAD
    product = cdiv(M, chunk_width(N, M, 2)) * N * D * 2 + read * D * 2
    scored = RESCORED * nnz * D * W + N * D * W
    sort = 150 * nnz if op == "encode_batch_topk" else 0
    return narrowed(N, D) + product + scored + sort + nnz * (W + 4)


def radix_sort(backend: str, slots: int, M: int) -> int:
    """Numbers written, keys read once to count them, then pass by pass read and written with their numbers."""
    bits, number = (M.bit_length(), 4) if backend == "cuda" else (32, 8)
    return slots * (number + 4 + ceil(bits / 8) * 2 * (4 + number))


def regrouped(backend: str, case: Case, valued: bool) -> int:
    """by_latent: keys and rows listed, sorted, put in order; with their acts, as update_latents_ does."""
    slots = case.N * case.K
    listed = slots * (W + 4 + 4 + 4 + (W if valued else 0))
    if backend == "cuda":  # key, number, row read; row and slot written
        entries = slots * (4 + 4 + 4 + 4 + 8 + (2 * W if valued else 0))
    else:  # key, index, row read; row written, and the index once more where there are no acts
        entries = slots * (4 + 8 + 4 + 4 + (2 * W if valued else 8))
    return listed + radix_sort(backend, slots, case.M) + entries + 8 * case.M


def heavy_tokens(case: Case) -> tuple[int, float]:
    """How many long tokens the uneven code has, and how many latents each."""
    heavy = cdiv(case.N, EVERY)
    return heavy, case.N * case.K * HEAVY / (case.N - heavy + HEAVY * heavy)


def decode(backend: str, op: str, kind: str, case: Case) -> float:
    N, D, nnz = case.N, case.D, case.N * case.K
    total = float(nnz * D * W + nnz * (W + 4) + N * D * W)
    if op == "decode_error":
        total += N * D * W + 8 * N
    if kind == "fixed":
        return total
    heavy, longest = heavy_tokens(case)
    if backend == "cuda":
        piece = max(SHORTEST, 8 * case.K)
        total += 28 * N + 2 * heavy * ceil(longest / piece) * D * 4
        longest = min(longest, piece)
    return total + 8 * N + MULTIPROCESSORS * max(0.0, longest - case.K) * min(D, COLUMNS) * W


def active_dot(backend: str, kind: str, case: Case) -> float:
    N, D, nnz = case.N, case.D, case.N * case.K
    total = float(nnz * D * W + N * D * W + nnz * (4 + 2 * W))
    if kind == "fixed":
        return total
    _, longest = heavy_tokens(case)
    alone = max(0.0, longest - case.K) if backend == "triton" else 0.0
    return total + 8 * N + MULTIPROCESSORS * alone * D * W


def of(backend: str, op: str, kind: str, case: Case) -> float:
    """Bytes of one call. Raises LookupError for an op that is not counted."""
    N, D, M, nnz = case.N, case.D, case.M, case.N * case.K
    match op:
        case "encode_topk" | "encode_above" | "encode_batch_topk":
            return encoder(backend, op, kind, case)
        case "decode" | "decode_error":
            return decode(backend, op, kind, case)
        case "active_dot":
            return active_dot(backend, kind, case)
        case "active_outer":  # with the order at hand; long latents are cut in both
            return nnz * D * W + M * D * W + nnz * (4 + 8 + W) + 28 * M
        case "by_latent":
            return regrouped(backend, case, valued=False) + (8 * N if kind == "ragged" else 0)
        case "update_latents_":  # rows of x and grad; weight, m and v of both dictionaries; the screen made anew
            return 2 * nnz * D * W + 2 * M * D * 24 + narrowed(M, D) + regrouped(backend, case, valued=True)
        case "prepare_screen":
            return narrowed(M, D)
    raise LookupError(f"{op} is not counted")
