"""`starflow sample`: clips from text, pictures and videos, at once or as a stream."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.cli.options import PROG, Command, add_device, device_name, load_pipeline, number, size_of, solver_form
from starflow.cli.output import (
    Meter,
    Output,
    clip_name,
    clips_text,
    computed_together,
    given_sources,
    print_report,
    write_clips,
)
from starflow.config import ConfigError

if TYPE_CHECKING:
    from starflow.distributed import World
    from starflow.sampling import Denoise, Frames, Pipeline


_SOLVER_HELP = (
    'how the flow is inverted: "window[:size[:tolerance]]" (the default; fast, error set by the tolerance, which '
    'defaults to 0.01 of a token\'s own scale; size "auto" fits this machine), "sequential" (token by token, exact, '
    'slow), or "chunks[:block[:threshold]]" (the published scheme, least exact)'
)


def _run(args: argparse.Namespace) -> int:
    import torch

    from starflow.distributed import join
    from starflow.solver import parse_solver

    if args.given is not None and args.video is None:
        raise ConfigError(f"--given is {args.given}, expected --video together with it")
    if args.edit_prompt and args.edit is None:
        raise ConfigError(f"--edit-prompt is {args.edit_prompt!r}, expected --edit together with it")
    if args.certificate and args.solver is not None:
        try:
            parse_solver(args.solver, certificate=True)
        except ValueError as error:
            raise ConfigError(f"--certificate: {error}") from None
    with join(torch.device(device_name(args.device))) as world:
        return _sample_part(args, world)


def _sample_part(args: argparse.Namespace, world: World) -> int:
    """The clips of one of the processes that `torchrun` started, or all."""
    pipeline = load_pipeline(args, world)
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.clips)]
    mine = range(world.rank, len(prompts), world.size)
    fps = args.fps or pipeline.config.sample.fps
    if args.stream:
        if world.size > 1:
            raise ConfigError(f"--stream is given in {world.size} processes, expected one")
        return _stream(args, pipeline, prompts, fps)
    with Output(Path(args.out)) as out:
        shown: dict[int, tuple[Any, str]] = {}
        for first in range(0, len(mine), args.batch):
            group = mine[first : first + args.batch]
            sampled = pipeline.sample(
                [prompts[index] for index in group],
                seeds=[args.seed + index for index in group],
                **_sample_options(args),
            )
            clips = write_clips(out, sampled, group, fps, args)
            captions = [prompt or f"seed {seed}" for prompt, seed in zip(sampled.prompts, sampled.seeds, strict=True)]
            shown.update(zip(group, zip(clips, captions, strict=True), strict=True))
            if world.first:
                print_report(sampled)
        everything = {index: clip for part in world.gather(shown) for index, clip in part.items()}
        if world.first:
            out.sheet(*zip(*(everything[index] for index in sorted(everything)), strict=True))
    if world.first:
        print(f"{clips_text(len(prompts))} in {args.out}: mp4, gif and json of each, and sheet.png")
    return 0


def _sample_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Pipeline.sample` and `Pipeline.session` that the command line names."""
    choices: dict[str, Denoise] = {"auto": True, "none": False, "learned": "learned", "score": "score"}
    height, width = args.size or (None, None)
    names = [
        "frames",
        "fps",
        "guidance",
        "temperature",
        "solver",
        "precision",
        "certificate",
        "image",
        "video",
        "given",
        "last_image",
        "source",
        "edit",
        "edit_prompt",
        "look_ahead",
        "window",
        "window_context",
    ]
    return {
        "height": height,
        "width": width,
        "denoise": choices[args.denoise],
        **{name: getattr(args, name) for name in names},
    }


def _stream(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], fps: float) -> int:
    """Writes frames while they are made, a file for each clip."""
    from starflow.data import VideoWriter, enlarge, to_frames
    from starflow.sampling import report_of

    if len(prompts) > args.batch:
        raise ConfigError(f"--batch is {args.batch}, expected at least {len(prompts)}: streamed clips run together")
    begin = time.perf_counter()
    session = pipeline.session(prompts, seed=args.seed, **_sample_options(args))
    if session.denoising.whole:
        raise ConfigError(
            f"--stream is given and the denoiser is {session.denoising.kind}, which needs the whole clip; expected a "
            "model with a learned denoiser that runs forward in time, or --denoise none"
        )
    height, width = (side * pipeline.codec.spatial for side in session.shape[2:])
    scale = args.scale or max(1, math.ceil(128 / min(height, width)))
    names = [clip_name(row, prompt, args.seed + row) for row, prompt in enumerate(prompts)]
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
            for writer, clip in zip(writers, frames.pixels, strict=True):
                writer.write(enlarge(to_frames(clip), scale))
            meter.add(frames.pixels.shape[1])

        given = session.beginning
        if given is not None:
            write(given)
        for frames in session.extend(session.planned, last=True):
            write(frames)
        files.close()
        meter.end()
        report = report_of(session, meter.seconds, meter.frames * len(prompts)).to_mapping()
        shape = {"frames": meter.frames, "fps": fps, "height": height, "width": width}
        beginning = {
            "given_frames": 0 if given is None else given.pixels.shape[1],
            **given_sources(args),
        }
        for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            caption = pipeline.caption(
                prompt,
                fps=args.fps,
                image=meter.frames == 1,
                mode="last" if args.last_image else "v2v" if args.source else None,
                size=(height, width),
            )
            told = {"prompt": prompt, "caption": caption, "seed": args.seed + row, "model": str(args.model)}
            out.json(f"{name}.json", {**told, **shape, **beginning, **report, **computed_together(len(prompts))})
    print(
        f"{clips_text(len(prompts))} of {meter.frames} frames in {meter.seconds:.2f} s ({meter.rate:.1f} frames/s, the "
        f"first after {meter.first:.2f} s) in {args.out}: mp4 and json of each"
    )
    return 0


