"""The CPU backend's narrow copy of an encoder, and the encoders that screen with it (bounds: csrc/cpu/encode.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastsae import _cpu
from fastsae.backends import buffers
from fastsae.backends.blank import blank_tokens, with_blank
from fastsae.backends.cpu.memory import CPU, matrix, numbers
from fastsae.codes import Held, Screen

_Tensors = list[Tensor]


def allocate(latents: int, d: int, fmt: _cpu.Format) -> _Tensors:
    """[words int32, tables fp32 (3, positions), format int32 (), factors fp32 (2, d)]: one narrow copy, not filled.

    None of them is an inference tensor: training may update a copy that was made under torch.inference_mode.
    """
    words, positions = _sizes(latents, d, fmt)
    with torch.inference_mode(False):
        return [
            buffers.empty((words,), torch.int32, CPU),
            buffers.empty((3, positions), torch.float32, CPU),
            buffers.scalar(int(fmt), torch.int32, CPU),
            buffers.empty((2, d), torch.float32, CPU),
        ]


def _sizes(latents: int, d: int, fmt: _cpu.Format) -> tuple[int, int]:
    """Words, and columns of the tables."""
    blocks = _cpu.blocks_of(latents)
    return 0 if fmt == _cpu.Format.f32 else blocks * _cpu.words_per_row(fmt, d) * 16, blocks * 16


def absent(latents: int, d: int) -> _cpu.Screen:
    """No narrow copy: an encoder scores every latent in fp32, an update has nothing to refresh."""
    return _cpu.Screen(None, None, None, _cpu.Format.f32, latents, d)


def view(tensors: _Tensors, latents: int, d: int) -> _cpu.Screen:
    """The C++ view of a narrow copy. Raises ValueError for one of another dictionary or processor; TypeError."""
    if len(tensors) != 4 or tensors[2].numel() != 1:
        shapes = [tuple(t.shape) for t in tensors]
        expected = "words, tables, a format and factors"
        raise ValueError(f"the screen is tensors of shapes {shapes}, expected {expected}; make a new one")
    words, tables, code, factors = tensors
    numbers("the screen's format", code, torch.int32, tuple(code.shape))
    fmt = _cpu.Format(int(code))
    if not _cpu.format_supported(fmt):
        raise ValueError(f"the screen is in {fmt.name}, which {_cpu.isa()} has no code for; make a new one")
    size, positions = _sizes(latents, d, fmt)
    if tables.shape != (3, positions) or words.shape != (size,) or factors.shape != (2, d):
        raise ValueError(f"the screen belongs to another dictionary than W ({latents}, {d}); make a new one")
    return _cpu.Screen(
        numbers("the screen's words", words, torch.int32, (size,)),
        numbers("the screen's tables", tables, torch.float32, (3, positions)),
        numbers("the screen's factors", factors, torch.float32, (2, d)),
        fmt,
        latents,
        d,
    )


def fill(
    W: Tensor, rows: Tensor | None, fmt: _cpu.Format, factors: Tensor | None = None
) -> tuple[_cpu.Screen, _Tensors]:
    """A narrow copy of W, or of some of its rows, with the tensors that hold it. factors: `balanced`'s; None: signs."""
    latents = W.shape[0] if rows is None else rows.shape[0]
    tensors = allocate(latents, W.shape[1], fmt)
    tensors[3].copy_(balanced(W, None) if factors is None else factors)
    screen = view(tensors, latents, W.shape[1])
    _cpu.prepare_screen(matrix("W", W), numbers("rows", rows, torch.int32, (latents,)), screen, torch.get_num_threads())
    return screen, tensors


SAMPLED = 1024  # rows that second moments are taken from
MOST_UNBALANCED = 2.0**16


def balanced(W: Tensor, x: Tensor | None) -> Tensor:
    """(2, D) factors of x's columns, and of W's, each the other's inverse: with them both have the same second moments,
    so that a dimension which is large in one and small in the other costs no format its precision.

    Their signs are random, for the rotation that follows them (csrc/cpu/narrow.h): it would add the entries of a row
    whose mean is not 0 up to one large number. Without x they are the signs alone.
    """
    coin = torch.Generator(CPU).manual_seed(W.shape[1])
    signs = buffers.empty((W.shape[1],), torch.float32, CPU).bernoulli_(generator=coin).mul_(2).sub_(1)
    if x is None or not x.shape[0] or not W.shape[0]:
        return torch.stack([signs, signs])
    # Roots before they are divided: a quotient of squares may leave fp32's range.
    ratio = _second_moments(W).pow_(0.25) / _second_moments(x).pow_(0.25)
    ratio.div_(ratio.median()).clamp_(1 / MOST_UNBALANCED, MOST_UNBALANCED).mul_(signs)
    return torch.stack([ratio, ratio.reciprocal()])


