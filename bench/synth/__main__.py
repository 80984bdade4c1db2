"""`python -m bench.synth`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import bench.synth as package
from bench import machine, peers
from bench.family.store import Store
from bench.results import RESULTS
from bench.synth import draw, run
from bench.synth.trainers import RULES
from bench.synth.world import Settings, quick


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, evaluates and draws. Returns 2 if SAELens is missing, 130 if it was interrupted."""
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.synth", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=usual.samples, help="samples per rule (default: %(default)s)")
    parser.add_argument("--eval-samples", type=int, default=usual.eval_samples, help="held-out (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=RULES, default=(), help="only these rules")
    parser.add_argument("--device", default=usual.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--autocast", action="store_true", help="SAELens under bf16 autocast, as published")
    parser.add_argument("--world", default=usual.world, help="a saved SyntheticModel: a folder, or a name on the hub")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of weights and samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the script; figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="delete existing results first")
    parser.add_argument("--draw", action="store_true", help="only draw the existing results")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: bench/results/<device>/synth")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick measures nothing worth keeping; name another folder: --out")
    if options.samples < 1 or options.eval_samples < 1:
        parser.error(f"got {options.samples} samples and {options.eval_samples} to judge by, expected 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave the option out")
    device = torch.cuda.get_device_name() if on_gpu else machine.cpu_name()
    folder = options.out or RESULTS / (machine.slug(device) if on_gpu else machine.device_folder()) / "synth"
    if not options.draw:
        if reason := peers.unavailable("sae-lens"):
            print(f"{reason} into .venv-peers: .venv-peers/bin/python -m bench.synth", file=sys.stderr)
            return 2
        chosen = {
            name: getattr(options, name) for name in ("samples", "eval_samples", "device", "autocast", "world", "seed")
        }
        settings = quick(Settings(**chosen)) if options.quick else Settings(**chosen)
        for name in ("synth.json", run.UNFINISHED) if options.fresh else ():
            (folder / name).unlink(missing_ok=True)
        try:
            run.run(Store(folder, "synth"), settings, device, options.only)
        except KeyboardInterrupt as stopped:
            print(str(stopped) or "stopped; the same command goes on", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:  # an OSError: the world does not exist
            parser.error(str(error))
    for path in draw.draw(folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
