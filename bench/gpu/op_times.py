"""Single ops of one backend, timed; torch.sparse (cuSPARSE on a GPU) beside them. The tests say if they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import cases, real
from bench.cases import Case, Inputs
from bench.gpu import layouts
from bench.gpu.clock import measure
from bench.gpu.plan import Job, NotThere, Settings
from bench.run import rotating
from fastsae import SparseCodes, UpdateTerm, ops

SECONDS, TOY_SECONDS = 0.6, 0.01
"""How long the timed runs of one call last."""
DEAD = 8
"""One latent in so many is listed in the rows of an encode."""
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


def build(case: Case, device: str) -> Inputs:
    return cases.build(case, real.rows, real.trained, device)


def seconds_of(settings: Settings) -> float:
    return TOY_SECONDS if settings.is_toy else SECONDS


class OpTimes:
    """The items of a job "ops-<case>-<backend>": the ops on the inputs of a case."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        self.device, self.backend, self.seconds = settings.device, job.backend, seconds_of(settings)
        case = self.case = settings.cases[job.case]
        self.inputs = build(case, self.device)
        self.W, self.b = self.inputs.W_enc, self.inputs.b_enc
        # From torch, so that a broken encoder does not keep the other ops from being timed.
        acts, indices = torch.relu(torch.addmm(self.b, self.inputs.x, self.W.T)).topk(case.K, dim=-1)
        indices, order = indices.sort(dim=-1)
        self.codes = SparseCodes(acts.gather(-1, order), indices.int(), case.M)
        self.bar = float(acts[:128, -1].mean())  # about k latents of a token are above it
        self.grad = torch.randn_like(self.inputs.x) * (2 / case.N)

    def __call__(self, item: str) -> dict[str, Any]:
        call, nnz = self.encoder(item) if item.startswith("encode") else (self.call(item), int(self.codes.nnz))
        return {"time": measure(call, self.device, self.seconds, flush=True).in_ms(), "nnz": nnz}

    def encoder(self, item: str) -> tuple[Callable[[], object], int]:
        case, W, b = self.case, self.W, self.b
        kept: dict[str, Any] = {"backend": self.backend}
        kept["screen"] = ops.prepare_screen(W, b, x=self.inputs.x, k=case.K, backend=self.backend)
        if item == "encode_topk rows":  # of every eighth latent, with room for all, as AuxK asks for the dead ones
            rows = torch.full((case.M,), -1, dtype=torch.int32, device=self.device)
            listed = torch.arange(0, case.M, DEAD, dtype=torch.int32, device=self.device)
            rows[: len(listed)] = listed
            kept["rows"] = rows

        def encode(x: Tensor) -> SparseCodes:
            if item == "encode_above":
                return ops.encode_above(x, W, b, self.bar, 2 * case.N * case.K, **kept)[0]
            op = ops.encode_batch_topk if item == "encode_batch_topk" else ops.encode_topk
            return op(x, W, b, case.K, **kept)

        return rotating(self.inputs, encode), int(encode(self.inputs.x).nnz)

    def call(self, item: str) -> Callable[[], object]:
        if item != "update_latents_":
            return op_call(item, self.codes, self.inputs.x, self.inputs.W_dec, self.backend)
        W_enc, W_dec, b_enc, b_dec = (getattr(self.inputs, name).clone() for name in PARAMETERS)
        moments = [torch.zeros_like(p) for p in (W_enc, W_dec, b_enc, b_dec) for _ in range(2)]
        screen = ops.prepare_screen(W_enc, b_enc, backend=self.backend)
        lr = torch.tensor(1e-3, dtype=torch.float64, device=self.device)
        step = torch.ones((), dtype=torch.int64, device=self.device)
        terms = [UpdateTerm(self.codes, self.inputs.x, self.grad)]
        return lambda: ops.update_latents_(
            W_enc, W_dec, b_enc, b_dec, moments, terms, lr=lr, step=step, betas=(0.9, 0.999), eps=1e-8,
            unit_norm=True, pre_bias=True, screen=screen, backend=self.backend,
        )  # fmt: skip


def op_call(op: str, codes: SparseCodes, x: Tensor, W: Tensor, backend: str | None) -> Callable[[], object]:
    """An op on a code; active_outer without the regrouping by latent."""
    match op:
        case "decode":
            return lambda: ops.decode(codes, W, backend=backend)
        case "decode_error":
            return lambda: ops.decode_error(codes, W, x, backend=backend)
        case "active_dot":
            return lambda: ops.active_dot(x, codes, W, backend=backend)
        case "by_latent":
            return lambda: ops.by_latent(codes, backend=backend)
        case "active_outer":
            order = ops.by_latent(codes, backend=backend)
            return lambda: ops.active_outer(codes, x, codes.d_sae, by_latent=order, backend=backend)
    raise LookupError(f"{op} is no op of this job")


def sparse_call(op: str, codes: SparseCodes, x: Tensor, W: Tensor) -> Callable[[], object]:
    """The same by torch.sparse; the code is a CSR tensor, and its transpose another, made outside the timing."""
    A = codes.to_torch_sparse_csr()
    if op == "active_outer":
        At = A.transpose(0, 1).to_sparse_csr()
        return lambda: torch.sparse.mm(At, x)
    if op == "decode":
        return lambda: torch.sparse.mm(A, W)

    def dots() -> Tensor:
        return torch.sparse.sampled_addmm(A, x, W.mT, beta=0.0)

    try:
        dots()
    except RuntimeError as error:
        if "sampled_addmm" not in str(error):
            raise
        raise NotThere(f"torch.sparse.sampled_addmm is not there for this device: {error}") from error
    return dots


class CodeTimes:
    """The items of the jobs "codes-<case>-<backend>", and of "codes-<case>", torch.sparse: "<op> <layout>"."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        case = self.case = settings.cases[job.case]
        self.device, self.backend, self.seconds = settings.device, job.backend, seconds_of(settings)
        generator = torch.Generator(self.device).manual_seed(case.seed)
        self.x, self.W = (torch.randn(n, case.D, generator=generator, device=self.device) for n in (case.N, case.M))

    def __call__(self, item: str) -> dict[str, Any]:
        op, layout = item.split()
        codes = layouts.make(layout, self.case, self.device)
        given = (op, codes, self.x, self.W)
        call = sparse_call(*given) if self.backend is None else op_call(*given, self.backend)
        return {"time": measure(call, self.device, self.seconds, flush=True).in_ms(), "nnz": int(codes.nnz)}
