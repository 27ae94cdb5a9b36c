"""A paddle that is played by dreaming: of many futures, each under other keys, the best one tells what to do.

    python examples/plan_in_a_dream.py [MODEL]

Random shooting: every few frames the model dreams a batch of futures from the last frames of the real game, each under
keys drawn at random. A reader of frames tells of each dream how many balls were met and lost; the keys of the best one
are pressed in the real game. The balls met are compared with those that a random policy meets.

Reference: Nagabandi et al., Neural Network Dynamics for Model-Based Deep Reinforcement Learning with Model-Free
Fine-Tuning (2018).
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from starflow import Pipeline
from starflow.data import to_pixels
from starflow.worlds import COURT, PaddleBall, PaddleState, Policy, draw_court, one_hot

# Frames of the real game that a dream begins with.
GIVEN = 8
# Where the paddle and the ball can be, and the middle of the court.
PADDLE_ROWS, PADDLE_COLUMNS, TOP, BOTTOM, MIDDLE = 6, slice(2, 4), 1, 23, 12
# Where a ball is that has left.
GONE = (-2, 12)


@dataclass(frozen=True)
class Seen:
    """What frames show, each int64 (...): top of the paddle, left and top of the ball, how many balls there are.

    `balls` is 2 for more than one. Where it is 0, the ball's place is the brightest one.
    """

    paddle: Tensor
    x: Tensor
    y: Tensor
    balls: Tensor


def read(pixels: Tensor) -> Seen:
    """Reads frames (..., channels, size, size) in [-1, 1] one by one, by brightness: walls 0.4, paddle 0.75, ball 1."""
    levels = units(pixels.reshape(-1, *pixels.shape[-3:]))
    # A unit of the paddle counts 1, a dark one -1, and one that the ball covers nothing.
    columns = levels[:, TOP:BOTTOM, PADDLE_COLUMNS]
    likeness = torch.minimum((columns / 0.375 - 1).clamp(-1, 1), (1 - columns) / 0.25).sum(-1)
    paddle = likeness.unfold(1, PADDLE_ROWS, 1).sum(-1).argmax(1)
    # Brightness above a court without a ball, as a share of what a ball would add, in squares of 2 x 2.
    court = courts(*pixels.shape[-2:-4:-1])[paddle]
    shares = ((levels - court) / (1 - court)).unfold(1, 2, 1).unfold(2, 2, 1).mean((-2, -1))
    shares = shares[:, TOP : BOTTOM - 1, : BOTTOM - 1]
    best, place = shares.flatten(1).max(1)
    y, x = place // shares.shape[2], place % shares.shape[2]
    rows, across = torch.arange(shares.shape[1]), torch.arange(shares.shape[2])
    near = ((rows - y[:, None]).abs() < 3)[:, :, None] & ((across - x[:, None]).abs() < 3)[:, None]
    another = shares.masked_fill(near, 0).amax((1, 2))
    balls = torch.where(best > 0.5, 1 + (another > 0.5).long(), 0)
    return Seen(*(found.view(pixels.shape[:-3]) for found in (paddle + TOP, x, y + TOP, balls)))


def units(pixels: Tensor) -> Tensor:
    """Levels (frames, 24, 24) of the units of the court: of frames in [-1, 1] the brightest channel, averaged."""
    brightest = (pixels.amax(1).clamp(-1, 1) + 1) / 2
    edges = torch.arange(COURT + 1) * (brightest.shape[-1] / COURT)
    at = torch.arange(brightest.shape[-1])
    # Share of each unit that lies in each pixel, (24, size).
    inside = (torch.minimum(at + 1, edges[1:, None]) - torch.maximum(at, edges[:-1, None])).clamp(min=0)
    share = inside / inside.sum(1, keepdim=True)
    return share @ brightest @ share.T


@functools.cache
def courts(size: int, channels: int) -> Tensor:
    """Levels (17, 24, 24) of a court without a ball, for each place of the paddle, drawn at a size."""
    places = range(TOP, BOTTOM - PADDLE_ROWS + 1)
    drawn = draw_court([PaddleState(paddle, GONE, (-1, 1)) for paddle in places], size, channels)
    return units(to_pixels(torch.from_numpy(drawn)))


def value(dreams: Tensor) -> Tensor:
    """How good dreams (futures, frames, channels, size, size) are: balls met less missed, then who is near."""
    seen = read(dreams)
    before, turn, after = seen.x[:, :-2], seen.x[:, 1:-1], seen.x[:, 2:]
    met = (before > turn) & (after > turn) & (turn > PADDLE_COLUMNS.start) & (turn < MIDDLE // 2)
    met &= (seen.balls == 1).unfold(1, 3, 1).all(-1)
    missed = (seen.x <= PADDLE_COLUMNS.start).any(1)
    apart = (seen.y + 1 - seen.paddle - PADDLE_ROWS // 2).abs()[:, -1]
    return met.sum(1) - missed.long() - 0.01 * apart


def draw_keys(futures: int, horizon: int, rng: np.random.Generator) -> np.ndarray:
    """Keys (futures, horizon): one is held for a while, then another one."""
    keys = rng.integers(3, size=(futures, 2))
    until = rng.integers(1, horizon + 1, size=(futures, 1))
    return np.where(np.arange(horizon) < until, keys[:, :1], keys[:, 1:])


@dataclass(frozen=True)
class Played:
    """Balls that were met and lost."""

    met: int
    lost: int


def plan(pipeline: Pipeline, past: deque[np.ndarray], told: deque[int], keys: np.ndarray, seed: int) -> np.ndarray:
    """The row of `keys` (futures, horizon) whose dream is the best; `past` frames and the keys `told` led to it."""
    futures = len(keys)
    session = pipeline.session([""] * futures, seed=seed)
    session.tell(one_hot([None, *list(told)[1:]], 3).expand(futures, -1, -1))
    session.prefill(to_pixels(torch.from_numpy(np.stack(past))).expand(futures, -1, -1, -1, -1))
    steps = [session.step(one_hot(keys[:, frame].tolist(), 3)).pixels for frame in range(keys.shape[1])]
    return np.asarray(keys[int(value(torch.cat(steps, 1)).argmax())])


def play(
    pipeline: Pipeline, frames: int = 400, *, futures: int = 16, horizon: int = 12, every: int = 4, seed: int = 0
) -> Played:
    """Plays the real game for `frames` frames, with a new plan for every few of them."""
    data = pipeline.config.data
    rng, world = np.random.default_rng(seed), PaddleBall(data.height, seed, data.channels)
    past, told = deque([world.frame], maxlen=GIVEN), deque([0], maxlen=GIVEN)
    keys = [0] * (GIVEN - 1)
    rewards = []
    for frame in range(frames):
        if not keys:
            keys = plan(pipeline, past, told, draw_keys(futures, horizon, rng), seed + frame).tolist()[:every]
        told.append(keys.pop(0))
        step = world.step(told[-1])
        past.append(step.frame)
        rewards.append(step.reward)
    return Played(rewards.count(1.0), rewards.count(-1.0))


def play_randomly(frames: int = 20000, *, seed: int = 0) -> Played:
    """The same by keys that are held at random."""
    world = PaddleBall(seed=seed)
    policy = Policy(world, "random", np.random.default_rng(seed))
    rewards = [world.advance(policy()) for _ in range(frames)]
    return Played(rewards.count(1.0), rewards.count(-1.0))


def main() -> None:
    """Play and print."""
    frames = 400
    planned = play(Pipeline.load(sys.argv[1] if len(sys.argv) > 1 else "paddle"), frames)
    chance = play_randomly(50 * frames)
    print(f"planned: {planned.met} balls met, {planned.lost} lost in {frames} frames")
    print(f"at random: {chance.met / 50:.1f} balls met, {chance.lost / 50:.1f} lost in as many")


if __name__ == "__main__":
    main()
