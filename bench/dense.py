"""The two references in plain torch: the dense step as a good PyTorch user writes it, and the sparse-eager one.

Both train W_enc (M, D), b_enc (M), W_dec (M, D), b_dec (D) and the parameters of the rule. The loss is mse, the mean
over tokens of the squared error, plus the rule's own losses. The step projects the decoder's gradient, calls
Adam(fused=True) and renormalizes the decoder's rows: the same step as fastsae's. The mathematics is that of
fastsae.reference, with torch.topk in place of the stable sort: it is faster and promises no order among ties.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Inputs
from bench.timing import Mark, unmarked
from fastsae import SparseAutoencoder, reference
from fastsae.model.rules import AbsTopK, Activation, BatchTopK, GroupMax, HierarchicalTopK, Matryoshka, TopK
from fastsae.reference import wide

LR = 1e-6
"""For timing: every contestant takes the same step, so small that the case's weights barely change meanwhile."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Sets how fp32 products are computed inside: "highest" in fp32, "high" in TF32 on a GPU that has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


class Code(NamedTuple):
    """Which latents are active. For a fixed number per token acts and indices (N, K), and pre is relu(pre-acts), which
    autograd keeps anyway; else acts (N, M), indices None, and pre the pre-acts. pre is (N, M) always.
    """

    pre: Tensor
    acts: Tensor
    indices: Tensor | None = None


class Forward(NamedTuple):
    """loss and mse 0-d, in the graph; acts: the active latents' acts in any shape, the others 0 or left out."""

    loss: Tensor
    mse: Tensor
    acts: Tensor


def scattered(code: Code, ranks: slice = slice(None)) -> Tensor:
    """A (N, M), of the latents of these ranks alone."""
    if code.indices is None:
        return code.acts
    zeros = torch.zeros(code.pre.shape, dtype=code.acts.dtype, device=code.acts.device)
    return zeros.scatter(-1, code.indices[:, ranks], code.acts[:, ranks])


def keep_batch_top_k(pre: Tensor, k: int) -> Tensor:
    """relu(pre) with all but the N·k largest of the batch set to 0."""
    flat = torch.relu(pre).flatten()
    acts, places = flat.topk(pre.shape[0] * k, sorted=False)
    return torch.zeros_like(flat).scatter(0, places, acts).view_as(pre)


def keep_group_max(pre: Tensor, k: int) -> Tensor:
    """relu(pre) at the largest entry of each of k groups."""
    grouped = torch.relu(pre).unflatten(-1, (k, -1))
    acts, indices = grouped.max(dim=-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, indices, acts).flatten(-2)


def keep_abs_top_k(pre: Tensor, k: int) -> Tensor:
    """pre at its k largest magnitudes of each token."""
    places = pre.abs().topk(k, dim=-1).indices
    return torch.zeros_like(pre).scatter(-1, places, pre.gather(-1, places))


