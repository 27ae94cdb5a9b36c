"""What samples look like, in figures: the targets of group "quality" of targets.py, and their contact sheets.

    python benchmarks/targets.py --group quality                       the shipped model
    QUALITY_MODEL=runs/mine python benchmarks/targets.py --group quality      another model of digits
    python benchmarks/quality.py FOLDER                                sheets of clips, to be looked at

Frames are read one by one by `DigitJudge`; its own error on held-out real clips stands beside each figure that rests on
it. No seed is chosen: clips have the seeds 0, 1, 2 and so on.
"""

from __future__ import annotations

import functools
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, Skipped, target
from torch import Tensor
from torch.nn import functional as F

from starflow import Pipeline
from starflow.data import DIGITS, DIRECTIONS, Clip, DigitJudge, MovingDigits, to_frames, write_contact_sheet
from starflow.evaluate import frechet_distance, noise_floor, score

MODEL = os.environ.get("QUALITY_MODEL", "digits")
PROMPTS = 500
ROLLOUTS = 100
STREAMS = 20
BATCH = 50


@functools.cache
def pipeline() -> Pipeline:
    """The model that is judged."""
    return Pipeline.load(MODEL)


@functools.cache
def judge() -> DigitJudge:
    """The reader of its frames."""
    data = pipeline().config.data
    return DigitJudge(data.height, data.handwritings)


def prompts(count: int) -> list[str]:
    """Prompts over all pairs of digit and direction, in an order that mixes both."""
    pairs = [(digit, direction) for direction in DIRECTIONS for digit in DIGITS]
    chosen = [pairs[(index * 37) % len(pairs)] for index in range(count)]
    return [f"{'an' if digit == 'eight' else 'a'} {digit} {direction}" for digit, direction in chosen]


def digit_of(prompt: str) -> int:
    """The digit that a prompt asks for."""
    return DIGITS.index(prompt.split()[1])


@functools.cache
def clips(count: int, frames: int) -> Tensor:
    """Pixels (count, frames, 1, height, width) of the first prompts."""
    told = prompts(count)
    parts = [
        pipeline().sample(told[first : first + BATCH], seed=first, frames=frames).pixels
        for first in range(0, count, BATCH)
    ]
    return torch.cat(parts)


@functools.cache
def real(count: int, frames: int, split: str = "test", first: int = 0) -> list[Clip]:
    """Clips of the data that begin where those of training do."""
    data = pipeline().config.data
    made = MovingDigits(
        frames=frames,
        size=data.height,
        split="test" if split == "test" else "train",
        start=data.start,
        handwritings=data.handwritings,
    )
    return [made.item(index) for index in range(first, first + count)]


def read_right(pixels: Tensor | Sequence[Tensor], told: Sequence[str]) -> Tensor:
    """(clips, frames): whether each frame, read by itself, shows the digit asked for."""
    return torch.stack(
        [judge().read(clip) == digit_of(prompt) for clip, prompt in zip(pixels, told, strict=True)]
    ).float()


def _real_right(count: int, frames: int) -> Tensor:
    known = real(count, frames)
    return read_right([clip.pixels for clip in known], [clip.caption for clip in known])


@target("quality")
def digit_every_frame() -> Iterator[Figure]:
    """500 prompts: clips whose every frame shows the digit asked for, and clips that begin to move as asked."""
    frames = pipeline().config.data.frames
    told, made, known = prompts(PROMPTS), clips(PROMPTS, frames), real(PROMPTS, frames)
    right = read_right(made, told)
    raw: dict[str, Any] = {
        "clips": PROMPTS,
        "frames": frames,
        "by frame": [round(float(share), 3) for share in right.mean(0)],
        "by digit": {
            name: round(float(right[[digit_of(p) == place for p in told]].all(1).float().mean()), 3)
            for place, name in enumerate(DIGITS)
        },
        "real": float(_real_right(PROMPTS, frames).all(1).float().mean()),
    }
    yield Figure("digit_every_frame", float(right.all(1).float().mean()), "of clips", 0.98, 0.995, raw=raw)
    moves = [judge().direction(clip) == prompt.split(" ", 2)[2] for clip, prompt in zip(made, told, strict=True)]
    seen = [judge().direction(clip.pixels) == clip.caption.split(" ", 2)[2] for clip in known]
    raw = {"clips": PROMPTS, "real": float(np.mean(seen))}
    yield Figure("direction", float(np.mean(moves)), "of clips", 0.995, 1.0, raw=raw)


