"""The figures of a report, and the columns that each one shows."""

from __future__ import annotations

from fastsae.report.drawing import C1, C2, C3, Curve, Plot, bar_plot, histogram_plot, line_plot
from fastsae.report.runlog import RunLog, histogram, hooks_of, whole
from fastsae.report.timing import StepTiming

PARTS = ("data", "step", "resample", "eval", "checkpoint")
"""The parts that fastsae.runs.trainer times."""


def all_plots(log: RunLog, timing: StepTiming | None = None) -> list[Plot]:
    """Every figure for which the run has numbers, in reading order."""
    step_of = {"train": C1, "held out": C3}

    def pair(key: str, *, dense: bool = False) -> list[Curve]:
        curves = [Curve("train", *log.series(key), step_of["train"])]
        curves.append(Curve("held out", *log.series(key, of="evals"), step_of["held out"], points=True))
        if dense:
            curves.append(Curve("dense reference", *log.series(key, of="dense"), C2, dashed=True))
        return curves

    evaluation = log.evals[-1] if log.evals else {}
    at = hooks_of(evaluation)
    held = {f" at {one.get('hook')}": histogram(one) for one in at} if len(at) > 1 else {"": histogram(evaluation)}
    dead_after = whole(log.config, "sae", "dead_after")
    patience = "a set number of" if dead_after is None else f"{dead_after:,}"
    plots = [
        line_plot("loss", "Loss", "Training loss with the dead-latent term.", [Curve("loss", *log.series("loss"))],
                  log=True),
        line_plot("fvu", "Fraction of variance unexplained",
                  "0 is perfect; 1 is no better than always answering the mean row.", pair("fvu", dense=True),
                  log=True),
        line_plot("clock", "FVU against the clock", "The same curves over seconds of training.",
                  [Curve("fastsae", *log.series("fvu", x="time_s"), C1),
                   Curve("dense reference", *log.series("fvu", of="dense", x="time_s"), C2, dashed=True)],
                  xlabel="seconds", log=True) if log.series("fvu", of="dense", x="time_s")[0] else None,
        gap_plot(log),
        line_plot("l0", "L0", "Active latents per token.", pair("l0"), from_zero=True),
        line_plot("penalty", "Penalty weight",
                  "Driven to the L0 that was asked for. Below 0 it rewards active latents: without it there are fewer.",
                  [Curve("weight", *log.series("penalty_weight"))], log=True),
        line_plot("dead", "Dead latents",
                  f"Latents that have not been active for {patience} tokens; no latent is dead before that.",
                  [Curve("dead", *log.series("dead"))], from_zero=True),
        *(histogram_plot(*one, where=where, name=f"density{i}") for i, (where, one) in enumerate(held.items()) if one),
        line_plot("lr", "Learning rate", "With warm-up and decay.", [Curve("lr", *log.series("lr"))], from_zero=True),
        line_plot("grad", "Gradient norm", "Over all parameters, before any projection.",
                  [Curve("norm", *log.series("grad_norm"))], log=True),
        line_plot("redone", "Tokens encoded twice",
                  "Share of tokens whose fast selection had no certificate and was repeated; above 1 % costs speed.",
                  [Curve("share", *log.series("redone_share"))], from_zero=True),
        line_plot("speed", "Throughput", "Tokens per second of data and updates, without evaluations and checkpoints.",
                  [Curve("fastsae", *log.series("tokens_per_s")),
                   Curve("dense reference", *log.series("tokens_per_s", of="dense"), C2, dashed=True)],
                  from_zero=True),
        bar_plot("loop", "Time of the training loop by part",
                 "Means over the run; evaluations and checkpoints are averaged over all steps.", loop_parts(log),
                 shares=True),
        None if timing is None else update_plot(timing),
        bar_plot("against", "A whole step, side by side", "Timed in turns on one batch with the trained weights.",
                 {name: times["ms"] for name, times in log.step_times.items()}),
    ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def update_plot(timing: StepTiming) -> Plot | None:
    """The parts of one fused update."""
    caption = (
        f"{timing.n_tokens:,} tokens on {timing.threads} CPU threads, {timing.tokens_per_s:,.0f} tokens/s; timed when "
        "this page was written."
    )
    return bar_plot("parts", "Inside one update", caption, timing.parts, shares=True)


def loop_parts(log: RunLog) -> dict[str, float]:
    """{part: mean ms per step} of the parts of the training loop that have a column ms_PART."""
    names = [f"ms_{part}" for part in PARTS if log.series(f"ms_{part}")[0]]
    # A line without evaluation has no ms_eval: average over all lines, not only over those that have it.
    return {name.removeprefix("ms_").replace("_", " "): sum(log.series(name)[1]) / len(log.metrics) for name in names}


def gap_plot(log: RunLog) -> Plot | None:
    """FVU of this run over the dense reference's at the same steps, as a difference in per cent."""
    dense = dict(zip(*log.series("fvu", of="dense"), strict=True))
    steps, ours = log.series("fvu")
    shared = [(s, 100 * (v / dense[s] - 1)) for s, v in zip(steps, ours, strict=True) if dense.get(s)]
    if not shared:
        return None
    worst = max(abs(v) for _, v in shared)
    return line_plot(
        "gap", "Difference to the dense reference",
        f"FVU relative to the dense reference at equal steps; at most {worst:.2g} % off.",
        [Curve("difference", [s for s, _ in shared], [v for _, v in shared])], ylabel="per cent",
    )  # fmt: skip
