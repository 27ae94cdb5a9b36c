"""Training of a row: the flow by the product's own `train`, a baseline by the same batches, optimiser and average.

Both can be killed at any time and go on from their last checkpoint. Processor seconds are those of this process, all
threads, since the last checkpoint that counts.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from baselines import Baseline, Draws
from study import Row, new_baseline
from torch import Tensor, nn

from starflow.config import RunConfig, TrainConfig
from starflow.model import Flow
from starflow.storage import latest_state, saving
from starflow.text import Features
from starflow.training import TrainStep, train
from starflow.training.batches import Batches, make_dataset, make_parts
from starflow.training.machine import gains_from_bfloat16
from starflow.training.optim import Average, Optimizer

CHECKPOINT_EVERY = 200
# File of the state of a baseline.
STATE = "state.pt"


class Clock:
    """Processor seconds of a training, kept over interruptions.

    Args:
        path: of the file that keeps them.
        begin: steps that were done when this process took over.
    """

    def __init__(self, path: Path, begin: int) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self._known = {int(step): seconds for step, seconds in known.items() if int(step) <= begin}
        self._before = self._known.get(begin, 0.0)
        self._start = time.process_time()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.process_time() - self._start

    def note(self, step: int) -> None:
        """Keeps what has passed until the checkpoint of a step."""
        self._known[step] = self.seconds
        with saving(self._path, "seconds") as temporary:
            temporary.write_text(json.dumps(self._known))


def fit(row: Row, config: RunConfig, folder: Path) -> tuple[Flow | Baseline, float]:
    """Trains a row, or goes on with it; returns the averaged model and the processor seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    return _fit_flow(config, folder) if row.recipe.baseline is None else _fit_baseline(row, config, folder)


def _fit_flow(config: RunConfig, folder: Path) -> tuple[Flow, float]:
    last = latest_state(folder)
    clock = Clock(folder / "seconds.json", int(last.name.split("-")[-1]) if last is not None else 0)
    config = replace(config, train=replace(config.train, checkpoint_every=CHECKPOINT_EVERY))

    def note(done: TrainStep) -> None:
        if done.step % CHECKPOINT_EVERY == 0 or done.step == config.train.steps:
            clock.note(done.step)

    flow = train(config, folder, on_step=note, quiet=True)
    return flow, clock.seconds


def new_optimizer(model: nn.Module, recipe: TrainConfig, rate: float, betas: tuple[float, float]) -> Optimizer:
    """The optimiser of a network that is no flow, by the recipe of one."""
    faster = gains_from_bfloat16(torch.device("cpu"))
    return Optimizer(dict(model.named_parameters()), recipe, rate, betas, bfloat16=faster)


def latents_of(pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Latents (batch, frames, ...) of clips, or of images as clips of one frame."""
    latents = encode(pixels)
    return latents if latents.dim() == 5 else latents.unsqueeze(1)


def _fit_baseline(row: Row, config: RunConfig, folder: Path) -> tuple[Baseline, float]:
    recipe, path = config.train, folder / STATE
    codec, text = make_parts(config)
    features = Features(config.flow, text)
    model = new_baseline(row, config).train()
    average = Average(model, copy.deepcopy(model), recipe.ema)
    optimizer = new_optimizer(model, recipe, recipe.lr, (recipe.beta1, recipe.beta2))
    tensors = {"model": model.state_dict(), "average": average.flow.state_dict(), "optimizer": optimizer.state()}
    begin = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        begin = state["step"]
        for part, values in tensors.items():
            for name, value in values.items():
                value.copy_(state[part][name])
    clock = Clock(folder / "seconds.json", begin)
    batches = Batches(config, make_dataset(config), codec)
    for step, batch in enumerate(batches.run(begin, recipe.steps), start=begin):
        latents = latents_of(batch.pixels, codec.encode)
        noise = batch.noise if batch.noise.dim() == 5 else batch.noise.unsqueeze(1)
        loss = model.loss(latents, features(batch.captions), batch.frame_conditions, Draws(recipe.seed, step, noise))
        loss.backward()
        optimizer.clip()
        optimizer.step(step)
        optimizer.zero_grad()
        average.update(step)
        done = step + 1
        if done % CHECKPOINT_EVERY == 0 or done == recipe.steps:
            clock.note(done)
            with saving(path, "state") as temporary:
                torch.save({"step": done, **tensors}, temporary)
    return average.flow.eval(), clock.seconds


@torch.no_grad()
def held_out_loss(model: Flow | Baseline, config: RunConfig, steps: int = 8) -> float:
    """The model's own training loss on batches of held-out clips, with the noise of steps that no training has."""
    codec, text = make_parts(config)
    features = Features(config.flow, text)
    quiet = replace(config.train, image_prob=0.0, drop_label=0.0, drop_frame_condition=0.0, batch_size=16)
    batches = Batches(replace(config, train=quiet), make_dataset(config, "test"), codec)
    losses = []
    for step in range(steps):
        batch = batches.make(10_000_000 + step)
        latents, y = latents_of(batch.pixels, codec.encode), features(batch.captions)
        if isinstance(model, Flow):
            noisy = latents + config.train.noise_std * batch.noise
            losses.append(float(model.nll(noisy, y, batch.frame_conditions).mean()))
        else:
            draws = Draws(config.train.seed, 10_000_000 + step, batch.noise)
            losses.append(float(model.loss(latents, y, batch.frame_conditions, draws)))
    return sum(losses) / steps