def _second_moments(rows: Tensor) -> Tensor:
    """(D,) the mean square of each column, from at most SAMPLED rows. Never 0, as a column of zeros has no balance."""
    # An odd step: rows are often contexts of 2ⁿ tokens one after the other, whose first tokens are like no others.
    some = rows.detach()[:: -(-rows.shape[0] // SAMPLED) | 1].to(torch.float32)
    squares = torch.where(some.isfinite().all(1, keepdim=True), some, 0.0).square().mean(0)
    return squares.clamp_(max=1e30).add_(squares.mean() * 1e-6 + 1e-30)


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    W = W.contiguous()
    bias = buffers.zeros((W.shape[0],), torch.float32, CPU) if b is None else b
    serves = None if x is None or k is None else partial(_topk_serves, x, W, bias, k, None, None)
    fmt, tensors = _best_copy(W, None, serves, x)
    return Screen(tensors, f"cpu/{fmt.name}")


def hold_screen(held: Held | None, W: Tensor, b: Tensor, x: Tensor, k: int | None) -> tuple[Held | None, Screen | None]:
    """A copy that later calls may use too, made once more than FEW tokens came: so many repay it."""
    n = x.shape[0]
    if n <= FEW_KEPT or _cpu.fastest_format(W.shape[1]) == _cpu.Format.f32:
        return held, None
    digest = *_cpu.digest(matrix("W", W), torch.get_num_threads()), W.dtype
    if held is None or held.digest != digest:
        held = Held(digest)
    if held.screen is None:
        waited = held.waited + n
        held = Held(digest, prepare_screen(W, b, x, k) if waited > FEW else None, waited)
    return held, held.screen


# 8 bits have twice the product rate of bf16 and a bound several times wider. If the bound lets in more rivals than this
# share of the latents, scoring them costs more than the product saves (Zen 5: 22 us a token at M = 24576, 40 ns a
# rival).
RIVALS_WORTH = 0.02
REDONE_WORTH = 0.01
# For thresholds a candidate costs less: it is scored while its row is in L2. Zen 5, in turns: with 3.1 % of the latents
# (D = 2304) 8 bits take .84 of bf16's time, with 6.1 % (D = 4096) .90 and 1.01.
CANDIDATES_WORTH = 0.05
PROBED = 192
Judge = Callable[[_cpu.Screen], bool]
"""Whether a narrow copy's bounds are tight enough for some inputs."""

# Up to so many tokens every latent is scored in fp32: a copy costs more to make, or to read, than it saves. FEW_KEPT
# where a narrow one is kept already. `python -m bench.few` measures where they cross.
FEW, FEW_KEPT = 128, 12


def _best_copy(W: Tensor, rows: Tensor | None, serves: Judge | None, x: Tensor | None) -> tuple[_cpu.Format, _Tensors]:
    """The narrow copy that encodes fastest, judged by encoding a few inputs. Exact results never depend on it."""
    fmt, tight = _cpu.fastest_format(W.shape[1]), _cpu.tight_format()
    factors = balanced(W, x)
    narrow, tensors = fill(W, rows, fmt, factors)
    if serves is None or fmt == tight or not narrow.latents or serves(narrow):
        return fmt, tensors
    return tight, fill(W, rows, tight, factors)[1]


def _few(t: Tensor) -> Tensor:
    """PROBED of the rows at most."""
    return t[:: max(1, t.shape[0] // PROBED)][:PROBED].contiguous()


def _topk_serves(
    x: Tensor, W: Tensor, b: Tensor, k: int, rows: Tensor | None, scale: Tensor | None, narrow: _cpu.Screen
) -> bool:
    few = _few(x).to(W.dtype)
    n = few.shape[0]
    args = _encode_args(few, W, b, k, rows, scale, 0, narrow, rescore=True, redo=False)
    redone, rivals = _cpu.encode_topk(args, *_fixed(n, k)[1])
    return redone <= REDONE_WORTH * n and rivals <= RIVALS_WORTH * narrow.latents * n


def _above_serves(
    x: Tensor, W: Tensor, b: Tensor, per_latent: Tensor | None, bars: Tensor | None, narrow: _cpu.Screen
) -> bool:
    few, bars = _few(x).to(W.dtype), None if bars is None else _few(bars)
    n, latents = few.shape[0], W.shape[0]
    args = _encode_args(few, W, b, 1, None, None, 0, narrow, rescore=True, redo=True)
    above, _, candidates = _cpu.encode_above(args, *_thresholds(per_latent, bars, latents, n), *_ragged(n, 0)[1])
    return candidates - above <= CANDIDATES_WORTH * latents * n


def _thresholds(per_latent: Tensor | None, bars: Tensor | None, latents: int, n: int) -> list[_cpu.Numbers | None]:
    return [
        numbers("threshold", per_latent, torch.float32, (latents,)),
        numbers("threshold", bars, torch.float32, (n, 1)),
    ]


def _encode_args(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    narrow: _cpu.Screen,
    *,
    rescore: bool,
    redo: bool,
) -> _cpu.EncodeArgs:
    each, bias = (W.shape[0],), b.float().contiguous()
    gain = None if scale is None else scale.float().contiguous()
    return _cpu.EncodeArgs(
        matrix("x", x), matrix("W", W), numbers("b", bias, torch.float32, each),
        numbers("scale", gain, torch.float32, each), numbers("rows", rows, torch.int32, (narrow.latents,)),
        index_offset, k, rescore, redo, narrow, torch.get_num_threads(),
    )  # fmt: skip


def arguments(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: _Tensors | None,
    precision: str,
    serves: Judge | None = None,
) -> _cpu.EncodeArgs:
    """What every encoder passes to C++. serves: left out, that of a top k."""
    considered = None if rows is None else rows[rows >= 0].contiguous()
    count = W.shape[0] if considered is None else considered.shape[0]
    kept = screen if considered is None and precision != "fp32" else None
    narrow = absent(count, W.shape[1]) if kept is None else view(kept, count, W.shape[1])
    if x.shape[0] <= (FEW if kept is None or int(kept[2]) == int(_cpu.Format.f32) else FEW_KEPT):
        narrow = absent(count, W.shape[1])
    elif kept is None and precision == "fp32":
        narrow = fill(W, considered, _cpu.Format.f32)[0]
    elif kept is None:
        made = _best_copy(W, considered, serves or partial(_topk_serves, x, W, b, k, considered, scale), x)[1]
        narrow = view(made, count, W.shape[1])
    rescore = precision != "screened"
    return _encode_args(x, W, b, k, considered, scale, index_offset, narrow, rescore=rescore, redo=True)


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: _Tensors | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    args = arguments(x, W, b, k, rows, scale, index_offset, screen, precision)
    (acts, indices), places = _fixed(x.shape[0], k)
    redone, _ = _cpu.encode_topk(args, *places)
    return acts.to(x.dtype), indices, _count(redone)


def encode_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, screen: _Tensors | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_token, n = threshold.ndim == 2, x.shape[0]
    per_latent = None if per_token else threshold.float().expand(W.shape[0]).contiguous()
    bars = threshold.float().expand(n, 1).contiguous() if per_token else None
    serves = partial(_above_serves, x, W, b, per_latent, bars)
    args = arguments(x, W, b, 1, None, None, 0, screen, precision, serves)
    (acts, indices, offsets), places = _ragged(n, capacity)
    above, redone, _ = _cpu.encode_above(args, *_thresholds(per_latent, bars, W.shape[0], n), *places)
    overflow = buffers.scalar(above > capacity, torch.bool, CPU)
    return acts.to(x.dtype), indices, offsets, overflow, _count(redone)


def encode_batch_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, screen: _Tensors | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The sum, finite unless there is such a token or it overflows, costs a twentieth of the rows' norms.
    n, blank = x.shape[0], None if bool(torch.isfinite(x.sum())) else blank_tokens(x)
    if blank is not None and not bool(blank.any()):
        blank = None
    numbered = x if blank is None else x[~blank].contiguous()
    args = arguments(numbered, W, b, k, None, None, 0, screen, precision)
    (acts, indices, offsets), places = _ragged(numbered.shape[0], numbered.shape[0] * k)
    redone = _cpu.encode_batch_topk(args, *places)
    acts = acts.to(x.dtype)
    if blank is None:
        return acts, indices, offsets, _count(redone)
    (most, latents, ends), _ = _ragged(n, n * k)
    most = most.to(x.dtype).zero_()
    most[: acts.shape[0]] = acts
    latents.zero_()[: acts.shape[0]] = indices
    ends[0] = 0
    ends[1:] = torch.where(blank, 0, torch.ones_like(ends[1:]))
    ends[1:] = offsets[ends[1:].cumsum(0)]
    return *with_blank(most, latents, ends, blank, k), _count(redone)


def _count(n: int) -> Tensor:
    return buffers.scalar(n, torch.int64, CPU)


def _fixed(n: int, k: int) -> tuple[_Tensors, list[_cpu.Numbers]]:
    """acts fp32 and indices (n, k), which C++ fills, and their numbers."""
    dtypes, shape = (torch.float32, torch.int32), (n, k)
    held = [buffers.empty(shape, dtype, CPU) for dtype in dtypes]
    return held, [numbers("the result", t, dtype, shape) for t, dtype in zip(held, dtypes, strict=True)]


def _ragged(n: int, capacity: int) -> tuple[_Tensors, list[_cpu.Numbers]]:
    """acts fp32 and indices (capacity,), offsets (n + 1,), which C++ fills in part, and their numbers."""
    layout = ((torch.float32, (capacity,)), (torch.int32, (capacity,)), (torch.int64, (n + 1,)))
    held = [buffers.zeros(shape, dtype, CPU) for dtype, shape in layout]
    return held, [numbers("the result", t, dtype, shape) for t, (dtype, shape) in zip(held, layout, strict=True)]
