"""`python -m bench.interop`: SAELens, dictionary_learning and sparsify, before and after accelerate.

Steps: each library's own training step in fp32, as its trainer makes it, in three versions that take turns: as it is;
with its SAE accelerated and its own torch optimizer; and accelerated with `fastsae.optim.Adam` as the optimizer. All
start from the same weights and get the same batches; the losses of their first steps are compared before anything is
timed. Inference: SAELens' JumpReLUSAE at the shape of a Gemma Scope SAE, as it is, accelerated, and as `fastsae.load`
reads it from SAELens' own files; reconstructions are compared first.
Writes bench/results/<device>/interop.json and the tables of docs/accelerate.md. `.venv-peers` has the libraries
(`make .venv-peers/.installed`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastsae
from bench import cases, peers, real
from bench.cases import Inputs
from bench.dense import LR
from bench.machine import ROOT, describe, device_folder
from bench.plot import milliseconds, table, with_numbers
from bench.results import RESULTS
from bench.run import rotating, shape
from bench.timing import interleaved
from fastsae.atomic import replace_file, write_json

STEPS: dict[str, tuple[str, Callable[[Inputs, int], Any]]] = {
    "sae-lens TopK": ("sae-lens", peers.SAELens),
    "dictionary-learning TopK": ("dictionary-learning", peers.DictionaryLearning),
    "sparsify TopK": ("sparsify", peers.Sparsify),
    "sae-lens Standard": ("sae-lens", partial(peers.SAELens, rule="Standard")),
    "sae-lens Gated": ("sae-lens", partial(peers.SAELens, rule="Gated")),
    "sae-lens JumpReLU": ("sae-lens", partial(peers.SAELens, rule="JumpReLU")),
}
"""What is timed: the library, and its step."""
INFERENCE = cases.of_shape("4096,2304,16384,71")
"""Gemma Scope's layer_20/width_16k/average_l0_71, on random weights with as many latents above their thresholds."""
TOKENS = (1, 64, 4096)
AT_A_THRESHOLD = 1e-3
"""The share of tokens that may have a latent within rounding of its threshold, active in one version only."""
FORMAT = 2
PAGE = ROOT / "docs" / "accelerate.md"
BEGIN, END = "<!-- steps: begin (python -m bench.interop --draw) -->", "<!-- steps: end -->"
AS_IT_IS, SWAPPED, FUSED = WAYS = ("as it is", "accelerated", "accelerated, fastsae.optim")
LOADED = "fastsae.load"
COMPARED = 3
"""Steps whose losses are compared."""
TOLERANCE = 1e-3
"""Relative: fp32 sums of thousands of terms, in another order, three steps on."""


def contestant(name: str, way: str, inputs: Inputs, k: int) -> Any:
    """The step of that name, from the inputs' weights."""
    made = STEPS[name][1](inputs, k)
    if way == AS_IT_IS:
        return made
    if way == FUSED and hasattr(made, "trainer"):
        fastsae.accelerate(made.trainer)
        return made
    fastsae.accelerate(made.sae)
    if way == FUSED:
        made.optimizer = fastsae.optim.Adam(made.sae, lr=LR)
    return made


def measure(name: str, inputs: Inputs, k: int, rounds: int, bar: tqdm) -> dict[str, Any]:
    """Milliseconds of a step in each version. Raises ValueError if a loss differs from the library's own."""
    calls: dict[str, Callable[[], Any]] = {way: rotating(inputs, contestant(name, way, inputs, k).step) for way in WAYS}
    losses = {way: [float(call()) for _ in range(COMPARED)] for way, call in calls.items()}
    for way, found in losses.items():
        for step, (got, expected) in enumerate(zip(found, losses[AS_IT_IS], strict=True)):
            if not abs(got - expected) <= TOLERANCE * abs(expected):
                raise ValueError(
                    f"{name}, {way}: the loss of step {step} is {got:.7g}, but the library's own is {expected:.7g}; "
                    "nothing is timed"
                )
    times = interleaved(calls, rounds, min_seconds=0.2, on_round=lambda _: bar.update())
    return {
        "version": peers.version(STEPS[name][0]), "losses": losses,
        "ways": {way: sample.in_ms() for way, sample in times.items()},
    }  # fmt: skip


