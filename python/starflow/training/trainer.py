"""Training: the published recipe, deterministic under a seed, and resumable to the same bits.

Everything random in a step (choice of clips, noise, dropped captions) follows from the seed and the number of the step,
so the state of a run is its weights, optimiser moments and three counters. One process or the many that `torchrun`
starts compute the same steps (see `starflow.distributed`).

Reference: Gu et al., STARFlow-V (2025), training details; Gu et al., STARFlow (2025); Zhai et al., TarFlow (2024).
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from starflow.arguments import check_call, check_config, check_flag
from starflow.codecs import Codec, make_codec, tell_scale
from starflow.config import ConfigError, RunConfig, TrainConfig, to_mapping
from starflow.data import ClipDataset, kept_clip, to_frames, write_contact_sheet
from starflow.devices import as_device
from starflow.distributed import ALONE, World, join
from starflow.files import remove_leftovers, sole
from starflow.inference import plain_modes
from starflow.messages import shown, told_once
from starflow.model import STEP, Encoded, Flow, nll_of, score_target
from starflow.storage import (
    INDEX,
    MODEL,
    CheckpointError,
    check_parts,
    fingerprints,
    latest_state,
    load_state,
    read_state,
    save_model,
    save_state,
    saving,
)
from starflow.text import Features, TextEncoder, caption_for, make_text_encoder
from starflow.training.batches import (
    Batch,
    Batches,
    check_own,
    data_of,
    item_of,
    make_dataset,
    make_images,
    make_parts,
    open_text,
    source_of,
    tell_data,
    with_vocabulary,
    with_world,
)
from starflow.training.engine import Engine, shard
from starflow.training.errors import TrainingError, not_finite
from starflow.training.log import open_log
from starflow.training.machine import gains_from_bfloat16, keep_freed_memory
from starflow.training.measure import begin_from_data
from starflow.training.optim import Average, make_optimizers
from starflow.training.start import new_flow, started_flow

__all__ = [
    "Features",
    "TrainStep",
    "Trainer",
    "TrainingError",
    "caption_for",
    "make_dataset",
    "make_parts",
    "train",
]

logger = logging.getLogger(__name__)

# Weight of a batch in the running means of `Flow.track`.
TRACK_RATE = 0.05
# Steps in a row without a finite loss before training gives up.
PATIENCE = 5
# The published rule of skipping large gradients begins after so many steps.
SKIP_AFTER = 100
# The log tells when more than half of so many last steps were skipped for their gradients.
SKIPS_LOOKED_AT = 100
# So many skipped in a row end the training: the weights no longer change, so no gradient will be small again.
MOST_SKIPS = 500
# Steps between entries of the log.
LOG_EVERY = 10


@dataclass(frozen=True)
class TrainStep:
    """What a step did.

    Args:
        step: steps done, this one included.
        loss: negative log-likelihood of the noisy latents, nats per dimension without the constant log(2 pi) / 2.
        denoiser_loss: mean squared error to the score target; None where the denoiser did not learn.
        grad_norm, denoiser_grad_norm: before clipping.
        lr: of the flow.
        samples_per_second: clips of all processes, over the last steps.
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


