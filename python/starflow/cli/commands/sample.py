"""`starflow sample`: clips from text, pictures and videos, at once or as a stream."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.cli.options import (
    MODEL_HELP,
    PROG,
    Command,
    add_device,
    add_sample_options,
    check_written,
    device_name,
    load_pipeline,
    number,
    path_text,
    sample_options_of,
)
from starflow.cli.output import (
    Meter,
    Output,
    clip_name,
    clips_text,
    computed_together,
    options_told,
    print_report,
    write_clips,
)
from starflow.config import ConfigError
from starflow.messages import short, shown, told_once

if TYPE_CHECKING:
    from starflow.distributed import World
    from starflow.sampling import Frames, Pipeline, SampleOptions


logger = logging.getLogger(__name__)

# Clips of a prompt: a prompt and a seed of each are listed before the first is made.
_MOST_CLIPS = 1_000_000


def _run(args: argparse.Namespace) -> int:
    import torch

    from starflow.distributed import join

    asked = sample_options_of(args)
    args.prompts = _prompts(args)
    with join(torch.device(device_name(args.device))) as world, told_once():
        return _sample_part(args, asked, world)


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a command line, on it or in a file.

    Raises:
        ConfigError: both are given, a prompt that is the name of a text file, or a file without prompts.
    """
    named = next((prompt for prompt in args.prompts if prompt.endswith(".txt") and Path(prompt).is_file()), None)
    if named is not None:
        raise ConfigError(f"PROMPT is {shown(named)}, which is a file, expected --prompts {short(named)}")
    if args.prompt_file is None:
        return list(args.prompts)
    if args.prompts:
        raise ConfigError(f"--prompts is given beside the prompt {shown(args.prompts[0])}, expected one of them")
    path = Path(args.prompt_file)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--prompts {short(path)} cannot be read: {error.strerror}, expected a text file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"--prompts {short(path)} is not UTF-8 in line {line}, expected text, a line a prompt"
        ) from None
    # Not `splitlines`, which also cuts at signs that a prompt may hold.
    prompts = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {short(path)} is empty, expected a line a prompt")
    return prompts


def _sample_part(args: argparse.Namespace, asked: SampleOptions, world: World) -> int:
    """The clips of one of the processes that `torchrun` started, or all."""
    pipeline = load_pipeline(args.model, world)
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.clips)]
    names = [clip_name(index, prompt, asked.seed + index) for index, prompt in enumerate(prompts)]
    _check_given(Path(args.out), names, asked)
    mine = range(world.rank, len(prompts), world.size)
    if args.parallel == "fsdp" and world.size > 1:
        mine = _in_pieces(pipeline, asked, prompts, world)
    elif args.parallel == "fsdp":
        logger.warning("--parallel is fsdp and this is one process, which holds all weights (see torchrun)")
    fps = asked.fps or pipeline.config.sample.fps
    _tell_rate(pipeline, asked, fps)
    if args.stream:
        if world.size > 1:
            raise ConfigError(f"--stream is given in {world.size} processes, expected one")
        return _stream(args, asked, pipeline, prompts, fps)
    with Output(Path(args.out)) as out:
        shown: dict[int, tuple[Any, str]] = {}
        # Clips of a call have one shape: drawn ones are made alone, so that a clip follows from its own seed.
        batch = 1 if asked.aspect_ratio == "random" else args.batch
        for first in range(0, len(mine), batch):
            group = mine[first : first + batch]
            sampled = pipeline.sample(
                [prompts[index] for index in group],
                replace(asked, seed=0, seeds=tuple(asked.seed + index for index in group)),
            )
            if args.parallel == "fsdp" and not world.first:
                continue
            clips = write_clips(out, sampled, group, fps, args, asked)
            captions = [prompt or f"seed {seed}" for prompt, seed in zip(sampled.prompts, sampled.seeds, strict=True)]
            shown.update(zip(group, zip(clips, captions, strict=True), strict=True))
            if world.first:
                print_report(sampled)
        everything = {index: clip for part in world.gather(shown) for index, clip in part.items()}
        if world.first:
            out.sheet(*zip(*(everything[index] for index in sorted(everything)), strict=True))
    if world.first:
        made = f"{clips_text(len(prompts))} in {args.out}: mp4, gif and json of each, and sheet.png"
        print(f"{made}{out.earlier(names)}")
    return 1 if out.kept_as_frames else 0


