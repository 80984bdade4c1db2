"""How few directions have to be patched for a language model to predict another name, and how large the edit is.

At every token of a prompt and its target, which names another receiver, x is the residual stream after a layer and c a
code of it. Patching the latents F gives

    x' = x + Σ_{i in F} (c̄_i - c_i) f_i        c̄: the target's code, f_i: the latent's direction

The model goes on from x', and its next-token distribution is compared with the target's, KL(patched ‖ target) at the
last token, averaged over prompts. The edit is the mean of ‖x' - x‖ over all tokens. F begins with all latents; for each
threshold τ, ascending, every latent of F in random order is dropped if KL then rises by less than τ over that of the
last accepted F. Tokens before the name in which the two differ have equal codes, and so do latents that are active at
none of the others: they are left out from the start.

Codes: of SAEs, and of the principal components of the rows that SAEs are trained on, as coordinates (both signs at
once) and as directions ± around the mean with codes of at least 0. Source: Cunningham et al. 2023, section 4, and its
public code; KL and the selection as there, prompts and model are others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae.data.hooks import HookedModel, find, input_of, run, with_input
from fastsae.data.models import LanguageModel
from fastsae.data.shards import ShardSource
from fastsae.data.splice import edited
from fastsae.model.sae import SparseAutoencoder
from fastsae.systems.interpretable_directions.prompts import Prompts


class Code(NamedTuple):
    """rows (n, D) -> codes (n, M), dense; and the latents' directions (M, D)."""

    encode: Callable[[Tensor], Tensor]
    directions: Tensor


def of_sae(sae: SparseAutoencoder) -> Code:
    """In the units of the rows: the module's acts times its scale."""
    scale = sae.norm.scale if sae.norm.mode == "constant" else torch.ones(())
    return Code(lambda x: sae.encode(x).to_dense() * scale, sae.W_dec.detach())


def principal(source: ShardSource, *, signed: bool) -> Code:
    """All principal components of a source's rows; signed: each and its opposite, with codes of at least 0."""
    n, total, square = 0, torch.zeros(source.d_in).double(), torch.zeros(source.d_in, source.d_in).double()
    for _, rows in source.iterate(4096):
        x = rows.double()
        n, total, square = n + len(x), total + x.sum(0), square.addmm_(x.T, x)
    mean = total / n
    _, V = torch.linalg.eigh(square / n - torch.outer(mean, mean))
    directions = torch.cat([V.T, -V.T]) if signed else V.T
    W, centre = directions.float(), mean.float()

    def encode(x: Tensor) -> Tensor:
        coordinates = (x - centre) @ W.T
        return coordinates.relu() if signed else coordinates

    return Code(encode, W)


# -- the model from a layer on ----------------------------------------------------------------------------------------


