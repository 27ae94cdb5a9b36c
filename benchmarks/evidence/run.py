"""Trains and measures rows of the study; a killed run goes on where it was.

    python benchmarks/evidence/run.py paddle/flow/0 paddle/diffusion/0      rows, one after the other
    python benchmarks/evidence/run.py --tune digits/diffusion               the learning rates of a model
    python benchmarks/evidence/run.py --calibrate digits                    the steps that the budget allows

Weights and states are kept under --folder, results are added to --results, one line for each way of sampling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from fit import fit, held_out_loss
from study import RATES, TUNING_SEED, VERSION, Plan, Row, config_of

RESULTS = Path(__file__).parents[1] / "results" / "evidence.jsonl"
# Of a training of tuning, as a share of the steps of the study.
TUNING_SHARE = 4


def add(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to the results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"study": VERSION, **line}) + "\n")


def tune(kind: str, model: str, folder: Path, results: Path) -> None:
    """Trains a model at each of the rates for a quarter of its steps; adds the losses on held-out clips."""
    row = Row.parse(f"{kind}/{model}/{TUNING_SEED}")
    steps = Plan.load().steps[kind][model] // TUNING_SHARE
    for rate in RATES:
        config = config_of(row, steps, rate)
        trained, seconds = fit(row, config, folder / str(row) / f"rate-{rate:g}")
        loss = held_out_loss(trained, config)
        line = {"tune": f"{kind}/{model}", "rate": rate, "steps": steps, "loss": loss, "seconds": seconds}
        add(results, line)
        print(line, flush=True)


def main() -> None:
    """Parse the command and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="KIND/MODEL/SEED")
    parser.add_argument("--tune", nargs="+", default=[], metavar="KIND/MODEL")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.tune:
        tune(*name.split("/"), options.folder, options.results)


if __name__ == "__main__":
    main()
