"""The command `starflow`.

Exit status: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted. What goes wrong is told in
one sentence on standard error; `--debug` adds the traceback. Files appear whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import yaml

from starflow.config import ConfigError, RunConfig, config_names, from_mapping, to_mapping
from starflow.files import replacing, write_text

# The parts of the package are imported by the commands that need them: TensorBoard alone takes seconds.
if TYPE_CHECKING:
    from starflow.data import Clip
    from starflow.distributed import World
    from starflow.evaluate import ClipScore
    from starflow.plan import Plan
    from starflow.sample import Denoise, Pipeline, Sampled
    from starflow.session import Frames

_PROG = "starflow"
_SOLVER_HELP = (
    'how the flow is inverted: "window[:size[:tolerance]]" (the default; fast, error set by the tolerance, which '
    'defaults to 0.01 of a token\'s own scale; size "auto" fits this machine), "sequential" (token by token, exact, '
    'slow), or "chunks[:block[:threshold]]" (the published scheme, least exact)'
)


# -- argument types ---------------------------------------------------------------------------------------------------


def _number(kind: Callable[[str], Any], least: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of at least (or above) `least`."""
    what = f"{'an integer' if kind is int else 'a number'} {'>' if above else '>='} {least:g}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is given, expected {what}")
        return value

    return parse


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected HEIGHTxWIDTH such as 480x848")
    return int(found[1]), int(found[2])


