"""How true the dreams of a recorded world are: targets of group "recorded" of targets.py, and contact sheets.

    WORLD_MODEL=runs/pong WORLD_FOLDER=clips/held-out python benchmarks/targets.py --group recorded
    WORLD_MODEL=runs/pong WORLD_FOLDER=clips/held-out python benchmarks/recorded.py FOLDER

WORLD_FOLDER has what `starflow record` wrote, with a seed that training has not seen. Nothing of the world is known but
its frames and actions, so that any world can be measured: dreams are compared with what was recorded under the same
actions, pixel by pixel, and with the last given frame repeated. Clips are cut evenly from all files; none is chosen.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from figures import Figure, Skipped, area_under_curve, target
from torch import Tensor
from world import GIVEN, dreamed

from starflow import Pipeline
from starflow.data import Clip, VideoFolder, to_frames, write_contact_sheet
from starflow.evaluate import surprise

DREAMED = 20
CLIPS = 64
BATCH = 16
SKIPPED = 4


@functools.cache
def pipeline() -> Pipeline:
    """The model that is judged."""
    if "WORLD_MODEL" not in os.environ or "WORLD_FOLDER" not in os.environ:
        raise Skipped("WORLD_MODEL or WORLD_FOLDER is not set, expected a model and a folder of held-out recordings")
    return Pipeline.load(os.environ["WORLD_MODEL"])


@functools.cache
def clips() -> list[Clip]:
    """Recorded clips, with their actions."""
    config = pipeline().config
    folder = Path(os.environ["WORLD_FOLDER"])
    files = len(list(folder.glob("*.jsonl")))
    made = VideoFolder(
        folder,
        frames=GIVEN + DREAMED,
        height=config.data.height,
        width=config.data.width,
        channels=config.data.channels,
        clips_per_file=-(-CLIPS // files),
        cut="even",
        frame_dim=config.flow.frame_dim,
    )
    return [made.item(index) for index in range(min(CLIPS, len(made)))]


@functools.cache
def dreams() -> Tensor:
    """What follows the first frames of the clips, (clips, frames, channels, height, width)."""
    made = []
    for first in range(0, len(clips()), BATCH):
        group = clips()[first : first + BATCH]
        told = torch.stack([clip.frame_conditions for clip in group if clip.frame_conditions is not None])
        made.append(dreamed(pipeline(), torch.stack([clip.pixels[:GIVEN] for clip in group]), told, first))
    return torch.cat(made)


@target("recorded")
def recorded_dream() -> Iterator[Figure]:
    """Mean squared error of dreamed frames to those that were recorded, over that of the last given frame repeated."""
    made, real = dreams(), torch.stack([clip.pixels for clip in clips()])
    error = (made - real[:, GIVEN:]).square().mean((0, 2, 3, 4))
    still = (real[:, GIVEN - 1 : GIVEN] - real[:, GIVEN:]).square().mean((0, 2, 3, 4))
    ratios = {frame: float(error[frame - 1] / still[frame - 1]) for frame in (1, 5, 10, DREAMED)}
    raw: dict[str, Any] = {"clips": len(clips()), "by frame": {key: round(value, 3) for key, value in ratios.items()}}
    raw["still"] = {frame: float(still[frame - 1]) for frame in ratios}
    yield Figure("recorded_dream", ratios[5], "x the last frame repeated, fifth frame", 0.5, 0.2, lower=True, raw=raw)


def _other_frame(clip: Clip, frame: int) -> Clip:
    """The first frames of a clip, the last of them exchanged for a later one."""
    pixels = torch.cat([clip.pixels[: GIVEN - 1], clip.pixels[frame : frame + 1]])
    told = clip.frame_conditions
    return replace(clip, pixels=pixels, frame_conditions=None if told is None else told[:GIVEN])


def _other_action(clip: Clip) -> Clip:
    """The first frames of a clip, the action of the last of them exchanged for the next one in the list."""
    true = _other_frame(clip, GIVEN - 1)
    assert true.frame_conditions is not None
    told = true.frame_conditions.clone()
    told[-1] = told[-1].roll(1)
    return replace(true, frame_conditions=told)


@target("recorded")
def recorded_surprise() -> Iterator[Figure]:
    """Clips whose last frame comes from later, or from another action, against the same untouched: area."""
    normal = [_other_frame(clip, GIVEN - 1) for clip in clips()]
    strange = {
        f"{SKIPPED} frames skipped": [_other_frame(clip, GIVEN - 1 + SKIPPED) for clip in clips()],
        "another action": [_other_action(clip) for clip in clips()],
    }
    bits = {
        name: torch.stack([found.frames[-1] for found in surprise(pipeline(), group, draws=4)]).numpy()
        for name, group in {"": normal, **strange}.items()
    }
    for name in strange:
        raw = {"clips": len(normal), "draws": 4, "pairs": float((bits[name] > bits[""]).mean())}
        yield Figure(f"recorded_surprise: {name}", area_under_curve(bits[""], bits[name]), "area", 0.99, 0.999, raw=raw)


@target("recorded")
def recorded_fps() -> Iterator[Figure]:
    """Frames a second of one clip that is played."""
    session = pipeline().session("", seed=0)
    session.prefill(clips()[0].pixels[None, :GIVEN])
    seconds = []
    for frame in range(210):
        begin = time.perf_counter()
        session.step(frame // 8 % pipeline().config.flow.frame_dim)
        seconds.append(time.perf_counter() - begin)
    raw = {"threads": torch.get_num_threads(), "worst": max(seconds[10:])}
    yield Figure("recorded_fps", 1 / statistics.median(seconds[10:]), "frames/s", 30.0, 60.0, raw=raw)


def main() -> None:
    """Write a sheet: each dream under what was recorded."""
    file = Path(sys.argv[1]) / "recorded.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, captions = [], []
    for clip, dream in list(zip(clips(), dreams(), strict=True))[:: max(len(clips()) // 6, 1)]:
        rows += [to_frames(clip.pixels[GIVEN::2]), to_frames(dream[::2])]
        captions += [f"recorded: {clip.name}", "dream"]
    write_contact_sheet(file, rows, captions, frames_per_row=10, scale=2)


if __name__ == "__main__":
    main()
