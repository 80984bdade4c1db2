"""The functional interface of the engine, over the raw ops torch.ops.fastsae.*.

    encode.py           encode_topk, encode_above, encode_batch_topk; encode_by for your own selection; prepare_screen
    held.py             HeldScreen: an encoder's low-precision copy, held while its weights rest
    products.py         decode, decode_error, active_dot, active_outer, by_latent
    update.py           update_latents_: the backward and the optimizer step of a whole SAE
    reconstruction.py   squared_errors, from which losses are built
    ledger.py           what backward passes keep for a fused update; gradients.py: the same as ordinary tensors
    register.py         how an op becomes torch.ops.fastsae.<op>; checks.py: the checks of arguments and their messages

Every function takes leading batch dimensions, which are flattened on the way in and restored on the way out, and
`backend=None|"reference"|"cpu"|...`: None takes the fastest backend that supports the call; a name raises, with the
reason, if that backend does not. All of them are deterministic, work for N = 0, and are differentiable where that makes
sense.
precision="exact" returns the fp32 answer even if a backend screens in a narrower format first; "screened" trusts the
screen, so its selection depends on the screen's format; "fp32" does not screen.

Errors: ValueError for shapes, sizes and names, TypeError for dtypes, IndexError for codes that point outside the
dictionary, fastsae.BackendError for a backend that cannot serve.
"""

from fastsae.ops.encode import encode_above, encode_batch_topk, encode_by, encode_topk, prepare_screen
from fastsae.ops.held import HeldScreen
from fastsae.ops.products import active_dot, active_outer, by_latent, decode, decode_error
from fastsae.ops.update import update_latents_

__all__ = [
    "HeldScreen", "active_dot", "active_outer", "by_latent", "decode", "decode_error", "encode_above",
    "encode_batch_topk", "encode_by", "encode_topk", "prepare_screen", "update_latents_",
]  # fmt: skip
