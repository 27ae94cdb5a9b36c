"""How true the dreams of a world model are, in figures: targets of group "world" of targets.py, and contact sheets.

    python benchmarks/targets.py --group world                        the shipped model
    WORLD_MODEL=runs/mine python benchmarks/targets.py --group world  another model of `paddle`
    python benchmarks/world.py FOLDER                                 sheets and a moving picture of dreams

The true game goes through the same keys. Frames are read one by one by the reader of examples/plan_in_a_dream.py; its
error on the real frames stands beside the figures that rest on it. No seed is chosen: rollouts have 0, 1, 2 and so on.
WORLD_ROLLOUTS, WORLD_DREAMED and WORLD_CLIPS set how many rollouts there are, of how many frames, and how many clips
for surprise, WORLD_DRAWS how many draws of its noise; WORLD_FRAMES and WORLD_PLANNED are the frames of the long dream
and of the planned games. A line tells its counts.
"""

from __future__ import annotations

import cProfile
import functools
import gc
import os
import pstats
import resource
import runpy
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, Skipped, area_under_curve, target
from torch import Tensor

from starflow import Pipeline
from starflow.data import Clip, to_frames, to_pixels, write_contact_sheet, write_gif
from starflow.evaluate import surprise
from starflow.sampling import Session
from starflow.worlds import COURT, PaddleBall, PaddleState, Policy, draw_court, one_hot
from starflow_ext._load import native

MODEL = os.environ.get("WORLD_MODEL", "paddle")
GIVEN = 8
ROLLOUTS = int(os.environ.get("WORLD_ROLLOUTS", "64"))
DREAMED = int(os.environ.get("WORLD_DREAMED", "200"))
CLIPS = int(os.environ.get("WORLD_CLIPS", "128"))
# Of the noise, averaged: one draw alone spreads by 113 bits for the 12,288 values of a frame of 64 x 64 in colour.
DRAWS = int(os.environ.get("WORLD_DRAWS", "8"))
LONG = int(os.environ.get("WORLD_FRAMES", "1000"))
PLANNED = int(os.environ.get("WORLD_PLANNED", "300"))
BATCH = 16
# Frames in which the ball is followed.
FOLLOWED = 30
# Frames of the moving picture.
MOVING = 180

_PLANNER = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "plan_in_a_dream.py"))
_read: Callable[[Tensor], Any] = _PLANNER["read"]


@functools.cache
def pipeline() -> Pipeline:
    """The model that is judged."""
    return Pipeline.load(MODEL)


# -- dreams beside the real game --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rollout:
    """A real game and what was dreamed under its keys.

    Attributes:
        states: of the real game, the given frames first.
        keys: that led to them; the first is not known.
        dream: pixels (frames, channels, height, width) of the frames that were dreamed.
    """

    states: list[PaddleState]
    keys: list[int]
    dream: Tensor


def _played(seed: int, frames: int) -> tuple[list[PaddleState], list[int]]:
    """A real game, from the midst of play on."""
    rng = np.random.default_rng(seed)
    world = PaddleBall(seed=seed)
    policy = Policy(world, "mixed", rng)
    for _ in range(int(rng.integers(20, 80))):
        world.advance(policy())
    states, keys = [world.state], [0]
    for _ in range(frames - 1):
        keys.append(policy())
        world.advance(keys[-1])
        states.append(world.state)
    return states, keys


def _pixels(states: list[PaddleState]) -> Tensor:
    data = pipeline().config.data
    return to_pixels(torch.from_numpy(draw_court(states, data.height, data.channels)))


def dreamed(pipeline: Pipeline, given: Tensor, told: Tensor, seed: int) -> Tensor:
    """What follows given frames, (clips, frames, channels, height, width).

    Args:
        pipeline: that dreams.
        given: pixels (clips, given frames, channels, height, width).
        told: vectors of all frames, given ones included, (clips, given and dreamed frames, frame_dim).
        seed: of the first clip.
    """
    count = given.shape[1]
    session = pipeline.session([""] * len(given), seed=seed)
    session.tell(told[:, :count])
    session.prefill(given)
    return torch.cat([session.step(told[:, frame]).pixels for frame in range(count, told.shape[1])], 1)


