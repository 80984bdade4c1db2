"""Lists the slots of a code and sorts them by latent: the two stages of fastsae.backends.gpu.by_latent.

The sort is torch's (a radix sort without atomics on data, which a CUDA graph can capture); the kernels around it are
one program for each BLOCK slots or latents. A counting sort of our own would have to be stable too, which takes a
histogram of M for each block of slots: at M = 131072 more bytes than the four passes of the radix sort over the keys.

Bytes: nnz·(4 + 4 + 4 + 4) for the keys, about 4·24·nnz in the sort, nnz·(4 + 8 + 4 + 4 + 8) for the entries, 8·M.
Flops: none; log2(nnz)·M + log2(N)·nnz comparisons.
Workspace: keys, rows and the sort's double buffers, 32 bytes a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.search import count_up_to
from fastsae.kernels.variants import POINTERS, Variant


@dataclass(frozen=True)
class Config:
    BLOCK: int  # slots, or latents, of one program
    num_warps: int


def choose() -> Config:
    """8 numbers a thread: as many searches, whose loads wait for each other, side by side."""
    return Config(BLOCK=1024, num_warps=4)


@triton.jit
def _list_slots_kernel(
    acts_ptr, indices_ptr, offsets_ptr, keys_ptr, rows_ptr, values_ptr, n_slots, N, K, M, first_row,
    BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keys[slot], rows[slot] = first_row + its token, and with values_ptr: values[slot] = its act in float32.

    With values_ptr an act of 0 is empty in a ragged code too, since it has no gradient unless one is given (ZEROS).
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_slots
    latent = tl.load(indices_ptr + slot, mask=inside, other=0)
    occupied = (latent >= 0) & (latent < M)

    if offsets_ptr is None:
        row = slot // K
    else:
        row = count_up_to(offsets_ptr, N + 1, slot, BITS) - 1
        occupied &= row < N  # N + 1 offsets start no later than a slot past the end
    if offsets_ptr is None or values_ptr is not None:
        act = tl.load(acts_ptr + slot, mask=inside, other=0.0).to(tl.float32)
        if offsets_ptr is None or not ZEROS:
            occupied &= act != 0.0
        if values_ptr is not None:
            tl.store(values_ptr + slot, act, mask=inside)

    tl.store(keys_ptr + slot, tl.where(occupied, latent, M), mask=inside)
    tl.store(rows_ptr + slot, row + first_row, mask=inside)


@triton.jit
def _latent_starts_kernel(keys_ptr, starts_ptr, n_slots, M, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """starts[i] = how many keys are below i, for i = 0 .. M."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = count_up_to(keys_ptr, n_slots, i - 1, BITS)
    tl.store(starts_ptr + i, start.to(tl.int64), mask=i <= M)


@triton.jit
def _entries_kernel(
    keys_ptr, order_ptr, rows_ptr, values_ptr, rows_out_ptr, values_out_ptr, n_slots, M, BLOCK: tl.constexpr
):
    """rows (and values) in the order of the latents; past the last entry rows and order become -1."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < n_slots
    live = tl.load(keys_ptr + e, mask=inside, other=M) < M
    slot = tl.load(order_ptr + e, mask=live, other=-1)
    tl.store(rows_out_ptr + e, tl.load(rows_ptr + slot, mask=live, other=-1), mask=inside)
    if values_ptr is None:
        tl.store(order_ptr + e, slot, mask=inside)
    else:
        tl.store(values_out_ptr + e, tl.load(values_ptr + slot, mask=live, other=0.0), mask=inside)


def list_slots(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int,
    keys: Tensor, rows: Tensor, values: Tensor | None, first_row: int = 0, zeros: bool = False,
) -> None:  # fmt: skip
    """Fills keys and rows (int32) and values (float32), one number a slot. rows count from first_row."""
    n, k = (acts.shape[0], acts.shape[1]) if offsets is None else (offsets.shape[0] - 1, 1)
    if acts.numel() == 0:
        return
    config = choose()
    _list_slots_kernel[(triton.cdiv(acts.numel(), config.BLOCK),)](
        acts, indices, offsets, keys, rows, values, acts.numel(), n, k, d_sae, first_row,
        BITS=0 if offsets is None else (n + 1).bit_length(), ZEROS=zeros, BLOCK=config.BLOCK,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def sort_slots(
    keys: Tensor, rows: Tensor, values: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The listed slots latent by latent: offsets (M+1,) int64, rows (slots,) int32, slots int64, values float32.

    With values the third tensor is the bare order of the sort: its end is not filled with -1.
    """
    n_slots = keys.numel()
    starts = buffers.empty((d_sae + 1,), torch.int64, keys.device)
    rows_out = torch.empty_like(rows)
    values_out = None if values is None else torch.empty_like(values)
    if n_slots == 0:
        return starts.zero_(), rows_out, buffers.empty((0,), torch.int64, keys.device), values_out
    config = choose()
    keys, order = torch.sort(keys, stable=True)
    _latent_starts_kernel[(triton.cdiv(d_sae + 1, config.BLOCK),)](
        keys, starts, n_slots, d_sae, BITS=n_slots.bit_length(), BLOCK=config.BLOCK, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    _entries_kernel[(triton.cdiv(n_slots, config.BLOCK),)](
        keys, order, rows, values, rows_out, values_out, n_slots, d_sae, BLOCK=config.BLOCK, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return starts, rows_out, order, values_out


def variants() -> list[Variant]:
    """Fixed and ragged codes, each as the op and as the update (with values) list them."""
    config, found = choose(), []
    sizes = {"n_slots": "i32", "N": "i32", "K": "i32", "M": "i32", "first_row": "i32"}
    for dtype in (torch.float32, torch.bfloat16):
        for ragged in (False, True):
            for valued in (False, True):
                layout = f"{'ragged' if ragged else 'fixed'}{'-valued' if valued else ''}"
                pointers: dict[str, str] = {
                    "acts_ptr": POINTERS[dtype],
                    "indices_ptr": "*i32",
                    "keys_ptr": "*i32",
                    "rows_ptr": "*i32",
                }
                absent: dict[str, None] = {}
                for name, kind, present in (("offsets_ptr", "*i64", ragged), ("values_ptr", "*fp32", valued)):
                    if present:
                        pointers[name] = kind
                    else:
                        absent[name] = None
                found.append(
                    Variant(
                        _list_slots_kernel,
                        f"list_slots/{POINTERS[dtype][1:]}/{layout}",
                        pointers | sizes,
                        absent | {"BITS": 14 if ragged else 0, "ZEROS": False, "BLOCK": config.BLOCK},
                        config.num_warps,
                    )
                )
    found.append(
        Variant(
            _latent_starts_kernel,
            "latent_starts",
            {"keys_ptr": "*i32", "starts_ptr": "*i64", "n_slots": "i32", "M": "i32"},
            {"BITS": 20, "BLOCK": config.BLOCK},
            config.num_warps,
        )
    )
    for valued in (False, True):
        pointers = {"keys_ptr": "*i32", "order_ptr": "*i64", "rows_ptr": "*i32", "rows_out_ptr": "*i32"}
        values = dict.fromkeys(("values_ptr", "values_out_ptr"), "*fp32" if valued else None)
        found.append(
            Variant(
                _entries_kernel,
                f"entries/{'valued' if valued else 'bare'}",
                pointers | ({k: v for k, v in values.items() if v}) | {"n_slots": "i32", "M": "i32"},
                ({k: v for k, v in values.items() if not v}) | {"BLOCK": config.BLOCK},
                config.num_warps,
            )
        )
    return found
