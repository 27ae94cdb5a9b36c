"""`starflow evaluate`: clips of a model beside real ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starflow.cli.options import (
    MODEL_HELP,
    PROG,
    Command,
    add_device,
    add_sample_options,
    check_data,
    device_name,
    load_pipeline,
    number,
    path_text,
    sample_options_of,
)
from starflow.cli.output import Output, clips_text, computed_together, options_told
from starflow.config import ConfigError, DataConfig, RunConfig
from starflow.messages import short

if TYPE_CHECKING:
    from starflow.data import Clip
    from starflow.evaluate import Evaluation, Fidelity

# Clips of each half where none are asked for, and clips that features are learned from, for each of a half.
_CLIPS = 128
_LEARNED = 4
# Options of a sample that do not come from the real clips.
_SAMPLED = (
    "seed",
    "frames",
    "guidance",
    "guidance_frames",
    "guide_top",
    "temperature",
    "solver",
    "precision",
    "attn_temp",
    "denoise",
    "look_ahead",
    "window_frames",
    "context_frames",
    "sink_frames",
    "renew",
)
# Pairs of clips on the sheet.
_SHOWN = 8


def _run(args: argparse.Namespace) -> int:
    import torch

    from starflow.data import enlarge, to_frames
    from starflow.distributed import World
    from starflow.evaluate import evaluate

    asked = sample_options_of(args)
    pipeline = load_pipeline(args.model, World(device=torch.device(device_name(args.device))))
    real, others, training = _real_clips(pipeline.config, args)
    with Output(Path(args.out)) as out:
        found = evaluate(
            pipeline,
            real,
            others,
            training,
            options=asked,
            given=args.given_frames,
            second=args.second,
            batch=args.batch,
            steps=args.feature_steps,
            tell=lambda what: print(f"{what} ...", file=sys.stderr),
        )
        out.json(
            "evaluation.json",
            {
                "model": str(args.model),
                "data": args.data or "the model's own",
                "feature_steps": args.feature_steps,
                "training_clips": len(training),
                **options_told(asked),
                **found.to_mapping(),
                **computed_together(min(args.batch, len(real))),
            },
        )
        side = min(real[0].pixels.shape[-2:])
        shown, captions = [], []
        for clip, made in list(zip(real, found.clips, strict=True))[:_SHOWN]:
            shown += [enlarge(to_frames(pixels), max(1, 96 // side)) for pixels in (clip.pixels, made)]
            captions += [f"real: {short(clip.caption or clip.name)}", "made"]
        out.sheet(shown, captions)
    _print(found)
    print(f"{args.out}: evaluation.json, and sheet.png with {clips_text(len(shown) // 2)} beside the real ones")
    return 0


def _real_clips(config: RunConfig, args: argparse.Namespace) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Real clips in two halves of one number, and those that features are learned from.

    Raises:
        ConfigError: fewer clips than `--count` needs, or none of the model's own.
    """
    from starflow.data import VideoFolder, is_folder
    from starflow.evaluate import tell_rates
    from starflow.training import make_dataset

    # Every clip in the one size that clips are made in.
    data = dataclasses.replace(config.data, mix_aspect=False)
    if args.data is not None:
        check_data(args.data)
        data = _of_folder(data, args.data)
    elif data.kind == "folder" and (data.path is None or not is_folder(Path(data.path))):
        raise ConfigError(
            f"evaluate: the model's own data, data.path {short(data.path)}, are not here, expected --data FOLDER"
        )
    own, config = config, dataclasses.replace(config, data=data)
    count = args.count or _CLIPS
    held_out = make_dataset(config, "test")
    if isinstance(held_out, VideoFolder):
        tell_rates("evaluate", own, held_out.rates_of_files)
    if data.kind == "folder" and len(held_out) < 2 * count:
        # More clips of each file: as many as both halves need, where the files are long enough to differ.
        more = dataclasses.replace(data, clips_per_file=data.clips_per_file * -(-2 * count // len(held_out)))
        held_out = make_dataset(dataclasses.replace(config, data=more), "test")
    found: dict[str, Clip] = {}
    for index in range(len(held_out)):
        clip = held_out.item(index)
        found.setdefault(clip.name, clip)
        if data.kind != "folder" and len(found) == 2 * count:
            break
    clips = list(found.values())
    if args.count is None:
        count = min(count, len(clips) // 2)
    if len(clips) < 2 * count or not count:
        raise ConfigError(
            f"--count is {max(count, 1)}, expected at most {len(clips) // 2}: there are {clips_text(len(clips))} that "
            "differ, and half of them are compared with the other half"
        )
    # Clips of one file stay on one side where they can.
    half = len(clips) // 2
    learned = make_dataset(config, "train")
    training = [learned.item(index) for index in range(min(_LEARNED * count, len(learned)))]
    if data.kind == "folder" and len(training) < len(clips):
        training += clips
    return _spread(clips[:half], count), _spread(clips[half:], count), training


def _of_folder(data: DataConfig, path: str) -> DataConfig:
    """The data of a folder of videos in place of those of the model, for clips of the same form."""
    plain = DataConfig()
    # Options of data that are made.
    made = {name: getattr(plain, name) for name in ("start", "handwritings", "contacts")}
    return dataclasses.replace(data, kind="folder", path=path, clips_per_file=1, **made)


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """So many of the clips, evenly from first to last."""
    return [clips[place * len(clips) // count] for place in range(count)]


def _print(found: Evaluation) -> None:
    made, floor = found.made, found.floor

    def row(name: str, mine: float | None, real: float | None, note: str = "") -> None:
        ours, theirs = (f"{'-':>9}" if value is None else f"{value:>9.3f}" for value in (mine, real))
        print(f"{name:<34}{ours}  {theirs}  {note}".rstrip())

    print(
        f"{clips_text(made.made_clips)} of {found.frames} frames against {made.real_clips} real ones; beside it "
        f"{floor.made_clips} other real clips against the same"
    )
    print(f"{'':<34}{'model':>9}  {'real':>9}")
    _print_rows(row, made, floor)
    first, last = found.drift[0], found.drift[-1]
    begin = f"Fréchet, frames {first.first} to {first.last}"
    row(begin, first.frechet, found.drift_floor, f"a second is {found.second} frames")
    if len(found.drift) > 1:
        end = f"Fréchet, frames {last.first} to {last.last}"
        row(end, last.frechet, None, f"drift: {last.frechet - first.frechet:+.3f} from the first second to the last")
    else:
        print("drift: none to tell, clips have no second second; --frames N makes longer ones")
    row("bits per dimension, real clips", found.bits_per_dim, found.noise_floor, "beside it the entropy of the noise")
    how = "one clip, streamed" if found.streamed else "all clips, each as a whole"
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    print(f"{'frames a second':<34}{found.frames_per_second:>9.1f}  {'':>9}  {how}, {threads}")


def _print_rows(row: Callable[..., None], made: Fidelity, floor: Fidelity) -> None:
    row("Fréchet, frames", made.frechet, floor.frechet, "less is better, real is the floor")
    if made.frechet_motion is not None:
        row("Fréchet, frame differences", made.frechet_motion, floor.frechet_motion)
    row("precision", made.precision, floor.precision, "made frames among real ones")
    row("recall", made.recall, floor.recall, "real frames among made ones")


_DESCRIPTION = f"""Compare clips of a model with real ones.

The model makes a clip for each of --count real ones, with its caption and its actions. Told are the Fréchet
distance of frames and of frame differences, precision and recall, in the features of a small network that is
trained on real clips (about a minute); the drift from the first second to the last; bits per dimension of the
real clips; and frames a second. Beside it stand as many other real clips: what a perfect model would have.
OUT receives evaluation.json and sheet.png. Real clips must be held out: --data FOLDER (its subfolder "test"
where there is one), or the model's own test data.

examples:
  {PROG} evaluate digits
  {PROG} evaluate paddle --frames 120 --count 64
  {PROG} evaluate runs/mine --data held_out_clips --temperature 0.8 --out evaluation"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_text, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--data",
        type=path_text,
        metavar="FOLDER",
        help="real clips (default: the held-out ones of the model's own data)",
    )
    parser.add_argument(
        "--count",
        type=number(int, 1),
        metavar="N",
        help=f"clips to make; twice as many real ones are needed (default: {_CLIPS}, or what there is)",
    )
    parser.add_argument(
        "--given",
        # Not the option of `SampleOptions`, whose frames come from a file.
        dest="given_frames",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="frames of the real clip that each one begins with (default: 0)",
    )
    parser.add_argument(
        "--second", type=number(int, 1), metavar="N", help="frames of a second (default: those of the training clips)"
    )
    parser.add_argument(
        "--out", type=path_text, default="evaluation", metavar="FOLDER", help="where files go (default: evaluation)"
    )
    add_sample_options(parser, _SAMPLED)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch", type=number(int, 1), default=32, metavar="N", help="most clips made together (default: 32)"
    )
    run.add_argument(
        "--feature-steps",
        type=number(int, 1),
        default=400,
        metavar="N",
        help="steps that the network of the features is trained for (default: 400)",
    )
    add_device(parser)


COMMAND = Command("clips of a model beside real ones: fidelity, drift, bits, speed", _DESCRIPTION, _add_options, _run)