def _dreamed(games: list[tuple[list[PaddleState], list[int]]], seed: int) -> Tensor:
    """What follows the first frames of games."""
    told = torch.stack([one_hot([None, *keys[1:]], len(PaddleBall.actions)) for _, keys in games])
    return dreamed(pipeline(), torch.stack([_pixels(states[:GIVEN]) for states, _ in games]), told, seed)


@functools.cache
def rollouts() -> list[Rollout]:
    """The games and their dreams."""
    games = [_played(seed, GIVEN + DREAMED) for seed in range(ROLLOUTS)]
    dreams = [_dreamed(games[first : first + BATCH], first) for first in range(0, ROLLOUTS, BATCH)]
    return [Rollout(*game, dream) for game, dream in zip(games, torch.cat(dreams), strict=True)]


def _truth() -> Tensor:
    """(rollouts, frames, 3): paddle, and x and y of the ball of the real games, of the frames that were dreamed."""
    return torch.tensor([[[s.paddle, *s.ball] for s in rollout.states[GIVEN:]] for rollout in rollouts()])


def _seen(pixels: Tensor) -> Tensor:
    """(..., 4): paddle, x and y of the ball, and number of balls of frames."""
    seen = _read(pixels)
    return torch.stack([seen.paddle, seen.x, seen.y, seen.balls], -1)


@functools.cache
def dreams() -> Tensor:
    """What the reader sees in the dreams, (rollouts, frames, 4)."""
    return _seen(torch.stack([rollout.dream for rollout in rollouts()]))


@functools.cache
def reader_right() -> float:
    """Share of the real frames that are read without any error."""
    read = torch.stack([_seen(_pixels(rollout.states[GIVEN:])) for rollout in rollouts()])
    truth = _truth()
    there = truth[..., 1] >= 0
    # Where an empty court has its ball says nothing.
    placed = (read[..., 1:3] == truth[..., 1:]).all(-1) | ~there
    return float(((read[..., 0] == truth[..., 0]) & (read[..., 3] == there) & placed).float().mean())


def _facts(right: Tensor) -> dict[str, Any]:
    """Counts, and shares over time of right frames (rollouts, frames)."""
    parts = [part.float().mean().item() for part in right.chunk(10, 1)]
    return {
        "rollouts": right.shape[0],
        "frames": right.shape[1],
        "by time": [round(part, 4) for part in parts],
        "reader": reader_right(),
    }


def _balls(balls: Tensor) -> dict[str, float]:
    """Shares of frames without a ball, and with more than one."""
    return {"none": float((balls == 0).float().mean()), "more": float((balls > 1).float().mean())}


@target("world")
def dream_paddle() -> Iterator[Figure]:
    """Dreams under recorded keys: frames whose paddle is within 1 pixel of the real one."""
    right = (dreams()[..., 0] - _truth()[..., 0]).abs() <= 1
    exact = float((dreams()[..., 0] == _truth()[..., 0]).float().mean())
    raw = _facts(right) | {"exact": exact}
    yield Figure("dream_paddle", float(right.float().mean()), "of frames", 0.99, 0.999, raw=raw)


def _one_ball(seen: Tensor) -> Tensor:
    """Which frames (..., frames) have one ball, or none where the frame before shows it leaving, as the game has it."""
    one = seen[..., 3] == 1
    leaving = torch.nn.functional.pad(one & (seen[..., 1] == 0), (1, -1))
    return one | (leaving & (seen[..., 3] == 0))


@target("world")
def dream_one_ball() -> Iterator[Figure]:
    """Dreams under recorded keys: frames with exactly one ball, or with none right after it has left."""
    right = _one_ball(dreams())
    raw = _facts(right) | _balls(dreams()[..., 3])
    yield Figure("dream_one_ball", float(right.float().mean()), "of frames", 0.98, 0.999, raw=raw)