def ground_level(pixels: Tensor) -> float:
    """Mean level, of 1, of the pixels (..., 1, height, width) that are more than two from any stroke."""
    levels = (pixels.flatten(0, -4).clamp(-1.0, 1.0) + 1.0) / 2.0
    far = F.max_pool2d((levels > 0.25).float(), 5, 1, 2) == 0.0
    return float(levels[far].mean())


@target("quality")
def ground() -> Iterator[Figure]:
    """500 prompts: how black the ground is where nothing is near; the data has 0."""
    frames = pipeline().config.data.frames
    yield Figure("ground", ground_level(clips(PROMPTS, frames)), "of 1", 0.0015, 0.0005, lower=True)


def _read(frames: Tensor) -> Tensor:
    """What the judge reads of frames, (frames, 144)."""
    return torch.from_numpy(judge().features(frames))


@target("quality")
def frechet() -> Iterator[Figure]:
    """500 prompts: Fréchet distance of frames in the judge's features to real ones, over that of two real halves."""
    frames = pipeline().config.data.frames
    halves = [
        _read(torch.cat([clip.pixels for clip in real(PROMPTS, frames, "train", first)])) for first in (0, PROMPTS)
    ]
    own = frechet_distance(*halves)
    distance = frechet_distance(_read(clips(PROMPTS, frames).flatten(0, 1)), halves[0])
    yield Figure("frechet", distance / own, "x two real halves", 3.0, 1.5, lower=True, raw={"halves": own})