def _solver(text: str) -> str:
    from starflow.sample import parse_solver

    try:
        parse_solver(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _model(text: str) -> str:
    if Path(text).suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected a file that ends in .safetensors, or a folder")
    return text


def _picture(text: str) -> str:
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected a file that ends in .png, .svg or .pdf")
    return text


def _setting(text: str) -> tuple[list[str], Any]:
    """KEY=VALUE to (path, value), the value read as yaml."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected KEY=VALUE such as train.steps=1000")
    try:
        return key.split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected a value that is yaml") from None


# -- configurations ---------------------------------------------------------------------------------------------------


def make_config(name: str, settings: Sequence[tuple[list[str], Any]]) -> RunConfig:
    """A configuration with some of its options set anew.

    Args:
        name: of a configuration that comes with the package, or path of a yaml file.
        settings: (path, value), such as (["train", "steps"], 1000).

    Raises:
        ConfigError: an option that does not exist or a value that does not fit.
    """
    values = to_mapping(RunConfig.load(name))
    for path, value in settings:
        place = values
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {'.'.join(path)}: {key} is one option, expected a group of options")
        place[path[-1]] = value
    return from_mapping(RunConfig, values)


# -- commands ---------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from starflow.demo import demo

    out = Path(args.out)
    figures = demo(out, steps=args.steps, seed=args.seed, quiet=args.quiet)
    print(
        f"{out / 'report.html'}: {figures.steps} steps in {figures.train_seconds:.0f} s, "
        f"{figures.bits_per_dim:.3f} bits per dimension on held-out clips; "
        f"{figures.digit_every_frame:.0%} of the sampled clips show the digit asked for in every frame, "
        f"{figures.direction_accuracy:.0%} move as asked for; {figures.sample_seconds:.2f} s for a clip"
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from starflow.checkpoints import read_header
    from starflow.data import CaptionMode
    from starflow.distributed import rank_and_size
    from starflow.train import train

    settings = list(args.set)
    if args.data is not None:
        if not Path(args.data).is_dir():
            raise ConfigError(f"--data is {args.data!r}, expected a folder of videos")
        settings[:0] = [(["data", "kind"], "folder"), (["data", "path"], str(Path(args.data).resolve()))]
    if args.steps is not None:
        settings.append((["train", "steps"], args.steps))
    if args.seed is not None:
        settings.append((["train", "seed"], args.seed))
    if args.parallel is not None:
        settings.append((["train", "parallel"], args.parallel))
    name = args.config or ("digits" if args.data is None else "clips")
    config = make_config(name, settings)
    folder = Path(args.out or f"runs/{Path(name).stem}")
    train(config, folder, resume=not args.no_resume, quiet=args.quiet, device=_device(args.device))
    if rank_and_size()[0]:
        return 0
    text = read_header(folder).config.text
    given = (' "PROMPT"' if text else "") + (" --source VIDEO" if config.train.source_prob else "")
    print(f"{folder}: trained for {config.train.steps} steps; sample from it with: {_PROG} sample {folder}{given}")
    if text.get("kind") == "words":
        words = [word for word in text["vocabulary"] if word not in get_args(CaptionMode)]
        print(f"words of a prompt, at most {text['size']}: {', '.join(words)}")
    elif text.get("names"):
        # Without what captions begin with where something is given, which is not for the user to type.
        modes = tuple(f"({mode}) " for mode in get_args(CaptionMode))
        print(f"prompts: {', '.join(name for name in text['names'] if not name.startswith(modes))}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    import torch

    from starflow.distributed import join
    from starflow.sample import parse_solver

    if args.given is not None and args.video is None:
        raise ConfigError(f"--given is {args.given}, expected --video together with it")
    if args.edit_prompt and args.edit is None:
        raise ConfigError(f"--edit-prompt is {args.edit_prompt!r}, expected --edit together with it")
    if args.certificate and args.solver is not None:
        try:
            parse_solver(args.solver, certificate=True)
        except ValueError as error:
            raise ConfigError(f"--certificate: {error}") from None
    with join(torch.device(_device(args.device))) as world:
        return _sample_part(args, world)


def _sample_part(args: argparse.Namespace, world: World) -> int:
    """The clips of one of the processes that `torchrun` started, or all."""
    pipeline = _load(args, world)
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.clips)]
    mine = range(world.rank, len(prompts), world.size)
    fps = args.fps or pipeline.config.sample.fps
    if args.stream:
        if world.size > 1:
            raise ConfigError(f"--stream is given in {world.size} processes, expected one")
        return _stream(args, pipeline, prompts, fps)
    with _Output(Path(args.out)) as out:
        shown: dict[int, tuple[Any, str]] = {}
        for first in range(0, len(mine), args.batch):
            group = mine[first : first + args.batch]
            sampled = pipeline.sample(
                [prompts[index] for index in group],
                seeds=[args.seed + index for index in group],
                **_sample_options(args),
            )
            clips = _write_clips(out, sampled, group, fps, args)
            captions = [prompt or f"seed {seed}" for prompt, seed in zip(sampled.prompts, sampled.seeds, strict=True)]
            shown.update(zip(group, zip(clips, captions, strict=True), strict=True))
            if world.first:
                _print_report(sampled)
        everything = {index: clip for part in world.gather(shown) for index, clip in part.items()}
        if world.first:
            out.sheet(*zip(*(everything[index] for index in sorted(everything)), strict=True))
    if world.first:
        print(f"{_clips(len(prompts))} in {args.out}: mp4, gif and json of each, and sheet.png")
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
    from starflow.sample import report_of

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
    names = [_clip_name(row, prompt, args.seed + row) for row, prompt in enumerate(prompts)]
    with _Output(Path(args.out)) as out, contextlib.ExitStack() as files:
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
        meter = _Meter(begin)

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
            **_sources(args),
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
            out.json(f"{name}.json", {**told, **shape, **beginning, **report, **_together(len(prompts))})
    print(
        f"{_clips(len(prompts))} of {meter.frames} frames in {meter.seconds:.2f} s ({meter.rate:.1f} frames/s, the "
        f"first after {meter.first:.2f} s) in {args.out}: mp4 and json of each"
    )
    return 0


class _Meter:
    """Counts frames and tells on standard error how fast they come.

    Args:
        begin: the time from which on they count.
    """

    def __init__(self, begin: float) -> None:
        self.frames, self.first, self.seconds = 0, 0.0, 0.0
        self._begin, self._told = begin, begin
        self._live = sys.stderr.isatty()

    @property
    def rate(self) -> float:
        """Frames a second since the first."""
        return (self.frames - 1) / (self.seconds - self.first) if self.frames > 1 else self.frames / self.seconds

    def add(self, frames: int) -> None:
        """Counts frames that are there now."""
        now = time.perf_counter()
        self.seconds = now - self._begin
        self.first = self.first if self.frames else self.seconds
        self.frames += frames
        if now - self._told >= (0.2 if self._live else 2.0):
            self._told = now
            end = "\r" if self._live else "\n"
            print(f"{self.frames} frames, {self.rate:.1f} frames/s", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the line of the display."""
        if self._live:
            print(file=sys.stderr)


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _print_report(sampled: Sampled) -> None:
    report = sampled.report
    clips, frames = sampled.pixels.shape[:2]
    error = "" if report.backward_error is None else f", backward error {report.backward_error:.2g}"
    print(
        f"{_clips(clips)} of {frames} frames in {report.seconds:.2f} s ({report.frames_per_second:.1f} frames/s): "
        f"solver {report.solver}, {report.sweeps} sweeps, {report.evaluations_per_token:.1f} evaluations/token{error}"
    )


class _Output:
    """A folder that receives files; the new ones of a run that fails are taken back.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: list[Path] = []
        self._made = False

    def __enter__(self) -> _Output:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--out is {str(self.folder)!r}, which is a file, expected a folder")
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for path in self._new:
                path.unlink(missing_ok=True)
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def path(self, name: str) -> Path:
        """Where to write a file of this name."""
        path = self.folder / name
        if not path.exists():
            self._new.append(path)
        return path

    def json(self, name: str, values: Any) -> None:
        """Writes a json file."""
        write_json(self.path(name), values)

    def sheet(self, clips: Sequence[Any], captions: Sequence[str]) -> None:
        """Writes the contact sheet of all clips."""
        from starflow.data import write_contact_sheet

        write_contact_sheet(self.path("sheet.png"), clips, captions)


def write_json(path: Path, values: Any) -> None:
    """Writes a json file whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def _write_clips(
    out: _Output, sampled: Sampled, numbers: Sequence[int], fps: float, args: argparse.Namespace
) -> list[Any]:
    """Writes mp4, gif and json of each clip under its number; returns the frames for the contact sheet."""
    from starflow.data import enlarge, to_frames, write_gif, write_video

    side = min(sampled.pixels.shape[-2:])
    scale = args.scale or max(1, math.ceil(128 / side))
    # Browsers slow a gif down that shows more than 50 frames a second.
    skip = math.ceil(fps / 50)
    shown = []
    for row, pixels in enumerate(sampled.pixels):
        frames = enlarge(to_frames(pixels), scale)
        prompt, seed = sampled.prompts[row], sampled.seeds[row]
        name = _clip_name(numbers[row], prompt, seed)
        write_video(out.path(f"{name}.mp4"), frames, fps, lossless=args.lossless)
        write_gif(out.path(f"{name}.gif"), frames[::skip], fps / skip)
        out.json(
            f"{name}.json",
            {
                "prompt": prompt,
                "caption": sampled.captions[row],
                "seed": seed,
                "model": str(args.model),
                "frames": len(frames),
                "fps": fps,
                "height": pixels.shape[-2],
                "width": pixels.shape[-1],
                "given_frames": sampled.given,
                **_sources(args),
                **sampled.report.to_mapping(),
                **_together(len(sampled.pixels)),
            },
        )
        shown.append(frames)
    return shown


def _clip_name(row: int, prompt: str, seed: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{row:03d}-{words + '-' if words else ''}seed{seed}"


def _sources(args: argparse.Namespace) -> dict[str, Any]:
    """The files that clips were made from."""
    return {
        "given_from": args.image or args.video,
        "last_image": args.last_image,
        "source": args.source,
        "edited_from": args.edit,
    }


def _together(clips: int) -> dict[str, Any]:
    """What else decides the last bits of a clip."""
    import torch

    from starflow.info import version

    return {"clips_together": clips, "versions": {"starflow": version(), "torch": torch.__version__}}


def _score(args: argparse.Namespace) -> int:
    import torch

    from starflow.distributed import World
    from starflow.evaluate import LEVELS_BITS, Reference, heat_map, noise_floor, read_clips, score

    if bool(args.paths) == (args.held_out is not None):
        raise ConfigError("score: expected either paths of videos or --held-out, and not both")
    if args.reference is not None and args.held_out is not None:
        raise ConfigError(
            f"--reference is {args.reference}, expected paths together with it: it judges them by held-out clips"
        )
    if args.per_token and args.json is None:
        raise ConfigError("--per-token is given, expected --json together with it")
    pipeline = _load(args, World(device=torch.device(_device(args.device))))
    if args.caption and pipeline.text is None:
        raise ConfigError(f"--caption is {args.caption!r}, expected none: the model was trained without text")
    if args.held_out is not None:
        clips = _held_out(pipeline, args.held_out)
        if args.caption is not None:
            clips = [dataclasses.replace(clip, caption=args.caption) for clip in clips]
    else:
        clips = read_clips(
            pipeline, args.paths, frames=args.frames, clips_per_file=args.clips_per_file, caption=args.caption
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
    )
    ordinary = [] if args.reference is None else _held_out(pipeline, args.reference)
    if ordinary:
        reference = Reference(score(pipeline, ordinary, seed=args.seed, batch=args.batch, noise_std=sigma))
        scores = [reference.judge(item) for item in scores]
    if args.heat_map is not None:
        path = Path(args.heat_map)
        path.parent.mkdir(parents=True, exist_ok=True)
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


def _held_out(pipeline: Pipeline, count: int) -> list[Clip]:
    """The first clips of the run's own test data."""
    from starflow.batches import make_dataset

    dataset = make_dataset(pipeline.config, "test")
    return [dataset.item(index) for index in range(min(count, len(dataset)))]


def _print_scores(scores: Sequence[ClipScore], facts: dict[str, Any], *, frames: bool) -> None:
    print(f"bits per dimension: {facts['definition']}; less is better.")
    if facts["noise_floor"] is not None:
        print(
            f"No model scores less than the noise on average: {facts['noise_floor']:.3f}. "
            f"In 8-bit levels: add {facts['to_8_bit_levels']:.3f}."
        )
    width = max(len(item.name) for item in scores)
    ordered = [item for item in scores if item.shuffled is not None and item.reversed is not None]
    judged = any(item.anomaly is not None for item in scores)
    print(
        f"{'clip':<{width}}  {'bits/dim':>8}"
        + (f"  {'shuffled':>8}  {'reversed':>8}" if ordered else "")
        + (f"  {'anomaly':>8}  {'p-value':>8}  worst frame" if judged else "")
    )
    for item in scores:
        line = f"{item.name:<{width}}  {item.bits_per_dim:>8.4f}"
        if item.shuffled is not None and item.reversed is not None:
            line += f"  {item.shuffled:>8.4f}  {item.reversed:>8.4f}"
        if item.anomaly is not None:
            worst = max(range(len(item.frames)), key=[abs(value) for value in item.anomaly.frames].__getitem__)
            line += f"  {item.anomaly.deviations:>+8.2f}  {item.anomaly.p_value:>8.3f}"
            line += f"  {worst:>3} ({item.anomaly.frames[worst]:+.1f})"
        print(line + (f'  "{item.caption}"' if item.caption else ""))
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
                f"in time order better than {name}: {better} of {_clips(len(ordered))}{still}; "
                f"{gain:.4f} bits per dimension on average"
            )


def _convert(args: argparse.Namespace) -> int:
    from starflow.convert import convert, published_config

    if args.config not in config_names():
        config = published_config(args.config, codec_folder=args.codec, text_folder=args.text)
    else:
        folders = {"codec": args.codec, "text": args.text}
        config = make_config(args.config, [([part, "folder"], folder) for part, folder in folders.items() if folder])
    file_bytes = int(args.file_size * 2**30)
    convert(args.checkpoint, config, args.out, storage=args.dtype, file_bytes=file_bytes, progress=print)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from starflow.plan import GIB, fitting, plan

    config = make_config(args.config, args.set)
    how = {"devices": args.gpus, "peak": args.peak * 1e12, "efficiency": args.efficiency}
    asked = plan(config, **how)
    limit = None if args.memory is None else int(args.memory * GIB)
    fits = None if limit is None else fitting(config, limit, **how)
    if args.json:
        changed = {} if fits is None else _changes(config, fits[0])
        print(json.dumps({**asked.to_mapping(), "fits": limit is None or asked.memory <= limit, "change": changed}))
        return 0
    _print_plan(asked, config)
    if limit is None:
        return 0
    if fits is None:
        print(
            f"does not fit into {args.memory:g} GiB, one clip at a time, in pieces and recomputed: expected more "
            "devices or memory"
        )
        return 1
    settings = "".join(f" --set {key}={value}" for key, value in _changes(config, fits[0]).items())
    if settings:
        print(f"does not fit into {args.memory:g} GiB; this does, with {fits[1].memory / GIB:.1f}:{settings}")
        return 1
    print(f"fits into {args.memory:g} GiB")
    return 0


def _changes(config: RunConfig, changed: RunConfig) -> dict[str, Any]:
    """Options of one configuration that differ from another's."""
    before, after = to_mapping(config), to_mapping(changed)
    return {
        f"{section}.{name}": value
        for section, options in after.items()
        for name, value in options.items()
        if before[section].get(name) != value
    }


def _print_plan(plan: Plan, config: RunConfig) -> None:
    gib = 2**30
    total = sum(plan.parameters.values())
    print(f"parameters: {total:,} (" + ", ".join(f"{part} {count:,}" for part, count in plan.parameters.items()) + ")")
    print(
        f"a step on each of {plan.devices} ({plan.parallel}): {config.train.accumulate} x {plan.clips} clips of "
        f"{plan.tokens:,} tokens"
    )
    for name in ("weights", "gradients", "moments", "average", "gathered", "activations", "workspace", "memory"):
        print(f"{name:>12}  {getattr(plan, name) / gib:8.2f} GiB")
    print(
        f"{plan.flops:.3g} FLOP a step and device, {plan.seconds:.3g} s at {plan.rate:.3g} FLOP/s; "
        f"{config.train.steps:,} steps in {plan.seconds * config.train.steps / 3600:.3g} hours"
    )


def _info(args: argparse.Namespace) -> int:
    from starflow import info

    facts = info.machine() if args.model is None else info.model(args.model)
    if args.model is None:
        facts["starflow"]["configs"] = ", ".join(config_names())
    print(json.dumps(facts, indent=2, default=str) if args.json else info.text_of(facts))
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, expected cpu: torch {torch.__version__} sees no CUDA device")
    return name


def _load(args: argparse.Namespace, world: World) -> Pipeline:
    from starflow.checkpoints import read_header
    from starflow.sample import Pipeline

    licence = read_header(args.model).about.get("licence")
    if licence and world.first:
        print(f"{args.model}: {licence}", file=sys.stderr)
    return Pipeline.load(args.model, device=world.device)


# -- the parser -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROG}: error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument(
        "--threads",
        type=_number(int, 1),
        metavar="N",
        help="threads to compute with (default: OMP_NUM_THREADS, else what affinity and container quota allow)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, or auto: CUDA where there is one (default: auto)"
    )