@target("world")
def dream_ball() -> Iterator[Figure]:
    """The first 30 frames of dreams in which no ball is served: the ball is within 2 pixels of the real one."""
    # A ball that is served in the last given frame does not yet say where it goes.
    followed = [(rollout.states[GIVEN - 2], *rollout.states[GIVEN:][:FOLLOWED]) for rollout in rollouts()]
    known = [len({state.serves for state in game}) == 1 and game[-1].ball[0] >= 0 for game in followed]
    if not any(known):
        raise Skipped(f"a ball is served in each of {ROLLOUTS} rollouts, expected more rollouts (WORLD_ROLLOUTS)")
    seen, truth = dreams()[known, :FOLLOWED], _truth()[known, :FOLLOWED]
    near = ((seen[..., 1:3] - truth[..., 1:]).abs() <= 2).all(-1) & (seen[..., 3] > 0)
    exact = (seen[..., 1:3] == truth[..., 1:]).all(-1)
    raw = _facts(near) | {"exact": float(exact.float().mean())}
    yield Figure("dream_ball", float(near.float().mean()), "of frames", 0.90, 0.99, raw=raw)


def _bounces(seen: Tensor, keys: list[int]) -> list[tuple[str, bool]]:
    """Bounces of one dream by the rules of the game, each by where it is and whether the dream does the same.

    The rules are applied to each frame of the dream itself: the place of the ball and its way from the frame before,
    where that is a way a ball can go, and the paddle.
    """
    found = []
    world = PaddleBall()
    for frame in range(1, len(seen) - 1):
        (_, x0, y0, before), (paddle, x, y, now), (_, x2, y2, after) = seen[frame - 1 : frame + 2].tolist()
        way = (x - x0, y - y0)
        if (before, now, after) != (1, 1, 1) or {*map(abs, way)} != {1}:
            continue
        world.state = PaddleState(paddle, (x, y), way)
        reward = world.advance(keys[frame + 1])
        then = world.state
        if reward < 0 or then.velocity == way:
            continue
        kind = "paddle" if reward > 0 else "wall"
        found.append((kind, (x2 - x, y2 - y) == then.velocity))
    return found


@target("world")
def dream_bounces() -> Iterator[Figure]:
    """Bounces that are due in the dream by what it shows itself: those after which the ball goes where it should."""
    found = [
        bounce
        for seen, rollout in zip(dreams(), rollouts(), strict=True)
        for bounce in _bounces(seen, rollout.keys[GIVEN:])
    ]
    raw: dict[str, Any] = {"bounces": len(found), "reader": reader_right()}
    for kind in ("wall", "paddle"):
        of_kind = [right for where, right in found if where == kind]
        raw[kind] = round(statistics.mean(of_kind), 4) if of_kind else None
        raw[f"{kind} bounces"] = len(of_kind)
    yield Figure("dream_bounces", statistics.mean(right for _, right in found), "of bounces", 0.97, 0.995, raw=raw)


# -- surprise ---------------------------------------------------------------------------------------------------------


def _teleported(world: PaddleBall, key: int, rng: np.random.Generator) -> PaddleState | None:
    if rng.random() > 0.1:
        return None
    world.advance(key)
    world.teleport(rng)
    return world.state


def _flown_through(world: PaddleBall, key: int, rng: np.random.Generator) -> PaddleState | None:
    """The ball goes on where the paddle would have met it."""
    (x, y), (right, down) = world.state.ball, world.state.velocity
    if world.advance(key) != 1.0:
        return None
    try:
        return replace(world.state, ball=(x + right, y + down), velocity=(right, down))
    except ValueError:  # it would be in the wall
        return None


def _ignored(world: PaddleBall, key: int, rng: np.random.Generator) -> PaddleState | None:
    """The paddle stays where a key should move it."""
    before = world.state.paddle
    world.advance(key)
    if world.state.paddle == before or rng.random() > 0.1:
        return None
    return replace(world.state, paddle=before)


TAMPERED = {"teleport": _teleported, "missed_bounce": _flown_through, "ignored_key": _ignored}


