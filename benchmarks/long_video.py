"""Drift of clips that are ten times as long as the training clips, by the way that windows are joined.

    python benchmarks/long_video.py [--clips N] [--frames N] [--figure docs/images/long-video.svg]

For each way of joining windows it samples clips of a trained model and measures, frame by frame: the bits per dimension
of a frame under the model given the frames before it, the share of clips that still show the digit that they began with
(as `DigitJudge` reads it), and the ink of a frame over that of held-out clips. It prints one JSON line for each and
draws the curves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import models
import numpy as np
import torch
from torch import Tensor

from starflow import noise
from starflow.data import DIGITS, DigitJudge
from starflow.sampling import Pipeline

SIZE = 32
# Name -> options of `Pipeline.session`; the training clips have 6 frames, and so has the window.
WAYS: dict[str, dict[str, Any]] = {
    "4 of 6 carried over (published)": {"context_frames": 4},
    "4, the first frame among them": {"context_frames": 4, "sink_frames": 1},
    "4, cleaned and noised anew": {"context_frames": 4, "renew": True},
    "3 carried over": {"context_frames": 3},
    "3, the first frame among them": {"context_frames": 3, "sink_frames": 1},
    "1 carried over": {"context_frames": 1},
    "5 carried over": {"context_frames": 5},
    "no windows": {"window": None},
}


def held_out(clips: int, frames: int) -> tuple[Tensor, list[str]]:
    """Held-out clips of the data, one digit after the other, and their captions."""
    data = models.CutDigits(frames, SIZE, "test")
    found: dict[str, list[Tensor]] = {digit: [] for digit in DIGITS}
    index = 0
    while min(len(some) for some in found.values()) < -(-clips // len(DIGITS)):
        clip = data.item(index)
        found[clip.caption.split()[1]].append(clip.pixels)
        index += 1
    chosen = [(digit, found[digit][row // len(DIGITS)]) for row in range(clips) for digit in [DIGITS[row % 10]]]
    return torch.stack([pixels for _, pixels in chosen]), [f"a {digit}" for digit, _ in chosen]


@torch.inference_mode()
def bits(pipeline: Pipeline, pixels: Tensor, captions: list[str], step: int) -> tuple[list[int], list[float]]:
    """Indices of frames, and the mean bits per dimension of each given the frames before it in a window."""
    window = pipeline.config.data.frames
    latents = pipeline.codec.encode(pixels)
    noisy = latents + pipeline.config.train.noise_std * noise.draw(
        range(len(pixels)), *latents.shape[1:], purpose="train"
    )
    y = pipeline.condition(captions)
    places = list(range(window - 1, pixels.shape[1], step))
    means = []
    for place in places:
        clip = noisy[:, place - window + 1 : place + 1]
        nats = pipeline.flow.log_likelihood(pipeline.flow.encode(clip, y))[:, -1]
        means.append(float(-nats.mean()) / clip[0, 0].numel() / math.log(2))
    return places, means


def kept(judge: DigitJudge, pixels: Tensor, step: int) -> list[float]:
    """Share of clips, frame by frame, that show the digit that they began with."""
    read = torch.stack([judge.read(clip) for clip in pixels])
    return (read == read[:, :1]).float().mean(0)[::step].tolist()


def ink(pixels: Tensor) -> Tensor:
    """Mean brightness of each frame above the background, (frames,)."""
    return pixels.add(1).div(2).sub(0.1).clamp(min=0).mean((0, 2, 3, 4))


def clips_of(pipeline: Pipeline, captions: list[str], frames: int, options: dict[str, Any]) -> Tensor:
    """Pixels of clips that are sampled with the options of one way."""
    limit = frames if "window" in options else None
    made = pipeline.session(captions, seed=1000, frames=limit, **(options | ({"window": frames} if limit else {})))
    return torch.cat([part.pixels for part in made.extend(frames, last=True, together=True)], 1)


def main() -> int:
    """Print a line for each way, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, metavar="N", help="of each way (default: 20)")
    parser.add_argument("--frames", type=int, default=60, metavar="N", help="of a clip (default: 60)")
    parser.add_argument("--step", type=int, default=5, metavar="N", help="frames between measurements (default: 5)")
    parser.add_argument("--only", action="append", metavar="NAME", help="ways to measure (default: all)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="where the curves are drawn")
    args = parser.parse_args()
    ways: dict[str, dict[str, Any] | None] = {"held-out clips": None, **WAYS}
    if unknown := [name for name in args.only or () if name not in ways]:
        parser.error(f"--only is {unknown[0]!r}, expected one of {', '.join(ways)}")
    pipeline = models.streaming(SIZE)
    real, captions = held_out(args.clips, args.frames)
    judge = DigitJudge(SIZE)
    level = ink(real).mean()
    rows: dict[str, dict[str, Any]] = {}
    for name, options in ways.items():
        if args.only and name not in args.only:
            continue
        begin = time.perf_counter()
        pixels = real if options is None else clips_of(pipeline, captions, args.frames, options)
        seconds = time.perf_counter() - begin
        places, curve = bits(pipeline, pixels, captions, args.step)
        shares = kept(judge, pixels, args.step)
        amount = (ink(pixels) / level).tolist()
        rows[name] = {
            "way": name,
            "seconds": seconds,
            "places": places,
            "bits": curve,
            "kept": shares,
            "ink": amount,
            "bits_last_third": float(np.mean(curve[-len(curve) // 3 :])),
            "kept_last_third": float(np.mean(shares[-len(shares) // 3 :])),
            "ink_last_third": float(np.mean(amount[-len(amount) // 3 :])),
        }
        print(json.dumps(rows[name], default=float), flush=True)
    if args.figure is not None:
        draw(rows, args.step, args.figure)
    return 0


def draw(rows: dict[str, dict[str, Any]], step: int, path: Path) -> None:
    """Three curves over the frames, a line for each way."""
    plt.rcParams["svg.hashsalt"] = "starflow"
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), constrained_layout=True)
    for name, row in rows.items():
        style = {"color": "black", "linestyle": ":"} if name == "held-out clips" else {}
        axes[0].plot(row["places"], row["bits"], label=name, **style)
        axes[1].plot([step * place + 2 for place in range(len(row["kept"]))], row["kept"], **style)
        axes[2].plot(row["ink"], **style)
    titles = ("bits per dimension of a frame", "clips that show the digit they began with", "ink, held-out clips = 1")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("frame")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
