"""What the flow is compared with: causal diffusion, regression of the next frame, the last frame.

The networks are made of the product's layers and run on its ops, with the same tokens, attention over the same frames
and the same cache, so that a difference in speed is one of the principle. They work on latents less the mean of each
channel, in units of the standard deviation of what is left.

Reference: Chen et al., Diffusion Forcing (2024), a noise level for each frame; Nichol and Dhariwal, Improved Denoising
Diffusion Probabilistic Models (2021), the cosine schedule; Song et al., DDIM (2021); Li and He, Back to Basics (2025),
clean data as what the network puts out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from starflow.config import FlowConfig
from starflow.model.cache import DecodeState
from starflow.model.conditioner import make_layout
from starflow.model.layers import Attending, Transformer, Weights
from starflow.model.packed import pack_linears
from starflow.model.tokens import patchify, unpatchify
from starflow.noise import draw, stream
from starflow_ext import ops
from starflow_ext.block_attention import FrameMask
from starflow_ext.rope_append import Rotation

# Waves that tell a network the noise level of a frame.
LEVEL_WAVES = 32
# Exponent of the noise levels that training draws and sampling steps through.
HIGH_LEVELS = 3
# The highest noise level of the past that a frame is told.
MOST_PAST = 0.2
# Frames that tables of positions are made for; they are relative in time.
MOST_FRAMES = 256
# Of the bound of the likelihood: levels, and how many of them are drawn.
BOUND_LEVELS = 4096
BOUND_DRAWS = 16
# Least and most noise that is added, as decimal logarithms of shares of the noise of the data.
BOUND_NOISE = (-1.0, 4.0)


class FrameTransformer(Transformer):
    """A transformer whose frames see themselves whole and the frames before them.

    Args:
        config: of the flow that it is compared with: its patches, heads, norms, text and frames of attention.
        width, layers: of this network.
        vector_dim: of what each frame is told.
        beside: whether each frame has another picture beside its own.
    """

    def __init__(self, config: FlowConfig, *, width: int, layers: int, vector_dim: int, beside: bool = False) -> None:
        heads = width // config.head_dim
        super().__init__(
            config,
            width=width,
            heads=heads,
            kv_heads=heads,
            layers=layers,
            out_channels=config.token_channels,
            text_dim=0,
            frame_dim=vector_dim,
        )
        self.side = config.img_size // config.patch_size
        # Rotary angles tell distances alone.
        self.place = nn.Parameter(0.02 * torch.randn(self.frame_tokens, width))
        self.summary = nn.Linear(config.txt_dim, width, bias=False) if config.txt_dim else None
        self.beside = nn.Linear(config.token_channels, width, bias=False) if beside else None

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return self.side**2

    def forward(
        self,
        x: Tensor,
        vectors: Tensor,
        text: Tensor | None = None,
        *,
        beside: Tensor | None = None,
        state: DecodeState | None = None,
        first: int = 0,
    ) -> Tensor:
        """An output like `x`.

        Args:
            x: latents (batch, frames, channels, height, width).
            vectors: what frames are told (batch, frames, vector_dim).
            text: features (batch, text tokens, txt_dim), whose sum each token gets.
            beside: the other picture of each frame, like `x`, where the network has one.
            state: cache of the frames before; those of this call are written over what it has at their places.
            first: index of the first frame of `x`.
        """
        config = self.config
        weights = self._packed()
        grid = self._grid(x)
        told = self.embed_frames(vectors, weights)
        assert told is not None
        h = self.embed(grid.flatten(1, 3), weights) + told.repeat_interleave(self.frame_tokens, 1)
        h = h + self.place.repeat(x.shape[1], 1)
        if self.beside is not None:
            assert beside is not None
            h = h + ops.linear(self._grid(beside).flatten(1, 3), self.beside.weight)
        if self.summary is not None and text is not None:
            h = h + ops.linear(text.sum(1, keepdim=True), self.summary.weight)
        rotation = self._rotation(first, x.shape[1])
        h = self.run(
            h,
            Attending(
                rotation,
                rotation,
                causal=False,
                frames=FrameMask(0, self.frame_tokens, 1, config.attention_frames),
                caches=None if state is None else state.caches,
                start=first * self.frame_tokens,
                weights=weights,
            ),
        )
        out = self.put_out(h, weights).to(x.dtype).reshape(grid.shape)
        return unpatchify(out, config.patch_size, channel_first=config.channel_first_patches, image=False)

    def _grid(self, x: Tensor) -> Tensor:
        return patchify(x, self.config.patch_size, channel_first=self.config.channel_first_patches)

    def _rotation(self, first: int, frames: int) -> Rotation:
        layout = make_layout(self.config, "raster", MOST_FRAMES, self.side, self.side, 0, still=False)
        assert layout.query is not None
        slots = slice(first * self.frame_tokens, (first + frames) * self.frame_tokens)
        return Rotation(layout.query.cos[slots], layout.query.sin[slots])

    def _packed(self) -> Weights | None:
        return pack_linears(self) if torch.is_inference_mode_enabled() else None


@dataclass(frozen=True)
class Task:
    """Clips that are to be made.

    Args:
        seeds: of the clips.
        shape: of their latent frames (channels, height, width).
        frames: that are made.
        given: latents (clips, given frames, channels, height, width) that they follow, or None.
        text: features (clips, text tokens, txt_dim), or None.
        told: vectors of given and made frames (clips, frames, frame_dim), NaN for none; or None.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, int, int]
    frames: int
    given: Tensor | None = None
    text: Tensor | None = None
    told: Tensor | None = None

    @property
    def begin(self) -> int:
        """Given frames."""
        return 0 if self.given is None else self.given.shape[1]

    def told_at(self, first: int, frames: int = 1) -> Tensor | None:
        """The vectors of some frames."""
        return None if self.told is None else self.told[:, first : first + frames]

    def text_alone(self) -> Tensor | None:
        """Text features that say nothing."""
        return None if self.text is None else torch.zeros_like(self.text)


