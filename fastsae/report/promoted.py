"""The tokens that a latent promotes and suppresses: its decoder row read by the unembedding (the logit lens).

    logits_i = W_U (γ ⊙ W_dec_i), less their mean over the vocabulary

W_U (V, D) is the unembedding without its bias, γ (D,) the final norm's weight, folded in; where that norm removes the
mean over the D coordinates (LayerNorm), it is removed from W_dec_i too. The norm's division by the residual stream's
length is left out: it differs from token to token and scales all logits alike. W_dec_i is in the units of the
activations, for an activation of 1: times the scale of normalize="constant"; with "layer_norm" and "standardize" that
scale is per token, and is left out. Only the direct path is included, not the effect through later layers. Float32.
Source: nostalgebraist (2020, "interpreting GPT: the logit lens"); folded and centred as in TransformerLens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsae.data.hooks import in_residual_stream, input_of, run
from fastsae.data.models import load_model
from fastsae.report.html import visible
from fastsae.runs.opening import OpenedRun, language_of_run, other_model

if TYPE_CHECKING:
    from fastsae.model.sae import SparseAutoencoder

TOKENS = 8
"""Tokens shown on either side."""
PIECE = 1 << 13
"""Rows of the unembedding that are in float32 at a time."""


@dataclasses.dataclass(frozen=True)
class Promoted:
    """(visible text, logit) of the tokens of the largest and of the smallest logits, the farthest first."""

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Unembedding:
    """How a model reads its residual stream out."""

    weight: Tensor
    """W_U (V, D)."""
    gain: Tensor
    """γ (D,) float32; 1 where the model has no final norm."""
    centers: bool
    """Whether the final norm removes the mean over D."""


def promoted_of_run(run: OpenedRun, latents: Sequence[int], names: Sequence[str]) -> tuple[dict[int, Promoted], str]:
    """The promoted tokens by latent, by the language model that the run records, and a sentence on how.

    names: the text of every token id. Where there is no such model here, or the latents do not write into its residual
    stream, there are none and the sentence says why; nothing is raised, and nothing downloaded.
    """
    try:
        record = language_of_run(run.config)
        if record is None:
            return {}, ""
        dtype = None if record.dtype is None else getattr(torch, record.dtype)
        model = load_model(record.model, dtype=dtype, head=True, download=False)
        if other := other_model(model, record):
            raise ValueError(other)
        # A transcoder writes at its target; of a crosscoder the last layer's rows are shown.
        written = record.stream.hooks[-1] if record.target is None else record.target
        if not in_residual_stream(model.model, written):
            raise ValueError(f"the output at {written} is not added to the residual stream that the head reads")
        found = promoted(run.sae, latents, unembedding(model.model), names)
    except (ImportError, OSError, ValueError, MemoryError) as error:
        return {}, f"The promoted tokens are left out: {' '.join(str(error).split())}."
    return dict(zip(latents, found, strict=True)), (
        "A latent promotes the tokens whose logits it raises most and suppresses those that it lowers most, by the "
        f"logit lens on {record.model}: its decoder row times the final norm's weight, through the unembedding, less "
        "the mean over the vocabulary. Effects through later layers are not included."
    )


def promoted(
    sae: SparseAutoencoder, latents: Sequence[int], read_out: Unembedding, names: Sequence[str], count: int = TOKENS
) -> list[Promoted]:
    """The tokens that each latent promotes and suppresses, `count` of both. Of a crosscoder, by its last layer's rows.

    names: the text of every token id; rows of the unembedding beyond them are padding and left out.
    Raises ValueError where the rows are not as wide as the residual stream.
    """
    width = read_out.weight.shape[1]
    if sae.d_out != width * sae.layers:
        raise ValueError(f"a latent writes {sae.d_out // sae.layers} numbers, but the residual stream has {width}")
    rows = sae.W_dec.detach()[list(latents)].float().cpu()[:, -width:]
    if sae.norm.mode == "constant":
        rows = rows * sae.norm.scale.float().cpu()
    if read_out.centers:
        rows = rows - rows.mean(1, keepdim=True)
    reading = (rows * read_out.gain).T
    pieces = read_out.weight.detach()[: len(names)].split(PIECE)
    logits = torch.cat([piece.float().cpu() @ reading for piece in pieces])
    logits -= logits.mean(0)

    def ends(largest: bool) -> list[list[tuple[str, float]]]:
        best = logits.topk(min(count, len(logits)), dim=0, largest=largest)
        columns = zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
        return [[(visible(names[i]), value) for i, value in zip(*column, strict=True)] for column in columns]

    return [Promoted(up, down) for up, down in zip(ends(True), ends(False), strict=True)]


def unembedding(model: nn.Module) -> Unembedding:
    """The head's weight, and the norm whose output the head reads, found in one pass over two tokens.

    Raises ValueError for a model without a linear head.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{type(model).__name__} has no linear unembedding")
    outputs: list[tuple[nn.Module, Tensor]] = []
    reads: list[Any] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append((module, output))

    def note_read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        reads.append(input_of(args, kwargs))

    leaves = [m for m in model.modules() if m is not head and not [*m.children()] and [*m.parameters()]]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for leaf in leaves:
            stack.enter_context(leaf.register_forward_hook(note))
        stack.enter_context(head.register_forward_pre_hook(note_read, with_kwargs=True))
        run(model, torch.arange(2)[None])
    read = reads[-1]
    norm = next(
        (m for m, y in outputs if isinstance(y, Tensor) and y.shape == read.shape and torch.equal(y, read)), None
    )
    if norm is None:
        return Unembedding(weight, torch.ones(weight.shape[1]), False)
    return Unembedding(weight, *_gain_of(norm, read))


def _gain_of(norm: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """γ of a norm, and whether it removes the mean, from what it makes of known inputs.

    Its parameter alone would not say: some multiply by 1 + weight.
    """
    width = like.shape[-1]
    x = torch.ones(width)
    x[1::2] = -1
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])  # the mean is 0, and no coordinate is

    def odd_part(v: Tensor) -> Tensor:
        v = v.to(like).expand(1, 1, width)
        with torch.no_grad():
            return ((norm(v).float() - norm(-v).float()) / 2).flatten().cpu()  # without the norm's bias

    gain = odd_part(x) * x.square().mean().sqrt() / x
    return gain, bool(odd_part(torch.ones(width)).abs().max() < 1e-3 * gain.abs().max())