def inference(rounds: int, case: cases.Case, bar: tqdm) -> dict[str, Any]:
    """Milliseconds of a reconstruction for each number of tokens and version. Raises ValueError if one differs."""
    lens = importlib.import_module(peers.SAELens.module)
    inputs = cases.build(case, real.rows, real.trained)
    theirs, swapped = (
        lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=case.D, d_sae=case.M, apply_b_dec_to_input=False))
        for _ in (AS_IT_IS, SWAPPED)
    )
    for sae in (theirs, swapped):
        peers.fill(sae, inputs, peers.bar(case.K, case.M))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_model(folder)
        loaded = fastsae.load(folder).eval()
    fastsae.accelerate(swapped)
    saes: dict[str, Callable[[Tensor], Tensor]] = {
        AS_IT_IS: theirs, SWAPPED: swapped, LOADED: lambda x: loaded.decode(loaded.encode(x)),
    }  # fmt: skip
    found = {}
    for tokens in TOKENS:
        x = inputs.x[:tokens]
        with torch.no_grad():
            expected = theirs(x)
            for way, sae in saes.items():
                other = (sae(x) - expected).norm(dim=1) > TOLERANCE * expected.norm(dim=1)
                if int(other.sum()) > AT_A_THRESHOLD * tokens:
                    raise ValueError(
                        f"JumpReLU, {way}: the reconstructions of {int(other.sum())} of {tokens} tokens are not the "
                        f"library's own (to {TOLERANCE:g} of their norm); nothing is timed"
                    )
            times = interleaved(
                {way: partial(sae, x) for way, sae in saes.items()}, rounds, min_seconds=0.2,
                on_round=lambda _: bar.update(),
            )  # fmt: skip
        found[str(tokens)] = {"ways": {way: sample.in_ms() for way, sample in times.items()}}
    return {"version": peers.version("sae-lens"), **{name: getattr(case, name) for name in "DMK"}, "tokens": found}


def shown(result: dict[str, Any]) -> str:
    """The result as Markdown tables: milliseconds, and how many times as fast as the library as it is."""

    def cells(ways: dict[str, dict[str, float]]) -> list[str]:
        own = ways[AS_IT_IS]["ms"]
        return [
            milliseconds(time["ms"]) + ("" if way == AS_IT_IS else f" ({own / time['ms']:.1f}×)")
            for way, time in ways.items()
        ]

    steps = [
        [f"{found['version']} {name.partition(' ')[2]}", *cells(found["ways"])]
        for name, found in result["steps"].items()
    ]
    tables = [table(["training step, ms", *WAYS], steps)]
    if infers := result["inference"]:
        lines = [[f"{int(tokens):,}", *cells(found["ways"])] for tokens, found in infers["tokens"].items()]
        tables.append(table([f"{infers['version']} JumpReLUSAE, tokens", AS_IT_IS, SWAPPED, LOADED], lines))
    return "\n\n".join(tables)


def section(results: Path) -> str:
    """What docs/accelerate.md shows: every device's result, the newest first. Raises ValueError for another format."""
    found = {path: json.loads(path.read_text()) for path in results.glob("*/interop.json")}
    said = []
    for path, result in sorted(found.items(), key=lambda one: one[1]["machine"]["date"], reverse=True):
        if result.get("format") != FORMAT:
            raise ValueError(f"{path} has format {result.get('format')!r}, expected {FORMAT}: run bench.interop again")
        machine = result["machine"]
        cpu = machine["backends"]["cpu"]["detail"]
        sizes = " ".join(f"{name}={result[name]}" for name in "NDMK")
        said.append(
            f"{machine['device']}, {machine['threads']} threads, fastsae's {cpu['isa']} kernels, screened in "
            f"{cpu['screening']}, {sizes} ({path.relative_to(results.parents[1])}):\n\n{shown(result)}"
        )
    return "\n\n".join(said)


def renew(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Puts the tables between the page's markers."""
    text = with_numbers(page.read_text(), section(results), BEGIN, END)
    replace_file(page, lambda partial: partial.write_text(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=shape, metavar="N,D,M,K", help="size of the steps; left out: 4096,768,24576,32")
    parser.add_argument("--steps", nargs="*", choices=tuple(STEPS), default=tuple(STEPS), metavar="STEP",
                        help=f"these only, or none: {', '.join(STEPS)}")  # fmt: skip
    parser.add_argument("--no-inference", action="store_true", help="time only the steps")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the result; left out: bench/results/<device>")
    parser.add_argument("--draw", action="store_true", help="only renew docs/accelerate.md, from the stored results")
    options = parser.parse_args()
    if options.draw:
        renew()
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    for library in dict.fromkeys(
        [STEPS[name][0] for name in options.steps] + ["sae-lens"] * (not options.no_inference)
    ):
        if reason := peers.unavailable(library):
            print(f"{reason} into .venv-peers: .venv-peers/bin/python -m bench.interop", file=sys.stderr)
            return 2
    case = cases.PRIMARY if options.size is None else cases.named(options.size)
    inputs = cases.build(case, real.rows, real.trained)
    sizes = {name: getattr(case, name) for name in "NDMK"}
    result: dict[str, Any] = {"format": FORMAT, "machine": describe(), **sizes, "steps": {}, "inference": None}
    path = (options.out or RESULTS / device_folder()) / "interop.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = len(options.steps) + (0 if options.no_inference else len(TOKENS))
    with tqdm(total=turns * options.rounds, unit="round", disable=None) as bar:
        for name in options.steps:
            bar.set_description(name)
            result["steps"][name] = measure(name, inputs, case.K, options.rounds, bar)
        if not options.no_inference:
            bar.set_description("inference")
            result["inference"] = inference(options.rounds, INFERENCE, bar)
    write_json(path, result)
    print(shown(result))
    print(f"written: {path}")
    if options.out is None:
        renew()
    return 0


if __name__ == "__main__":
    sys.exit(main())