@dataclass(frozen=True)
class Draws:
    """What is random in a training step; drawn where a model reads it, as its seconds count.

    Args:
        seed, step: of the training.
        noise: normal noise like the latents.
    """

    seed: int
    step: int
    noise: Tensor

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """Uniform in [0, 1), (batch, frames): of the frames, and of their copies that stand beside those after them."""
        drawn = stream(self.seed, "posterior", self.step).random((2, *self.noise.shape[:2]), dtype="float32")
        here, before = torch.from_numpy(drawn)
        return here, before

    @cached_property
    def noise_before(self) -> Tensor:
        """Normal noise of the copies."""
        drawn = stream(self.seed, "posterior", self.step, 1).standard_normal(tuple(self.noise.shape), dtype="float32")
        return torch.from_numpy(drawn)


class Baseline(nn.Module):
    """A model of frames given those before them.

    Args:
        config: of the flow that it is compared with.
        width, layers: of the network.
        mean: of the latents of the data (channels, 1, 1).
        scale: standard deviation of the latents less their mean.
    """

    # Numbers of the model's own that each frame is told, before the vector that the data have for it.
    extra = 0
    # Whether the network sees a frame beside that before it.
    beside = False

    def __init__(self, config: FlowConfig, *, width: int, layers: int, mean: Tensor, scale: float) -> None:
        super().__init__()
        self.config = config
        vector_dim = max(self.extra + config.frame_dim, 1)
        self.network = FrameTransformer(config, width=width, layers=layers, vector_dim=vector_dim, beside=self.beside)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", torch.tensor(scale))
        self.mean: Tensor
        self.scale: Tensor

    def loss(self, latents: Tensor, text: Tensor | None, told: Tensor | None, draws: Draws) -> Tensor:
        """The training loss of a batch of latents (batch, frames, channels, height, width), text and vectors."""
        raise NotImplementedError

    def follow(self, task: Task) -> Tensor:
        """Latents (clips, frames, channels, height, width) of what was asked for."""
        raise NotImplementedError

    def to_units(self, latents: Tensor) -> Tensor:
        """Latents (..., channels, height, width) in the units of the network."""
        return (latents - self.mean) / self.scale

    def from_units(self, x: Tensor) -> Tensor:
        """The inverse of `to_units`."""
        return x * self.scale + self.mean

    def state(self, task: Task) -> DecodeState:
        """A cache for a task."""
        tokens = (task.begin + task.frames) * self.network.frame_tokens
        return DecodeState.allocate(self.network, len(task.seeds), tokens, 0)

    def vectors(self, told: Tensor | None, own: Tensor) -> Tensor:
        """What frames are told: the model's own numbers (batch, frames, `extra`), and the vectors of the data."""
        none = own.new_zeros(*own.shape[:2], self.config.frame_dim)
        whole = torch.cat([own, none if told is None else torch.where(told.isfinite(), told, 0.0)], -1)
        return whole if whole.shape[-1] else own.new_zeros(*own.shape[:2], 1)


