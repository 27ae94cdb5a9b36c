"""Surprise: how much less likely a frame was, given the past and its action, than a frame can be at best.

The flow gives `log p(frame | frames before, actions up to it)` exactly, for the frame with the normal noise of training
on its latents. A frame that follows from its past with certainty still has the entropy of that noise; surprise is what
is above it, in bits: near 0 for what the flow foresees to the last detail, large where something else happens. (A frame
whose noise happens to be small has a little less than 0.) It is a sum over the tokens of the frame, so that it can be
drawn as a heat map over the picture; the map is exact in sums over what the shallow blocks do not mix, which is a frame
(see `Flow.token_log_likelihood`).

`surprise` looks at whole clips, `Watcher` at frames as they come, for as long as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow import noise
from starflow.arguments import check_texts
from starflow.codecs import tell_scale
from starflow.data import Clip
from starflow.evaluate.scores import as_read, check_clip, noise_floor, token_bits
from starflow.inference import without_autocast
from starflow.messages import shown
from starflow.model import to_grid, to_sequence
from starflow.numeric import integer
from starflow.sampling import Pipeline
from starflow.solver import BlockDecoder, rolling_frames


@dataclass(frozen=True, eq=False)
class Surprise:
    """Bits above the entropy of the noise, of the frames of one clip.

    Args:
        name: of the clip.
        frames: of each latent frame given those before it and the actions up to it, float64 (frames,).
        tokens: of each place of the token grid, float64 (frames, height, width); they add up to `frames`.
    """

    name: str
    frames: Tensor
    tokens: Tensor


def surprise(
    pipeline: Pipeline,
    clips: Sequence[Clip],
    *,
    seed: int = 0,
    draws: int = 1,
    batch: int = 8,
    scaled: bool = False,
) -> list[Surprise]:
    """The surprise of clips.

    Args:
        pipeline: with the flow.
        clips: of one shape, with their captions, and with the actions of their frames where the flow reads such.
        seed: of the noise; clip i has the noise of seed + i.
        draws: of the noise that are averaged: surprise of one draw varies by about sqrt(n / 2) / ln 2 bits for n
            dimensions.
        batch: clips computed together.
        scaled: as of `score`.

    Raises:
        ValueError: a model that was trained without noise, a number below 1, no clip, or one that does not fit.
    """
    for name, value, least in (("draws", draws, 1), ("batch", batch, 1), ("seed", seed, 0)):
        whole = integer(value)
        if whole is None or whole < least:
            raise ValueError(f"surprise: {name} is {shown(value)}, expected an integer >= {least}")
    if not isinstance(clips, Sequence) or not clips:
        raise ValueError(f"surprise: clips is {shown(clips)}, expected a list of clips (starflow.data.Clip), not empty")
    for clip in clips:
        check_clip(pipeline, clip, clips[0])
    if not scaled:
        tell_scale("surprise: no pixel of the clips", [clip.pixels for clip in clips])
    clips = as_read(pipeline, clips)
    found = []
    for first in range(0, len(clips), batch):
        group = clips[first : first + batch]
        pixels = torch.stack([clip.pixels for clip in group])
        tokens = torch.zeros((), dtype=torch.float64)
        for draw in range(draws):
            seeds = [seed + first + row + draw * len(clips) for row in range(len(group))]
            tokens = tokens + _above(pipeline, token_bits(pipeline, group, pixels, seeds, None, _sigma(pipeline)))
        found += [
            Surprise(clip.name, bits.flatten(1).sum(1), bits) for clip, bits in zip(group, tokens / draws, strict=True)
        ]
    return found


class Watcher:
    """The surprise of frames as they come, each in the time of one pass of the deep block over one frame.

    What it tells of a frame is what `surprise` tells of it in the clip of all frames so far, with the same noise. Its
    memory is that of the last frames, which the deep block attends to (`flow.attention_frames`).

    Args:
        pipeline: with a flow whose deep block attends to the last frames alone.
        prompts: one for each clip that is watched; "" for a flow without text.
        seeds: of the noise of each clip; by default 0, 1 and so on.
        size: height and width of the frames; by default those of the training clips.
        scaled: as of `score`; the log tells of a first frame that looks like [0, 1].

    Raises:
        ValueError: a flow that sees all frames or mixes them in its shallow blocks, a codec that joins frames, or a
            number of seeds that is not that of the prompts.

    Example:
        >>> watcher = Watcher(Pipeline.load("runs/paddle"))  # doctest: +SKIP
        >>> watcher.step(world.step(1).frame, 1).frames  # doctest: +SKIP
    """

    @without_autocast()
    @torch.inference_mode()
    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str] = ("",),
        *,
        seeds: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        scaled: bool = False,
    ) -> None:
        check_texts("watcher", "prompts", prompts)
        flow, config = pipeline.flow, pipeline.flow.config
        if config.attention_frames is None:
            raise ValueError("watcher: flow.attention_frames is None, expected a number (a deep block that can go on)")
        self._seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(self._seeds) != len(prompts) or not prompts:
            raise ValueError(f"watcher: seeds has {len(self._seeds)} entries, expected {len(prompts)} like the prompts")
        _sigma(pipeline)
        shown_by = pipeline.codec.pixel_frames(2)
        if shown_by != 2:
            raise ValueError(
                f"watcher: two latent frames of the codec are {shown_by} frames of pixels, expected 2: frames that "
                "come one by one are encoded alone (`surprise` takes whole clips)"
            )
        data = pipeline.config.data
        height, width = size or (data.height, data.width)
        side = pipeline.codec.spatial * config.patch_size
        self._pipeline, self._size = pipeline, (height, width)
        self._behind = config.attention_frames
        self._y = pipeline.condition(prompts, size=size)
        deep = flow.solving_order()[0]
        self._area = (height // side) * (width // side)
        frames = rolling_frames(self._behind, self._area)
        context = self._y if config.num_classes or config.text_width(deep.index) else None
        layout = deep.layout(frames, height // side, width // side, context, image=False)
        self._order = layout.order[: self._area]
        none = torch.full((len(prompts), frames, config.frame_dim), math.nan) if config.frame_dim else None
        self._decoder = BlockDecoder(deep, layout, len(prompts), context, frame_conditions=none)
        self._scaled = scaled
        self._frame = 0  # number of the next frame
        self._place = 0  # of the next frame in the cache
        self._past: Tensor | None = None  # tokens of the last frames

    @without_autocast()
    @torch.inference_mode()
    def step(self, pixels: Tensor, condition: Tensor | None = None) -> Surprise:
        """The surprise of the next frame of each clip.

        Args:
            pixels: (clips, channels, height, width) in [-1, 1].
            condition: vectors of this frame (clips, frame_dim), where the flow reads such; None for none.

        Returns:
            Bits by clip: `frames` (clips,), `tokens` (clips, height, width); its name is the number of the frame.

        Raises:
            ValueError: a frame or a condition that does not fit.
        """
        pipeline, flow = self._pipeline, self._pipeline.flow
        for name, value in (("frame", pixels), ("condition", condition)):
            if not isinstance(value, Tensor) and not (name == "condition" and value is None):
                raise ValueError(f"watcher: {name} is {shown(value)}, expected a tensor")
        expected = [len(self._seeds), pipeline.codec.channels, *self._size]
        if list(pixels.shape) != expected or not bool(pixels.isfinite().all()):
            raise ValueError(f"watcher: frame has shape {list(pixels.shape)}, expected {expected}, all finite")
        if not self._scaled:
            tell_scale("watcher: no pixel of the first frame", [pixels])
            self._scaled = True
        clean = pipeline.codec.encode(pixels[:, None].to(pipeline.device)).float()
        drawn = noise.draw(self._seeds, 1, *clean.shape[2:], first=self._frame, purpose="train").to(clean)
        noisy = clean + _sigma(pipeline) * drawn
        told = flow.check_frame_conditions(noisy, None if condition is None else condition[:, None], name="condition")
        grid, shallow = flow.encode_shallow(noisy, self._y)
        tokens = to_sequence(grid, self._order)
        if self._place == self._decoder.layout.frames:
            self._decoder.forget(self._decoder.layout.frames - self._behind)
            self._place = self._behind
        past = tokens[:, :0] if self._past is None else self._past
        before = self._decoder.conditioner.before_next(past, self._area)
        if flow.config.frame_dim and told is None:
            told = noisy.new_full((len(self._seeds), 1, flow.config.frame_dim), math.nan)
        if told is not None or before is not None:
            self._decoder.tell(self._place, told, before)
        past = torch.cat([past, tokens], 1)
        # Row i is the token before token i; before the first one stands none.
        rows = F.pad(past, (0, 0, 1, 0))[:, -tokens.shape[1] - 1 : -1]
        affine = self._decoder.evaluate(rows, self._place * self._area)
        z, log_det = affine.encode(tokens)
        total = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) + log_det
        nats = (to_grid(total[..., None], self._order, 1, *shallow.shape[2:])[..., 0] + shallow)[:, 0]
        self._past = past[:, -max(flow.config.previous_frames, 1) * self._area :]
        self._frame, self._place = self._frame + 1, self._place + 1
        dimensions = clean[0].numel() / nats[0].numel()
        per_dim = -(nats.double() / dimensions + (pipeline.codec.log_det_per_dimension or 0.0)) / math.log(2)
        bits = _above(pipeline, per_dim[:, None].cpu())[:, 0]
        return Surprise(f"frame {self._frame - 1}", bits.flatten(1).sum(1), bits)


def _sigma(pipeline: Pipeline) -> float:
    sigma = pipeline.config.train.noise_std
    if not sigma:
        raise ValueError(
            "surprise: train.noise_std is 0, expected a model that was trained with noise: what is certain "
            "has no finite density"
        )
    return sigma


def _above(pipeline: Pipeline, per_dim: Tensor) -> Tensor:
    """Bits of tokens above the entropy of the noise, from bits per dimension (..., frames, height, width)."""
    config = pipeline.flow.config
    floor = noise_floor(_sigma(pipeline), pipeline.codec.log_det_per_dimension)
    return (per_dim - floor) * config.token_channels
