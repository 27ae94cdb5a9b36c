"""`starflow record`: play of a world becomes clips with their actions."""

from __future__ import annotations

import argparse

from starflow.cli.options import PROG, Command, number, path_text, size_of
from starflow.cli.output import clips_text
from starflow.config import LEAST_FPS, MOST_FPS


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from starflow.worlds import open_world, record

    world = open_world(args.world, size=args.size, channels=1 if args.grey else None)
    try:
        with tqdm(total=args.frames, disable=args.quiet, unit="frame") as bar:
            made = record(
                world,
                args.out,
                args.frames,
                policy=args.policy,
                seed=args.seed,
                fps=args.fps,
                clip_frames=args.clip_frames,
                on_frame=bar.update,
            )
    finally:
        world.close()
    print(
        f"{args.out}: {made.frames} frames in {clips_text(made.clips)}, {made.episodes} episodes ended, reward "
        f"{made.reward:g}; actions: {', '.join(world.actions)}; train on them with: {PROG} train --data {args.out}"
    )
    return 0


_DESCRIPTION = f"""Play a world and write what is seen: videos, and beside NAME.mp4 a NAME.jsonl with one line of JSON a
frame, such as {{"frame": 7, "action": 1, "reward": 0.0, "done": false}}. The action is the one that led to the
frame. OUT/world.json names the world and its actions. Where OUT holds clips of the same world, more are added.

WORLD is "paddle", the built-in ball game, or the name of a gymnasium environment with discrete actions, such as
ALE/Pong-v5 (needs the extra "worlds").

examples:
  {PROG} record paddle --out clips/paddle --frames 20000
  {PROG} record ALE/Pong-v5 --out clips/pong --frames 50000
  {PROG} train --data clips/pong --out runs/pong"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    from starflow.worlds import CLIP_FRAMES, POLICIES

    parser.add_argument("world", metavar="WORLD", help='"paddle", or the name of a gymnasium environment')
    parser.add_argument("--out", type=path_text, required=True, metavar="FOLDER", help="where clips go")
    parser.add_argument("--frames", type=number(int, 1), required=True, metavar="N", help="to write")
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default="mixed",
        help="random: keys held for a while; mixed: also tapped, left alone, and played well where the world can "
        "(default: mixed)",
    )
    parser.add_argument("--size", type=size_of, metavar="HxW", help="of the frames (default: 64x64)")
    parser.add_argument("--grey", action="store_true", help="grey frames")
    parser.add_argument(
        "--fps", type=number(float, LEAST_FPS, most=MOST_FPS), metavar="F", help="of the videos (default: the world's)"
    )
    parser.add_argument(
        "--clip-frames",
        type=number(int, 1),
        default=CLIP_FRAMES,
        metavar="N",
        help=f"most frames of a clip (default: {CLIP_FRAMES})",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of world and play (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


COMMAND = Command("record play of a world, with its actions", _DESCRIPTION, _add_options, _run)