def waves(levels: Tensor) -> Tensor:
    """Cosines and sines of noise levels (batch, frames) in [0, 1], (batch, frames, 2 LEVEL_WAVES)."""
    angles = levels[..., None] * torch.logspace(0.0, 2.0, LEVEL_WAVES) * (math.pi / 2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def schedule(level: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of data and noise at levels (batch, frames), to be multiplied with latents."""
    angle = level[..., None, None, None] * (math.pi / 2)
    return angle.cos(), angle.sin()


def drawn_levels(shares: Tensor) -> Tensor:
    """The noise levels below which these shares of the levels that training draws lie: most are high.

    Only there is it to be learned what moves how; below, a frame is seen through its noise.
    """
    return 1 - (1 - shares) ** HIGH_LEVELS


def shifted(x: Tensor) -> Tensor:
    """The frame before each frame (batch, frames, channels, height, width); zeros stand before the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@dataclass(frozen=True)
class Past:
    """The frame before each frame of a pass, as the network sees it: with a little noise.

    Args:
        x: (batch, frames, channels, height, width) in the units of the network, at its noise level.
        levels: that noise level (batch, frames).
    """

    x: Tensor
    levels: Tensor

    @classmethod
    def of(cls, x: Tensor, levels: Tensor, noise: Tensor) -> Past:
        """Clean frames with noise of a level."""
        alpha, sigma = schedule(levels)
        return cls(alpha * x + sigma * noise, levels)


class Diffusion(Baseline):
    """Causal diffusion with a noise level for each frame, which sees the frame before it nearly clean.

    At level t a frame is cos(pi t / 2) x + sin(pi t / 2) noise. In training every frame has a level of its own. Beside
    it stands a copy of the frame before it at a low level, so that what moves how is learned at every level of the
    frames behind (as in Diffusion for World Modeling: Visual Details Matter in Atari, Alonso et al., 2024, whose past
    is clean and whose channels stand beside those of the frame). The noise of the past keeps errors from growing in a
    rollout (GameNGen, Valevski et al., 2024). The network puts out the clean frame and not its difference to that copy:
    its width is less than the channels of a token, so that it could never undo what the copy has in the others.

    Args:
        config, width, layers, mean, scale: as of `Baseline`.
        steps: of sampling a frame.
        context: level of the frame before, in sampling.
        guidance, guidance_frames: weight of guidance by text, and how many first frames have it.
    """

    extra = 4 * LEVEL_WAVES
    beside = True

    def __init__(
        self,
        config: FlowConfig,
        *,
        width: int,
        layers: int,
        mean: Tensor,
        scale: float,
        steps: int = 16,
        context: float = 0.05,
        guidance: float = 0.0,
        guidance_frames: int = 1,
    ) -> None:
        super().__init__(config, width=width, layers=layers, mean=mean, scale=scale)
        self.steps, self.context = steps, context
        self.guidance, self.guidance_frames = guidance, guidance_frames

    def clean(
        self,
        noisy: Tensor,
        levels: Tensor,
        past: Past,
        text: Tensor | None,
        told: Tensor | None,
        state: DecodeState | None = None,
        first: int = 0,
    ) -> Tensor:
        """The clean data that the network sees in noisy ones, both in the units of the network."""
        vectors = self.vectors(told, torch.cat([waves(levels), waves(past.levels)], -1))
        out: Tensor = self.network(noisy, vectors, text, beside=past.x, state=state, first=first)
        return out

    def loss(self, latents: Tensor, text: Tensor | None, told: Tensor | None, draws: Draws) -> Tensor:
        """The mean squared error of clean data.

        Errors weighted as those of v, by 1 / sigma^2, are mostly those of copying frames with little noise: with them a
        network of this size was slower to learn what moves how (docs/evidence.md).
        """
        x = self.to_units(latents)
        shares, shares_before = draws.levels
        levels = drawn_levels(shares)
        alpha, sigma = schedule(levels)
        past = Past.of(shifted(x), MOST_PAST * shares_before, draws.noise_before)
        return (self.clean(alpha * x + sigma * draws.noise, levels, past, text, told) - x).square().mean()

    @torch.inference_mode()
    def follow(self, task: Task) -> Tensor:
        """See `Baseline.follow`: DDIM, frame by frame; what the last step of a frame put into the cache stays there."""
        state, begin = self.state(task), task.begin
        path = drawn_levels(torch.linspace(1.0, 0.0, self.steps + 1)).tolist()
        x = torch.zeros(len(task.seeds), 1, *task.shape)
        if task.given is not None:
            given = self.to_units(task.given)
            levels = torch.full(given.shape[:2], self.context)
            noisy = Past.of(given, levels, draw(task.seeds, begin, *task.shape, purpose="posterior"))
            past = self._past(shifted(given), task, 0)
            self.clean(noisy.x, levels, past, task.text, task.told_at(0, begin), state)
            x = given[:, -1:]
        made = []
        for frame in range(begin, begin + task.frames):
            weight = self.guidance if frame < self.guidance_frames else 0.0
            past = self._past(x, task, frame)
            z = draw(task.seeds, 1, *task.shape, first=frame)
            for now, then in itertools.pairwise(path):
                x = self._guided(z, now, past, weight, task, state, frame)
                z = _ddim(z, x, now, then) if then > 0 else x
            made.append(self.from_units(x))
        return torch.cat(made, 1)

    def _guided(
        self, z: Tensor, level: float, past: Past, weight: float, task: Task, state: DecodeState, frame: int
    ) -> Tensor:
        """The clean frame at a level; the pass with text is the last, so that its keys and values stay in the cache."""
        levels, told = torch.full(z.shape[:2], level), task.told_at(frame)
        if not weight or task.text is None:
            return self.clean(z, levels, past, task.text, told, state, frame)
        alone = self.clean(z, levels, past, task.text_alone(), told, state, frame)
        x = self.clean(z, levels, past, task.text, told, state, frame)
        return x + weight * (x - alone)

    def _past(self, before: Tensor, task: Task, first: int) -> Past:
        """Frames that stand before others, the first of which is numbered, at the noise level of the past."""
        noise = draw(task.seeds, before.shape[1], *task.shape, first=first, purpose="train")
        return Past.of(before, torch.full(before.shape[:2], self.context), noise)

    @torch.inference_mode()
    def bound(
        self, latents: Tensor, text: Tensor | None, told: Tensor | None, noise_std: float, seeds: Sequence[int]
    ) -> Tensor:
        """A lower bound of log p in nats of latents with noise, (clips, frames), of each frame behind those before it.

        The noisy latents are the data of a diffusion of BOUND_LEVELS levels that begins at theirs: its bound holds
        whatever the network says. From level to level the noise that is added to these data grows by one factor. The
        first level is computed, of the others BOUND_DRAWS are drawn, one from each of as many equal parts.

        Args:
            latents: (clips, frames, channels, height, width).
            text, told: of the clips.
            noise_std: of the noise, in units of the latents.
            seeds: of the noise, that of `Session`, and of what is drawn.

        Reference: Kingma et al., Variational Diffusion Models (2021), equations 11 to 14.
        """
        clips, frames = latents.shape[:2]
        shape = (latents.shape[2], latents.shape[3], latents.shape[4])
        size = math.prod(shape)
        begin = math.atan(noise_std / float(self.scale))
        # Angles of the schedule, from that of the data on: tan^2 is the data's own plus that of what is added.
        added = torch.logspace(*BOUND_NOISE, BOUND_LEVELS, dtype=torch.float64) * math.tan(begin)
        tangents = (math.tan(begin) ** 2 + torch.cat([torch.zeros(1, dtype=torch.float64), added.square()])).sqrt()
        angles = tangents.atan()
        share = angles.cos() / angles[0].cos()
        left = (angles.sin().square() - share.square() * angles[0].sin().square()).clamp(min=0).sqrt()
        ratio = share.square() / left.square().clamp(min=1e-12)
        z = angles[0].cos() * self.to_units(latents + noise_std * draw(seeds, frames, *shape, purpose="train"))
        before = shifted(z)
        task = Task(tuple(seeds), shape, frames, None, text, told)
        state = self.state(task)
        chosen = np.stack([stream(seed, "choose", 1).random((frames, BOUND_DRAWS)) for seed in seeds])
        bounds = []
        for frame in range(frames):
            log_p = torch.full((clips,), size * float((angles[0].cos() / self.scale).log()), dtype=torch.float64)
            here = z[:, frame : frame + 1].double()
            past = Past(before[:, frame : frame + 1], torch.full((clips, 1), begin * 2 / math.pi))
            for number in range(BOUND_DRAWS + 1):
                if number:
                    place = (number - 1 + torch.from_numpy(chosen[:, frame, number - 1])) / BOUND_DRAWS
                    level = 2 + (place * (BOUND_LEVELS - 1)).long()
                else:
                    level = torch.ones(clips, dtype=torch.int64)
                noise = draw(seeds, 1, *shape, first=frames * (number + 1) + frame, purpose="posterior").double()
                a, s, angle = (part[level][:, None, None, None, None] for part in (share, left, angles))
                noisy = a * here + s * noise
                levels = (angles[level] * (2 / math.pi)).float()[:, None]
                x = self.clean(noisy.float(), levels, past, text, task.told_at(frame), state, frame).double()
                kept = a * angles[0].sin().square() / angle.sin().square()
                error = (here - angles[0].cos() * x - kept * (noisy - angle.cos() * x)).square().flatten(1).sum(1)
                if number:
                    log_p -= 0.5 * (ratio[level - 1] - ratio[level]) * error * (BOUND_LEVELS - 1) / BOUND_DRAWS
                else:
                    variance = angles[0].sin().square() * (1 - (kept * a)[:, 0, 0, 0, 0])
                    log_p -= 0.5 * error / variance + 0.5 * size * (2 * math.pi * variance).log()
            a, s = share[-1], left[-1]
            log_p -= 0.5 * (s**2 + a**2 * here.square() - 1 - 2 * s.log()).flatten(1).sum(1)
            bounds.append(log_p)
            self.clean(here.float(), past.levels, past, text, task.told_at(frame), state, frame)
        return torch.stack(bounds, 1)


def _ddim(z: Tensor, x: Tensor, now: float, then: float) -> Tensor:
    """From one level to a lower one, without new noise."""
    (alpha, sigma), (alpha_then, sigma_then) = (schedule(torch.tensor(level)) for level in (now, then))
    return alpha_then * x + sigma_then * (z - alpha * x) / sigma


class Regression(Baseline):
    """The next frame as the mean of what may come, by its squared error.

    The network puts out the frame and not its difference to the one before, for the reason that `Diffusion` has.
    """

    def predicted(
        self,
        before: Tensor,
        text: Tensor | None,
        told: Tensor | None,
        state: DecodeState | None = None,
        first: int = 0,
    ) -> Tensor:
        """Frames from those before them, both in the units of the network; zeros stand before the first."""
        vectors = self.vectors(told, before.new_zeros(*before.shape[:2], 0))
        out: Tensor = self.network(before, vectors, text, state=state, first=first)
        return out

    def loss(self, latents: Tensor, text: Tensor | None, told: Tensor | None, draws: Draws) -> Tensor:
        """The mean squared error of frames."""
        return self.errors(latents, text, told).mean()

    def errors(self, latents: Tensor, text: Tensor | None, told: Tensor | None) -> Tensor:
        """Squared errors, like the latents, in units of their variance."""
        x = self.to_units(latents)
        return (self.predicted(shifted(x), text, told) - x).square()

    @torch.inference_mode()
    def follow(self, task: Task) -> Tensor:
        """See `Baseline.follow`; the seeds say nothing."""
        state, begin = self.state(task), task.begin
        x = torch.zeros(len(task.seeds), 1, *task.shape)
        if task.given is not None:
            given = self.to_units(task.given)
            self.predicted(shifted(given), task.text, task.told_at(0, begin), state)
            x = given[:, -1:]
        made = []
        for frame in range(begin, begin + task.frames):
            x = self.predicted(x, task.text, task.told_at(frame), state, frame)
            made.append(self.from_units(x))
        return torch.cat(made, 1)


class LastFrame(nn.Module):
    """The last given frame, again and again."""

    @torch.inference_mode()
    def follow(self, task: Task) -> Tensor:
        """See `Baseline.follow`."""
        if task.given is None:
            raise ValueError("last: no frame is given, expected one to repeat")
        return task.given[:, -1:].expand(-1, task.frames, -1, -1, -1)
