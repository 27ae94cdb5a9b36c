"""`starflow demo`: shows the shipped model, trains one itself, samples, continues, scores, and reports all of it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from starflow import noise
from starflow.cli.options import held_out_clips
from starflow.cli.report import Report
from starflow.config import RunConfig
from starflow.data import (
    DIGITS,
    DIRECTIONS,
    Clip,
    DigitJudge,
    enlarge,
    to_frames,
    write_contact_sheet,
    write_gif,
    write_video,
)
from starflow.evaluate import ClipScore, Reference, heat_map, noise_floor, score
from starflow.extras import import_extra
from starflow.files import write_text
from starflow.model import FlowBlock, patchify, to_sequence
from starflow.sampling import Pipeline, Sampled
from starflow.solver import BlockDecoder, Chunks, Schedule, Sequential, Window, certify, invert
from starflow.training import TrainStep, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)


# Sampled clips that the judge reads: every digit four times, every direction at least four times.
_JUDGED = 40


_SCORED = 32


_SHOWN = 18


_CONTINUED = 6


_GIVEN = 3


_ENLARGED = 4


_MAPPED = 2


# The model that comes with the package, and frames of its clips: enough to see digits turn round at the walls.
_SHIPPED = "digits"
_SHIPPED_FRAMES = 24
_TITLE = "STARFlow-V on moving digits"


@dataclass(frozen=True)
class SolverRow:
    """Cost and error of one schedule on the deep block of one clip."""

    name: str
    evaluations_per_token: float
    sweeps: int
    sweeps_per_frame: float
    backward_error: float
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class DemoFigures:
    """What the demo measured; written to `figures.json` and into the report.

    Args:
        first_clip_seconds: from the start of the demo to the report with the clips of the shipped model.
        shipped_digit_every_frame, shipped_direction_accuracy: as below, of those clips.
        steps, train_seconds, clips_per_second: steps, seconds and rate of training.
        bits_per_dim: mean of held-out clips. noise_floor_bits: the least that any model can reach on average.
        digit_every_frame, direction_accuracy: share of sampled clips whose every frame, read alone, shows the digit
            asked for, and share of those that move as asked for.
        real_digit_every_frame, real_direction_accuracy: both shares of held-out real clips: the judge's own error.
        shuffled_ranked, reversed_ranked: share of held-out clips that score better than the same frames shuffled, or
            backwards.
        clip_certificate: largest backward error of the sampled clips, over all blocks, by the solver of the config.
        sweeps_per_frame: sweeps of the deep block for one clip at the default tolerance, window of one frame.
        certificate: backward error of that solve; published_certificate: that of the published scheme.
        sample_seconds: time of sampling one clip: all blocks, denoiser and codec.
        seconds: time of the whole demo.
    """

    first_clip_seconds: float
    shipped_digit_every_frame: float
    shipped_direction_accuracy: float
    steps: int
    train_seconds: float
    clips_per_second: float
    bits_per_dim: float
    noise_floor_bits: float
    digit_every_frame: float
    direction_accuracy: float
    real_digit_every_frame: float
    real_direction_accuracy: float
    shuffled_ranked: float
    reversed_ranked: float
    clip_certificate: float
    sweeps_per_frame: float
    certificate: float
    published_certificate: float
    sample_seconds: float
    seconds: float


@dataclass(frozen=True)
class _Opening:
    """What the shipped model made: its clips as files with their prompts, and what the judge says of all of them."""

    shown: list[tuple[Path, str]]
    judged: dict[str, float]
    seconds: float


def demo(folder: Path, *, steps: int | None = None, seed: int = 0, quiet: bool = False) -> DemoFigures:
    """Runs the whole demo.

    Args:
        folder: gets `report.html`, `figures.json`, `clips` (mp4 and GIF), contact sheets and the trained model `run`.
            The report is there within seconds, with clips of the shipped model, and whole at the end. A demo that was
            interrupted goes on from its last checkpoint.
        steps: training steps; default those of the config `digits`.
        seed: seed of weights, data, noise and samples.
        quiet: shows no progress bar.

    Returns:
        The measured figures.
    """
    # A missing package that the report needs is an error before the training, not after it.
    import_extra("matplotlib.figure", purpose="the report", extra="plots")
    begin = time.perf_counter()
    config = RunConfig.load("digits")
    recipe = replace(config.train, seed=seed, steps=config.train.steps if steps is None else steps)
    config = replace(config, train=recipe)
    folder.mkdir(parents=True, exist_ok=True)
    judge = DigitJudge(config.data.height)
    opening = _open(folder, judge, seed, begin)
    if not quiet:
        print(
            f"{folder / 'report.html'}: clips of the model that comes with the package, after {opening.seconds:.0f} s; "
            f"now a smaller one is trained from nothing in {recipe.steps} steps, and the report goes on"
        )
    history: list[TrainStep] = []
    train_begin = time.perf_counter()
    train(config, folder / "run", on_step=history.append, quiet=quiet)
    train_seconds = time.perf_counter() - train_begin
    pipeline = Pipeline.load(folder / "run")
    held_out = held_out_clips(config, _SCORED)

    prompts = [_prompt(index) for index in range(_JUDGED)]
    sampled = pipeline.sample(prompts, seed=seed, certificate=True)
    assert sampled.report.backward_error is not None
    one = pipeline.sample(prompts[3], seed=seed)
    beginnings = torch.stack([clip.pixels for clip in held_out[:_CONTINUED]])
    captions = [clip.caption for clip in held_out[:_CONTINUED]]
    from_image = pipeline.sample(captions, seed=seed, image=beginnings[:, 0])
    from_clip = pipeline.sample(captions, seed=seed, video=beginnings[:, :_GIVEN], given=_GIVEN)
    judged = judge.score(sampled.pixels, prompts)
    real = judge.score([clip.pixels for clip in held_out], [clip.caption for clip in held_out])
    scores = score(pipeline, held_out, seed=seed, order_check=True, per_token=True)
    tampered = [_tampered(clip, other) for clip, other in zip(held_out[:_MAPPED], held_out[_MAPPED:], strict=False)]
    odd = score(pipeline, tampered, seed=seed, per_token=True)
    reference = Reference(scores[_MAPPED:])
    mapped = [
        (clip, reference.judge(item))
        for place in range(_MAPPED)
        for clip, item in ((held_out[place], scores[place]), (tampered[place], odd[place]))
    ]
    solver = solver_study(pipeline, prompts[3], seed)
    figures = DemoFigures(
        first_clip_seconds=opening.seconds,
        shipped_digit_every_frame=opening.judged["digit_every_frame"],
        shipped_direction_accuracy=opening.judged["direction_accuracy"],
        steps=recipe.steps,
        train_seconds=train_seconds,
        clips_per_second=len(history) * recipe.batch_size / train_seconds,
        bits_per_dim=_mean(s.bits_per_dim for s in scores),
        noise_floor_bits=noise_floor(recipe.noise_std),
        digit_every_frame=judged["digit_every_frame"],
        direction_accuracy=judged["direction_accuracy"],
        real_digit_every_frame=real["digit_every_frame"],
        real_direction_accuracy=real["direction_accuracy"],
        shuffled_ranked=_mean(s.shuffled is not None and s.bits_per_dim < s.shuffled for s in scores),
        reversed_ranked=_mean(s.reversed is not None and s.bits_per_dim < s.reversed for s in scores),
        clip_certificate=sampled.report.backward_error,
        sweeps_per_frame=solver[1].sweeps_per_frame,
        certificate=solver[1].backward_error,
        published_certificate=solver[-1].backward_error,
        sample_seconds=one.report.seconds,
        seconds=time.perf_counter() - begin,
    )

    clips = folder / "clips"
    shown = _write_clips(clips, "sample", sampled, config, count=_SHOWN)
    continued = [
        *_write_clips(clips, "from-image", from_image, config, count=_CONTINUED),
        *_write_clips(clips, "from-clip", from_clip, config, count=_CONTINUED),
    ]
    for name, made in (("samples", sampled), ("from-image", from_image), ("from-clip", from_clip)):
        write_contact_sheet(folder / f"{name}.png", [to_frames(c) for c in made.pixels[:_SHOWN]], made.prompts[:_SHOWN])
    write_text(folder / "figures.json", json.dumps(asdict(figures), indent=1))
    _write_report(folder / "report.html", figures, opening, history, shown, continued, scores, mapped, solver)
    return figures


def _open(folder: Path, judge: DigitJudge, seed: int, begin: float) -> _Opening:
    """Samples from the shipped model and writes the report as far as that goes."""
    pipeline = Pipeline.load(_SHIPPED)
    prompts = [_prompt(index) for index in range(_SHOWN)]
    sampled = pipeline.sample(prompts, seed=seed, frames=_SHIPPED_FRAMES)
    shown = _write_clips(folder / "clips", "shipped", sampled, pipeline.config, count=_SHOWN)
    opening = _Opening(shown, judge.score(sampled.pixels, prompts), time.perf_counter() - begin)
    report = Report(_TITLE)
    _write_opening(report, opening)
    report.text("A smaller flow is being trained from nothing; it will be shown here, beside this one.", note=True)
    report.write(folder / "report.html")
    return opening


def _write_opening(report: Report, opening: _Opening) -> None:
    report.heading("The model that comes with the package")
    report.text(
        f"Clips of {_SHIPPED_FRAMES} frames of the model {_SHIPPED} (its card: starflow info {_SHIPPED}), on "
        f"this page {opening.seconds:.0f} s after the command. The digit asked for is read in every frame of "
        f"{opening.judged['digit_every_frame']:.0%} of these {_SHOWN} clips, frames read one by one; "
        f"{opening.judged['direction_accuracy']:.0%} begin to move as they should."
    )
    report.clips(opening.shown)


def _prompt(index: int) -> str:
    """The prompt of a clip: digits and directions take turns with its index."""
    digit, direction = DIGITS[index % len(DIGITS)], list(DIRECTIONS)[index % len(DIRECTIONS)]
    return f"{'an' if digit == 'eight' else 'a'} {digit} {direction}"


def _write_clips(folder: Path, kind: str, made: Sampled, config: RunConfig, *, count: int) -> list[tuple[Path, str]]:
    """Writes mp4 and GIF of each clip; returns (GIF, caption) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for index, (pixels, prompt) in enumerate(zip(made.pixels[:count], made.prompts, strict=False)):
        frames = enlarge(to_frames(pixels), _ENLARGED)
        path = folder / f"{kind}-{index:02d}"
        write_video(path.with_suffix(".mp4"), frames, config.sample.fps)
        write_gif(path.with_suffix(".gif"), frames, config.sample.fps)
        shown.append((path.with_suffix(".gif"), prompt))
    return shown


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def _tampered(clip: Clip, other: Clip) -> Clip:
    """The clip with its middle frame taken from another."""
    pixels = clip.pixels.clone()
    middle = len(pixels) // 2
    pixels[middle] = other.pixels[middle]
    return Clip(pixels, clip.caption, f"{clip.name}, frame {middle} of {other.name}")


