"""Likelihood of a trained model: by the level of the noise, and for clips that are unlike the training data.

    python benchmarks/likelihood.py demo/run

Prints the tables of docs/likelihood.md for a model trained on the moving digits (the demo's).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from figures import area_under_curve

from starflow.data import Clip
from starflow.evaluate import ClipScore, Reference, noise_floor, score
from starflow.sampling import Pipeline
from starflow.training import make_dataset

ORDINARY, JUDGED = 96, 64
# Factors of the noise level that the model was trained at.
LEVELS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def one_frame(clip: Clip, other: Clip) -> Clip:
    """The middle frame comes from another clip."""
    pixels = clip.pixels.clone()
    pixels[len(pixels) // 2] = other.pixels[len(pixels) // 2]
    return dataclasses.replace(clip, pixels=pixels)


def backwards(clip: Clip, other: Clip) -> Clip:
    """The frames are in reverse order, against the direction that the caption names."""
    return dataclasses.replace(clip, pixels=clip.pixels.flip(0))


def upside_down(clip: Clip, other: Clip) -> Clip:
    """Every frame is upside down."""
    return dataclasses.replace(clip, pixels=clip.pixels.flip(-2))


def captioned_otherwise(clip: Clip, other: Clip) -> Clip:
    """The caption comes from another clip."""
    return dataclasses.replace(clip, caption=other.caption)


def empty(clip: Clip, other: Clip) -> Clip:
    """Every frame is background without a digit."""
    return dataclasses.replace(clip, pixels=torch.full_like(clip.pixels, -1.0))


ODD: tuple[Callable[[Clip, Clip], Clip], ...] = (one_frame, backwards, upside_down, captioned_otherwise, empty)


def worst_frame(item: ClipScore) -> float:
    """Largest absolute deviation of a frame's score."""
    assert item.anomaly is not None
    return max(map(abs, item.anomaly.frames))


def either_side(item: ClipScore) -> float:
    """Absolute deviation of the clip's score."""
    assert item.anomaly is not None
    return abs(item.anomaly.deviations)


def noise_table(pipeline: Pipeline, clips: Sequence[Clip]) -> str:
    """Markdown table of bits per dimension by the level of the added noise."""
    trained = pipeline.config.train.noise_std
    lines = [
        "| noise | bits per dimension | floor | above the floor | better than shuffled | one frame of another clip |",
        "|---|---|---|---|---|---|",
    ]
    ordinary, judged = clips[:ORDINARY], clips[ORDINARY:]
    for factor in LEVELS:
        sigma = factor * trained
        scores = score(pipeline, judged, seed=1000, noise_std=sigma, order_check=True)
        reference = Reference(score(pipeline, ordinary, noise_std=sigma))
        bits = statistics.mean(item.bits_per_dim for item in scores)
        floor = noise_floor(sigma, pipeline.codec.log_det_per_dimension)
        ranked = statistics.mean(float(s.shuffled is not None and s.bits_per_dim < s.shuffled) for s in scores)
        odd = score(pipeline, altered(one_frame, judged), seed=1000, noise_std=sigma)
        found = area_under_curve(*([worst_frame(reference.judge(item)) for item in items] for items in (scores, odd)))
        told = " (training)" if factor == 1.0 else ""
        lines.append(
            f"| {sigma:.2f}{told} | {bits:.3f} | {floor:.3f} | {bits - floor:.3f} | {ranked:.0%} | {found:.2f} |"
        )
    return "\n".join(lines)


def altered(change: Callable[[Clip, Clip], Clip], clips: Sequence[Clip]) -> list[Clip]:
    """Each clip changed with the help of the next one."""
    return [change(clip, other) for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True)]


def anomaly_table(pipeline: Pipeline, clips: Sequence[Clip]) -> str:
    """Markdown table of how well three scores tell odd clips from ordinary ones."""
    ordinary, judged = clips[:ORDINARY], clips[ORDINARY:]
    reference = Reference(score(pipeline, ordinary))
    plain = [reference.judge(item) for item in score(pipeline, judged, seed=1000)]
    lines = ["| clips | bits per dimension | bits | deviation | worst frame |", "|---|---|---|---|---|"]
    lines.append(f"| ordinary | {statistics.mean(item.bits_per_dim for item in plain):.3f} | | | |")
    for change in ODD:
        odd = [reference.judge(item) for item in score(pipeline, altered(change, judged), seed=1000)]
        cells = [
            area_under_curve([measure(item) for item in plain], [measure(item) for item in odd])
            for measure in (lambda item: item.bits_per_dim, either_side, worst_frame)
        ]
        mean = statistics.mean(item.bits_per_dim for item in odd)
        name = change.__name__.replace("_", " ")
        lines.append(f"| {name} | {mean:.3f} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run on the digits")
    pipeline = Pipeline.load(parser.parse_args().run)
    data = make_dataset(pipeline.config, "test")
    clips = [data.item(index) for index in range(ORDINARY + JUDGED)]
    print(noise_table(pipeline, clips), end="\n\n")
    print(anomaly_table(pipeline, clips))
    return 0


if __name__ == "__main__":
    sys.exit(main())