class Dense:
    """F.linear, the rule, scatter, matmul, mse, backward, fused Adam: (N, M) throughout.

    rule: or the k of a TopK. rule_state: the rule's parameters and buffers to start from; None: a new SAE's.
    autocast: in bfloat16, weights kept in fp32. tf32: fp32 products on the tensor cores, with TF32's ten bits.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self,
        inputs: Inputs,
        rule: Activation | int,
        *,
        autocast: bool = False,
        tf32: bool = False,
        lr: float = LR,
        rule_state: Mapping[str, Tensor] | None = None,
        pre_bias: bool = True,
        unit_norm: bool = True,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.name = "dense bf16" if autocast else "dense tf32" if tf32 else "dense fp32"
        self.rule = rule if isinstance(rule, Activation) else TopK(rule)
        self.autocast, self.products, self.lr = autocast, "high" if tf32 else "highest", lr
        self.pre_bias, self.unit_norm, self.normalize = pre_bias, unit_norm, normalize
        for name in WEIGHTS:
            setattr(self, name, nn.Parameter(getattr(inputs, name).clone()))
        learnt = self.rule.new_parameters(len(self.b_enc))
        state = {**learnt, **self.rule.new_buffers()} if rule_state is None else rule_state
        self.rule_state = {name: t.detach().clone().to(self.b_enc.device) for name, t in state.items()}
        self.rule_state |= {name: nn.Parameter(self.rule_state[name]) for name in learnt} | {"b_enc": self.b_enc}
        self.learnt = tuple(learnt)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)

    @classmethod
    def of_sae(cls, sae: SparseAutoencoder, lr: float, *, autocast: bool = False) -> Self:
        """With the settings and weights of an SAE, which stays as it is.

        Raises ValueError for settings that it does not know.
        """
        plain = {"tied": False, "skip": False, "layers": 1, "aux_k": None, "ghost": None, "loss": "mse"}
        odd = [f"{name}={getattr(sae, name)!r}" for name, value in plain.items() if getattr(sae, name) != value]
        if odd or sae.d_out != sae.d_in:
            what = ", ".join(odd) or f"d_out={sae.d_out}"
            raise ValueError(f"the dense version has no {what}; it knows an SAE with the mse of its own input only")
        weights: dict[str, Tensor] = {name: getattr(sae, name).detach() for name in WEIGHTS}
        inputs = Inputs(batches=(), provenance="an SAE", **weights)
        return cls(
            inputs, sae.activation, autocast=autocast, lr=lr, rule_state=sae.rule_state, pre_bias=sae.pre_bias,
            unit_norm=sae.decoder_norm == "unit",
            normalize=lambda x: sae.norm.normalize(x, sae.norm.statistics(x)),
        )  # fmt: skip

    def parameters(self) -> list[Tensor]:
        """W_enc, b_enc, W_dec, b_dec, then what the rule learns."""
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec, *(self.rule_state[name] for name in self.learnt)]

    def state_bytes(self) -> int:
        return bytes_of([*self.parameters(), *optimizer_tensors(self.optimizer)])

    def precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast:
            return torch.autocast(self.W_enc.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def code(self, x: Tensor) -> Code:
        """Which latents of x (N, D) are active, and how much."""
        pre = F.linear(x - self.b_dec if self.pre_bias else x, self.W_enc, self.b_enc)
        rule = self.rule.inner if isinstance(self.rule, Matryoshka) else self.rule
        if isinstance(rule, (TopK, HierarchicalTopK)):
            pre = torch.relu(pre)
            return Code(pre, *pre.topk(rule.k if isinstance(rule, TopK) else rule.ks[-1], dim=-1))
        if isinstance(rule, BatchTopK):
            return Code(pre, keep_batch_top_k(pre, rule.k))
        if isinstance(rule, GroupMax):
            return Code(pre, keep_group_max(pre, rule.k))
        if isinstance(rule, AbsTopK):
            return Code(pre, keep_abs_top_k(pre, rule.k))
        return Code(pre, rule.activate(pre, rule.per_latent(self.rule_state)))

    def recons(self, code: Code) -> list[tuple[Tensor, float]]:
        """Each reconstruction in the loss, with its weight; a nested rule makes each from the one before."""
        rule, W = self.rule, self.W_dec
        recon: Tensor = self.b_dec
        out: list[tuple[Tensor, float]] = []
        if isinstance(rule, Matryoshka):  # of growing prefixes of the dictionary: products of slices
            A, ends = scattered(code), rule.ends(len(W), self.rule_state, W.device).tolist()
            for (start, end), weight in zip(pairwise((0, *ends)), rule.each_weight, strict=True):
                recon = recon + A[:, start:end] @ W[start:end]
                out.append((recon, weight))
        elif isinstance(rule, HierarchicalTopK):  # of the k strongest for growing k, from one top-k, which is sorted
            for (a, b), weight in zip(pairwise((0, *rule.ks)), rule.each_weight, strict=True):
                recon = recon + scattered(code, slice(a, b)) @ W
                out.append((recon, weight))
        else:
            out.append((scattered(code) @ W + recon, 1.0))
        return out

    def forward(self, x: Tensor, penalty_scale: float = 1.0, mark: Mark = unmarked) -> Forward:
        """x (N, D), normalized."""

        def squared_error(recon: Tensor) -> Tensor:
            return (wide(recon) - x).square().sum(-1).mean()

        with self.precision():
            code = self.code(x)
            mark("encode")
            recons = self.recons(code)
            mark("decode")
            errors = [squared_error(recon) for recon, _ in recons]
            loss = torch.stack([e * weight for e, (_, weight) in zip(errors, recons, strict=True)]).sum()
            rule, rows = self.rule, self.rule.per_latent(self.rule_state)
            norms = reference.decoder_norms(self.W_dec) if rule.needs_norms else self.b_enc.new_ones(())
            sparsity = rule.sparsity(code.pre, code.acts, rows, norms)
            if sparsity is not None:
                mean = sparsity.sum(dtype=x.dtype) / len(x)  # in bfloat16 it would be rounded to three digits
                loss = loss + penalty_scale * rule.weight(self.rule_state) * rule.penalty(mean)
            gate = rule.gate(code.pre)
            if gate is not None:
                loss = loss + squared_error(gate @ self.W_dec.detach() + self.b_dec.detach())
        mark("loss")
        return Forward(loss, errors[-1], code.acts)

    def normalized(self, x: Tensor) -> Tensor:
        return x if self.normalize is None else self.normalize(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """acts and indices, as `Code` has them."""
        with fp32_products(self.products), self.precision():
            return self.code(self.normalized(x))[1:]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with fp32_products(self.products), self.precision():
            return self.recons(self.code(self.normalized(x)))[-1][0].float()

    @torch.no_grad()
    def metrics(self, x: Tensor, penalty_scale: float = 1.0) -> dict[str, Tensor]:
        """loss, mse, fvu and l0 of x (N, D) in the caller's units, without an update."""
        x = self.normalized(x)
        with fp32_products(self.products):
            found = self.forward(x, penalty_scale)
        variance = (x - x.mean(0)).square().sum() / len(x)
        l0 = (found.acts != 0).sum() / len(x)
        return {"loss": found.loss, "mse": found.mse, "fvu": found.mse / variance, "l0": l0}

    # -- one step -----------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, penalty_scale: float = 1.0, mark: Mark = unmarked) -> Tensor:
        return self.forward(x, penalty_scale, mark).loss

    def step(self, x: Tensor, mark: Mark = unmarked, *, lr_scale: float = 1.0, penalty_scale: float = 1.0) -> Tensor:
        """One update on x (N, D), in the caller's units; returns the loss before it."""
        with fp32_products(self.products):
            loss = self.loss(self.normalized(x), penalty_scale, mark)
            loss.backward()
            self.update(lr_scale)
            mark("update")
        return loss.detach()

    @torch.no_grad()
    def update(self, lr_scale: float = 1.0) -> None:
        """Project the decoder's gradient, Adam, renormalize: a unit decoder's rows have norm 1 before and after."""
        if self.unit_norm:
            assert self.W_dec.grad is not None
            self.project(self.W_dec.grad, self.W_dec)
        self.optimizer.param_groups[0]["lr"] = self.lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.unit_norm:
            self.renormalize(self.W_dec)
        if "batches" in self.rule_state:
            self.rule_state["batches"] += 1  # which prefixes are drawn next

    @staticmethod
    def project(grad: Tensor, W: Tensor) -> None:
        grad.sub_((grad * W).sum(-1, keepdim=True) * W)

    @staticmethod
    def renormalize(W: Tensor) -> None:
        W.div_(W.norm(dim=-1, keepdim=True))


