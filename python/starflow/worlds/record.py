"""record: play of a world as a folder of clips with their actions, which a flow trains on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from starflow.arguments import check_call
from starflow.config import LEAST_FPS, MOST_FPS
from starflow.data import (
    WORLD_FILE,
    Action,
    RecordedWorld,
    action_line,
    actions_beside,
    probe,
    read_video,
    read_world,
    write_video,
)
from starflow.files import sole, write_text
from starflow.messages import shown
from starflow.numeric import check_seed, integer, number
from starflow.worlds.policies import Policy, PolicyName
from starflow.worlds.world import PlayableWorld, check_picture, check_step, check_world

# Frames of a clip, which stay in memory until it ends.
CLIP_FRAMES = 1000


@dataclass(frozen=True)
class Recorded:
    """What `record` wrote.

    Args:
        clips, frames, episodes: how many.
        reward: sum over all frames.
    """

    clips: int
    frames: int
    episodes: int
    reward: float


class _Clip:
    """One clip: its frames in memory until it ends, when both of its files appear."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._shown: list[tuple[np.ndarray, str]] = []

    def __len__(self) -> int:
        return len(self._shown)

    def add(self, frame: np.ndarray, action: Action, reward: float, done: bool) -> None:
        frame = check_picture("record", frame)
        if (points := number(reward)) is None or not math.isfinite(points):
            raise ValueError(f"record: the world gives the reward {shown(reward)}, expected a finite number")
        if self._shown and frame.shape != self._shown[0][0].shape:
            raise ValueError(
                f"record: the world shows a frame of {list(frame.shape)} after one of "
                f"{list(self._shown[0][0].shape)}, expected frames of one size (height, width, channels)"
            )
        self._shown.append((frame, action_line(len(self), action, points, bool(done))))

    def end(self) -> None:
        """Writes the lines first: a video without them would not train."""
        frames, lines = zip(*self._shown, strict=True)
        path = actions_beside(self._path)
        write_text(path, "\n".join(lines) + "\n")
        try:
            write_video(self._path, torch.from_numpy(np.stack(frames)), self._fps, lossless=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def record(
    world: PlayableWorld,
    folder: str | Path,
    frames: int,
    *,
    policy: PolicyName = "mixed",
    seed: int = 0,
    fps: float | None = None,
    clip_frames: int = CLIP_FRAMES,
    on_frame: Callable[[], object] | None = None,
) -> Recorded:
    """Plays a world and writes what is seen: `clip-000000.mp4` (lossless) and `clip-000000.jsonl` and so on.

    A clip ends with its episode, or after `clip_frames` frames. A folder that holds clips of the same world gets more
    of them. Where the world fails or the call is interrupted, the frames so far are kept.

    Args:
        world: to play; its frames are of one size.
        folder: is made where it does not exist.
        frames: to write.
        policy: how it is played (see `Policy`).
        seed: of the policy and of the world. The same seed writes the same clips where the world is deterministic.
        fps: frames a second of the videos; None takes the world's own.
        clip_frames: most frames of a clip.
        on_frame: called after each frame.

    Raises:
        ValueError: an argument out of range, or a folder of another world, size, rate or colour.
        InUseError: another process records into the folder.
        WorldError: the world failed.
        OSError: a file cannot be written.
    """
    for name, value in (("frames", frames), ("clip_frames", clip_frames)):
        if (whole := integer(value)) is None or whole < 1:
            raise ValueError(f"record: {name} is {shown(value)}, expected an integer of at least 1")
    check_seed("record", seed)
    check_call("record", "on_frame", on_frame)
    check_world("record", world)
    fps = world.fps if fps is None else fps
    rate = number(fps)
    if rate is None or not LEAST_FPS <= rate <= MOST_FPS:
        raise ValueError(f"record: fps is {shown(fps)}, expected {LEAST_FPS:g} to {MOST_FPS:g}")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # Two that number their clips alike would leave the frames of one beside the actions of the other.
    with sole(folder):
        return _record(
            world, folder, frames, policy=policy, seed=seed, fps=rate, clip_frames=clip_frames, on_frame=on_frame
        )


def _check_alike(path: Path, frame: np.ndarray, fps: float) -> None:
    """Refuses frames of another size, rate or colour than those of a clip that the folder holds."""
    info = probe(path)
    held = read_video(path, frames=1)[0].numpy()

    def look(picture: np.ndarray, rate: float) -> str:
        grey = bool((picture == picture[..., :1]).all())
        return f"{picture.shape[0]}x{picture.shape[1]} in {'grey' if grey else 'colour'} at {rate:g} frames a second"

    if look(held, info.fps) != look(frame, fps):
        raise ValueError(
            f"record: the world shows {look(frame, fps)}, expected {look(held, info.fps)} as {path} (or another folder)"
        )


def _record(
    world: PlayableWorld,
    folder: Path,
    frames: int,
    *,
    policy: PolicyName,
    seed: int,
    fps: float,
    clip_frames: int,
    on_frame: Callable[[], object] | None,
) -> Recorded:
    about, held = RecordedWorld(world.name, tuple(world.actions)), read_world(folder)
    if held is not None and held != about:
        raise ValueError(
            f"record: {folder} holds the world {held.world} with the actions {', '.join(held.actions)}, expected "
            f"{about.world} with {', '.join(about.actions)}"
        )
    held_clips = sorted(folder.glob("clip-*.mp4"))
    number = 1 + max((int(path.stem[5:]) for path in folder.glob("clip-*.mp4") if path.stem[5:].isdigit()), default=-1)
    if held is None:
        write_text(folder / WORLD_FILE, about.to_json())
    play = Policy(world, policy, np.random.default_rng([seed, number]))
    clips = episodes = count = 0
    total = 0.0
    clip: _Clip | None = None
    with contextlib.ExitStack() as ending:
        # Whatever ends the block, a clip that has frames is whole.
        ending.callback(lambda: clip.end() if clip else None)
        # Seeds of the episodes go on from those of the clips that are there.
        frame, action, reward, done = world.reset(seed + number), None, 0.0, False
        if held_clips:
            _check_alike(held_clips[-1], check_picture("record", frame), fps)
        while True:
            if clip is None:
                clip = _Clip(folder / f"clip-{number:06d}.mp4", fps)
                clips, number = clips + 1, number + 1
            clip.add(frame, action, reward, done)
            count, total = count + 1, total + float(reward)
            if on_frame is not None:
                on_frame()
            if done or count == frames or len(clip) == clip_frames:
                complete, clip = clip, None
                complete.end()
            if done:
                episodes += 1
            if count == frames:
                return Recorded(clips, count, episodes, total)
            if done:
                frame, action, reward, done = world.reset(), None, 0.0, False
            else:
                action = play()
                step = check_step("record", world.step(action))
                frame, reward, done = step.frame, step.reward, step.done