_DESCRIPTION = f"""Make clips from a trained model.

For each prompt (without one: a clip of anything) OUT receives NAME.mp4 (plays in every browser), NAME.gif and
NAME.json (prompt, seed, solver, its work and its error, seconds), and for all together sheet.png. The same
seed gives the same clip, alone or among others; the i-th clip has the seed SEED + i.

examples:
  {PROG} sample runs/mine "a three moving up" "an eight standing still" --guidance 2 --out out
  {PROG} sample runs/mine "a three moving up" --image first_frame.png
  {PROG} sample runs/mine "a three moving up" --image first_frame.png --last-image last_frame.png
  {PROG} sample runs/mine --video start.mp4 --given 4 --frames 16
  {PROG} sample runs/pairs negative --source three.mp4
  {PROG} sample runs/mine "an eight moving up" --edit three.mp4 --edit-prompt "a three moving up"
  {PROG} sample runs/mine "a three moving up" --frames 2000 --stream
  {PROG} sample runs/mine --solver window:16:0.001 --certificate"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or a .safetensors file")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a clip shows; one or several")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="where files go (default: samples)")
    what = parser.add_argument_group("what")
    what.add_argument("--clips", type=number(int, 1), default=1, metavar="N", help="clips of each prompt (default: 1)")
    what.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of the first clip (default: 0)")
    what.add_argument(
        "--frames", type=number(int, 1), metavar="N", help="frames, given ones included (default: as in training)"
    )
    what.add_argument(
        "--size", type=size_of, metavar="HxW", help="height and width in pixels (default: as in training)"
    )
    what.add_argument(
        "--fps", type=number(float, 0, above=True), metavar="F", help="frames a second (default: the model's)"
    )
    what.add_argument(
        "--guidance",
        type=number(float, 0),
        metavar="W",
        help="weight of the prompt, 0 for none (default: the model's)",
    )
    what.add_argument(
        "--temperature",
        type=number(float, 0),
        metavar="T",
        help="factor of the noise that clips are made from: below 1 they vary less and keep together better (default: "
        "the model's)",
    )
    beginning = parser.add_argument_group("given frames")
    either = beginning.add_mutually_exclusive_group()
    either.add_argument("--image", metavar="FILE", help="picture that becomes the first frame")
    either.add_argument("--video", metavar="FILE", help="video to continue: its last frames become the first ones")
    beginning.add_argument(
        "--given",
        type=number(int, 1),
        metavar="N",
        help="frames taken from the end of --video (default: half of --frames, or all where it is shorter)",
    )
    beginning.add_argument(
        "--last-image",
        metavar="FILE",
        help="picture that the clip ends with, alone or together with --image (a model trained with "
        "train.last_frame_prob)",
    )
    beginning.add_argument(
        "--source",
        metavar="FILE",
        help="video to make another one of, as the prompt says, as long as those of training (a model trained on "
        "pairs, train.source_prob)",
    )
    either.add_argument(
        "--edit",
        metavar="FILE",
        help="video to make again under the prompt: the flow finds its noise and decodes it (guidance 0 unless given)",
    )
    beginning.add_argument("--edit-prompt", default="", metavar="TEXT", help="what the video of --edit shows")
    how = parser.add_argument_group("how")
    how.add_argument("--solver", type=solver_form, metavar="TEXT", help=_SOLVER_HELP)
    how.add_argument(
        "--precision",
        choices=("float32", "two_bfloat16", "float16", "bfloat16", "int8"),
        help="how decoding stores weights and takes products: on the CPU float16 and int8 read fewer bytes at float32 "
        "products, bfloat16 is fastest where the processor multiplies it and needs a tolerance of 0.05, two_bfloat16 "
        "lies between (for processors with AMX); on a GPU float16 and bfloat16 decode by native kernels (default: the "
        "model's, float32 if it says nothing)",
    )
    how.add_argument(
        "--certificate",
        action="store_true",
        help="measure the backward error: how far the noise that these clips belong to is from the noise asked for, in "
        "standard deviations, at worst",
    )
    how.add_argument(
        "--denoise",
        choices=("auto", "learned", "score", "none"),
        default="auto",
        help="how the noise of the training data is removed: by the learned denoiser, by a step along the flow's own "
        "score, or not at all (default: learned where the model has one, else score)",
    )
    how.add_argument(
        "--window-context",
        type=number(int, 1),
        metavar="N",
        help="of clips longer than the window: latent frames that each window takes over from the one before (default: "
        "three quarters)",
    )
    how.add_argument(
        "--window",
        type=number(int, 2),
        metavar="N",
        help="latent frames that the deep block sees (default: the model's own window, or else as in training)",
    )
    how.add_argument(
        "--stream",
        action="store_true",
        help="write each frame as soon as it is final and show frames a second; the mp4 plays while it grows, and "
        "whatever ends the command. All clips run together; no gif and no sheet",
    )
    how.add_argument(
        "--look-ahead",
        type=number(int, 0),
        metavar="N",
        help="frames that the learned denoiser waits for (default: as many as it was trained to see): 0 shows a frame "
        "sooner, cleaned a little worse",
    )
    how.add_argument(
        "--batch", type=number(int, 1), default=8, metavar="N", help="most clips computed together (default: 8)"
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
    "make clips from text, a picture or the end of a video", _DESCRIPTION, _add_options, _run, rest="prompts"
)
