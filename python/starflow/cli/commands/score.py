"""`starflow score`: bits per dimension of given clips."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.cli.options import (
    MODEL_HELP,
    PROG,
    Command,
    add_device,
    check_written,
    device_name,
    held_out_clips,
    load_pipeline,
    model_places,
    number,
    path_text,
    picture_path,
)
from starflow.cli.output import clips_text, write_json
from starflow.config import ConfigError
from starflow.files import replacing
from starflow.messages import short

if TYPE_CHECKING:
    from starflow.evaluate import ClipScore


def _run(args: argparse.Namespace) -> int:
    import torch

    from starflow.distributed import World
    from starflow.evaluate import LEVELS_BITS, Reference, heat_map, noise_floor, read_clips, score

    if bool(args.paths) == (args.held_out is not None):
        raise ConfigError("score: expected either paths of videos or --held-out, and not both")
    if args.held_out is not None:
        for option in ("frames", "clips_per_file"):
            if (value := getattr(args, option)) is not None:
                told = f"--{option.replace('_', '-')}"
                raise ConfigError(
                    f"{told} is {value}, expected paths together with it: held-out clips are as in training"
                )
    if args.reference is not None and args.held_out is not None:
        raise ConfigError(
            f"--reference is {args.reference}, expected paths together with it: it judges them by held-out clips"
        )
    if args.per_token and args.json is None:
        raise ConfigError("--per-token is given, expected --json together with it")
    check_written(
        {"--json": args.json, "--heat-map": args.heat_map},
        {"the clip": args.paths, "the model": model_places(args.model)},
    )
    # Before hours of scoring and not after.
    for file in (args.heat_map, args.json):
        if file not in (None, "-"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(args.model, World(device=torch.device(device_name(args.device))))
    if args.caption and pipeline.text is None:
        raise ConfigError(f"--caption is {args.caption!r}, expected none: the model was trained without text")
    if args.held_out is not None:
        clips = held_out_clips(pipeline.config, args.held_out)
        if args.caption is not None:
            clips = [dataclasses.replace(clip, caption=args.caption) for clip in clips]
    else:
        clips = read_clips(
            pipeline, args.paths, frames=args.frames, clips_per_file=args.clips_per_file or 1, caption=args.caption
        )
    sigma = pipeline.config.train.noise_std if args.noise_std is None else args.noise_std
    per_token = args.per_token or args.heat_map is not None
    scores = score(
        pipeline,
        clips,
        seed=args.seed,
        batch=args.batch,
        order_check=args.order_check,
        per_token=per_token,
        noise_std=sigma,
        scaled=True,
    )
    ordinary = [] if args.reference is None else held_out_clips(pipeline.config, args.reference)
    if ordinary:
        reference = Reference(score(pipeline, ordinary, seed=args.seed, batch=args.batch, noise_std=sigma, scaled=True))
        scores = [reference.judge(item) for item in scores]
    if args.heat_map is not None:
        path = Path(args.heat_map)
        with replacing(path) as partial:
            heat_map(clips, scores).savefig(partial, format=path.suffix[1:])
    if not args.per_token:
        scores = [dataclasses.replace(item, tokens=None) for item in scores]
    what = "pixel" if pipeline.codec.log_det_per_dimension is not None else "latent"
    facts = {
        "definition": f"minus log2 of the density of the clip with normal noise of deviation {sigma:g} on its latents, "
        f"per {what} value{' in [-1, 1]' if what == 'pixel' else ''}",
        "noise_std": sigma,
        "noise_std_of_training": pipeline.config.train.noise_std,
        "reference_clips": len(ordinary),
        "noise_seed": args.seed,
        "noise_floor": noise_floor(sigma, pipeline.codec.log_det_per_dimension) if sigma else None,
        "to_8_bit_levels": LEVELS_BITS,
        "bits_per_dim": sum(item.bits_per_dim for item in scores) / len(scores),
    }
    if args.json is not None:
        values = {**facts, "clips": [item.to_mapping() for item in scores]}
        if args.json == "-":
            print(json.dumps(values, indent=2))
            return 0
        write_json(Path(args.json), values)
    _print_scores(scores, facts, frames=args.per_frame)
    return 0


def _print_scores(scores: Sequence[ClipScore], facts: dict[str, Any], *, frames: bool) -> None:
    print(f"bits per dimension: {facts['definition']}; less is better.")
    if facts["noise_floor"] is not None:
        print(
            f"No model scores less than the noise on average: {facts['noise_floor']:.3f}. "
            f"In 8-bit levels: add {facts['to_8_bit_levels']:.3f}."
        )
    names = [short(item.name) for item in scores]
    width = max(map(len, names))
    ordered = [item for item in scores if item.shuffled is not None and item.reversed is not None]
    judged = any(item.anomaly is not None for item in scores)
    print(
        f"{'clip':<{width}}  {'bits/dim':>8}"
        + (f"  {'shuffled':>8}  {'reversed':>8}" if ordered else "")
        + (f"  {'anomaly':>8}  {'p-value':>8}  worst frame" if judged else "")
    )
    for name, item in zip(names, scores, strict=True):
        line = f"{name:<{width}}  {item.bits_per_dim:>8.4f}"
        if item.shuffled is not None and item.reversed is not None:
            line += f"  {item.shuffled:>8.4f}  {item.reversed:>8.4f}"
        if item.anomaly is not None:
            worst = max(range(len(item.frames)), key=[abs(value) for value in item.anomaly.frames].__getitem__)
            line += f"  {item.anomaly.deviations:>+8.2f}  {item.anomaly.p_value:>8.3f}"
            line += f"  {worst:>3} ({item.anomaly.frames[worst]:+.1f})"
        print(line + (f'  "{short(item.caption)}"' if item.caption else ""))
        if frames:
            print("  frames: " + " ".join(f"{bits:.4f}" for bits in item.frames))
    print(f"{'mean':<{width}}  {facts['bits_per_dim']:>8.4f}")
    if judged:
        print(
            f"anomaly: deviations from the mean of {facts['reference_clips']} held-out clips, negative where more "
            "predictable; p-value: how often an ordinary clip is as far from it, at most."
        )
    if ordered:
        for name in ("shuffled", "reversed"):
            others = [getattr(item, name) for item in ordered]
            better = sum(item.bits_per_dim < other for item, other in zip(ordered, others, strict=True))
            ties = sum(item.bits_per_dim == other for item, other in zip(ordered, others, strict=True))
            gain = sum(others) / len(others) - sum(item.bits_per_dim for item in ordered) / len(ordered)
            still = f", {ties} the same" if ties else ""
            print(
                f"in time order better than {name}: {better} of {clips_text(len(ordered))}{still}; "
                f"{gain:.4f} bits per dimension on average"
            )


_DESCRIPTION = f"""Score clips: bits per dimension, less is better.

