"""Training: the published recipe, deterministic under a seed, and resumable to the same bits.

Whatever is random in a step (which clips, noise, dropping) follows from the seed and the number of the step, so the
state of a run is weights, optimiser moments and two counters.

Reference: Gu et al., STARFlow-V (2025), training details; Gu et al., STARFlow (2025); Zhai et al., TarFlow (2024).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from starflow.block import Encoded
from starflow.codecs import Codec, make_codec
from starflow.config import ConfigError, FlowConfig, RunConfig, require
from starflow.data import ClipDataset, MovingDigits, VideoFolder, assemble, sample_indices, stack_clips
from starflow.denoiser import STEP, score_target
from starflow.flow import Flow, nll_of
from starflow.noise import draw_batch, stream
from starflow.optim import Average, make_optimizers
from starflow.text import TextEncoder, make_text_encoder

logger = logging.getLogger(__name__)

# Weight of a batch in the running means of `Flow.track`.
TRACK_RATE = 0.05
# Steps in a row without a finite loss before training gives up.
PATIENCE = 5
# The published rule of skipping large gradients begins after so many steps.
SKIP_AFTER = 100
# Captions whose features are kept.
CAPTION_CACHE = 4096


class TrainingError(RuntimeError):
    """Training cannot go on: data or loss that is not finite, or a run that does not fit its folder."""


@dataclass(frozen=True)
class TrainStep:
    """What a step did.

    Args:
        step: steps done, this one included.
        loss: negative log-likelihood of the noisy latents, nats per dimension without the constant log(2 pi) / 2.
        denoiser_loss: mean squared error to the score target; None without a denoiser.
        grad_norm, denoiser_grad_norm: before clipping.
        lr: of the flow.
        samples_per_second: clips, over the last steps.
        skipped: the weights were left alone (loss or gradient not finite, or a gradient above `train.grad_skip`).
    """

    step: int
    loss: float
    denoiser_loss: float | None
    grad_norm: float
    denoiser_grad_norm: float | None
    lr: float
    samples_per_second: float
    skipped: bool

    @property
    def bits_per_dim(self) -> float:
        """Bits per dimension of the noisy latents' density.

        (loss + log(2 pi) / 2) / log 2: minus log2 of the continuous density, noise included, divided by the dimensions
        of the latents. With an orthonormal codec that is per pixel and channel of pictures in [-1, 1]. It is not the
        bits of 8-bit pixels, and negative values are normal.
        """
        return (self.loss + 0.5 * math.log(2 * math.pi)) / math.log(2)


def make_dataset(config: RunConfig, split: Literal["train", "test"] = "train") -> ClipDataset:
    """The data set that a run is trained or tested on.

    Args:
        config: of the run.
        split: digits: no digit image is in both. Folder: its subfolder of this name where there is one, else the
            whole folder; clips are cut at random starts for "train" and evenly for "test".

    Raises:
        ConfigError: options that the kind of data cannot honour.
        ValueError, FileNotFoundError: the folder does not exist or holds nothing that can be read.
    """
    data = config.data
    if data.kind == "digits":
        require(data.height == data.width, "data.width", data.width, f"the height {data.height} for digits")
        require(data.channels == 1, "data.channels", data.channels, "1 for digits")
        return MovingDigits(frames=data.frames, size=data.height, split=split)
    if data.path is None:
        raise ConfigError("data.path is None, expected a folder of videos or images")
    folder = Path(data.path)
    return VideoFolder(
        folder / split if (folder / split).is_dir() else folder,
        frames=data.frames,
        height=data.height,
        width=data.width,
        fps=data.fps,
        channels=data.channels,
        cut="random" if split == "train" else "even",
        cache_bytes=int(data.cache_gb * 2**30),
    )


def make_parts(config: RunConfig) -> tuple[Codec, TextEncoder | None]:
    """Codec and text encoder of a run, after checking that everything fits together.

    Raises:
        ConfigError: options of different parts that contradict each other.
        ValueError: an option of the codec or the text encoder that is wrong.
    """
    flow, data = config.flow, config.data
    codec = make_codec(config.codec)
    text = make_text_encoder(config.text) if config.text else None
    require(
        flow.in_channels == codec.latent_channels,
        "flow.in_channels",
        flow.in_channels,
        f"the {codec.latent_channels} latent channels of the codec",
    )
    require(data.channels == codec.channels, "data.channels", data.channels, f"the {codec.channels} of the codec")
    multiple = codec.spatial * flow.patch_size
    for name in ("height", "width"):
        side = getattr(data, name)
        require(side % multiple == 0, f"data.{name}", side, f"a multiple of {multiple} (codec times patch)")
    codec.latent_frames(data.frames)
    reads = flow.txt_size > 0 or flow.num_classes > 0
    require(reads == (text is not None), "text", config.text, "a text encoder exactly when flow reads text or classes")
    if text is not None and flow.num_classes:
        require(text.dim == flow.num_classes, "flow.num_classes", flow.num_classes, f"the {text.dim} of the encoder")
    elif text is not None:
        require(text.dim == flow.txt_dim, "flow.txt_dim", flow.txt_dim, f"the width {text.dim} of the text encoder")
        require(text.size <= flow.txt_size, "flow.txt_size", flow.txt_size, f"at least the {text.size} of the encoder")
    return codec, text


def caption_for(
    config: RunConfig, caption: str, *, extend: bool = False, drop: bool = False, image: bool = False
) -> str:
    """The caption as the flow of this run reads it: with frame rate and noise level where the run tells them.

    Args:
        config: of the run.
        caption: what the clip shows.
        extend: the first frame is cut off.
        drop: the caption of nothing.
        image: a single frame without time.
    """
    fps = None
    if config.data.caption_fps:
        fps = 0.0 if image else config.data.fps
    noise_level = config.train.noise_std if config.train.cond_noise_level else None
    return assemble(caption, mode="extend" if extend else None, drop=drop, fps=fps, noise_level=noise_level)


class Features:
    """Captions to what the flow reads, remembered by caption.

    Every caption is encoded by itself: the features must not depend on the batch, or a resumed run would differ.

    Args:
        flow: architecture.
        encoder: of the text; None for a flow that reads none.
    """

    def __init__(self, flow: FlowConfig, encoder: TextEncoder | None) -> None:
        self._classes = flow.num_classes > 0
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor | None:
        """Text (batch, text tokens, txt_dim), class labels (batch,) with -1 for none, or None."""
        if self._encoder is None:
            return None
        features = torch.cat([self._encode(self._encoder, caption) for caption in captions])
        if not self._classes:
            return features
        rows = features[:, 0]
        return torch.where(rows.any(1), rows.argmax(1), -1)

    def _encode(self, encoder: TextEncoder, caption: str) -> Tensor:
        if caption not in self._known:
            if len(self._known) >= CAPTION_CACHE:
                self._known.pop(next(iter(self._known)))
            self._known[caption] = encoder.encode([caption])
        return self._known[caption]


@dataclass(frozen=True)
class Batch:
    """A training batch before the codec.

    Args:
        pixels: (batch, frames, channels, height, width), or (batch, channels, height, width) for images.
        captions: as the flow reads them.
        names: of the clips.
        noise: like the latents, standard normal.
        posterior: the same, for a codec with a posterior.
        extend: the first latent frame is to be dropped, after noising.
    """

    pixels: Tensor
    captions: list[str]
    names: list[str]
    noise: Tensor
    posterior: Tensor | None
    extend: bool


class Batches:
    """Makes the batch of any step, the next one ahead of time in a thread.

    Args:
        config: of the run.
        dataset: of clips.
        codec: fixes the shape of the noise.
    """

    def __init__(self, config: RunConfig, dataset: ClipDataset, codec: Codec) -> None:
        self._config, self._dataset, self._codec = config, dataset, codec

    def make(self, step: int) -> Batch:
        """The batch of a step; depends on the seed and the step alone."""
        train, codec = self._config.train, self._codec
        pairs = sample_indices(train.seed, step, train.batch_size, len(self._dataset))
        clips = [self._dataset.item(index, epoch=epoch, seed=train.seed) for index, epoch in pairs]
        pixels, captions = stack_clips(clips)
        choose = stream(train.seed, "choose", step)
        image = choose.random() < train.image_prob
        frames = codec.latent_frames(pixels.shape[1])
        extend = choose.random() < train.drop_image and not image and frames > 1
        height, width = (side // codec.spatial for side in pixels.shape[-2:])
        shape: tuple[int, ...] = (len(clips), frames, codec.latent_channels, height, width)
        if image:
            pixels = pixels[:, int(choose.integers(pixels.shape[1]))]
            shape = (shape[0], *shape[2:])
        dropped = stream(train.seed, "drop", step).random(len(clips)) < train.drop_label
        return Batch(
            pixels,
            [
                caption_for(self._config, caption, extend=extend, drop=bool(drop), image=image)
                for caption, drop in zip(captions, dropped, strict=True)
            ],
            [clip.name for clip in clips],
            draw_batch(train.seed, step, shape),
            None if codec.exact else draw_batch(train.seed, step, shape, purpose="posterior"),
            extend,
        )

    def run(self, first: int, end: int) -> Iterator[Batch]:
        """The batches of the steps `first .. end - 1`."""
        with ThreadPoolExecutor(1, thread_name_prefix="starflow-batches") as pool:
            ahead = pool.submit(self.make, first)
            for step in range(first, end):
                batch = ahead.result()
                if step + 1 < end:
                    ahead = pool.submit(self.make, step + 1)
                yield batch


class Trainer:
    """A flow in training: the step of the recipe and the state between steps.

    Args:
        config: of the run.
        codec: pixels to latents.
        text: captions to features, or None.
        device: where the flow lives.
    """

    def __init__(self, config: RunConfig, codec: Codec, text: TextEncoder | None, device: torch.device) -> None:
        self.config, self.codec, self.device = config, codec, device
        self.features = Features(config.flow, text)
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            self.flow = Flow(config.flow).to(device).train()
        self.average = Average(self.flow, config.train.ema)
        self.optimizer, self.denoiser_optimizer = make_optimizers(self.flow, config.train)
        self.step = 0
        self.updates = 0
        self._bad = 0

    def run(self, batch: Batch, samples_per_second: Callable[[], float] = lambda: math.nan) -> TrainStep:
        """One step.

        Args:
            batch: of this step.
            samples_per_second: asked for the report when the step is done.

        Raises:
            TrainingError: a clip that is not finite, or too many steps in a row without a finite loss.
        """
        lr = self.optimizer.lr(self.updates)
        x, y = self._inputs(batch)
        losses = self._backward(x, y)
        norm = denoiser_norm = math.nan
        finite = losses is not None
        if finite:
            norm = float(self.optimizer.clip())
            denoiser_norm = float(self.denoiser_optimizer.clip()) if self.denoiser_optimizer else 0.0
            finite = math.isfinite(norm) and math.isfinite(denoiser_norm)
        skip = not finite or self._too_large(max(norm, denoiser_norm))
        if not skip:
            self.optimizer.step(self.updates)
            if self.denoiser_optimizer:
                self.denoiser_optimizer.step(self.updates)
            self.average.update(self.updates)
            self.updates += 1
        self.optimizer.zero_grad()
        if self.denoiser_optimizer:
            self.denoiser_optimizer.zero_grad()
        self._bad = 0 if finite else self._bad + 1
        self.step += 1
        if not finite:
            logger.warning("step %d: loss or gradient is not finite, step skipped", self.step)
            if self._bad >= PATIENCE:
                raise TrainingError(
                    f"training: the loss was not finite in {PATIENCE} steps in a row, up to step {self.step}; "
                    "expected a finite loss (lower train.lr, or set flow.soft_clip and train.grad_clip)"
                )
        nll, denoiser_loss = losses if losses is not None else (math.nan, math.nan)
        has_denoiser = self.denoiser_optimizer is not None
        return TrainStep(
            self.step,
            nll,
            denoiser_loss if has_denoiser else None,
            norm,
            denoiser_norm if has_denoiser else None,
            lr,
            samples_per_second(),
            skip,
        )

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Noisy latents and what the flow reads beside them."""
        train = self.config.train
        with torch.no_grad():
            posterior = batch.posterior
            if posterior is not None:
                posterior = posterior.to(self.device)
            latents = self.codec.encode(batch.pixels.to(self.device), noise=posterior)
            finite = torch.isfinite(latents).flatten(1).all(1).tolist()
            if not all(finite):
                raise TrainingError(
                    f"training: clip {batch.names[finite.index(False)]} holds NaN or infinity, expected finite pixels"
                )
            x = latents.float() + train.noise_std * batch.noise.to(self.device)
            if batch.extend:
                x = x[:, 1:]
        y = self.features(batch.captions)
        return x, None if y is None else y.to(self.device)

    def _backward(self, x: Tensor, y: Tensor | None) -> tuple[float, float] | None:
        """Gradients of a batch, part by part: both losses, or None where one is not finite."""
        train, flow = self.config.train, self.flow
        weight = train.noise_std / STEP if train.cond_noise_level else 1.0
        parts = train.accumulate
        texts = [None] * parts if y is None else y.chunk(parts)
        total = denoiser_total = 0.0
        for part, text in zip(x.chunk(parts), texts, strict=True):
            part = part.detach().requires_grad_(flow.denoiser is not None)
            with self._autocast():
                encoded = flow.encode(part, text)
                nll = nll_of(encoded).mean()
            loss = weight * nll / parts
            if not math.isfinite(value := float(nll.detach())):
                return None
            total += value / parts
            gradient = self._flow_backward(loss, self._penalty(encoded) / parts, part)
            flow.track(encoded, TRACK_RATE)
            if flow.denoiser is not None and gradient is not None:
                target = score_target(gradient * parts, train.noise_std)
                with self._autocast():
                    prediction = flow.denoiser(part.detach(), text if flow.config.conditional_denoiser else None)
                    denoiser_loss = F.mse_loss(prediction.float(), target)
                (denoiser_loss / parts).backward()
                denoiser_total += float(denoiser_loss.detach()) / parts
        return (total, denoiser_total) if math.isfinite(denoiser_total) else None

    def _penalty(self, encoded: Encoded) -> Tensor | float:
        weight = self.config.train.latent_norm_regularization
        if not weight:
            return 0.0
        squares = [latent.square().mean() for latent in encoded.latents[:-1]]
        return weight * torch.stack(squares).sum()

    @staticmethod
    def _flow_backward(loss: Tensor, penalty: Tensor | float, x: Tensor) -> Tensor | None:
        """Gradients of loss and penalty; returns that of the loss by `x`, where `x` asks for one."""
        if not x.requires_grad or not isinstance(penalty, Tensor):
            (loss + penalty).backward()
            return x.grad
        # By itself first: the score target is the gradient of the likelihood alone.
        loss.backward(retain_graph=True)
        assert x.grad is not None
        gradient = x.grad.clone()
        penalty.backward()
        return gradient

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def _too_large(self, norm: float) -> bool:
        train = self.config.train
        limit = train.grad_skip * train.grad_clip
        return limit > 0 and self.step >= SKIP_AFTER and norm > limit


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = True,
    on_step: Callable[[TrainStep], None] | None = None,
    quiet: bool = False,
    dataset: ClipDataset | None = None,
    device: str | torch.device | None = None,
) -> Flow:
    """Trains a flow.

    Args:
        config: of the run.
        folder: where checkpoints, logs and samples go.
        resume: go on from the last checkpoint in `folder`, if there is one.
        on_step: called after each step.
        quiet: no progress bar.
        dataset: in place of the one that the config names.
        device: default CUDA where there is one, else the CPU.

    Returns:
        The flow with the averaged weights, in eval mode.

    Raises:
        ConfigError: options that contradict each other.
        TrainingError: data or losses that are not finite.

    Reference: Gu et al., STARFlow-V (2025), training details.
    """
    codec, text = make_parts(config)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trainer = Trainer(config, codec, text, where)
    batches = Batches(config, dataset if dataset is not None else make_dataset(config), codec)
    steps = config.train.steps
    speed = _Speed(config.train.batch_size)
    with tqdm(total=steps, initial=trainer.step, disable=quiet, unit="step") as bar:
        for batch in batches.run(trainer.step, steps):
            done = trainer.run(batch, speed)
            bar.set_postfix_str(
                f"{done.bits_per_dim:.3f} bits/dim, {done.samples_per_second:.1f} clips/s", refresh=False
            )
            bar.update()
            if on_step is not None:
                on_step(done)
    return trainer.average.flow


class _Speed:
    """Clips a second, averaged over about ten steps."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._last = time.perf_counter()
        self._seconds: float | None = None

    def __call__(self) -> float:
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        self._seconds = taken if self._seconds is None else 0.9 * self._seconds + 0.1 * taken
        return self._batch / self._seconds