class Compiled(Dense):
    """Dense through torch.compile: forward with backward, projection, renormalization. Adam is fused already."""

    def __init__(self, inputs: Inputs, k: int, *, autocast: bool = False, tf32: bool = False, lr: float = LR) -> None:
        super().__init__(inputs, k, autocast=autocast, tf32=tf32, lr=lr)
        self.name += " compiled"
        # The function objects live as long as this object, so that a second step reuses what the first compiled.
        self.compiled_loss = torch.compile(super().loss, dynamic=False)
        self.code = torch.compile(self.code, dynamic=False)  # type: ignore[method-assign]
        self.project = torch.compile(Dense.project, dynamic=False)  # type: ignore[method-assign]
        self.renormalize = torch.compile(Dense.renormalize, dynamic=False)  # type: ignore[method-assign]

    def loss(self, x: Tensor, penalty_scale: float = 1.0, mark: Mark = unmarked) -> Tensor:
        """A compiled graph has no parts: "loss" is marked at its end."""
        loss = self.compiled_loss(x, penalty_scale)
        mark("loss")
        return loss


class SparseEager(Dense):
    """The step with torch's own sparse ops: dense top-k, embedding_bag decode, index_add dictionary gradients.

    The gradients are written out, chunk by chunk of tokens, so that N·K·D is never materialized; autograd would do so.
    autocast: the encoder's product and top-k in bfloat16, all else in fp32, which is no slower there.
    """

    GPU_CHUNK = 2**29
    """Bytes that a chunk of gathered rows may take on a GPU, where many small launches cost time; else 256 tokens."""

    def __init__(self, inputs: Inputs, k: int, *, autocast: bool = False, lr: float = LR) -> None:
        super().__init__(inputs, k, autocast=autocast, lr=lr)
        self.name, self.k = "sparse eager" + (" bf16" if autocast else ""), k

    def decode(self, acts: Tensor, indices: Tensor) -> Tensor:
        return F.embedding_bag(indices, self.W_dec, per_sample_weights=acts, mode="sum") + self.b_dec

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        acts, indices = self.encode(x)
        return self.decode(acts.float(), indices)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, indices = super().encode(x)
        assert indices is not None
        return acts, indices

    @torch.no_grad()
    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:  # type: ignore[override]
        acts, indices = self.encode(x)
        acts = acts.float()
        mark("encode")
        recon = self.decode(acts, indices)
        mark("decode")
        error = recon - x
        loss = error.square().sum(-1).mean()
        mark("loss")
        self.backward(x - self.b_dec, acts, indices, error * (2 / x.shape[0]))
        self.update()
        mark("update")
        return loss

    def backward(self, x: Tensor, acts: Tensor, indices: Tensor, grad: Tensor) -> None:
        """x: the encoder's input, b_dec subtracted; grad: dL/d recon. Sets .grad of the four parameters."""
        dW_enc, dW_dec, db_enc = (torch.zeros_like(p) for p in (self.W_enc, self.W_dec, self.b_enc))
        chunk = max(256, self.GPU_CHUNK // (self.k * x.shape[1] * 4) if x.is_cuda else 0)
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            i, g = indices[rows], grad[rows].unsqueeze(1)
            dacts = torch.where(acts[rows] > 0, (F.embedding(i, self.W_dec) * g).sum(-1), 0)
            flat = i.flatten()
            dW_dec.index_add_(0, flat, (acts[rows].unsqueeze(-1) * g).flatten(0, 1))
            dW_enc.index_add_(0, flat, (dacts.unsqueeze(-1) * x[rows].unsqueeze(1)).flatten(0, 1))
            db_enc.index_add_(0, flat, dacts.flatten())
        self.W_enc.grad, self.W_dec.grad, self.b_enc.grad = dW_enc, dW_dec, db_enc
        self.b_dec.grad = grad.sum(0) - db_enc @ self.W_enc  # the second term: b_dec is subtracted from the input too