def solver_study(pipeline: Pipeline, prompt: str, seed: int) -> list[SolverRow]:
    """Solves the deep block of one clip by every schedule, and measures each backward error.

    Args:
        pipeline: pipeline with the trained flow.
        prompt: prompt of the clip.
        seed: seed of its noise.

    Returns:
        Rows of token by token, windows of one frame, half and a quarter of it, and published chunks, in order.
    """
    flow, data, codec = pipeline.flow, pipeline.config.data, pipeline.codec
    block = flow.blocks[-1]
    assert isinstance(block, FlowBlock)
    frames, height, width = codec.latent_frames(data.frames), data.height // codec.spatial, data.width // codec.spatial
    z = noise.draw([seed], frames, codec.latent_channels, height, width, purpose="sample")
    grid = patchify(z, flow.config.patch_size)
    context = pipeline.condition([prompt])
    layout = block.layout(grid.shape[1], grid.shape[2], grid.shape[3], context, image=False)
    tokens = to_sequence(grid, layout.order)
    frame = layout.frame_tokens
    schedules: list[tuple[str, Schedule]] = [
        ("token by token", Sequential()),
        (f"window of {frame} (one frame), tolerance 0.01", Window(frame)),
        (f"window of {frame // 2}, tolerance 0.01", Window(frame // 2)),
        (f"window of {frame // 4}, tolerance 0.01", Window(frame // 4)),
        ("published: chunks of 32, threshold 0.001", Chunks()),
    ]
    rows = []
    for name, schedule in schedules:
        with torch.inference_mode():
            x, report = invert(BlockDecoder(block, layout, 1, context), tokens, schedule)
            error = certify(BlockDecoder(block, layout, 1, context), x, tokens)
        rows.append(
            SolverRow(name, report.evaluations_per_token, report.sweeps, report.sweeps / frames, error, report.accepted)
        )
    return rows


def _write_report(
    path: Path,
    figures: DemoFigures,
    opening: _Opening,
    history: Sequence[TrainStep],
    shown: Sequence[tuple[Path, str]],
    continued: Sequence[tuple[Path, str]],
    scores: Sequence[ClipScore],
    mapped: Sequence[tuple[Clip, ClipScore]],
    solver: Sequence[SolverRow],
) -> None:
    report = Report(_TITLE)
    _write_opening(report, opening)
    report.heading("A model trained here")
    report.text(
        f"A normalizing flow and its denoiser, trained in {figures.train_seconds:.0f} s "
        f"({figures.steps} steps), then sampled, continued and scored."
    )
    report.table(
        ("measured", "value"),
        [
            (
                "digit as told in every frame, read one by one (in real clips)",
                _pair(figures.digit_every_frame, figures.real_digit_every_frame),
            ),
            (
                "moves as told, by the centre of mass (on real clips)",
                _pair(figures.direction_accuracy, figures.real_direction_accuracy),
            ),
            (
                "bits per dimension of held-out clips (noise floor)",
                f"{figures.bits_per_dim:.3f} ({figures.noise_floor_bits:.3f})",
            ),
            ("held-out clips that score better than shuffled", f"{figures.shuffled_ranked:.0%}"),
            ("held-out clips that score better than backwards", f"{figures.reversed_ranked:.0%}"),
            (
                f"largest error of {_JUDGED} whole clips, all blocks, in noise deviations",
                f"{figures.clip_certificate:.3f}",
            ),
            ("sweeps a frame, deep block of one clip, default tolerance", f"{figures.sweeps_per_frame:.2f}"),
            ("error of that block, in noise deviations", f"{figures.certificate:.3f}"),
            ("the same by the published scheme", f"{figures.published_certificate:.3f}"),
            ("seconds for one clip", f"{figures.sample_seconds:.2f}"),
            ("seconds for the whole demo", f"{figures.seconds:.0f}"),
        ],
    )
    report.heading("Samples")
    report.clips(shown)
    report.heading("Continuations")
    report.text(f"The first frame (upper row) or the first {_GIVEN} frames (lower row) of held-out clips are given.")
    report.clips(continued)
    if history:
        report.heading("Training")
        report.plot(_loss_plot(history, figures.noise_floor_bits), "bits per dimension over training")
    report.heading("Solving the inverse")
    report.text(
        "The deep block of one clip. Evaluations count tokens pushed through the block over tokens in the clip; sweeps "
        "are calls one after the other; the error is the largest difference between the noise that was asked for and "
        "the noise that the finished clip belongs to, in standard deviations."
    )
    report.table(
        ("schedule", "evaluations / token", "sweeps", "sweeps / frame", "error"),
        [
            (
                row.name,
                f"{row.evaluations_per_token:.2f}",
                str(row.sweeps),
                f"{row.sweeps_per_frame:.2f}",
                f"{row.backward_error:.2g}",
            )
            for row in solver
        ],
    )
    report.plot(_solver_plot(solver), "tokens accepted over sweeps")
    report.heading("Likelihood")
    report.text(
        "Bits per dimension of held-out clips (with the noise that training adds), of the same frames shuffled, and "
        "backwards; less is better. A clip played backwards moves against its caption."
    )
    report.plot(_score_plot(scores), "bits per dimension of real, shuffled and reversed clips")
    report.text(
        "Where the bits are: held-out clips, and the same with one frame taken from another clip. Above each its bits "
        "per dimension, how many deviations those are from the mean of the other held-out clips, and a bound on how "
        "often such a clip is as far from it."
    )
    titles = [
        f"{item.name}: {item.bits_per_dim:.3f}, {item.anomaly.deviations:+.1f} deviations, "
        f"p = {item.anomaly.p_value:.2f}"
        for _, item in mapped
        if item.anomaly is not None
    ]
    maps = heat_map([clip for clip, _ in mapped], [item for _, item in mapped], titles)
    report.plot(maps, "bits per dimension of tokens under the frames of clips")
    report.write(path)


def _pair(value: float, real: float) -> str:
    return f"{value:.0%} ({real:.0%})"


def _figure(width: float = 7.0, height: float = 3.2) -> Figure:
    plots = import_extra("matplotlib.figure", purpose="the report", extra="plots")
    figure: Figure = plots.Figure(figsize=(width, height), layout="constrained")
    return figure


def _loss_plot(history: Sequence[TrainStep], floor: float) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    steps = [done.step for done in history]
    bits = [done.bits_per_dim for done in history]
    width = max(len(bits) // 50, 1)
    smooth = [_mean(bits[max(i - width + 1, 0) : i + 1]) for i in range(len(bits))]
    axes.plot(steps, bits, color="0.8", linewidth=0.6)
    axes.plot(steps, smooth, label="flow")
    axes.axhline(floor, color="0.4", linestyle=":", label="noise floor")
    axes.set(xlabel="step", ylabel="bits per dimension", ylim=(floor - 0.1, max(smooth[len(smooth) // 20 :]) + 0.1))
    axes.legend()
    return figure


def _solver_plot(solver: Sequence[SolverRow]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    for row in solver:
        total = 0
        done = [0] + [total := total + count for count in row.accepted]
        axes.step(range(len(done)), done, where="post", label=row.name)
    axes.set(xlabel="sweeps", ylabel="tokens accepted", xscale="symlog")
    axes.legend(fontsize=8)
    return figure


def _score_plot(scores: Sequence[ClipScore]) -> Figure:
    figure = _figure()
    left, right = figure.subplots(1, 2)
    order = sorted(scores, key=lambda s: s.bits_per_dim)
    for name, values in (
        ("real", [s.bits_per_dim for s in order]),
        ("shuffled", [s.shuffled for s in order]),
        ("backwards", [s.reversed for s in order]),
    ):
        left.plot([math.nan if v is None else v for v in values], ".", label=name)
    left.set(xlabel="clip", ylabel="bits per dimension")
    left.legend(fontsize=8)
    frames = [_mean(column) for column in zip(*(s.frames for s in scores), strict=True)]
    right.bar(range(len(frames)), [value - min(0.0, *frames) for value in frames], bottom=min(0.0, *frames))
    right.set(xlabel="frame, given the ones before", ylabel="bits per dimension")
    return figure
