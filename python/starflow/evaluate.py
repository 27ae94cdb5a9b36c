"""Scoring: bits per dimension of given clips, and whether the flow knows their order in time.

What is scored is the density that the flow was trained on: that of the clip's latents plus normal noise of standard
deviation sigma (`train.noise_std`), the noise being fixed by a seed. Bits per dimension are minus log2 of that density
over the number of latent values. With a codec that is linear (its log-determinant is added) these are bits per pixel
and channel of pictures in [-1, 1]; with a learned autoencoder they are bits per latent value and say nothing about
pixels. A density is not a probability: bits may be negative, and cannot on average fall under the entropy of the noise,
`noise_floor`. Adding `LEVELS_BITS` expresses the same density in units of 8-bit grey levels.

A low density alone does not make a clip an anomaly, nor a high one an ordinary clip: an empty picture scores better
than any photograph. `Reference` therefore judges by how far the bits of a clip are from those of ordinary clips, on
either side.

Reference: Gu et al., STARFlow-V (2025); Theis et al., A Note on the Evaluation of Generative Models (2016); Nalisnick
et al., Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (2019); Laxhammar and Falkman,
Conformal Prediction for Distribution-Independent Anomaly Detection (2010).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from starflow import noise
from starflow.data import (
    CaptionMode,
    Clip,
    VideoError,
    VideoFolder,
    frames_at,
    probe,
    read_image,
    read_video,
    to_frames,
    to_pixels,
)
from starflow.data.clips import IMAGE_SUFFIXES, caption_at, captions_of
from starflow.sample import Pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One 8-bit level is 1 / 127.5 of the range [-1, 1].
LEVELS_BITS = math.log2(127.5)


def noise_floor(sigma: float, log_det_per_dimension: float | None = 0.0) -> float:
    """Entropy of the noise in bits per dimension: no model can score less on average. -inf for `sigma` 0.

    Args:
        sigma: standard deviation of the noise on the latents.
        log_det_per_dimension: of the codec; None where bits are those of latents.
    """
    if sigma <= 0.0:
        return -math.inf
    return 0.5 * math.log2(2 * math.pi * math.e * sigma**2) - (log_det_per_dimension or 0.0) / math.log(2)


@dataclass(frozen=True)
class Anomaly:
    """How a clip stands to ordinary ones (see `Reference`).

    Args:
        deviations: its bits per dimension minus their mean, in standard deviations; below 0 it is more predictable.
        frames: the same of each latent frame, against the same frame of the others.
        p_value: a bound on the probability that an ordinary clip is as far from the mean, on either side.
    """

    deviations: float
    frames: tuple[float, ...]
    p_value: float


@dataclass(frozen=True)
class ClipScore:
    """Bits per dimension of one clip (see the module for what is scored).

    Args:
        name: of the clip.
        caption: that the score is conditional on; "" for a flow without text.
        bits_per_dim: of the whole clip.
        frames: of each latent frame given the ones before it.
        tokens: of each token by frame, row and column (see `Flow.token_log_likelihood`), where asked for.
        shuffled, reversed: bits per dimension of the same frames in a random order and backwards, where asked for.
        anomaly: against ordinary clips, where asked for.
    """

    name: str
    caption: str
    bits_per_dim: float
    frames: tuple[float, ...]
    tokens: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    shuffled: float | None = None
    reversed: float | None = None
    anomaly: Anomaly | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return asdict(self)


class Reference:
    """Ordinary clips against which others are judged.

    The p-value is conformal: `(1 + number of ordinary clips at least as far from their mean) / (1 + their number)`. For
    clips drawn like them it is at most a with probability at most a, whatever the model; so `n` clips cannot give less
    than `1 / (n + 1)`.

    Args:
        scores: of the ordinary clips, at least two, all of as many latent frames; they must not have been trained on,
            and must be scored at the same noise as what they are compared with.

    Raises:
        ValueError: too few, of different lengths, or all alike.
    """

    def __init__(self, scores: Sequence[ClipScore]) -> None:
        if len(scores) < 2 or len({len(item.frames) for item in scores}) > 1:
            lengths = ", ".join(map(str, sorted({len(item.frames) for item in scores}))) or "none"
            raise ValueError(
                f"reference: {len(scores)} clips of {lengths} latent frames, expected at least 2 of one length"
            )
        self._bits = np.array([item.bits_per_dim for item in scores])
        self._frames = np.array([item.frames for item in scores])
        self._deviation, self._deviations = self._bits.std(ddof=1), self._frames.std(0, ddof=1)
        if self._deviation == 0.0 or not self._deviations.all():
            raise ValueError("reference: all clips have the same bits, expected clips that differ")

    def judge(self, item: ClipScore) -> ClipScore:
        """The score with its anomaly.

        Raises:
            ValueError: another number of latent frames than the reference.
        """
        if len(item.frames) != self._frames.shape[1]:
            raise ValueError(
                f"reference: {item.name} has {len(item.frames)} latent frames, expected {self._frames.shape[1]} as the "
                "reference has"
            )
        mean = self._bits.mean()
        far = (np.abs(self._bits - mean) >= abs(item.bits_per_dim - mean)).sum()
        frames = (np.array(item.frames) - self._frames.mean(0)) / self._deviations
        return replace(
            item,
            anomaly=Anomaly(
                float((item.bits_per_dim - mean) / self._deviation),
                tuple(frames.tolist()),
                float((1 + far) / (1 + len(self._bits))),
            ),
        )


def score(
    pipeline: Pipeline,
    clips: Sequence[Clip],
    *,
    seed: int = 0,
    batch: int = 8,
    order_check: bool = False,
    per_token: bool = False,
    fps: float | None = None,
    noise_std: float | None = None,
) -> list[ClipScore]:
    """Bits per dimension of clips.

    Args:
        pipeline: with the flow.
        clips: pixels (frames, channels, height, width) in [-1, 1] with their captions; shapes may differ. A clip with a
            source is scored given that, as a model of pairs was trained; the bits are those of the clip alone.
        seed: of the noise; clip i has the noise of seed + i.
        batch: clips computed together.
        order_check: also score every clip with its frames shuffled and reversed.
        per_token: keep the bits of each token.
        fps: frames a second that captions tell, by default those of the training clips.
        noise_std: of the noise that is added, by default that of training; anything else asks the flow about data that
            it was not trained on (see docs/likelihood.md).

    Returns:
        A score for each clip, in order.

    Raises:
        ValueError: no clip, a shape that does not fit, values that are not finite, or a caption that the text
            encoder refuses; the message names the clip.
    """
    if not clips:
        raise ValueError("score: clips is empty, expected at least one clip")
    if batch < 1:
        raise ValueError(f"score: batch is {batch}, expected at least 1")
    sigma = pipeline.config.train.noise_std if noise_std is None else noise_std
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"score: noise_std is {sigma}, expected a finite number >= 0")
    if pipeline.text is None:
        # As in training: a flow without text does not see the captions of its data.
        clips = [replace(clip, caption="") for clip in clips]
    scores: list[ClipScore] = []
    for first, group in _groups(clips, batch):
        seeds = range(seed + first, seed + first + len(group))
        pixels = torch.stack([clip.pixels for clip in group])
        tokens = _bits(pipeline, group, pixels, seeds, fps, sigma)
        # Tokens have equally many dimensions, and so have frames.
        bits = tokens.flatten(2).mean(2)
        shuffled = reverse = None
        if order_check and pixels.shape[1] > 1:
            orders = torch.stack([_shuffle(pixels.shape[1], number) for number in seeds])
            mixed = torch.stack([clip[order] for clip, order in zip(pixels, orders, strict=True)])
            shuffled = _bits(pipeline, group, mixed, seeds, fps, sigma).flatten(1).mean(1).tolist()
            reverse = _bits(pipeline, group, pixels.flip(1), seeds, fps, sigma).flatten(1).mean(1).tolist()
        for row, clip in enumerate(group):
            plain = ClipScore(clip.name, clip.caption, float(bits[row].mean()), tuple(bits[row].tolist()))
            if per_token:
                plain = replace(plain, tokens=_nested(tokens[row]))
            if shuffled is not None and reverse is not None:
                plain = replace(plain, shuffled=shuffled[row], reversed=reverse[row])
            scores.append(plain)
    return scores


@torch.inference_mode()
def _bits(
    pipeline: Pipeline, clips: Sequence[Clip], pixels: Tensor, seeds: Sequence[int], fps: float | None, sigma: float
) -> Tensor:
    """Bits per dimension of each token, (clips, latent frames, height, width), float64."""
    texts = [_condition(pipeline, clip, fps) for clip in clips]
    y = None if texts[0] is None else torch.cat([text for text in texts if text is not None])
    sources = [clip.source for clip in clips if clip.source is not None]
    if sources and sources[0].shape[1:] != pixels.shape[2:]:
        raise ValueError(
            f"score: {clips[0].name} has a source of {list(sources[0].shape[1:])} (channels, height, width), expected "
            f"{list(pixels.shape[2:])} like the clip"
        )
    try:
        parts = [torch.stack(sources), pixels] if sources else [pixels]
        encoded = [pipeline.codec.encode(part.to(pipeline.device)) for part in parts]
        latents = torch.cat(encoded, 1)
    except ValueError as error:
        raise ValueError(f"score: {clips[0].name}: {error}") from None
    finite = latents.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise ValueError(
            f"score: {clips[finite.index(False)].name} holds values that are not finite, expected numbers in [-1, 1]"
        )
    _, frames, channels, height, width = latents.shape
    drawn = noise.draw(seeds, frames, channels, height, width, purpose="train").to(latents)
    nats = pipeline.flow.log_prob(latents + sigma * drawn, y, by="token").double()[:, -encoded[-1].shape[1] :]
    dimensions = channels * height * width / nats[0, 0].numel()
    return (-(nats / dimensions + (pipeline.codec.log_det_per_dimension or 0.0)) / math.log(2)).cpu()


def _nested(tokens: Tensor) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in frame) for frame in tokens.tolist())


def _condition(pipeline: Pipeline, clip: Clip, fps: float | None) -> Tensor | None:
    """What the flow reads for the caption of one clip."""
    try:
        size = (clip.pixels.shape[-2], clip.pixels.shape[-1])
        mode: CaptionMode | None = None if clip.source is None else "v2v"
        return pipeline.condition([clip.caption], fps=fps, image=len(clip.pixels) == 1, mode=mode, size=size)
    except ValueError as error:
        raise ValueError(f"score: {clip.name}: {error}") from None


def _groups(clips: Sequence[Clip], batch: int) -> Iterator[tuple[int, list[Clip]]]:
    """Runs of clips of one shape, at most `batch` long, with the place of their first."""
    first = 0
    while first < len(clips):
        end = first + 1
        while end < min(first + batch, len(clips)) and _shapes(clips[end]) == _shapes(clips[first]):
            end += 1
        yield first, list(clips[first:end])
        first = end


def _shapes(clip: Clip) -> tuple[torch.Size, torch.Size | None]:
    return clip.pixels.shape, None if clip.source is None else clip.source.shape


def _shuffle(frames: int, seed: int) -> Tensor:
    """An order of the frames that is neither the one in time nor, where there are more than two, its reverse."""
    rng = np.random.default_rng(seed)
    plain = np.arange(frames)
    while True:
        order = rng.permutation(frames)
        if not (order == plain).all() and (frames == 2 or not (order == plain[::-1]).all()):
            return torch.from_numpy(order)


def heat_map(clips: Sequence[Clip], scores: Sequence[ClipScore], titles: Sequence[str] | None = None) -> Figure:
    """Draws where the bits of clips are: for each clip its frames, and under them the bits per dimension of the tokens.

    Args:
        clips: what was scored; a latent frame of several pixel frames is shown by the first of them.
        scores: of the clips, with `tokens`.
        titles: by default the names and the bits of the clips.

    Raises:
        ValueError: no clip, or scores without tokens or of other clips.
    """
    from matplotlib.figure import Figure

    if not clips or len(clips) != len(scores) or any(item.tokens is None for item in scores):
        raise ValueError(
            f"heat_map: {len(clips)} clips and {len(scores)} scores, expected one score with tokens (per_token) of each"
        )
    titles = [f"{item.name}: {item.bits_per_dim:.3f}" for item in scores] if titles is None else titles
    maps = [np.array(item.tokens) for item in scores]
    columns = max(len(bits) for bits in maps)
    figure = Figure(figsize=(1.1 * columns + 1.2, 2.4 * len(clips)), layout="constrained")
    axes = figure.subplots(2 * len(clips), columns, squeeze=False)
    # A single token far out would leave the rest without contrast.
    low, high = np.percentile(np.concatenate([bits.ravel() for bits in maps]), (1, 99))
    for row, (clip, bits, title) in enumerate(zip(clips, maps, titles, strict=True)):
        shown = to_frames(clip.pixels).numpy()
        # Of a codec that joins frames: the first pixel frame of each latent one.
        first = [len(shown) * frame // len(bits) for frame in range(len(bits))]
        left = axes[2 * row, 0]
        # A title would widen its column: an empty one keeps the room for it.
        left.set_title(" ", fontsize=8)
        left.text(0.0, 1.08, title, fontsize=8, transform=left.transAxes, in_layout=False)
        for column in range(columns):
            upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
            for place in (upper, lower):
                place.set_axis_off()
            if column < len(bits):
                upper.imshow(shown[first[column]].squeeze(-1), cmap="gray", vmin=0, vmax=255)
                image = lower.imshow(bits[column], cmap="magma", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label="bits per dimension", shrink=0.6)
    return figure


def read_clips(
    pipeline: Pipeline,
    paths: Sequence[str | Path],
    *,
    frames: int | None = None,
    clips_per_file: int = 1,
    caption: str | None = None,
) -> list[Clip]:
    """Cuts clips in the size and at the rate that the flow was trained on.

    Args:
        pipeline: of the flow.
        paths: video files, images (of models that make images), and folders of them. In a folder a file that cannot
            be read is skipped with a line in the log. Captions come from the files beside them, names and
            places where training took them from there.
        frames: of a clip, by default those of the training clips.
        clips_per_file: cut evenly from each file.
        caption: of all clips, in place of their own.

    Raises:
        ValueError, FileNotFoundError: a path that does not exist or cannot be read; the message names it.
    """
    data = pipeline.config.data
    count = data.frames if frames is None else frames
    clips: list[Clip] = []
    for path in map(Path, paths):
        if path.is_dir():
            folder = VideoFolder(
                path,
                frames=count,
                height=data.height,
                width=data.width,
                fps=data.fps,
                channels=data.channels,
                clips_per_file=clips_per_file,
                cut="even",
                name_captions=data.name_captions,
                caption_second=data.caption_second,
            )
            clips += [folder.item(index) for index in range(len(folder))]
        else:
            clips += _cut(path, count, clips_per_file, pipeline)
    return clips if caption is None else [replace(clip, caption=caption) for clip in clips]


def _cut(path: Path, frames: int, clips_per_file: int, pipeline: Pipeline) -> list[Clip]:
    """Clips of one file, from its first possible start to its last."""
    data = pipeline.config.data
    caption = captions_of(path, by_name=data.name_captions)[0]
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if frames > 1:
            raise VideoError(f"{path}: an image is one frame, expected a video of at least {frames}")
        picture = read_image(path, height=data.height, width=data.width, channels=data.channels)
        return [Clip(to_pixels(picture), caption, path.name)]
    info = probe(path, count=True)
    fps = data.fps or info.fps
    last = frames_at(info, fps) - frames
    if last < 0:
        raise VideoError(f"{path}: {last + frames} frames at {fps:g} frames per second, expected at least {frames}")
    spots = [last // 2] if clips_per_file == 1 else np.linspace(0, last, clips_per_file).round().astype(int).tolist()
    return [
        Clip(
            to_pixels(
                read_video(
                    path,
                    frames=frames,
                    fps=fps,
                    start=spot / fps,
                    info=info,
                    height=data.height,
                    width=data.width,
                    channels=data.channels,
                )
            ),
            caption_at(caption, spot / fps) if data.caption_second else caption,
            f"{path.name}@{spot}",
        )
        for spot in spots
    ]
