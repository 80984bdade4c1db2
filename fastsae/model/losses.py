"""Losses of a reconstruction: the denominators of mse and fvu, AuxK and ghost gradients. No (N, M) tensor is made.

Every loss here is a sum of squared errors over a normalizer: N tokens (mse) or the batch's total variance (fvu).
Arguments are (*batch, D) tensors of one dtype; results are 0-d, float32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.codes import SparseCodes, reads_are_free
from fastsae.model.axis import Axis
from fastsae.model.placement import Placement, axes_of
from fastsae.model.rules.base import EncodeOptions, select_topk
from fastsae.ops.reconstruction import squared_errors
from fastsae.ops.sums import sum_of_squares
from fastsae.reference import wide

LOSSES = ("mse", "fvu")
GHOST_PIECE = 2**24
"""Entries of (N, dead) that ghost gradients compute at a time."""


def total_variance(target: Tensor, placement: Placement | None = None) -> Tensor:
    """Σ_n ‖target_n - mean‖², the mean taken over this batch; 0 if it is no more than the rounding of the mean.

    placement: the batch has tokens in other processes too.
    """
    flat = wide(target).reshape(-1, target.shape[-1])
    if placement is not None and placement.tokens.size > 1:
        return _variance_of_all(flat, placement)
    n = flat.shape[0]
    if flat.is_cuda and n:
        # One kernel over columns instead of hundreds over pieces.
        variances, mean = torch.var_mean(flat, dim=0, correction=0)
        return unless_rounding((variances.double().sum() * n).to(flat.dtype), mean, n)
    mean = flat.mean(0)
    # In pieces, so that no second (N, D) tensor is made; a compiler fuses the two steps anyway.
    pieces = (flat,) if torch.compiler.is_compiling() else flat.split(512)
    return unless_rounding(
        torch.stack([sum_of_squares(piece - mean) for piece in pieces]).sum().to(flat.dtype), mean, n
    )


def _variance_of_all(flat: Tensor, placement: Placement) -> Tensor:
    n = placement.n
    # Its own gradient to the mean is 0: the deviations add up to nothing.
    mean = (placement.tokens.sum(flat.detach().double().sum(0)) / max(n, 1)).to(flat.dtype)
    squares = torch.stack([sum_of_squares(piece - mean) for piece in flat.split(512)]).sum()
    return unless_rounding(placement.tokens.summed(squares).to(flat.dtype), mean, n)


def unless_rounding(variance: Tensor, mean: Tensor, n: int) -> Tensor:
    """A total variance over n tokens (*B,), or 0 if the rounding of their mean (*B, D) explains it.

    One token repeated has no variance. Dividing by its rounding error would give a loss of 10¹⁴ with gradients to
    match, and Adam's second moments would need thousands of steps to forget their squares.
    """
    rounding = (4 * torch.finfo(mean.dtype).eps) ** 2 * n * mean.detach().double().square().sum(-1)
    return torch.where(variance <= rounding, 0, variance)


def loss_denominator(loss: str, target: Tensor, placement: Placement | None = None) -> Tensor | int:
    """The squared error's divisor: the number of tokens (mse; 1 if there are none) or the batch's total variance (fvu).

    Raises ValueError for an unknown loss, and for fvu with fewer than two tokens, whose variance is zero.
    """
    n = target.shape[:-1].numel() if placement is None else placement.n
    if loss == "mse":
        return max(n, 1)
    if loss != "fvu":
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    check_tokens(loss, n)
    return total_variance(target, placement)


def check_tokens(loss: str, n: int) -> None:
    """Raises ValueError for fvu with fewer than two tokens, whose variance is zero."""
    if loss == "fvu" and n < 2:
        raise ValueError(f"loss 'fvu' divides by the variance of the batch; got {n} tokens, expected at least 2")


def dead_rows(dead: Tensor) -> Tensor:
    """The ids of the dead latents, ascending, then -1: int32 (M,) from a bool mask (M,).

    The length is always M, so nothing is read back from the device.
    """
    m = dead.shape[0]
    # All live latents are written to slot m, which is cut off.
    place = torch.where(dead, dead.cumsum(0) - 1, m)
    rows = torch.full((m + 1,), -1, dtype=torch.int32, device=dead.device)
    return rows.scatter(0, place, torch.arange(m, dtype=torch.int32, device=dead.device))[:m]


def encode_dead(
    x: Tensor, W: Tensor, b: Tensor, dead: Tensor, k: int, options: EncodeOptions | None = None
) -> SparseCodes | None:
    """The k largest acts of each token among the dead latents: `encode_topk` on their rows.

    x (*batch, D): the encoder's input; dead (M,) bool. None if no latent is dead; only eager
    mode on a CPU checks this, because the check is a host sync on a GPU and a graph break under torch.compile.
    """
    placement = None if options is None else options.placement
    several = placement is not None and placement.latents.size > 1  # whose shards must all take part
    if reads_are_free(dead) and not several and not bool(dead.any()):
        return None
    return select_topk(x, W, b, k, options or EncodeOptions(), rows=dead_rows(dead))


def aux_weight(n_dead: Tensor, k: int) -> Tensor:
    """min(n_dead / k, 1), float64 0-d: the term grows as latents die, and is 0 while none are dead."""
    return (n_dead.double() / k).clamp(max=1.0)


def aux_k(
    codes: SparseCodes,
    W_dec: Tensor,
    missed: Tensor,
    weight: Tensor,
    loss_denominator: Tensor | int,
    *,
    overwrite: bool = False,
    placement: Placement | None = None,
    backend: str | None = None,
) -> Tensor:
    """weight · Σ_n ‖e_n - ê_n‖² / loss_denominator,  ê = A_dead W_dec: dead latents model the error of the live ones.

    codes: from `encode_dead`; missed (N, D_out) = recon - target = -e, held fixed (no gradient flows into it).
    overwrite: as of `squared_errors`. float64. Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """
    # Another backward pass overwrites `missed`, and this one may need it to recompute its error.
    missed = missed.detach().clone() if overwrite else missed.detach()
    shards = None if placement is None else placement.sums_shards
    left = squared_errors([(codes, 1.0)], W_dec, start=missed, overwrite=overwrite, shards=shards, backend=backend)
    left = left if placement is None else placement.over_tokens(left)
    return weight * left.weighted / loss_denominator


def ghost_residual(
    x: Tensor, error: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, loss_denominator: Tensor | int,
    placement: Placement | None = None,
) -> Tensor:  # fmt: skip
    """Σ_n r_n ‖s_n·g_n - e_n‖² / loss_denominator,  g = exp(x W_encᵀ + b_enc) W_dec: dead latents model the error.

    s_n makes ‖s_n g_n‖ half of ‖e_n‖ and r_n makes the term as large as the error of its token; both, and e, are held
    fixed. W_enc, W_dec (dead, D), b_enc (dead,): the rows of the dead latents; x (N, D_in); error (N, D_out): target -
    recon. 0 if none is dead. Dense in (N, dead), computed in pieces. placement: there are more dead latents, or more
    tokens, in other processes. Source: Jermyn & Templeton 2024 (Ghost Grads, Circuits Updates January 2024).
    """
    tokens, shards = axes_of(placement)
    n_dead = len(W_enc) if placement is None else sum(shards.rows(W_enc))
    if n_dead == 0:
        return x.new_zeros(())
    total = x.new_zeros(())
    size = max(1, GHOST_PIECE // n_dead)
    for inputs, left_over in zip(x.split(size), error.detach().split(size), strict=True):
        pre = inputs @ W_enc.mT + b_enc
        # The output is rescaled to the error's size below, so a token's factor cancels: subtract to avoid overflow.
        top = pre.detach().amax(-1, keepdim=True) if len(W_enc) else x.new_full((len(inputs), 1), -torch.inf)
        ghost = shards.summed(torch.exp(pre - shards.stack(top).amax(0)) @ W_dec)
        norms = torch.linalg.vector_norm(left_over, dim=-1, keepdim=True)
        ghost = ghost * (norms / (2 * torch.linalg.vector_norm(ghost, dim=-1, keepdim=True) + 1e-6)).detach()
        term = wide(ghost - left_over).square().sum(-1)
        total = total + (wide(left_over).square().sum(-1) / (term + 1e-6)).detach() @ term
    return tokens.summed(total) / loss_denominator


def ghost_pull(x: Tensor, error: Tensor, W_enc: Tensor, W_dec: Tensor, placement: Placement | None = None) -> Tensor:
    """Σ_dead softplus(-⟨u, W_enc_i⟩) + softplus(-⟨w, W_dec_i⟩): dead rows turn towards tokens of large error.

    u, w: means of x (N, D) and of error (N, D) = target - recon, each token weighted by its squared error; both held
    fixed. W_enc, W_dec (dead, D). placement: as for `ghost_residual`. Source: the point_cloud_sae experiments
    (R. Huben), with rows for columns.
    """
    tokens, shards = axes_of(placement)
    u, w = error_weighted_means(x.detach(), error.detach(), tokens)
    pull = shards.summed(F.softplus(-(W_enc @ u)).sum() + F.softplus(-(W_dec @ w)).sum())
    return tokens.summed(pull / tokens.size)  # the same in all: each gives its share of the gradient


def error_weighted_means(x: Tensor, error: Tensor, tokens: Axis | None = None) -> tuple[Tensor, Tensor]:
    """Means over tokens of x (*B, N, D) and error (*B, N, D_out), each token weighted by its squared error: (*B, D).

    tokens: the axis along which other processes have more of them.
    """
    tokens = tokens or Axis()
    weights = wide(error).square().sum(-1)
    weights = weights / tokens.sum(weights.sum(-1, keepdim=True)).clamp_min(torch.finfo(weights.dtype).tiny)
    weights = weights.to(x.dtype).unsqueeze(-2)
    return tokens.sum((weights @ x).squeeze(-2)), tokens.sum((weights @ error).squeeze(-2))


def ghost(
    kind: str, x: Tensor, error: Tensor, rows: tuple[Tensor, Tensor, Tensor], loss_denominator: Tensor | int,
    placement: Placement | None = None,
) -> Tensor:  # fmt: skip
    """The ghost gradients' loss of one kind, "residual" or "pull"; rows: W_enc, b_enc, W_dec of the dead latents."""
    W_enc, b_enc, W_dec = rows
    if kind == "pull":
        return ghost_pull(x, error, W_enc, W_dec, placement)
    return ghost_residual(x, error, W_enc, b_enc, W_dec, loss_denominator, placement)
