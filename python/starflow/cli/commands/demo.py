"""`starflow demo`: show the shipped model, train another, sample, score, and write a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from starflow.cli.options import PROG, Command, number, path_text


def _run(args: argparse.Namespace) -> int:
    from starflow.cli.demo import demo

    out = Path(args.out)
    figures = demo(out, steps=args.steps, seed=args.seed, quiet=args.quiet)
    print(
        f"{out / 'report.html'}: {figures.steps} steps in {figures.train_seconds:.0f} s, "
        f"{figures.bits_per_dim:.3f} bits per dimension on held-out clips; "
        f"{figures.digit_every_frame:.0%} of the sampled clips show the digit asked for in every frame, "
        f"{figures.direction_accuracy:.0%} move as asked for; {figures.sample_seconds:.2f} s for a clip"
    )
    return 0


_DESCRIPTION = f"""Show clips of the model that comes with the package, within seconds; then train a smaller flow on
moving handwritten digits, sample from it, continue and score clips, and write a report with figures and clips. Takes
minutes on two CPU cores and downloads nothing. A demo that was interrupted goes on when the same command is given
again; the trained model is OUT/run.

examples:
  {PROG} demo
  {PROG} demo --steps 2000 --out longer
  {PROG} sample demo/run "a five moving down and left"     more clips from its model"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_text, default="demo", metavar="FOLDER", help="where everything goes (default: demo)"
    )
    parser.add_argument("--steps", type=number(int, 1), metavar="N", help="of training (default: of config digits)")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of everything (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


COMMAND = Command(
    "show the shipped model, train one, sample, score, and write a report", _DESCRIPTION, _add_options, _run
)
