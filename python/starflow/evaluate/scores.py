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

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starflow import noise
from starflow.arguments import check_flag
from starflow.codecs import tell_scale
from starflow.data import CaptionMode, Clip, require_clip
from starflow.inference import without_autocast
from starflow.messages import listed, shown
from starflow.numeric import integer, number
from starflow.sampling import Pipeline

logger = logging.getLogger(__name__)

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
    """How far a clip is from ordinary ones (see `Reference`).

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
        first_frames: the pixel frame that each latent frame begins with, beside `tokens`.
        shuffled, reversed: bits per dimension of the same frames in a random order and backwards, where asked for.
        anomaly: against ordinary clips, where asked for.
        noise_std: of the noise that the clip was scored with; None where it is not known.
    """

    name: str
    caption: str
    bits_per_dim: float
    frames: tuple[float, ...]
    tokens: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    first_frames: tuple[int, ...] | None = None
    shuffled: float | None = None
    reversed: float | None = None
    anomaly: Anomaly | None = None
    noise_std: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return asdict(self)


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
    scaled: bool = False,
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
        scaled: the pixels are known to be in [-1, 1], as those of files are; the log tells of others that look like
            [0, 1].

    Returns:
        A score for each clip, in order.

    Raises:
        ValueError: no clip, a shape that does not fit, values or a density that are not finite, or a caption that the
            text encoder refuses; the message names the clip.
    """
    if not isinstance(clips, Sequence) or not all(isinstance(clip, Clip) for clip in clips):
        raise ValueError(f"score: clips is {shown(clips)}, expected a list of clips (starflow.data.Clip)")
    if not clips:
        raise ValueError("score: clips is empty, expected at least one clip")
    first_seed, most, sigma = integer(seed), integer(batch), number(noise_std)
    if first_seed is None or first_seed < 0:
        raise ValueError(f"score: seed is {shown(seed)}, expected an integer >= 0")
    if most is None or most < 1:
        raise ValueError(f"score: batch is {shown(batch)}, expected at least 1")
    if noise_std is None:
        sigma = pipeline.config.train.noise_std
    if sigma is None or not 0.0 <= sigma < math.inf:
        raise ValueError(f"score: noise_std is {shown(noise_std)}, expected a finite number >= 0")
    if fps is not None and ((rate := number(fps)) is None or not 0.0 < rate < math.inf):
        raise ValueError(f"score: fps is {shown(fps)}, expected a finite number above 0, or None")
    for name, flag in (("order_check", order_check), ("per_token", per_token), ("scaled", scaled)):
        check_flag("score", name, flag)
    for clip in clips:
        check_clip(pipeline, clip, clip)
    if not scaled:
        tell_scale("score: no pixel of the clips", [clip.pixels for clip in clips])
    _tell_unread(pipeline, clips, order_check=order_check, fps=fps)
    clips = as_read(pipeline, clips)
    scores: list[ClipScore] = []
    for first, group in _groups(clips, most):
        seeds = range(first_seed + first, first_seed + first + len(group))
        pixels = torch.stack([clip.pixels for clip in group])
        tokens = token_bits(pipeline, group, pixels, seeds, fps, sigma)
        # Tokens have equally many dimensions, and so have frames.
        bits = tokens.flatten(2).mean(2)
        shuffled = reverse = None
        if order_check and pixels.shape[1] > 1:
            orders = torch.stack([_shuffle(pixels.shape[1], number) for number in seeds])
            mixed = torch.stack([clip[order] for clip, order in zip(pixels, orders, strict=True)])
            ordered = [_in_order(clip, order) for clip, order in zip(group, orders, strict=True)]
            shuffled = token_bits(pipeline, ordered, mixed, seeds, fps, sigma).flatten(1).mean(1).tolist()
            backwards = [_in_order(clip, torch.arange(pixels.shape[1] - 1, -1, -1)) for clip in group]
            reverse = token_bits(pipeline, backwards, pixels.flip(1), seeds, fps, sigma).flatten(1).mean(1).tolist()
        for row, clip in enumerate(group):
            plain = ClipScore(
                clip.name, clip.caption, float(bits[row].mean()), tuple(bits[row].tolist()), noise_std=sigma
            )
            if per_token:
                begins = (0, *map(pipeline.codec.pixel_frames, range(1, len(tokens[row]))))
                plain = replace(plain, tokens=_nested(tokens[row]), first_frames=begins)
            if shuffled is not None and reverse is not None:
                plain = replace(plain, shuffled=shuffled[row], reversed=reverse[row])
            scores.append(plain)
    return scores


def as_read(pipeline: Pipeline, clips: Sequence[Clip]) -> list[Clip]:
    """Clips as training sees them: a flow without text does not read the captions of its data."""
    return list(clips) if pipeline.text is not None else [replace(clip, caption="") for clip in clips]


def _tell_unread(pipeline: Pipeline, clips: Sequence[Clip], *, order_check: bool, fps: float | None) -> None:
    """Tells of what was asked for and does nothing, and of clips that are longer than any of training."""
    data, flow = pipeline.config.data, pipeline.flow.config
    still = sum(len(clip.pixels) == 1 for clip in clips)
    if order_check and still:
        logger.warning("score: %d of %d clips are one frame, which has no order to check", still, len(clips))
    if fps is not None and not data.caption_fps:
        logger.warning("score: fps is %g and nothing reads it: captions of the model tell no rate", fps)
    sizes = {tuple(clip.pixels.shape[-2:]) for clip in clips}
    if not data.mix_aspect and (other := sorted(sizes - {(data.height, data.width)})):
        logger.warning(
            "score: clips have %s pixels, and the model was trained on %dx%d alone: how likely others are it never "
            "learned",
            listed(f"{high}x{wide}" for high, wide in other),
            data.height,
            data.width,
        )
    longest = max(len(clip.pixels) for clip in clips)
    if longest > data.frames and flow.attention_frames is None:
        logger.warning(
            "score: clips have up to %d frames, and the model was trained on %d: how likely longer ones are it never "
            "learned",
            longest,
            data.frames,
        )


def _in_order(clip: Clip, order: Tensor) -> Clip:
    """The clip with the vectors of its frames in another order; the pixels stay."""
    told = clip.frame_conditions
    return clip if told is None else replace(clip, frame_conditions=told[order])


@without_autocast()
@torch.inference_mode()
def token_bits(
    pipeline: Pipeline, clips: Sequence[Clip], pixels: Tensor, seeds: Sequence[int], fps: float | None, sigma: float
) -> Tensor:
    """Bits per dimension of each token, (clips, latent frames, height, width), float64.

    Args:
        pipeline: with the flow.
        clips: of one shape, with their captions, sources and vectors of frames.
        pixels: of these clips (clips, frames, channels, height, width).
        seeds: of the noise of each clip.
        fps: frames a second that captions tell; None for those of the training clips.
        sigma: standard deviation of the noise.

    Raises:
        ValueError: a clip that does not fit the model; the message names it.
    """
    texts = [_condition(pipeline, clip, fps) for clip in clips]
    y = None if texts[0] is None else torch.cat([text for text in texts if text is not None])
    sources = [clip.source for clip in clips if clip.source is not None]
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
    told = _vectors(pipeline, clips, frames, pixels.shape[1])
    nats = pipeline.flow.log_prob(latents + sigma * drawn, y, told, by="token").double()[:, -encoded[-1].shape[1] :]
    dimensions = channels * height * width / nats[0, 0].numel()
    known = nats.isfinite().flatten(1).all(1).tolist()
    if not all(known):
        raise ValueError(
            f"score: the density of {clips[known.index(False)].name} is not finite, expected finite weights and noise "
            f"of a size that the flow was trained on (noise_std is {sigma:g})"
        )
    return (-(nats / dimensions + (pipeline.codec.log_det_per_dimension or 0.0)) / math.log(2)).cpu()


def check_clip(pipeline: Pipeline, clip: Clip, first: Clip) -> None:
    """Refuses what is no clip, a clip of another form than the first, or with another source than those that the flow
    was trained on.
    """
    require_clip("score: a clip", clip)
    train = pipeline.config.train
    if clip.pixels.dim() != 4 or _shapes(clip) != _shapes(first):
        raise ValueError(
            f"score: {clip.name} has shape {list(clip.pixels.shape)}, expected (frames, channels, height, width), the "
            f"same of clips and of sources as {first.name}"
        )
    if clip.source is None:
        if train.source_prob == 1.0 and not (len(clip.pixels) == 1 and train.image_prob):
            raise ValueError(
                f"score: {clip.name} has no source, expected one: the model was trained on clips behind their sources "
                "alone (train.source_prob is 1)"
            )
    elif train.source_prob == 0.0:
        raise ValueError(
            f"score: {clip.name} has a source, expected none: the model was not trained on pairs (train.source_prob)"
        )
    elif clip.source.shape != clip.pixels.shape:
        raise ValueError(
            f"score: {clip.name} has a source of shape {list(clip.source.shape)}, expected {list(clip.pixels.shape)} "
            "like the clip (frames, channels, height, width)"
        )


def _vectors(pipeline: Pipeline, clips: Sequence[Clip], frames: int, shown: int) -> Tensor | None:
    """Vectors of the latent frames of clips, those of a source included, (clips, frames, frame_dim), or None."""
    dim = pipeline.flow.config.frame_dim
    for clip in clips:
        told = clip.frame_conditions
        if told is not None and not dim:
            raise ValueError(f"score: {clip.name} has actions, expected none (the model reads none: frame_dim is 0)")
        if dim and told is None:
            raise ValueError(f"score: {clip.name} has no actions, expected {dim} numbers for each frame (frame_dim)")
        if told is not None and list(told.shape) != [shown, dim]:
            raise ValueError(
                f"score: {clip.name} has actions of shape {list(told.shape)}, expected {[shown, dim]} (frames, "
                "frame_dim)"
            )
    if not dim:
        return None
    told_all = torch.stack([clip.frame_conditions for clip in clips if clip.frame_conditions is not None])
    before = told_all.new_full((len(clips), frames - shown, dim), math.nan)
    return torch.cat([before, told_all], 1).to(pipeline.device)


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
