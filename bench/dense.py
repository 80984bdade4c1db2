"""The two references in plain torch: the dense step as a good PyTorch user writes it, and the sparse-eager one.

Both train W_enc (M, D), b_enc (M), W_dec (M, D), b_dec (D) on mse = mean over tokens of the squared error, with the
decoder's gradient projected, Adam(fused=True), and the decoder's rows renormalized: the same step as fastsae's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Inputs
from bench.timing import Mark, unmarked

LR = 1e-6
"""For timing: every contestant takes the same step, small enough that a case keeps its weights while it is timed."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How fp32 products are computed meanwhile: "highest" in fp32, "high" in TF32 on a GPU that has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Dense:
    """F.linear, relu, topk, scatter, matmul, mse, backward, fused Adam.

    autocast: in bfloat16, weights kept in fp32. tf32: fp32 products on the tensor cores, with TF32's ten bits.
    """

    def __init__(self, inputs: Inputs, k: int, *, autocast: bool = False, tf32: bool = False, lr: float = LR) -> None:
        self.name = "dense bf16" if autocast else "dense tf32" if tf32 else "dense fp32"
        self.k = k
        self.autocast, self.products = autocast, "high" if tf32 else "highest"
        tensors = (inputs.W_enc, inputs.b_enc, inputs.W_dec, inputs.b_dec)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (nn.Parameter(t.clone()) for t in tensors)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)

    def parameters(self) -> list[nn.Parameter]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]

    def precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast:
            return torch.autocast(self.W_enc.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def topk(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """acts and indices (N, K), and the shape of the pre-acts they were chosen from."""
        pre_acts = torch.relu(F.linear(x - self.b_dec, self.W_enc, self.b_enc))
        acts, indices = pre_acts.topk(self.k, dim=-1)
        return acts, indices, pre_acts.shape

    def decode(self, acts: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        dense = torch.zeros(shape, dtype=acts.dtype, device=acts.device).scatter(-1, indices, acts)
        return dense @ self.W_dec + self.b_dec

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with fp32_products(self.products), self.precision():
            acts, indices, _ = self.topk(x)
        return acts, indices

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with fp32_products(self.products), self.precision():
            return self.decode(*self.topk(x)).float()

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        with fp32_products(self.products):
            with self.precision():
                code = self.topk(x)
                mark("encode")
                recon = self.decode(*code)
                mark("decode")
            loss = (recon.float() - x).square().sum(-1).mean()
            mark("loss")
            loss.backward()
            self.update()
            mark("update")
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Project the decoder's gradient, Adam, renormalize: the rows have norm 1 before and after."""
        assert self.W_dec.grad is not None
        self.project(self.W_dec.grad, self.W_dec)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.renormalize(self.W_dec)

    @staticmethod
    def project(grad: Tensor, W: Tensor) -> None:
        grad.sub_((grad * W).sum(-1, keepdim=True) * W)

    @staticmethod
    def renormalize(W: Tensor) -> None:
        W.div_(W.norm(dim=-1, keepdim=True))

    def state_bytes(self) -> int:
        return bytes_of([*self.parameters(), *optimizer_tensors(self.optimizer)])


class Compiled(Dense):
    """Dense through torch.compile: forward with backward, projection, renormalization. Adam is fused already."""

    def __init__(self, inputs: Inputs, k: int, *, autocast: bool = False, tf32: bool = False, lr: float = LR) -> None:
        super().__init__(inputs, k, autocast=autocast, tf32=tf32, lr=lr)
        self.name += " compiled"
        # The same function objects live as long as this does, so that a second step meets what the first compiled.
        self.compiled_loss = torch.compile(self.loss, dynamic=False)
        self.compiled_topk = torch.compile(self.topk, dynamic=False)
        self.project = torch.compile(Dense.project, dynamic=False)  # type: ignore[method-assign]
        self.renormalize = torch.compile(Dense.renormalize, dynamic=False)  # type: ignore[method-assign]

    def loss(self, x: Tensor) -> Tensor:
        return (self.decode(*self.topk(x)).float() - x).square().sum(-1).mean()

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with fp32_products(self.products), self.precision():
            acts, indices, _ = self.compiled_topk(x)
        return acts, indices

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        with fp32_products(self.products):
            with self.precision():
                loss = self.compiled_loss(x)
            mark("loss")
            loss.backward()
            self.update()
            mark("update")
        return loss.detach()


class SparseEager(Dense):
    """The step with torch's own sparse ops: dense top-k, embedding_bag decode, index_add dictionary gradients.

    The gradients are written out, chunk by chunk of tokens, so that N·K·D is never materialised: autograd would.
    autocast: the encoder's product and top-k in bfloat16, all else in fp32, where it is not slower.
    """

    GPU_CHUNK = 2**29
    """Bytes that a chunk of gathered rows may take on a GPU, which many small launches slow; else it is 256 tokens."""

    def __init__(self, inputs: Inputs, k: int, *, autocast: bool = False, lr: float = LR) -> None:
        super().__init__(inputs, k, autocast=autocast, lr=lr)
        self.name = "sparse eager" + (" bf16" if autocast else "")

    def decode(self, acts: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        return F.embedding_bag(indices, self.W_dec, per_sample_weights=acts.float(), mode="sum") + self.b_dec

    @torch.no_grad()
    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        with self.precision():
            acts, indices, shape = self.topk(x)
        acts = acts.float()
        mark("encode")
        recon = self.decode(acts, indices, shape)
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