class Trainer:
    """A flow in training: the step of the recipe and the state between steps.

    Args:
        config: of the run.
        codec: pixels to latents.
        text: captions to features, or None.
        device: where the flow lives.
        world: the processes that train it together; all make the same calls.
        flow: with the weights to begin with; None for random ones, which follow from `train.seed`.
    """

    def __init__(
        self,
        config: RunConfig,
        codec: Codec,
        text: TextEncoder | None,
        device: torch.device,
        world: World = ALONE,
        *,
        flow: Flow | None = None,
    ) -> None:
        check_config("Trainer", config, RunConfig)
        self.config, self.codec, self.text, self.device, self.world = config, codec, text, device, world
        self.features = Features(config.flow, text)
        precision = config.train.precision
        # One answer for all processes: their updates are to be the same, and their machines may differ.
        gains = world.share(lambda: gains_from_bfloat16(device))
        self._bfloat16 = precision == "bfloat16" or (precision == "auto" and gains)
        if self._bfloat16 and not gains and world.first:
            logger.warning(
                "train.precision is 'bfloat16', in which this machine multiplies no faster than in float32, or far "
                "slower: 'auto' takes the faster one"
            )
        self.flow = (new_flow(config) if flow is None else flow).to(device).train()
        # Without an average the weights themselves stand for it.
        target = copy.deepcopy(self.flow) if config.train.ema else self.flow
        self.engine = Engine(self.flow, world, config.train.parallel)
        self._sharded = world.size > 1 and config.train.parallel == "fsdp"
        if self._sharded and target is not self.flow:
            shard(target, world)
        self.average = Average(self.flow, target, config.train.ema)
        self.optimizer, self.denoiser_optimizer = make_optimizers(self.flow, config.train, bfloat16=gains)
        self.step = 0
        self.updates = 0
        self._bad = 0
        self._skips = _Skips()
        self._seen = False  # a batch
        # What tells the data that a run is trained on from others (see `data_of`).
        self.data: dict[str, Any] = {}
        self.parts = fingerprints(config)

    def save(self, folder: Path) -> None:
        """Writes the training state, and the averaged weights as the model of the run.

        Raises:
            CheckpointError: either cannot be written; what was there before is left as it was.
        """
        about = {
            "step": self.step,
            "updates": self.updates,
            "bad": self._bad,
            **self._skips.state(),
            "config": to_mapping(self.config),
            "data": self.data,
            "parts": self.parts,
        }
        tensors = self._tensors(averaged=bool(self.config.train.ema))
        save_state(folder, self.step, tensors, about, self.world)
        self.save_model(folder)

    def save_model(self, folder: Path) -> None:
        """Writes the averaged weights as the model of the run."""
        state = self.world.whole(self.average.flow.state_dict())
        if self.world.first:
            kind = "average" if self.config.train.ema else "last"
            about = {"weights": kind, "step": str(self.step)}
            save_model(folder / MODEL, state, self.config, self.codec, self.text, about=about, parts=self.parts)
        self.world.wait()

    def averaged(self) -> Flow:
        """The flow with the averaged weights; of weights in pieces a whole copy on the CPU, in the first process.

        The other processes get what they hold.
        """
        flow = self.average.flow
        if not self._sharded:
            return flow
        state = self.world.whole(flow.state_dict())
        if not self.world.first:
            return flow
        with torch.device("meta"):
            flow = Flow(self.config.flow)
        flow.load_state_dict(state, assign=True)
        return flow

    def load(self, path: Path) -> None:
        """Takes a training state up, of any number of processes.

        Args:
            path: as `latest_state` returns it.

        Raises:
            CheckpointError: damaged, or of another autoencoder or text encoder.
            TrainingError: of a run with another model or codec.
        """
        state = read_state(path)
        counters = [state.get(name) for name in ("step", "updates", "bad")]
        saved, data, parts = state.get("config"), state.get("data", self.data), state.get("parts", {})
        whole = isinstance(saved, dict) and all(isinstance(options, dict) for options in saved.values())
        whole = (
            whole
            and isinstance(data, dict)
            and isinstance(parts, dict)
            and all(type(count) is int and count >= 0 for count in counters)
        )
        skips = _Skips.of(state)
        if not whole or not isinstance(saved, dict) or skips is None:
            raise CheckpointError(f"checkpoint {path} is damaged, expected counters and a configuration in it")
        _check_same_run(self._spelt_out(saved, path), self._spelt_out(to_mapping(self.config), path), path)
        check_parts(f"checkpoint {path}", parts, self.config)
        # States of earlier versions tell nothing of data that are no files.
        if data != self.data and (data or "files" in self.data):
            logger.warning(
                "data changed since %s: %s were, %s are; the run goes on with these",
                path.name,
                *map(_told_data, (data, self.data)),
            )
        averaged = bool(saved.get("train", {}).get("ema"))
        about = load_state(path, self._tensors(averaged=averaged and bool(self.config.train.ema)), self.world)
        if self.config.train.ema and not averaged:
            self.average.reset()
        self.step, self.updates, self._bad = about["step"], about["updates"], about["bad"]
        self._skips = skips

    def _spelt_out(self, saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """A configuration with every option of codec and text: one that is left out is not what it is set to."""
        parts: dict[str, tuple[Callable[[Mapping[str, Any]], Any], Any]] = {
            "codec": (make_codec, self.codec),
            "text": (make_text_encoder, self.text),
        }
        whole = dict(saved)
        for name, (make, own) in parts.items():
            options = whole.get(name)
            if not options:
                continue
            try:
                same = options == getattr(self.config, name)
                whole[name] = (own if same else make(options)).to_config()
            except ValueError as error:
                raise TrainingError(f"training: {path} belongs to another model: its {error}") from None
        return whole

    def _tensors(self, *, averaged: bool) -> dict[str, Tensor]:
        """Everything that a resumed run needs, to be read and written in place."""
        state: dict[str, Mapping[str, Tensor]] = {
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        if averaged:
            state["average"] = self.average.flow.state_dict()
        if self.denoiser_optimizer:
            state["denoiser_optimizer"] = self.denoiser_optimizer.state()
        return {f"{part}:{name}": value for part, tensors in state.items() for name, value in tensors.items()}

    @plain_modes()
    def run(self, batch: Batch, samples_per_second: Callable[[], float] = lambda: math.nan) -> TrainStep:
        """One step.

        Args:
            batch: of this step; of several processes the rows of this one.
            samples_per_second: asked for the report when the step is done.

        Raises:
            TrainingError: a clip that is not finite, or too many steps in a row without a finite loss.
        """
        lr, scores = self.optimizer.lr(self.updates), self._scores
        x, y = self._inputs(batch)
        told = None if batch.frame_conditions is None else batch.frame_conditions.to(self.device)
        losses = self._backward(x, y, told)
        norm = denoiser_norm = math.nan
        finite = losses is not None
        if finite:
            norm = float(self.optimizer.clip())
            denoiser_norm = float(self.denoiser_optimizer.clip()) if self.denoiser_optimizer and scores else 0.0
            finite = math.isfinite(norm) and math.isfinite(denoiser_norm)
        large = finite and self._too_large(max(norm, denoiser_norm))
        skip = not finite or large
        if not skip:
            self.optimizer.step(self.updates)
            if self.denoiser_optimizer and scores:
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
        self._note_skip(large, max(norm, denoiser_norm))
        nll, denoiser_loss = losses if losses is not None else (math.nan, math.nan)
        return TrainStep(
            self.step,
            nll,
            denoiser_loss if scores else None,
            norm,
            denoiser_norm if scores else None,
            lr,
            samples_per_second(),
            skip,
        )

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Noisy latents and what the flow reads beside them."""
        if not self._seen:
            tell_scale("training: no pixel of the first batch", [batch.pixels])
            self._seen = True
        train = self.config.train
        with torch.no_grad():
            posterior = batch.posterior
            if posterior is not None:
                posterior = posterior.to(self.device)
            pixels = batch.pixels.to(self.device)
            if batch.reference is None:
                latents = self.codec.encode(pixels, noise=posterior)
            else:
                parts = (batch.reference.to(self.device), pixels)
                sizes = [self.codec.latent_frames(part.shape[1]) for part in parts]
                draws = (None, None) if posterior is None else posterior.split(sizes, 1)
                encoded = [self.codec.encode(part, noise=draw) for part, draw in zip(parts, draws, strict=True)]
                latents = torch.cat(encoded, 1)
            finite = torch.isfinite(latents).flatten(1).all(1).tolist()
            if not all(finite):
                raise not_finite(batch.names[finite.index(False)])
            x = latents.float() + train.noise_std * batch.noise.to(self.device)
            if batch.extend:
                x = x[:, 1:]
        y = self.features(batch.captions)
        return x, None if y is None else y.to(self.device)

    def _backward(self, x: Tensor, y: Tensor | None, told: Tensor | None = None) -> tuple[float, float] | None:
        """Gradients of a batch, part by part: both losses, or None where one is not finite."""
        train, flow, engine = self.config.train, self.flow, self.engine
        weight = train.noise_std / STEP if train.cond_noise_level else 1.0
        parts = train.accumulate
        texts, vectors = ([None] * parts if given is None else given.chunk(parts) for given in (y, told))
        total = denoiser_total = 0.0
        denoiser = engine.denoiser if self._scores else None
        for index, (part, text, vector) in enumerate(zip(x.chunk(parts), texts, vectors, strict=True), start=1):
            part = part.detach().requires_grad_(denoiser is not None)
            with engine.accumulating(last=index == parts):
                with self._autocast():
                    encoded = engine.encode(part, text, vector)
                    nll = nll_of(encoded).mean()
                loss = weight * nll / parts
                # Either all processes go on or none does, since all wait for each other's gradients.
                if not math.isfinite(value := self.world.mean(float(nll.detach()))):
                    self._share_tracked()
                    return None
                total += value / parts
                gradient = self._flow_backward(loss, self._penalty(encoded) / parts, part)
                flow.track(encoded, TRACK_RATE)
                if denoiser is not None and gradient is not None:
                    target = score_target(gradient * parts, train.noise_std)
                    with self._autocast():
                        read = (text, vector) if flow.config.conditional_denoiser else (None, None)
                        prediction = denoiser(part.detach(), *read)
                        denoiser_loss = F.mse_loss(prediction.float(), target)
                    (denoiser_loss / parts).backward()
                    denoiser_total += float(denoiser_loss.detach()) / parts
        self._share_tracked()
        denoiser_total = self.world.mean(denoiser_total)
        return (total, denoiser_total) if math.isfinite(denoiser_total) else None

    def _share_tracked(self) -> None:
        """Each process has the running means of its own rows; as these are linear, their average is that of the batch.

        Nothing else is averaged: of three equal numbers rounding makes another one.
        """
        self.world.average(self.flow.tracked())

    def _penalty(self, encoded: Encoded) -> Tensor | float:
        weight = self.config.train.latent_norm_regularization
        if not weight:
            return 0.0
        squares = [latent.square().mean() for latent in encoded.latents[:-1]]
        return weight * torch.stack(squares).sum()

    @staticmethod
    def _flow_backward(loss: Tensor, penalty: Tensor | float, x: Tensor) -> Tensor | None:
        """Gradients of loss and penalty; returns that of the loss by `x`, where `x` asks for one."""
        gradient = None
        if x.requires_grad and isinstance(penalty, Tensor):
            # Apart from the penalty: the score target is the gradient of the likelihood alone.
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        (loss + penalty).backward()
        return x.grad if gradient is None else gradient

    @property
    def _scores(self) -> bool:
        """Whether the denoiser learns in this step."""
        return self.flow.denoiser is not None and self.step % self.config.train.denoiser_every == 0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    @property
    def _largest_norm(self) -> float:
        """The norm from which gradients are skipped; 0 where none are."""
        return self.config.train.grad_skip * self.config.train.grad_clip

    def _too_large(self, norm: float) -> bool:
        return self._largest_norm > 0 and self.step >= SKIP_AFTER and norm > self._largest_norm

    def _note_skip(self, skipped: bool, norm: float) -> None:
        if not self._largest_norm:
            return
        skips = self._skips
        warn = skips.note(skipped)
        why = (
            f"for gradients above train.grad_skip * train.grad_clip = {self._largest_norm:g} (the last norm is "
            f"{norm:.3g})"
        )
        if skips.in_a_row >= MOST_SKIPS:
            raise TrainingError(
                f"training: {MOST_SKIPS} steps in a row were skipped {why}, up to step {self.step}; expected a limit "
                "that most steps keep to (raise train.grad_skip or train.grad_clip, 0 turns either off; or lower "
                "train.lr)"
            )
        if warn:
            logger.warning(
                "step %d: %d of the last %d steps were skipped %s; raise train.grad_skip, or set it to 0",
                self.step,
                skips.count,
                SKIPS_LOOKED_AT,
                why,
            )


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = True,
    on_step: Callable[[TrainStep], None] | None = None,
    quiet: bool = False,
    dataset: ClipDataset | None = None,
    device: str | torch.device | None = None,
) -> Flow:
    """Trains a flow, in this process or in those that `torchrun` starts, each of which calls this.

    A run that was interrupted or killed goes on from its last checkpoint and ends with the same bits as one that was
    not; with another number of processes, with the same numbers up to rounding. Ctrl-C ends the step, writes a
    checkpoint and raises KeyboardInterrupt; a second Ctrl-C does not wait.

    Args:
        config: of the run.
        folder: gets `model.safetensors` (the averaged weights), `checkpoints`, `config.yaml`, `samples` and the
            log `log` (`train.log`).
        resume: go on from the last checkpoint in `folder`, if there is one; False insists on a fresh run.
        on_step: called after each step, in every process.
        quiet: no progress bar.
        dataset: in place of the one that the config names.
        device: default CUDA where there is one, else the CPU.

    Returns:
        The flow with the averaged weights, in eval mode (with `train.parallel` "fsdp" whole in the first process, on
        the CPU, and in pieces in the others).

    Raises:
        ConfigError: options that contradict each other, or a model (`train.init`) that does not fit them.
        ValueError: a `config` or `on_step` of another type.
        TrainingError: data or losses that are not finite, or a folder that holds another run, or a model alone.
        InUseError: another process trains in the folder.
        CheckpointError: a checkpoint that cannot be written or read.
        DistributedError: another process of the run stopped.

    Reference: Gu et al., STARFlow-V (2025), training details.
    """
    check_config("train", config, RunConfig)
    check_flag("train", "resume", resume)
    check_flag("train", "quiet", quiet)
    check_call("train", "on_step", on_step)
    named = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Each sheet of samples would tell of the same options.
    with plain_modes(), told_once(), join(named) as world:
        # Written to until the end, whatever the working directory is then.
        return _train(
            config, Path(folder).absolute(), world, resume=resume, on_step=on_step, quiet=quiet, dataset=dataset
        )


def _train(
    config: RunConfig,
    folder: Path,
    world: World,
    *,
    resume: bool,
    on_step: Callable[[TrainStep], None] | None,
    quiet: bool,
    dataset: ClipDataset | None,
) -> Flow:
    if world.device.type == "cpu":
        keep_freed_memory()
    config, own = with_world(config), dataset is not None
    images = make_images(config)
    if open_text(config):
        dataset = make_dataset(config) if dataset is None else dataset
        config = with_vocabulary(config, dataset, images)
    codec, text = make_parts(config)
    _check_prompts(config, text)
    dataset = make_dataset(config) if dataset is None else dataset
    if own:
        check_own(config, dataset)
    if world.first:
        tell_data(config, dataset)
        _tell_recipe(config)
        if world.size == 1 and config.train.parallel == "fsdp":
            logger.warning("train.parallel is 'fsdp' and this is one process, which holds all weights (see torchrun)")
    batches = Batches(config, dataset, codec, images, rank=world.rank, size=world.size)
    with _held(folder, world):
        return _run(
            config, folder, world, dataset, images, batches, codec, text, resume=resume, on_step=on_step, quiet=quiet
        )


@contextmanager
def _held(folder: Path, world: World) -> Iterator[None]:
    """Holds the folder of a run for as long as the block lasts, without what killed runs left in it."""

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(sole(folder))
        for place in (folder, folder / "checkpoints", folder / "samples"):
            remove_leftovers(place)

    with ExitStack() as stack:
        world.share(take)
        yield


def _run(
    config: RunConfig,
    folder: Path,
    world: World,
    dataset: ClipDataset,
    images: ClipDataset | None,
    batches: Batches,
    codec: Codec,
    text: TextEncoder | None,
    *,
    resume: bool,
    on_step: Callable[[TrainStep], None] | None,
    quiet: bool,
) -> Flow:
    last = world.share(lambda: latest_state(folder))
    if last is not None and not resume:
        raise TrainingError(
            f"training: {folder} holds a run up to {last.name}, expected an empty folder (resume is off)"
        )
    # Some processes may not see the folder yet, so the first one looks.
    if last is None and world.share(lambda: any((folder / name).exists() for name in (MODEL, INDEX))):
        raise TrainingError(
            f"training: {folder} holds a model and no checkpoint of its run, expected an empty folder (a new run would "
            "replace the model; to train on from it, name it as train.init and give the run a folder of its own)"
        )
    flow = None
    if last is None:
        new = config.train.init is None
        flow = new_flow(config) if new else started_flow(config, codec, text)
        begin_from_data(flow, dataset, codec, config.train, world, new=new)
    trainer = Trainer(config, codec, text, world.device, world, flow=flow)
    trainer.data = world.share(lambda: data_of(dataset, images))
    if last is not None:
        trainer.load(last)
        logger.info("going on from step %d", trainer.step)
        if trainer.step > config.train.steps:
            raise TrainingError(
                f"training: train.steps is {config.train.steps}, expected at least {trainer.step}: {folder} was "
                "trained so far"
            )
        if trainer.step == config.train.steps:
            logger.warning("%s has its %d steps already, so that nothing is trained", folder, trainer.step)
    recipe = config.train
    speed = _Speed(recipe.batch_size)
    with ExitStack() as stack:
        log = None
        if world.first:
            with saving(folder / "config.yaml", "config") as temporary:
                temporary.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False), encoding="utf-8")
            log = stack.enter_context(open_log(recipe.log, folder / "log", trainer.step, to_mapping(config)))
        interrupted = stack.enter_context(_deferred_interrupt())
        hidden = quiet or not world.first
        bar = stack.enter_context(tqdm(total=recipe.steps, initial=trainer.step, disable=hidden, unit="step"))
        for batch in stack.enter_context(closing(batches.run(trainer.step, recipe.steps))):
            done = trainer.run(batch, speed)
            bar.set_postfix_str(
                f"{done.bits_per_dim:.3f} bits/dim, {done.samples_per_second:.1f} clips/s", refresh=False
            )
            bar.update()
            end = done.step == recipe.steps
            if log is not None and (end or done.step % LOG_EVERY == 0):
                log(_scalars(done), done.step)
            if on_step is not None:
                on_step(done)
            stop = world.any(interrupted.is_set())
            if end or stop or _due(done.step, recipe.checkpoint_every):
                trainer.save(folder)
            if _due(done.step, recipe.sample_every):
                _write_samples(trainer, folder, dataset)
                world.wait()
            if stop and not end:
                raise KeyboardInterrupt
    trainer.save_model(folder)
    return trainer.averaged().requires_grad_(False).eval()


def _told_data(facts: Mapping[str, Any]) -> str:
    """What `data_of` found, in words."""
    return f"{facts['clips']} clips of {facts['kind']}" if "clips" in facts else f"{facts.get('files', 'no')} files"


def _check_prompts(config: RunConfig, text: TextEncoder | None) -> None:
    """Refuses prompts of samples that could not be made, before hours of training and not after."""
    prompts = config.sample.prompts
    if not prompts or not config.train.sample_every or config.train.source_prob:
        return
    if text is None and any(prompts):
        raise ConfigError(f"sample.prompts is {shown(prompts)}, expected none: the model is trained without text")
    if text is not None:
        try:
            Features(config.flow, text)([caption_for(config, prompt) for prompt in prompts])
        except ValueError as error:
            raise ConfigError(f"sample.prompts: {error}") from None


def _tell_recipe(config: RunConfig) -> None:
    """Tells in the log of options that do nothing beside others, or undo what they are for."""
    flow, recipe, data = config.flow, config.train, config.data
    if recipe.warmup_steps >= recipe.steps:
        logger.warning(
            "train.warmup_steps is %d and train.steps %d: the learning rate does not get to train.lr",
            recipe.warmup_steps,
            recipe.steps,
        )
    usual, reads = TrainConfig(), flow.txt_size or flow.num_classes
    for options, read, why in (
        (("image_batch_size", "image_frame"), recipe.image_prob, "no step is on images"),
        (("denoiser_lr", "denoiser_every"), flow.learnable_self_denoiser, "there is no denoiser"),
        (("drop_label",), reads, "the flow reads neither text nor classes"),
        (("drop_frame_condition",), flow.frame_dim, "the flow reads no vectors of frames"),
        (("drop_image", "last_frame_prob", "source_prob"), recipe.image_prob < 1.0, "every step is on images"),
    ):
        for option in options:
            value = getattr(recipe, option)
            if not read and value != getattr(usual, option):
                logger.warning("train.%s is %s and nothing reads it: %s", option, shown(value), why)
    if recipe.lr == 0.0:
        logger.warning("train.lr is 0: the flow does not learn")
    if flow.learnable_self_denoiser and recipe.noise_std == 0.0:
        logger.warning("train.noise_std is 0: the denoiser has no noise to learn, and samples are not cleaned")
    elif flow.learnable_self_denoiser and 1 < recipe.steps <= recipe.denoiser_every:
        logger.warning(
            "train.denoiser_every is %d and train.steps %d: the denoiser learns in one step",
            recipe.denoiser_every,
            recipe.steps,
        )
    if data.frames > 1:
        for option, what in (
            ("image_prob", "every step is on images, and the flow never sees a clip"),
            ("drop_image", "the flow never sees a clip from its first frame on"),
            ("last_frame_prob", "the flow never sees a clip without the frame that it ends with"),
        ):
            if getattr(recipe, option) == 1.0:
                logger.warning("train.%s is 1: %s", option, what)
    for option, read in (("drop_label", reads), ("drop_frame_condition", flow.frame_dim)):
        if read and getattr(recipe, option) == 1.0:
            logger.warning("train.%s is 1: the flow never sees what it is to be told by", option)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _scalars(done: TrainStep) -> dict[str, float]:
    """The figures of a step that a log shows."""
    scalars = {
        "loss/bits_per_dim": done.bits_per_dim,
        "loss/denoiser": done.denoiser_loss,
        "gradient/flow": done.grad_norm,
        "gradient/denoiser": done.denoiser_grad_norm,
        "lr": done.lr,
        "samples_per_second": done.samples_per_second,
    }
    return {name: value for name, value in scalars.items() if value is not None}


def _write_samples(trainer: Trainer, folder: Path, dataset: ClipDataset) -> None:
    """Samples of the averaged weights: the same noise each time, so that progress can be seen.

    A model of pairs shows what it makes of the first sources of the data; a row begins with its source.
    """
    from starflow.sampling import Pipeline

    config, flow = trainer.config, trainer.averaged()
    if not trainer.world.first:
        return
    pipeline = Pipeline(flow, config, trainer.codec, trainer.text, device=trainer.device)
    if config.train.source_prob:
        clips = [kept_clip(item_of(dataset, index)) for index in range(min(4, len(dataset)))]
        prompts = tuple(clip.caption if trainer.text is not None else "" for clip in clips)
        sources = torch.stack([source_of(clip) for clip in clips])
        made = pipeline.sample(prompts, seed=config.train.seed, source=sources).pixels
        shown = torch.cat([sources, made], 1)
    else:
        prompts = config.sample.prompts or ("",) * 4
        shown = pipeline.sample(prompts, seed=config.train.seed).pixels
    target = folder / "samples" / f"step-{trainer.step:08d}.png"
    target.parent.mkdir(exist_ok=True)
    write_contact_sheet(target, [to_frames(clip) for clip in shown], list(prompts))


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, once; the second time they act as usual. Only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """A state fits its own model only; other options may change, with a line in the log."""
    begun, model = (options.get("train", {}).get("init") for options in (saved, given))
    if model not in (None, begun):
        raise TrainingError(
            f"training: {path.parent.parent} holds a run that began from "
            f"{'random weights' if begun is None else shown(begun)}, expected another folder for one that begins from "
            f"{shown(model)} (train.init)"
        )
    changed = [
        f"{section}.{name} was {old!r}, is {options[name]!r}"
        for section, options in given.items()
        for name, old in saved.get(section, {}).items()
        if name in options and options[name] != old
    ]
    fatal = [line for line in changed if line.startswith(("flow.", "codec.", "text."))]
    if fatal:
        raise TrainingError(f"training: {path} belongs to another model: {'; '.join(fatal)}")
    if kept := [line for line in changed if line.startswith("train.optimizer ")]:
        raise TrainingError(f"training: {path} holds what another optimiser keeps: {kept[0]}, expected the same")
    if changed:
        logger.warning("options changed since %s: %s", path.name, "; ".join(changed))


class _Skips:
    """Which of the last steps were skipped for their gradients."""

    def __init__(self, last: str = "", in_a_row: int = 0) -> None:
        self._last = last
        self.in_a_row = in_a_row
        self._told = 0  # steps for which nothing is told

    @property
    def count(self) -> int:
        """Skipped steps of the last `SKIPS_LOOKED_AT`."""
        return self._last.count("1")

    def note(self, skipped: bool) -> bool:
        """Notes a step; returns whether to tell, which it does not of the same steps again."""
        self._last = (self._last + "01"[skipped])[-SKIPS_LOOKED_AT:]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self._told = max(0, self._told - 1)
        if self._told or self.count * 2 <= SKIPS_LOOKED_AT:
            return False
        self._told = SKIPS_LOOKED_AT
        return True

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"skips": self._last, "skips_in_a_row": self.in_a_row}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Skips | None:
        """From what `state` returned, or from a state without it; None where it is damaged."""
        last, in_a_row = state.get("skips", ""), state.get("skips_in_a_row", 0)
        whole = isinstance(last, str) and len(last) <= SKIPS_LOOKED_AT and not last.strip("01")
        return cls(last, in_a_row) if whole and type(in_a_row) is int and in_a_row >= 0 else None


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