def _hold(name: str, count: int, frames: int, goal: float, moonshot: float) -> Figure:
    begin = time.perf_counter()
    right = read_right(clips(count, frames), prompts(count))
    seconds = time.perf_counter() - begin
    step = max(frames // 12, 1)
    raw = {
        "clips": count,
        "by frame": [round(float(share), 3) for share in right.mean(0)[::step]],
        "real": float(_real_right(count, frames)[:, -20:].mean()),
        "seconds": seconds,
    }
    return Figure(name, float(right[:, -20:].mean()), "of the last 20 frames", goal, moonshot, raw=raw)


@target("quality")
def hold_60() -> Iterator[Figure]:
    """100 prompts, clips of 60 frames: the digit asked for is read in the last 20, one by one."""
    yield _hold("hold_60", ROLLOUTS, 60, 0.90, 0.98)


@target("quality")
def hold_600() -> Iterator[Figure]:
    """20 prompts, streams of 600 frames: the same."""
    yield _hold("hold_600", STREAMS, 600, 0.80, 0.95)


@target("quality")
def hold_image() -> Iterator[Figure]:
    """100 held-out clips given their first frame and prompt: mean squared error of the fifth frame, in [-1, 1]."""
    known = real(ROLLOUTS, pipeline().config.data.frames)
    truth = torch.stack([clip.pixels for clip in known])
    made = torch.cat(
        [
            pipeline()
            .sample([clip.caption for clip in known[first : first + BATCH]], seed=first, image=truth[first:][:BATCH, 0])
            .pixels
            for first in range(0, ROLLOUTS, BATCH)
        ]
    )
    error = (made[:, 4] - truth[:, 4]).square().mean()
    still = (truth[:, 0] - truth[:, 4]).square().mean()
    raw = {"clips": ROLLOUTS, "of the first frame": float(still)}
    yield Figure("hold_image", float(error), "mean squared error", 0.09, 0.05, lower=True, raw=raw)


@target("quality")
def floor_gap() -> Iterator[Figure]:
    """64 held-out clips: bits per dimension above the entropy of the noise, which no model can fall under."""
    scores = score(pipeline(), real(64, pipeline().config.data.frames))
    bits = float(np.mean([each.bits_per_dim for each in scores]))
    floor = noise_floor(pipeline().config.train.noise_std)
    yield Figure("floor_gap", bits - floor, "bits a dimension", 0.10, 0.07, lower=True, raw={"bits": bits})


@target("quality")
def first_clip() -> Iterator[Figure]:
    """Seconds of `starflow sample` with the shipped model, from the command to the clip."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "starflow", "sample", "digits", "a three moving up and left", "--out", folder]
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        yield Figure("first_clip", time.perf_counter() - begin, "s", 20.0, 8.0, lower=True)


# The commit whose training steps are the yardstick of `train_speed`: the last one that let the system take its freed
# memory back, orthogonalised one matrix at a time and trained the demo in float32.
BEFORE = "e86e27b"
_ROUNDS, _STEPS = 3, 48
# Seconds of a step, of a training of the demo's recipe: the median of fours, as the denoiser learns in every fourth.
_TIMED = """
import statistics, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
from starflow.config import RunConfig
from starflow.training import train

config = RunConfig.load("digits")
config = replace(config, train=replace(config.train, steps=int(sys.argv[1]), checkpoint_every=0))
ends = []
with tempfile.TemporaryDirectory() as folder:
    train(config, Path(folder), on_step=lambda done: ends.append(time.perf_counter()), quiet=True)
print(statistics.median(ends[i + 4] - ends[i] for i in range(7, len(ends) - 4, 4)) / 4)
"""


def _step_seconds(sources: Path | None) -> float:
    """Seconds of a training step in a process of its own; with `sources` by that model package."""
    path = os.pathsep.join(filter(None, (str(sources) if sources else "", os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, str(_STEPS)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


@target("quality")
def denoising() -> Iterator[Figure]:
    """64 held-out clips with the noise of training: what each way to remove it leaves on the latents, and its time.

    Time is that of the processor.
    """
    frames, used = pipeline().config.data.frames, pipeline()
    known = real(64, frames)
    clean = used.codec.encode(torch.stack([clip.pixels for clip in known]))
    sigma = used.config.train.noise_std
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    raw: dict[str, Any] = {"clips": len(known), "frames": frames, "noise": sigma}
    for kind in ("none", "learned", "published", "score"):
        session = used.session([clip.caption for clip in known], frames=frames, denoise=kind, seed=0)
        # The session's own removal, of clips that no solver has touched.
        session._noisy = noisy
        begin = time.process_time()
        with torch.inference_mode():
            if session.denoising.whole:
                found = session._denoised(noisy, session.conditions.y, 0)
            else:
                found = torch.cat([session._cleaned(frame) for frame in range(noisy.shape[1])], 1)
        raw[kind] = {
            "error": round(float((found - clean).square().mean()), 5),
            "seconds": round(time.process_time() - begin, 2),
        }
    yield Figure("denoising", raw["published"]["error"], "mean squared error", 0.004, 0.003, lower=True, raw=raw)


@target("quality")
def train_speed() -> Iterator[Figure]:
    """Steps a second of the demo's training over those of the tree at e86e27b, in turn, each in a process of its own.

    The model package of that commit runs on the kernels that are installed, with its own recipe of the demo.
    """
    root = Path(__file__).parents[1]
    archive = subprocess.run(["git", "archive", BEFORE, "python"], cwd=root, capture_output=True)
    if archive.returncode:
        raise Skipped(f"git archive {BEFORE}: {archive.stderr.decode().strip()}, expected a clone with its history")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        taken = [(_step_seconds(Path(folder) / "python"), _step_seconds(None)) for _ in range(_ROUNDS)]
    before, now = (statistics.median(each) for each in zip(*taken, strict=True))
    raw: dict[str, Any] = {"before": before, "now": now, "threads": torch.get_num_threads()}
    yield Figure("train_speed", before / now, "x the step at e86e27b", 1.4, 2.0, raw=raw)


def main() -> None:
    """Write the sheets."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    frames = pipeline().config.data.frames
    sheets = {
        "prompts": (PROMPTS, frames, range(0, frames, 2)),
        "rollouts": (ROLLOUTS, 60, range(0, 60, 5)),
    }
    for name, (count, length, shown) in sheets.items():
        made, told = clips(count, length), prompts(count)
        for first in range(0, count, BATCH):
            group = [to_frames(clip[list(shown)]) for clip in made[first : first + BATCH]]
            write_contact_sheet(folder / f"{name}-{first:03d}.png", group, told[first : first + BATCH])


if __name__ == "__main__":
    main()