class Patched:
    """A model's predictions for prompts whose residual stream after `layer` layers is given.

    x, goal    (n, T, D) float32: the stream of the prompts and of their targets.
    untouched  (n, vocabulary): the logits after the prompts as they are.
    Raises ValueError for a model that cannot be run from a layer on.
    """

    def __init__(self, model: LanguageModel, layer: int, prompts: Prompts):
        self.model, self.layer, self.prompts = model.model.eval(), layer, prompts
        hooked = HookedModel(self.model, layer)
        self.x, self.goal = hooked(prompts.base).float(), hooked(prompts.target).float()
        with torch.no_grad():
            self._wanted = self._last_logits(prompts.target).double().log_softmax(-1)
            self.untouched = self._last_logits(prompts.base)
        size = float(self.untouched.abs().max())
        if not torch.allclose(self.untouched, self.logits(self.x), rtol=0, atol=1e-3 * size):
            raise ValueError(f"{model.name} cannot be run from layer {layer} on: its logits differ from a whole pass's")

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(n, vocabulary) at the last tokens, for the stream x (n, T, D)."""
        given = x.flatten(0, 1)
        with _idle_before(self.model, self.layer), edited(self.model, self.layer, lambda read, replaced: given):
            return self._last_logits(self.prompts.base)

    def kl(self, x: Tensor) -> float:
        """mean KL(patched ‖ target) in nats, for the stream x (n, T, D)."""
        patched = self.logits(x).double().log_softmax(-1)
        return float((patched.exp() * (patched - self._wanted)).sum(-1).mean())

    def changes(self, code: Code) -> Tensor:
        """c̄ - c (n, T, M), 0 where the prompts and targets cannot differ."""
        places = torch.arange(self.x.shape[1])
        differ = (places >= self.prompts.start[:, None]) & self.prompts.real
        found = self.x.new_zeros(*differ.shape, len(code.directions))
        with torch.no_grad():
            found[differ] = code.encode(self.goal[differ]) - code.encode(self.x[differ])
        return found

    def _last_logits(self, ids: Tensor) -> Tensor:
        """(n, vocabulary) at the last tokens; where the model says which module is its head, of these alone."""
        rows, last = torch.arange(len(ids)), self.prompts.last
        found = getattr(self.model, "get_output_embeddings", None)  # of transformers' models
        head: nn.Module | None = None if found is None else found()

        def last_only(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return with_input(args, kwargs, input_of(args, kwargs)[rows, last][:, None])

        with contextlib.ExitStack() as stack:
            if head is not None:
                stack.enter_context(head.register_forward_pre_hook(last_only, with_kwargs=True))
            output = run(self.model, ids)
        logits = getattr(output, "logits", output)
        return logits[:, 0] if head is not None else logits[rows, last]


@contextlib.contextmanager
def _idle_before(model: nn.Module, layer: int) -> Iterator[None]:
    """While the block runs, the first `layer` layers give what they are given."""
    stack = model.get_submodule(find(model, layer).name.partition(":")[0].rpartition(".")[0])
    idle = list(stack.children())[:layer]
    try:
        for module in idle:
            module.forward = lambda *args, **kwargs: input_of(args, kwargs)
        yield
    finally:
        for module in idle:
            module.__dict__.pop("forward", None)


# -- which latents are needed -----------------------------------------------------------------------------------------


@torch.no_grad()
def select(
    patched: Patched, code: Code, taus: Sequence[float], seed: int, advance: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """The published selection: {"tau", "latents", "kl", "edit"} with all latents that differ (tau 0) and after each τ.

    advance() is called len(taus) · M times, for every latent tried and, at once, for those that are already dropped.
    """
    changes, W = patched.changes(code), code.directions
    kept = (changes != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    edit = changes[..., kept] @ W[kept]
    last = patched.kl(patched.x + edit)
    found = [_point(patched, 0.0, kept, last, edit)]
    for tau in taus:
        dropped = torch.zeros(len(W), dtype=torch.bool)
        for latent in kept[torch.randperm(len(kept), generator=generator)].tolist():
            without = edit - changes[..., latent, None] * W[latent]
            kl = patched.kl(patched.x + without)
            if kl - last < tau:
                edit, last, dropped[latent] = without, kl, True
            advance()
        for _ in range(len(W) - len(kept)):
            advance()
        kept = kept[~dropped[kept]]
        edit = changes[..., kept] @ W[kept]  # without what rounding has added up
        found.append(_point(patched, tau, kept, last, edit))
    return found


def _point(patched: Patched, tau: float, kept: Tensor, kl: float, edit: Tensor) -> dict[str, float]:
    size = edit[patched.prompts.real].norm(dim=-1).mean()
    return {"tau": float(f"{tau:.3g}"), "latents": len(kept), "kl": round(kl, 6), "edit": round(float(size), 4)}


def fewest(points: Sequence[dict[str, float]], kl: float) -> dict[str, float] | None:
    """The point with the fewest latents among those of at most this KL."""
    return min((p for p in points if p["kl"] <= kl), key=lambda p: p["latents"], default=None)