def make_parser() -> _Parser:
    """The command line of `starflow`."""
    from starflow.info import version

    parser = _Parser(
        prog=_PROG,
        formatter_class=_Formatter,
        description="Video generation by one normalizing flow: train it, sample from it, score clips with it.",
        epilog=f"""examples:
  {_PROG} demo                                          train on moving digits, sample, write a report
  {_PROG} train --data my_clips --out runs/mine         train on a folder of videos
  {_PROG} sample runs/mine "waves at night" --out out   make a clip: mp4, GIF, JSON and a contact sheet
  {_PROG} score runs/mine a.mp4 b.mp4                   bits per dimension of given clips

"{_PROG} COMMAND --help" tells all options of a command.
exit status: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted.""",
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    for name, (run, options, summary, text) in _COMMANDS.items():
        made = commands.add_parser(name, formatter_class=_Formatter, help=summary, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        options(made)
        _add_common(made)
    return parser


_DEMO = f"""Train a small flow on moving handwritten digits, sample from it, continue and score clips, and write a
report with figures and clips. Takes minutes on two CPU cores and downloads nothing. A demo that was interrupted
goes on when the same command is given again; the trained model is OUT/run.

examples:
  {_PROG} demo
  {_PROG} demo --steps 2000 --out longer
  {_PROG} sample demo/run "a five moving down and left"     more clips from its model"""

_TRAIN = f"""Train a flow.

Without --data: on the built-in set of moving handwritten digits, which needs no download. With --data: on a
folder of video files of any format and size; NAME.txt or NAME.json beside NAME.mp4 holds its caption (in the
configuration "clips" NAME is, where there is no such file, followed by the second at which a clip begins). A run that
was interrupted goes on where its last checkpoint is when the same command is given again.

Under torchrun many processes train one flow, with the same numbers as one process ("--parallel fsdp": each keeps a
piece of weights and moments). A checkpoint is resumed by any number of processes.

examples:
  {_PROG} train --data my_clips --out runs/mine
  {_PROG} train --config digits --set train.steps=2000 --set train.batch_size=16
  {_PROG} train --config my.yaml --data my_clips
  torchrun --nproc-per-node 8 -m starflow train --config my.yaml --parallel fsdp"""

_SAMPLE = f"""Make clips from a trained model.

For each prompt (without one: a clip of anything) OUT receives NAME.mp4 (plays in every browser), NAME.gif and
NAME.json (prompt, seed, solver, its work and its error, seconds), and for all together sheet.png. The same
seed gives the same clip, alone or among others; the i-th clip has the seed SEED + i.

examples:
  {_PROG} sample runs/mine "a three moving up" "an eight standing still" --guidance 2 --out out
  {_PROG} sample runs/mine "a three moving up" --image first_frame.png
  {_PROG} sample runs/mine "a three moving up" --image first_frame.png --last-image last_frame.png
  {_PROG} sample runs/mine --video start.mp4 --given 4 --frames 16
  {_PROG} sample runs/pairs negative --source three.mp4
  {_PROG} sample runs/mine "an eight moving up" --edit three.mp4 --edit-prompt "a three moving up"
  {_PROG} sample runs/mine "a three moving up" --frames 2000 --stream
  {_PROG} sample runs/mine --solver window:16:0.001 --certificate"""

_SCORE = f"""Score clips: bits per dimension, less is better.

What is scored is the density that the model was trained on: of the clip plus normal noise (fixed by --seed).
With the built-in codecs, which are linear, the bits are per pixel and channel of pictures in [-1, 1]; they
may be negative. Clips are cut in the size and at the rate of the training clips.

examples:
  {_PROG} score runs/mine my_clips --order-check
  {_PROG} score runs/mine a.mp4 --caption "waves at night" --per-frame
  {_PROG} score runs/mine odd.mp4 --reference 100 --heat-map where.png
  {_PROG} score runs/digits --held-out 32 --json scores.json"""

_CONVERT = f"""Turn a published checkpoint (STARFlow, STARFlow-V) that you have on disk into a model file.

Nothing in a pickle is run, and nothing is downloaded. The weights keep their own licence. Sampling needs local copies
of the autoencoder and the text encoder that the release names.

Weights are copied one at a time, so that memory holds about the largest. OUT is one file where its name ends in
.safetensors, else a folder of files of a few gigabytes each.

example:
  {_PROG} convert starflow-v.yaml starflow-v.pth starflow-v --dtype bfloat16 --codec wan/vae --text flan-t5-xl"""

_PLAN = f"""Tell what a training run takes on each device before it is started: parameters, memory, arithmetic, time.

With --memory: whether it fits, else what to set so that it does (exit status 1). Nothing is trained and no weights
are made. The time is arithmetic over the peak times the efficiency: what a first run reached is the best guess.

examples:
  {_PROG} plan --config digits
  {_PROG} plan --config starflow-v_7B_t2v_caus_480p --gpus 64 --memory 80 --peak 989 --efficiency 0.4"""

_INFO = f"""Tell what is installed and what the machine can do; with a model, what it holds.

examples:
  {_PROG} info
  {_PROG} info runs/mine"""


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="where everything goes (default: demo)")
    parser.add_argument("--steps", type=_number(int, 1), metavar="N", help="of training (default: of config digits)")
    parser.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="of everything (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="folder of video files (default: the digits)")
    parser.add_argument(
        "--config",
        metavar="NAME_OR_PATH",
        help=f"configuration: a yaml file, or one of {', '.join(config_names())} (default: clips with --data, else "
        "digits)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder of the run (default: runs/NAME of the configuration)")
    parser.add_argument("--steps", type=_number(int, 1), metavar="N", help="short for --set train.steps=N")
    parser.add_argument("--seed", type=_number(int, 0), metavar="N", help="short for --set train.seed=N")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set an option of the configuration, such as train.lr=5e-4 or flow.channels=128; may be repeated",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="insist on a fresh run: an error where the folder holds checkpoints"
    )
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="short for --set train.parallel=...: what the processes of torchrun keep, everything or a piece",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _device_option(parser)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or a .safetensors file")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a clip shows; one or several")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="where files go (default: samples)")
    what = parser.add_argument_group("what")
    what.add_argument("--clips", type=_number(int, 1), default=1, metavar="N", help="clips of each prompt (default: 1)")
    what.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="of the first clip (default: 0)")
    what.add_argument(
        "--frames", type=_number(int, 1), metavar="N", help="frames, given ones included (default: as in training)"
    )
    what.add_argument("--size", type=_size, metavar="HxW", help="height and width in pixels (default: as in training)")
    what.add_argument(
        "--fps", type=_number(float, 0, above=True), metavar="F", help="frames a second (default: the model's)"
    )
    what.add_argument(
        "--guidance",
        type=_number(float, 0),
        metavar="W",
        help="weight of the prompt, 0 for none (default: the model's)",
    )
    what.add_argument(
        "--temperature",
        type=_number(float, 0),
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
        type=_number(int, 1),
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
    how.add_argument("--solver", type=_solver, metavar="TEXT", help=_SOLVER_HELP)
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
        type=_number(int, 1),
        metavar="N",
        help="of clips longer than the window: latent frames that each window takes over from the one before (default: "
        "three quarters)",
    )
    how.add_argument(
        "--window",
        type=_number(int, 2),
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
        type=_number(int, 0),
        metavar="N",
        help="frames that the learned denoiser waits for (default: as many as it was trained to see): 0 shows a frame "
        "sooner, cleaned a little worse",
    )
    how.add_argument(
        "--batch", type=_number(int, 1), default=8, metavar="N", help="most clips computed together (default: 8)"
    )
    _device_option(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--scale",
        type=_number(int, 1),
        metavar="N",
        help="pixels are repeated N times in both directions (default: 1, more where frames are smaller than 128)",
    )
    files.add_argument("--lossless", action="store_true", help="keep every bit in the mp4 (few browsers play it)")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or a .safetensors file")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="video files, or folders of them with their captions")
    parser.add_argument(
        "--held-out", type=_number(int, 1), metavar="N", help="in place of paths: N clips of the run's own test data"
    )
    parser.add_argument(
        "--clips-per-file", type=_number(int, 1), default=1, metavar="N", help="cut evenly from each file (default: 1)"
    )
    parser.add_argument("--frames", type=_number(int, 1), metavar="N", help="of a clip (default: as in training)")
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
        type=_picture,
        metavar="FILE",
        help="draw the bits of the tokens under the frames (.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--reference",
        type=_number(int, 2),
        metavar="N",
        help="judge the clips by N held-out clips of the run's own test data: how far off their bits are",
    )
    parser.add_argument(
        "--noise-std",
        type=_number(float, 0),
        metavar="S",
        help="deviation of the noise that is added (default: that of training; the model knows no other data)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the scores, frames included; - prints them in place of the table"
    )
    parser.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument(
        "--batch", type=_number(int, 1), default=8, metavar="N", help="most clips computed together (default: 8)"
    )
    _device_option(parser)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of a run, or a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print json")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help=f"yaml of the published release, or one of {', '.join(config_names())}"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".pth or .safetensors file with published names")
    parser.add_argument("out", metavar="OUT", type=_model, help="what to write: a name.safetensors, or a folder")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "int8"),
        default="keep",
        help="of the weights of layers; all else becomes float32 but with keep (default: keep, as in the checkpoint)",
    )
    parser.add_argument(
        "--file-size",
        type=_number(float, 0, above=True),
        default=4.0,
        metavar="GIB",
        help="of the files of a folder, about (default: 4)",
    )
    parser.add_argument("--codec", metavar="FOLDER", help="local copy of the autoencoder (diffusers format)")
    parser.add_argument("--text", metavar="FOLDER", help="local copy of the text encoder (transformers format)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME_OR_PATH",
        help=f"configuration: a yaml file, or one of {', '.join(config_names())}",
    )
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="set an option, as in train"
    )
    parser.add_argument("--gpus", type=_number(int, 1), default=1, metavar="N", help="devices in all (default: 1)")
    parser.add_argument(
        "--memory", type=_number(float, 0, above=True), metavar="GIB", help="of a device: whether the run fits"
    )
    parser.add_argument(
        "--peak",
        type=_number(float, 0, above=True),
        default=989.0,
        metavar="TFLOPS",
        help="of a device, in 10^12 FLOP/s (default: 989, an H100 in bfloat16 without sparsity)",
    )
    parser.add_argument(
        "--efficiency",
        type=_number(float, 0, above=True),
        default=0.4,
        metavar="SHARE",
        help="of the peak that is reached (default: 0.4)",
    )
    parser.add_argument("--json", action="store_true", help="print json, memory in bytes")