def _check_given(out: Path, names: list[str], asked: SampleOptions) -> None:
    """Refuses a given file in whose place a clip would be written, such as one that was sampled into this folder."""
    options = ("image", "video", "last_image", "source", "edit", "actions")
    files = {f"--{option.replace('_', '-')}": getattr(asked, option) for option in options}
    written = [str(out / file) for name in names for file in (f"{name}.mp4", f"{name}.gif", f"{name}.json")]
    check_written(
        {"the sheet of --out": str(out / "sheet.png"), "a clip of --out": written},
        {option: [str(file)] for option, file in files.items() if file is not None},
    )


def _tell_rate(pipeline: Pipeline, asked: SampleOptions, fps: float) -> None:
    """Tells where a clip goes on at the rate of a given file and is written at another."""
    from starflow.data import IMAGE_SUFFIXES, plays_otherwise, probe

    if asked.fps is not None or pipeline.config.data.fps is not None:
        return
    for name in ("video", "edit", "source"):
        file = getattr(asked, name)
        moving = file is not None and Path(file).suffix.lower() not in IMAGE_SUFFIXES
        if moving and Path(file).is_file() and plays_otherwise(rate := probe(file).fps, fps):
            logger.warning(
                "--%s has %g frames a second and the clip is written at %g (sample.fps): it plays at another speed, "
                "--fps %g writes it as the file is",
                name,
                rate,
                fps,
                rate,
            )


def _in_pieces(pipeline: Pipeline, asked: SampleOptions, prompts: list[str], world: World) -> range:
    """Cuts the weights into pieces; returns the clips that each process makes: all of them, together with the others.

    Raises:
        ConfigError: a window whose size each process would measure for itself.
    """
    from starflow.solver import Window
    from starflow.training import shard

    schedule = asked.schedule(pipeline.config.sample.solver)
    if isinstance(schedule, Window) and schedule.size is None:
        raise ConfigError("--parallel is fsdp and the solver's window is measured, expected a size: --solver window:64")
    shard(pipeline.flow, world)
    return range(len(prompts))


def _stream(args: argparse.Namespace, asked: SampleOptions, pipeline: Pipeline, prompts: list[str], fps: float) -> int:
    """Writes frames while they are made, a file for each clip."""
    from starflow.data import VideoWriter, enlarge, to_frames
    from starflow.sampling import report_of

    if len(prompts) > args.batch:
        raise ConfigError(f"--batch is {args.batch}, expected at least {len(prompts)}: streamed clips run together")
    begin = time.perf_counter()
    session = pipeline.session(prompts, asked)
    if session.denoising.whole:
        raise ConfigError(
            f"--stream is given and the denoiser is {session.denoising.kind}, which needs the whole clip; expected "
            "--denoise learned, for a model with a learned denoiser that runs forward in time, or --denoise none"
        )
    height, width = (side * pipeline.codec.spatial for side in session.shape[2:])
    scale = args.scale or max(1, math.ceil(128 / min(height, width)))
    names = [clip_name(row, prompt, asked.seed + row) for row, prompt in enumerate(prompts)]
    with Output(Path(args.out)) as out, contextlib.ExitStack() as files:
        writers = [
            files.enter_context(
                VideoWriter(
                    out.folder / f"{name}.mp4",
                    fps=fps,
                    height=height * scale,
                    width=width * scale,
                    channels=pipeline.codec.channels,
                    lossless=args.lossless,
                    growing=True,
                )
            )
            for name in names
        ]
        meter = Meter(begin)

        def write(frames: Frames) -> None:
            for name in () if meter.frames else names:
                out.renew(name)
            for writer, clip in zip(writers, frames.pixels, strict=True):
                writer.write(enlarge(to_frames(clip), scale))
            meter.add(frames.pixels.shape[1])

        given = session.beginning
        try:
            if given is not None:
                write(given)
            for frames in session.extend(session.planned, last=True):
                write(frames)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what was made before plays" if meter.frames else "no file was made") from None
        files.close()
        meter.end()
        for name in names:
            # A folder of clips takes a gif for the video of its name.
            if (older := out.folder / f"{name}.gif").is_file():
                logger.warning("%s is of an earlier clip: streams have no gif", older)
        if (older := out.folder / "sheet.png").is_file():
            logger.warning("%s is of earlier clips: streams have no sheet", older)
        report = report_of(session, meter.seconds, meter.frames * len(prompts)).to_mapping()
        shape = {"frames": meter.frames, "fps": fps, "height": height, "width": width}
        beginning = {"given_frames": 0 if given is None else given.pixels.shape[1], **options_told(asked)}
        for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            caption = pipeline.caption(
                prompt,
                fps=asked.fps,
                image=meter.frames == 1,
                mode=asked.mode,
                size=(height, width),
                noise_std=asked.target_noise_std,
            )
            told = {"prompt": prompt, "caption": caption, "seed": asked.seed + row, "model": str(args.model)}
            out.json(f"{name}.json", {**told, **shape, **beginning, **report, **computed_together(len(prompts))})
    print(
        f"{clips_text(len(prompts))} of {meter.frames} frames in {meter.seconds:.2f} s ({meter.rate:.1f} frames/s, the "
        f"first after {meter.first:.2f} s) in {args.out}: mp4 and json of each{out.earlier(names)}"
    )
    return 0