What is scored is the density that the model was trained on: of the clip plus normal noise (fixed by --seed).
With the built-in codecs, which are linear, the bits are per pixel and channel of pictures in [-1, 1]; they
may be negative. Clips are cut in the size and at the rate of the training clips.

examples:
  {PROG} score runs/mine my_clips --order-check
  {PROG} score runs/mine a.mp4 --caption "waves at night" --per-frame
  {PROG} score runs/mine odd.mp4 --reference 100 --heat-map where.png
  {PROG} score runs/digits --held-out 32 --json scores.json"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_text, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="video files, or folders of them with their captions")
    parser.add_argument(
        "--held-out", type=number(int, 1), metavar="N", help="in place of paths: N clips of the run's own test data"
    )
    parser.add_argument(
        "--clips-per-file", type=number(int, 1), metavar="N", help="cut evenly from each file (default: 1)"
    )
    parser.add_argument("--frames", type=number(int, 1), metavar="N", help="of a clip (default: as in training)")
    parser.add_argument("--caption", metavar="TEXT", help="of all clips, in place of their own")
    parser.add_argument(
        "--order-check",
        action="store_true",
        help="also score each clip with its frames shuffled and reversed, which should score worse",
    )
    parser.add_argument("--per-frame", action="store_true", help="print the bits of each frame given those before it")
    parser.add_argument("--per-token", action="store_true", help="with --json: the bits of each token, too")
    parser.add_argument(
        "--heat-map",
        type=picture_path,
        metavar="FILE",
        help="draw the bits of the tokens under the frames (.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--reference",
        type=number(int, 2),
        metavar="N",
        help="judge the clips by N held-out clips of the run's own test data: how far off their bits are",
    )
    parser.add_argument(
        "--noise-std",
        type=number(float, 0),
        metavar="S",
        help="deviation of the noise that is added (default: that of training; the model knows no other data)",
    )
    parser.add_argument(
        "--json",
        type=path_text,
        metavar="FILE",
        help="write the scores, frames included; - prints them in place of the table",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument(
        "--batch", type=number(int, 1), default=8, metavar="N", help="most clips computed together (default: 8)"
    )
    add_device(parser)


COMMAND = Command("bits per dimension of given clips", _DESCRIPTION, _add_options, _run, rest="paths")
