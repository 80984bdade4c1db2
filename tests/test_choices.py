"""Which GPU backend goes first: the table, the command that writes it, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import choices, moved, plan
from bench.gpu.plan import Job
from bench.gpu.store import Store
from bench.results import RESULTS
from fastsae import ops
from fastsae.backends import choice

MACHINE = {"device": "NVIDIA H100", "source": "0" * 12, "torch": "2", "triton": "3", "size": "full", "plant": None,
           "commit": "abc", "date": "2026-01-01"}  # fmt: skip


def measure(root: Path, folder: str, times: dict[str, dict[str, float]], **machine: Any) -> None:
    """Writes made-up results of a run: {"ops-big-cuda": {"decode": ms}}."""
    store = Store(root / folder / "gpu", MACHINE | machine)
    store.begin()
    for name, items in times.items():
        for item, ms in items.items():
            result = {"status": "ok", "time": {"ms": ms, "p20": ms, "p80": ms, "runs": 3}}
            store.put(Job(name, "ops", (item,), "big"), item, result, plan.BIG)


def costs(table: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    return {(line["op"], line["kind"]): line["cost"] for line in table["lines"]}


def test_the_committed_table_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "choices.json"
    assert choices.main(["--out", str(out)]) == 0
    assert out.read_text() == choices.TARGET.read_text(), "the committed table is old: run python -m bench.gpu.choices"
    assert choices.table(RESULTS)["lines"] == json.loads(choices.TARGET.read_text())["lines"]
    assert tuple(json.loads(out.read_text())[key] for key in ("source", "unit")) == (choice.SOURCE, choice.UNIT)


def test_without_timings_bytes_decide(tmp_path: Path) -> None:
    table = choices.table(tmp_path)
    assert table["unit"] == "GB"
    assert "nothing has been measured yet" in table["source"]
    found = costs(table)
    assert list(found) == list(moved.KINDS)
    assert {op for op, _ in found} == {*plan.OPS, "prepare_screen"}
    for line in (("encode_topk", "fixed"), ("decode", "fixed"), ("active_dot", "fixed"), ("active_outer", "ragged")):
        assert found[line]["cuda"] == found[line]["triton"], line
    dearer = {line for line, cost in found.items() if cost["triton"] < cost["cuda"]}
    assert dearer == {("encode_topk", "rows")}


def test_bytes_are_the_arithmetic_of_the_docstring() -> None:
    case = plan.BIG
    nnz, gather = case.N * case.K, case.N * case.K * case.D * 4
    assert moved.of("cuda", "decode", "fixed", case) == gather + 8 * nnz + 4 * case.N * case.D
    rows = [moved.of(backend, "encode_topk", "rows", case) for backend in moved.BACKENDS]
    assert rows[0] - rows[1] == (3 * case.M - case.M // 8) * case.D * 2
    assert moved.radix_sort("triton", nnz, case.M) == nnz * (8 + 4 + 4 * 24)
    assert moved.radix_sort("cuda", nnz, case.M) == nnz * (4 + 4 + 3 * 16)
    heavy, length = moved.heavy_tokens(case)
    assert heavy == 82
    others = (nnz - heavy * length) / (case.N - heavy)
    assert length == pytest.approx(100 * others)
    with pytest.raises(LookupError, match="is not counted"):
        moved.of("cuda", "sum", "fixed", case)


def test_timings_flip_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"decode": 0.4, "by_latent": 0.2}
    measure(tmp_path, "h100", {
        "ops-big-cuda": {"decode": 2.0, "encode_topk rows": 9.0, "active_dot": 1.0},
        "ops-big-triton": {"decode": 1.5, "encode_topk rows": 12.0},
        "ops-small-cuda": small, "ops-small-triton": small | {"by_latent": 0.3},
        "codes-big-cuda": {"decode ragged": 1.0, "decode heavy": 4.0},
        "codes-big-triton": {"decode ragged": 2.0, "decode heavy": 2.0},
    })  # fmt: skip
    table = choices.table(tmp_path)
    assert table["unit"] == "ms"
    assert "NVIDIA H100, commit abc, 2026-01-01" in table["source"]
    found = costs(table)
    assert found["decode", "fixed"] == {"cuda": 2.0, "triton": 1.5}
    assert found["decode", "ragged"] == {"cuda": 5.0, "triton": 4.0}
    assert found["encode_topk", "rows"] == {"cuda": 9.0, "triton": 12.0}
    assert found["by_latent", "fixed"] == {"cuda": 0.2, "triton": 0.3}, "the small case should count here"
    lines = {(line["op"], line["kind"]): line for line in table["lines"]}
    assert lines["active_dot", "fixed"]["unit"] == "GB", "only one backend was timed"
    assert "unit" not in lines["decode", "fixed"]
    assert json.loads(choices.text(table)) == table

    codes = ops.encode_topk(torch.ones(2, 4), torch.eye(4), torch.zeros(4), 2, backend="reference")
    decode = (codes.acts, codes.indices, torch.eye(4))
    assert choice.first("decode", decode) == "cuda"
    monkeypatch.setattr(choice, "COSTS", found)
    assert choice.first("decode", decode) == "triton"


def test_the_newest_whole_run_counts(tmp_path: Path) -> None:
    def both(cuda: float, triton: float) -> dict[str, dict[str, float]]:
        return {"ops-big-cuda": {"decode": cuda}, "ops-big-triton": {"decode": triton}}

    measure(tmp_path, "older", both(1, 2))
    measure(tmp_path, "newer", both(4, 3), date="2026-02-02")
    measure(tmp_path, "planted", both(5, 6), date="2026-03-03", plant="decode:wrong")
    measure(tmp_path, "toy", both(7, 8), date="2026-04-04", size="toy")
    measure(tmp_path, "one-backend", {"ops-big-triton": {"decode": 9}}, date="2026-05-05")
    assert costs(choices.table(tmp_path))["decode", "fixed"] == {"cuda": 4, "triton": 3}


def test_kinds_of_calls() -> None:
    x, W, b = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8)
    rows, gate = torch.zeros(3, dtype=torch.int32), torch.zeros(8)
    acts, flat, offsets = torch.zeros(2, 3), torch.zeros(5), torch.zeros(3, dtype=torch.int64)
    for op, tensors, kind in (
        ("encode_topk", (x, W, b), "fixed"),
        ("encode_topk", (x, W, b, gate), "fixed"),
        ("encode_topk", (x, W, b, rows, gate), "rows"),
        ("encode_above", (x, W, b, gate), "fixed"),
        ("decode", (acts, acts.int(), W), "fixed"),
        ("decode", (flat, flat.int(), offsets, W), "ragged"),
        ("decode_error", (flat, flat.int(), offsets, W, x), "ragged"),
        ("active_dot", (x, acts, acts.int(), W), "fixed"),
        ("active_dot", (x, flat, flat.int(), offsets, W), "ragged"),
        ("active_outer", (flat, flat.int(), offsets, x), "ragged"),
        ("by_latent", (acts, acts.int()), "fixed"),
        ("update_latents_", (W, W, b, b), "fixed"),
    ):
        assert choice.kind_of(op, tensors) == kind, op
        assert (op, kind) in moved.KINDS


def test_the_cheaper_backend_goes_first_and_cuda_wins_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, rows = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8), torch.zeros(3, dtype=torch.int32)
    costs = {("encode_topk", "fixed"): {"cuda": 1, "triton": 1}, ("encode_topk", "rows"): {"cuda": 2, "triton": 1}}
    monkeypatch.setattr(choice, "COSTS", costs)
    assert choice.first("encode_topk", (x, W, b)) == "cuda"
    assert choice.first("encode_topk", (x, W, b, rows)) == "triton"
    assert choice.first("by_latent", (x, rows)) == "cuda", "an op without a line"