_DESCRIPTION = f"""Make clips from a trained model.

For each prompt (without one: a clip of anything) OUT receives NAME.mp4 (plays in every browser), NAME.gif and
NAME.json (prompt, seed, solver, its work and its error, seconds), and for all together sheet.png. The same
seed gives the same clip, alone or among others; the i-th clip has the seed SEED + i.

examples:
  {PROG} sample digits "a three moving up and left"
  {PROG} sample runs/mine "a three moving up" "an eight standing still" --guidance 2 --out out
  {PROG} sample runs/mine --prompts captions.txt --out out
  {PROG} sample runs/mine "a three moving up" --image first_frame.png
  {PROG} sample runs/mine "a three moving up" --image first_frame.png --last-image last_frame.png
  {PROG} sample runs/mine --video start.mp4 --given 4 --frames 16
  {PROG} sample runs/pairs negative --source three.mp4
  {PROG} sample runs/mine "an eight moving up" --edit three.mp4 --edit-prompt "a three moving up"
  {PROG} sample runs/mine "a three moving up" --frames 2000 --stream
  {PROG} sample runs/mine --solver window:16:0.001 --certificate"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_text, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a clip shows; one or several")
    parser.add_argument(
        "--out", type=path_text, default="samples", metavar="FOLDER", help="where files go (default: samples)"
    )
    parser.add_argument(
        "--clips",
        type=number(int, 1, most=_MOST_CLIPS),
        default=1,
        metavar="N",
        help="clips of each prompt (default: 1)",
    )
    parser.add_argument(
        "--prompts",
        dest="prompt_file",
        metavar="FILE",
        help="prompts in a text file (UTF-8), a line each; blank ones are left out",
    )
    add_sample_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--stream",
        action="store_true",
        help="write each frame as soon as it is final and show frames a second; the mp4 plays while it grows, and "
        "whatever ends the command. All clips run together; no gif and no sheet",
    )
    run.add_argument(
        "--batch", type=number(int, 1), default=8, metavar="N", help="most clips computed together (default: 8)"
    )
    run.add_argument(
        "--parallel",
        choices=("prompts", "fsdp"),
        default="prompts",
        help="what the processes of torchrun share: the prompts, each with all weights, or the weights, each with a "
        "piece, for models beyond the memory of one; they decode in plain torch then (default: prompts)",
    )
    add_device(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--scale",
        type=number(int, 1),
        metavar="N",
        help="pixels are repeated N times in both directions (default: 1, more where frames are smaller than 128)",
    )
    files.add_argument("--lossless", action="store_true", help="keep every bit in the mp4 (few browsers play it)")


COMMAND = Command(
    "make clips from text, a picture or the end of a video",
    _DESCRIPTION,
    _add_options,
    _run,
    rest="prompts",
    alone=False,
)
