"""A screened score and the bound on its error, as device functions: the formulas of fastsae.backends.gpu.bounds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounded_score(stored, token_scale, p, q, tiny, scale, bias, A, B, ROUNDOFF: tl.constexpr):
    """A stored product as score v and the bound e on its error, both in fp32."""
    v = stored * (token_scale * scale) + bias
    return v, error_of(v, p, q, tiny, bias, A, B, ROUNDOFF)


@triton.jit
def error_of(v, p, q, tiny, bias, A, B, ROUNDOFF: tl.constexpr):
    """e of a score v. A latent of zeros has no error, so that nothing of it survives a bar of 0."""
    slack = tl.where(A + B > 0, tiny, 0.0)
    return p * A + q * B + (tl.abs(v) + tl.abs(bias)) * ROUNDOFF + slack