def tampered(kind: str, seed: int) -> tuple[Clip, Clip]:
    """A clip of real play, and the same one whose last frame breaks the rules."""
    rng = np.random.default_rng([seed, 1])
    world = PaddleBall(seed=seed)
    policy = Policy(world, "mixed", rng)
    states, keys = deque([world.state], maxlen=GIVEN), deque([0], maxlen=GIVEN)
    while True:
        keys.append(policy())
        before = world.state
        false = TAMPERED[kind](world, keys[-1], rng) if len(states) == GIVEN else None
        world.state = before
        world.advance(keys[-1])
        states.append(world.state)
        if false is not None:
            break
    told = one_hot([None, *list(keys)[1:]], len(world.actions))
    true, false_states = list(states), [*list(states)[:-1], false]
    return (
        Clip(_pixels(true), "", f"{kind}/{seed}/true", frame_conditions=told),
        Clip(_pixels(false_states), "", f"{kind}/{seed}/false", frame_conditions=told),
    )


@target("world")
def surprised() -> Iterator[Figure]:
    """Real play whose last frame breaks a rule, against the same play untouched: area under the curve of surprise."""
    for kind in TAMPERED:
        pairs = [tampered(kind, seed) for seed in range(CLIPS)]
        bits = [
            np.array([float(found.frames[-1]) for found in surprise(pipeline(), clips, draws=DRAWS)])
            for clips in ([true for true, _ in pairs], [false for _, false in pairs])
        ]
        raw = {
            "clips": CLIPS,
            "draws": DRAWS,
            "bits, true": float(np.median(bits[0])),
            "bits, true, most": float(bits[0].max()),
            "bits, false": float(np.median(bits[1])),
            "bits, false, least": float(bits[1].min()),
        }
        yield Figure(f"surprise_{kind}", area_under_curve(*bits), "area under the curve", 0.99, 0.999, raw=raw)


# -- playing on and on ------------------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _begun() -> tuple[Session, Policy]:
    """A dream that begins with a few real frames, and random keys for it."""
    states, keys = _played(0, GIVEN)
    session = pipeline().session("", seed=0)
    session.tell(one_hot([None, *keys[1:]], len(PaddleBall.actions))[None])
    session.prefill(_pixels(states)[None])
    return session, Policy(PaddleBall(), "random", np.random.default_rng(0))


