"""Sweeps a frame against bits per dimension, by the order in which the deep block visits the tokens of a frame.

    python benchmarks/token_order.py run [--sides 4 8 12] [--orders ...] [--seeds 0 1 2]
    python benchmarks/token_order.py show

`run` trains one small flow for each order, frame size and seed on the moving digits, on one thread, and appends what it
measured to results/token_order.json; what is there already is not run again. `show` prints the tables of
docs/token-order.md and draws docs/images/token-order.svg.

All flows of a size and seed begin with the same weights and see the same clips and noise in the same order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from starflow import Window, noise
from starflow.batches import Batches, make_dataset, make_parts
from starflow.config import RunConfig, from_mapping
from starflow.evaluate import score
from starflow.sample import Pipeline
from starflow.train import Trainer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "token_order.json"
PLOT = HERE.parent / "docs" / "images" / "token-order.svg"
ORDERS = ("raster", "spread", "farthest", "checkerboard", "interlace", "diagonal", "random")
FRAMES, PATCH = 3, 4
STEPS = 400
SCORED, SOLVED = 64, 12
TOLERANCE = 0.01


@dataclass(frozen=True)
class Run:
    """What was measured of one flow.

    Attributes:
        order, side, seed, steps: of the run; a frame has `side * side` tokens.
        bits_per_dim: of held-out clips.
        sweeps: of the deep block a frame, median over clips, window of one frame, tolerance 0.01.
        evaluations: a token, in the same.
        shallow_sweeps: of the shallow block, all frames together.
        backward_error: worst of the clips, deep block.
        seconds: of training.
    """

    order: str
    side: int
    seed: int
    steps: int
    bits_per_dim: float
    sweeps: float
    evaluations: float
    shallow_sweeps: float
    backward_error: float
    seconds: float


def config(order: str, side: int, seed: int, steps: int) -> RunConfig:
    """A flow of 0.2 M parameters in two blocks."""
    text = RunConfig.load("digits").text
    values: dict[str, Any] = {
        "flow": {
            "in_channels": PATCH * PATCH,
            "img_size": side,
            "channels": 64,
            "layers_per_block": [1, 2],
            "head_dim": 32,
            "soft_clip": 12,
            "use_qk_norm": True,
            "use_final_norm": True,
            "txt_size": text["size"],
            "txt_dim": len(text["vocabulary"]),
            "cond_top_only": True,
            "seq_order": "L2R",
            "temporal_causal": 1,
            "shallow_block_local": True,
            "top_order": order,
            "position_embed": True,
            "text_embed": True,
        },
        "data": {"frames": FRAMES, "height": side * PATCH, "width": side * PATCH},
        "codec": {"kind": "dct", "patch": PATCH, "channels": 1},
        "text": text,
        "train": {
            "steps": steps,
            "batch_size": 8,
            "lr": 4e-3,
            "min_lr": 1e-5,
            "warmup_steps": 20,
            "noise_std": 0.2,
            "ema": 0.98,
            "seed": seed,
        },
    }
    return from_mapping(RunConfig, values)


def measure(order: str, side: int, seed: int, steps: int = STEPS) -> Run:
    """Train one flow, score held-out clips with it, and solve for clips."""
    begin = time.perf_counter()
    made = config(order, side, seed, steps)
    codec, text = make_parts(made)
    trainer = Trainer(made, codec, text, torch.device("cpu"))
    for batch in Batches(made, make_dataset(made), codec).run(0, steps):
        trainer.run(batch)
    seconds = time.perf_counter() - begin
    pipeline = Pipeline(trainer.average.flow.eval(), made, codec, text)
    held_out = make_dataset(made, "test")
    clips = [held_out.item(index) for index in range(SCORED)]
    bits = statistics.mean(item.bits_per_dim for item in score(pipeline, clips, seed=1000))
    schedule = Window(side * side, TOLERANCE, certificate=True)
    deep, shallow = [], []
    for number in range(SOLVED):
        z = noise.draw([number], FRAMES, PATCH * PATCH, side, side)
        done = pipeline.flow.decode(z, pipeline.condition([clips[number].caption]), schedule=schedule)
        first, second = done.reports
        assert first is not None
        assert second is not None
        deep.append(first)
        shallow.append(second)
    return Run(
        order,
        side,
        seed,
        steps,
        bits,
        statistics.median(report.sweeps for report in deep) / FRAMES,
        statistics.median(report.evaluations_per_token for report in deep),
        statistics.median(report.sweeps for report in shallow),
        max(report.backward_error or 0.0 for report in deep),
        seconds,
    )


def load() -> list[Run]:
    """The runs that are kept."""
    return [Run(**values) for values in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def run(orders: Sequence[str], sides: Sequence[int], seeds: Sequence[int], steps: int) -> None:
    """Do what is missing, seed by seed, so that an early end leaves whole comparisons."""
    runs = load()
    known = {(item.order, item.side, item.seed, item.steps) for item in runs}
    torch.set_num_threads(1)
    for side in sides:
        for seed in seeds:
            for order in orders:
                if (order, side, seed, steps) in known:
                    continue
                runs.append(measure(order, side, seed, steps))
                print(json.dumps(asdict(runs[-1])), flush=True)
                RESULTS.write_text("[\n" + ",\n".join(json.dumps(asdict(item)) for item in runs) + "\n]\n")


def table(runs: Sequence[Run], side: int, steps: int) -> str:
    """Markdown: one row an order, means over seeds; bits as differences from raster of the same seed."""
    chosen = [item for item in runs if (item.side, item.steps) == (side, steps)]
    raster = {item.seed: item for item in chosen if item.order == "raster"}
    lines = [
        "| order | bits per dimension | against raster, by seed | sweeps a frame | evaluations a token | worst error |",
        "|---|---|---|---|---|---|",
    ]
    for order in ORDERS:
        mine = [item for item in chosen if item.order == order and item.seed in raster]
        if not mine:
            continue
        gains = [item.bits_per_dim - raster[item.seed].bits_per_dim for item in mine]
        sweeps = [item.sweeps for item in mine]
        lines.append(
            f"| {order} | {statistics.mean(item.bits_per_dim for item in mine):.4f} "
            f"| {' '.join(f'{gain:+.4f}' for gain in gains) if order != 'raster' else ''} "
            f"| {statistics.mean(sweeps):.2f} ({min(sweeps):.2f} to {max(sweeps):.2f}) "
            f"| {statistics.mean(item.evaluations for item in mine):.2f} "
            f"| {max(item.backward_error for item in mine):.3f} |"
        )
    return "\n".join(lines)


def plot(runs: Sequence[Run], steps: int) -> Figure:
    """Bits per dimension above raster over sweeps a frame, one panel a frame size, one dot a seed."""
    chosen = [item for item in runs if item.steps == steps]
    sides = sorted({item.side for item in chosen})
    figure = Figure(figsize=(3.6 * len(sides), 3.2), layout="constrained")
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for panel, side in zip(panels, sides, strict=True):
        here = [item for item in chosen if item.side == side]
        raster = {item.seed: item.bits_per_dim for item in here if item.order == "raster"}
        for index, order in enumerate(ORDERS):
            mine = [item for item in here if item.order == order and item.seed in raster]
            bits = [item.bits_per_dim - raster[item.seed] for item in mine]
            panel.plot([item.sweeps for item in mine], bits, "o", color=f"C{index}", label=order, markersize=5)
        panel.axhline(0.0, color="0.7", linewidth=0.8)
        panel.set(title=f"{side}x{side} tokens a frame", xlabel="sweeps a frame", xlim=(0, None))
    panels[0].set_ylabel("bits per dimension above raster")
    panels[-1].legend(fontsize=7)
    return figure


def show(steps: int) -> None:
    """Print the tables and draw the plot of the runs that are kept."""
    runs = load()
    for side in sorted({item.side for item in runs if item.steps == steps}):
        print(f"{side}x{side} tokens a frame\n\n{table(runs, side, steps)}\n")
    figure = plot(runs, steps)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> int:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--sides", nargs="+", type=int, default=[8, 4, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.what == "run":
        run(args.orders, args.sides, args.seeds, args.steps)
    else:
        show(args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