_COMMANDS: dict[
    str, tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str, str]
] = {
    "demo": (_demo, _add_demo, "train on moving digits, sample, score, and write a report", _DEMO),
    "train": (_train, _add_train, "train a flow on a folder of videos, or on the built-in digits", _TRAIN),
    "sample": (_sample, _add_sample, "make clips from text, a picture or the end of a video", _SAMPLE),
    "score": (_score, _add_score, "bits per dimension of given clips", _SCORE),
    "convert": (_convert, _add_convert, "turn a published checkpoint into a model file", _CONVERT),
    "plan": (_plan, _add_plan, "memory, arithmetic and time of a training run, before it is started", _PLAN),
    "info": (_info, _add_info, "versions and machine, or what a model file holds", _INFO),
}

# Commands with a list of positional arguments, and its name.
_LISTS = {"sample": "prompts", "score": "paths"}


# -- entry ------------------------------------------------------------------------------------------------------------


def _hint(command: str, rest: Sequence[str]) -> str:
    """The option that was probably meant."""
    own = _Parser()
    _COMMANDS[command][1](own)
    known = set(re.findall(r"--[a-z-]+", own.format_usage()))
    close = [name for text in rest for name in difflib.get_close_matches(text.partition("=")[0], known, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def _sentence(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _fail(status: int, message: str) -> int:
    print(f"{_PROG}: error: {message}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit status (see the module).
    """
    from starflow.info import set_threads

    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes a list of positional arguments in one piece only: what stands behind an option comes back as rest.
    if rest and (args.command not in _LISTS or any(text.startswith("-") for text in rest)):
        parser.error(f"{args.command} does not know {' '.join(rest)}{_hint(args.command, rest)}")
    if rest:
        getattr(args, _LISTS[args.command]).extend(rest)
    logging.basicConfig(format=f"{_PROG}: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("starflow").setLevel(logging.INFO)
    set_threads(args.threads)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        resumes = args.command in ("demo", "train")
        after = "the same command goes on from the last checkpoint" if resumes else "no file is half-written"
        if getattr(args, "stream", False):
            after = "what was made before plays"
        return _fail(130, f"interrupted; {after}")
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough; what is still in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, ConfigError):
            return _fail(2, _sentence(error))
        if _out_of_memory(error):
            return _fail(1, "not enough memory, expected fewer or smaller clips (--batch, --frames, --size) to fit")
        ours = type(error).__module__.partition(".")[0] == "starflow"
        if ours or isinstance(error, ValueError | OSError | ImportError):
            return _fail(1, _sentence(error))
        raise
    return status


if __name__ == "__main__":
    sys.exit(main())