@functools.cache
def long_dream() -> tuple[Tensor, list[float], dict[int, int]]:
    """One dream under random keys: what is seen (frames, 4), seconds of the frames, bytes at frame 100 and the last."""
    session, policy = _begun()
    # What is kept of the frames is there from the start: the memory that grows is that of the session.
    seen = torch.zeros(LONG, 4, dtype=torch.int64)
    seconds = np.zeros(LONG)
    held: dict[int, int] = {}
    for frame in range(LONG):
        key = policy()
        begin = time.perf_counter()
        made = session.step(key)
        seconds[frame] = time.perf_counter() - begin
        seen[frame] = _seen(made.pixels[0, 0])
        if frame in (min(100, LONG // 2), LONG - 1):
            held[frame] = _resident()
    # The first frames measure windows and pack weights.
    return seen, seconds[10:].tolist(), held


@target("world")
def play_fps() -> Iterator[Figure]:
    """Frames a second of one clip that is played key by key, and its slowest frame over the median."""
    _, seconds, _ = long_dream()
    median, worst = statistics.median(seconds), max(seconds)
    raw: dict[str, Any] = {
        "median": median,
        "p95": float(np.quantile(seconds, 0.95)),
        "worst": worst,
        "frames": len(seconds),
        "threads": torch.get_num_threads(),
        "isa": native.selected_isa(),
    }
    goal = 60.0 if native.selected_isa() == "amx" else 30.0
    yield Figure("play_fps", 1 / median, "frames/s", goal, 2 * goal, raw=raw)
    yield Figure("play_slowest", worst / median, "x the median", 3.0, 1.5, lower=True, raw=raw)


# Where the time of a step goes, by the functions (file, name) that it passes through; the rest is Python's own.
PARTS = {
    "deep block": ("rolling.py", "solve"),
    "shallow blocks": ("clip.py", "solve"),
    "denoiser": ("session.py", "_cleaned"),
    "codec": ("block_transform.py", "decode"),
}


@target("world")
def play_parts() -> Iterator[Figure]:
    """Milliseconds of a frame that is played, and what each part of it takes, under a profiler, which costs some."""
    session, _ = _begun()
    for _ in range(10):
        session.step(0)
    profile = cProfile.Profile()
    for frame in range(200):
        profile.runcall(session.step, frame % 3)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    spent = {(Path(file).name, name): cumulative for (file, _, name), (_, _, _, cumulative, _) in stats.items()}
    whole = spent["session.py", "step"] / 200 * 1000
    parts = {part: spent[place] / 200 * 1000 for part, place in PARTS.items()}
    raw = {part: round(value, 2) for part, value in parts.items()} | {"rest": round(whole - sum(parts.values()), 2)}
    yield Figure("play_parts", whole, "ms a frame", 33.0, 16.0, lower=True, raw=raw)


@target("world")
def play_on() -> Iterator[Figure]:
    """A long dream under random keys: one ball and the paddle in its last 1,000 frames, and memory."""
    seen, _, held = long_dream()
    last = seen[-min(1000, LONG // 2) :]
    raw: dict[str, Any] = {"frames": LONG, "of the last": len(last), **_balls(seen[:, 3])}
    yield Figure("play_on_ball", float(_one_ball(last).float().mean()), "of the last frames", 0.95, 0.99, raw=raw)
    (_, early), (_, late) = sorted(held.items())
    raw = {"frames": LONG, **{f"bytes_{frame}": size for frame, size in held.items()}}
    yield Figure("play_on_memory", late / early, "x frame 100", 1.02, 1.0, lower=True, raw=raw)


@target("world")
def play_rally() -> Iterator[Figure]:
    """Seconds that a player who follows the dream's ball keeps it in play, of a minute at 30 frames a second."""
    session, _ = _begun()
    world, rng, seconds = PaddleBall(), np.random.default_rng(0), 60
    key, aim, met, before, frame = 0, 0.5, 0, 0, 0
    while frame < seconds * 30:
        paddle, x, y, balls = _seen(session.step(key).pixels[0, 0]).tolist()
        if balls != 1 or x == 0:
            break
        if x > before and before < COURT // 4:
            met, aim = met + 1, float(rng.uniform(0.2, 0.8))
        before, frame = x, frame + 1
        world.state = replace(world.state, paddle=paddle, ball=(x, y))
        key = world.suggest(aim)
    yield Figure("play_rally", frame / 30, "s", 60.0, 60.0, raw={"met": met, "frames": frame})


@target("world")
def planning() -> Iterator[Figure]:
    """Games planned by dreams: balls met in the real game, over those that random keys meet."""
    games = [_PLANNER["play"](pipeline(), PLANNED // 3, seed=seed) for seed in range(3)]
    chance = _PLANNER["play_randomly"](20000)
    met, lost = sum(game.met for game in games), sum(game.lost for game in games)
    raw = {"frames": PLANNED // 3 * 3, "met": met, "lost": lost, "random met of 20,000 frames": chance.met}
    rate = met / (PLANNED // 3 * 3) / (chance.met / 20000)
    yield Figure("planning", rate, "x random keys", 2.0, 2.7, raw=raw)


def _moving(rollout: Rollout) -> Tensor:
    """The first frames of a dream and of its real game beside each other, twice as large, uint8."""
    both = [to_frames(pixels[:MOVING]) for pixels in (rollout.dream, _pixels(rollout.states[GIVEN:]))]
    left, right = (frames.repeat_interleave(2, 1).repeat_interleave(2, 2) for frames in both)
    return torch.cat([left, left.new_full((*left.shape[:2], 8, left.shape[3]), 255), right], 2)


def main() -> None:
    """Write the sheets, each dream under its real game, and the first of them as they move."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, shown in (
        ("first", slice(0, 24)),
        ("last", slice(-24, None)),
        ("all", slice(0, None, DREAMED // 24 or 1)),
    ):
        rows, captions = [], []
        for number, rollout in enumerate(rollouts()[:12]):
            rows += [to_frames(_pixels(rollout.states[GIVEN:][shown])), to_frames(rollout.dream[shown])]
            captions += [f"real {number}", f"dream {number}"]
        write_contact_sheet(folder / f"{name}.png", rows, captions, frames_per_row=24, scale=2)
    write_gif(folder / "paddle.gif", _moving(rollouts()[0]), PaddleBall.fps)


if __name__ == "__main__":
    main()
