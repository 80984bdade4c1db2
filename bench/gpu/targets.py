"""The targets of a GPU, and whether the results reach them: computed from the result files and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""{job name: its file}."""


@dataclass(frozen=True)
class Target:
    """what; the bar as text; the value, None where it was not measured; and its text."""

    what: str
    bar: str
    value: str
    verdict: str


def items(results: Results, *jobs: str) -> dict[str, Any]:
    """The items of these jobs, together."""
    found: dict[str, Any] = {}
    for job in jobs:
        found |= results.get(job, {}).get("items", {})
    return found


def is_of(job: str, kind: str, case: str) -> bool:
    """Whether a job is "<kind>-<case>", or a backend's, "<kind>-<case>-<backend>"."""
    return job == f"{kind}-{case}" or job.startswith(f"{kind}-{case}-")


@dataclass(frozen=True)
class Best:
    """The fastest of fastsae's whole steps of a case: which, of which backend; entry: that backend's plain step."""

    ms: float
    who: str
    entry: Mapping[str, Any]


def theirs(results: Results, case: str, name: str) -> float | None:
    entry = items(results, f"steps-{case}", f"more-steps-{case}").get(name, {})
    return entry["step"]["ms"] if "step" in entry else None


def ours(results: Results, case: str) -> Best | None:
    """With or without a CUDA graph, of whichever backend is fastest."""
    found = [
        Best(entry["step"]["ms"], f"{name}, {job.removeprefix(f'steps-{case}-')}", content["items"].get("fastsae", {}))
        for job, content in results.items() if job.startswith(f"steps-{case}-")
        for name, entry in content["items"].items() if name in ("fastsae", "fastsae graph") and "step" in entry
    ]  # fmt: skip
    return min(found, key=lambda best: best.ms, default=None)


def verdict(value: float | None, bar: float, at_most: bool) -> str:
    if value is None:
        return "not measured"
    return "reached" if (value <= bar if at_most else value >= bar) else "missed"


def _time(results: Results, case: str, bar: float) -> Target:
    found = ours(results, case)
    text = "-" if found is None else f"{found.ms:.3g} ms ({found.who})"
    value = None if found is None else found.ms
    return Target(f"whole exact step, {case} case", f"≤ {bar:g} ms", text, verdict(value, bar, at_most=True))


def _ratio(results: Results, case: str, other: str, bar: float) -> Target:
    found, ms = ours(results, case), theirs(results, case, other)
    value = ms / found.ms if found and ms else None
    text = "-" if value is None or found is None else f"{value:.2f}× ({ms:.3g} / {found.ms:.3g} ms)"
    return Target(f"against {other}, {case} case", f"≥ {bar:g}×", text, verdict(value, bar, at_most=False))


def _skew(results: Results, case: str, bar: float) -> Target:
    skewed, uniform = ours(results, case), ours(results, "small")
    value = skewed.ms / uniform.ms if skewed and uniform else None
    text = "-" if value is None else f"{value:.2f}×"
    return Target(f"{case} use of latents against uniform use", f"≤ {bar:g}×", text, verdict(value, bar, at_most=True))


def _plain_step(results: Results, case: str) -> Mapping[str, Any]:
    found = ours(results, case)
    return {} if found is None else found.entry


def _memory(results: Results, case: str) -> Target:
    entry = _plain_step(results, case)
    peak, bound = entry.get("extra_peak_bytes"), entry.get("memory_bound_bytes")
    bar = "≤ 10 % of (N, M) in bf16 + 8·N·D" + ("" if bound is None else f" = {bound / 1e6:,.0f} MB")
    text = "-" if peak is None else f"{peak / 1e6:,.0f} MB"
    return Target(f"peak extra memory of a step, {case} case", bar, text, verdict(peak, bound or 0.0, at_most=True))


def _encode_by_k(results: Results) -> Target:
    """Of the backend that encodes the base fastest."""
    found = []
    for job in results:
        sweep = items(results, job) if job.startswith("sweep-") else {}
        few, many = (sweep.get(name, {}).get("encode", {}).get("ms") for name in ("sweep-base", "sweep-K-256"))
        if few and many:
            found.append((few, many / few))
    value = min(found)[1] if found else None
    text = "-" if value is None else f"{value:.2f}×"
    return Target("encode from K = 32 to 256", "≤ 1.3×", text, verdict(value, 1.3, at_most=True))


def _redone(results: Results, case: str) -> Target:
    share = _plain_step(results, case).get("redone_share")
    text = "-" if share is None else f"{share:.3%}"
    return Target(f"tokens selected again, {case} case", "≤ 1 %", text, verdict(share, 0.01, at_most=True))


def targets(results: Results) -> list[Target]:
    """Every target, in the order of its weight. Times are meant for an H200."""
    return [
        _time(results, "big", 27),
        _ratio(results, "big", "dense bf16 compiled", 3.5),
        _ratio(results, "big", "sparsify", 2.5),
        _time(results, "small", 1.8),
        _skew(results, "zipf", 1.3),
        _skew(results, "hot", 1.3),
        _memory(results, "small"),
        _memory(results, "big"),
        _encode_by_k(results),
        *(_redone(results, case) for case in ("small", "big", "zipf", "hot")),
    ]
