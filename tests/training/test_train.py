"""The recipe, against references written out here, and runs that are interrupted."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from starflow.config import ConfigError, RunConfig
from starflow.data import (
    Clip,
    MovingDigits,
    VideoFolder,
    read_batch,
    sample_batch,
    sample_indices,
    to_frames,
    write_video,
)
from starflow.distributed import ALONE
from starflow.files import InUseError
from starflow.model import Flow, Gaussian
from starflow.sampling import Pipeline
from starflow.storage import CheckpointError, latest_state, load_model, parts
from starflow.text import ClassEncoder, Features
from starflow.training import (
    Batch,
    Batches,
    Trainer,
    TrainingError,
    machine,
    make_dataset,
    make_parts,
    optim,
    train,
    trainer,
)
from starflow.training.batches import check_own, make_images, tell_data, with_vocabulary
from starflow.training.machine import gains_from_bfloat16
from starflow.training.measure import begin_from_data, moments
from starflow.training.optim import Muon, cosine_lr
from starflow.training.trainer import MOST_SKIPS, PATIENCE, TRACK_RATE

from ..encoders import make_t5

CPU = torch.device("cpu")
# A flow that reads no captions.
_NO_TEXT = {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "conditional_denoiser": False, "text_embed": False}


def trainer_of(config: RunConfig) -> tuple[Trainer, Batches]:
    codec, text = make_parts(config)
    trainer = Trainer(config, codec, text, CPU)
    return trainer, Batches(config, make_dataset(config), codec)


def shaken(trainer: Trainer) -> Trainer:
    """Weights away from their start, where the network puts out no scale at all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.flow.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return trainer


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.flow.named_parameters() if p.grad is not None}


def noisy(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor]:
    x, y = trainer._inputs(batch)
    assert y is not None
    return x, y


def same(one: Flow, other: Flow) -> None:
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# -- the loss and the score target ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_losses_and_gradients_are_those_of_the_recipe(tiny, parts: int, weighted: bool, penalty: float) -> None:
    if weighted:
        words = [*RunConfig.load("tiny").text["vocabulary"], "noise", "level", "100"]
        text = {"kind": "words", "size": 6, "vocabulary": words}
        config = tiny(flow={"txt_dim": 18, "txt_size": 6}, text=text, cond_noise_level=True)
    else:
        config = tiny()
    config = replace(config, train=replace(config.train, accumulate=parts, latent_norm_regularization=penalty))
    trainer, batches = trainer_of(config)
    shaken(trainer)
    x, y = noisy(trainer, batches.make(0))
    sigma = config.train.noise_std
    weight = sigma / 0.3 if weighted else 1.0

    # The reference: the whole batch at once, in float64.
    flow = Flow(config.flow).double()
    flow.load_state_dict(trainer.flow.state_dict())
    leaf = x.double().requires_grad_()
    encoded = flow.encode(leaf, y.double())
    log_det = sum(d.flatten(1).sum(1) for d in encoded.log_det)
    nll = (0.5 * encoded.z.square().flatten(1).sum(1) - log_det).mean() / encoded.z[0].numel()
    (score,) = torch.autograd.grad(weight * nll, leaf, retain_graph=True)
    (weight * nll + penalty * sum(latent.square().mean() for latent in encoded.latents[:-1])).backward()
    target = score * x.numel() * sigma
    denoiser_loss = F.mse_loss(flow.denoiser(x.double(), y.double()), target)
    denoiser_loss.backward()

    losses = trainer._backward(x, y)
    assert losses == pytest.approx((nll.item(), denoiser_loss.item()), rel=1e-4)
    got = gradients(trainer)
    for name, parameter in flow.named_parameters():
        expected = parameter.grad
        torch.testing.assert_close(got[name].double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_bits_per_dimension_are_those_of_the_density(tiny) -> None:
    config = tiny()
    trainer, batches = trainer_of(config)
    batch = batches.make(0)
    x, y = noisy(trainer, batch)
    expected = -trainer.flow.log_prob(x, y).mean().item() / math.log(2) / x[0].numel()
    assert trainer.run(batch).bits_per_dim == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_close_and_keeps_float32_weights(tiny) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer, batches = trainer_of(tiny(precision=precision))
        shaken(trainer)
        losses.append(trainer._backward(*noisy(trainer, batches.make(0))))
        assert {p.grad.dtype for p in trainer.flow.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


# -- the update -------------------------------------------------------------------------------------------------------


def test_updates_are_two_adamw_with_clipping_schedule_and_average(tiny) -> None:
    config = tiny(steps=5, warmup_steps=2, grad_clip=0.01, weight_decay=0.1, ema=0.5, denoiser_lr=3e-3)
    trainer, batches = trainer_of(config)
    recipe = config.train
    reference = Flow(config.flow)
    reference.load_state_dict(trainer.flow.state_dict())
    average = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    parameters = dict(reference.named_parameters())
    parts = [[p for n, p in parameters.items() if n.startswith("denoiser.") == second] for second in (False, True)]
    adams = [
        torch.optim.AdamW(parts[0], betas=(0.9, 0.95), weight_decay=0.1, fused=False),
        torch.optim.AdamW(parts[1], weight_decay=0.1, fused=False),
    ]
    for step in range(5):
        batch = batches.make(step)
        probe = Trainer(config, trainer.codec, trainer.text, CPU)
        probe.flow.load_state_dict(reference.state_dict())
        assert probe._backward(*noisy(probe, batch)) is not None
        for name, gradient in gradients(probe).items():
            parameters[name].grad = gradient
        norms = [float(torch.nn.utils.clip_grad_norm_(part, 0.01)) for part in parts]
        for adam, peak in zip(adams, (recipe.lr, recipe.denoiser_lr), strict=True):
            adam.param_groups[0]["lr"] = cosine_lr(step, warmup=2, total=5, peak=peak, floor=recipe.min_lr)
            adam.step()
        # Tracked buffers come with the probe.
        with torch.no_grad():
            for name, buffer in reference.named_buffers():
                buffer.copy_(dict(probe.flow.named_buffers())[name])
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in reference.state_dict().items():
            average[name].lerp_(tensor, 1.0 - decay)

        done = trainer.run(batch)
        assert (done.step, done.skipped) == (step + 1, False)
        assert done.lr == cosine_lr(step, warmup=2, total=5, peak=recipe.lr, floor=recipe.min_lr)
        assert [done.grad_norm, done.denoiser_grad_norm] == pytest.approx(norms, rel=1e-4)
    for name, tensor in trainer.flow.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(trainer.average.flow.state_dict()[name], average[name], atol=1e-5, rtol=1e-4)


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # As torch's, which computes in bfloat16 on every machine.
    monkeypatch.setattr("starflow.training.trainer.gains_from_bfloat16", lambda device: True)
    config = tiny(steps=5, warmup_steps=2, weight_decay=0.1, denoiser_lr=3e-3, optimizer="muon", grad_clip=0.0)
    trainer, batches = trainer_of(config)
    shaken(trainer)
    recipe = config.train
    reference = Flow(config.flow)
    reference.load_state_dict(trainer.flow.state_dict())
    begun = {name: value.clone() for name, value in trainer.flow.state_dict().items()}
    parameters = dict(reference.named_parameters())
    matrices = [name for name, p in parameters.items() if ".layers." in f".{name}" and p.dim() == 2]
    assert len(matrices) == 4 * (4 + 8)  # qkv, proj, up and down of the layers of the blocks and of the denoiser
    optimizers = []
    for second, peak, betas in ((False, recipe.lr, (0.9, 0.95)), (True, recipe.denoiser_lr, (0.9, 0.999))):
        mine = [name for name in parameters if name.startswith("denoiser.") == second]
        muon = [parameters[name] for name in mine if name in matrices]
        adam = [parameters[name] for name in mine if name not in matrices]
        # Of the length that an update of AdamW has: a root mean square of 0.2.
        optimizers += [
            (torch.optim.Muon(muon, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"), peak),
            (torch.optim.AdamW(adam, betas=betas, weight_decay=0.1, fused=False), peak),
        ]
    for step in range(3):
        batch = batches.make(step)
        probe = Trainer(config, trainer.codec, trainer.text, CPU)
        probe.flow.load_state_dict(reference.state_dict())
        assert probe._backward(*noisy(probe, batch)) is not None
        for name, gradient in gradients(probe).items():
            parameters[name].grad = gradient
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = cosine_lr(step, warmup=2, total=5, peak=peak, floor=recipe.min_lr)
            optimizer.step()
        trainer.run(batch)
    for name, parameter in trainer.flow.named_parameters():
        if name in matrices:
            # Muon computes in bfloat16, which has 8 bits.
            error, way = parameter - parameters[name], parameters[name] - begun[name]
            assert float((error.norm() / way.norm()).detach()) < 0.05
        else:
            # A step is 1e-3 long; both divide by roots of small gradients, whose last bits differ.
            torch.testing.assert_close(parameter, parameters[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_is_torchs_up_to_rounding(bfloat16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8), (24, 8), (8, 24), (1, 5), (8, 8)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    alike = Muon(ours, lr=0.01, weight_decay=0.1, bfloat16=bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        alike.step()
        reference.step()
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        one, other = one.detach(), other.detach()
        moved = other - 0.999**3
        # Torch computes in bfloat16, which has 8 bits.
        assert float((one - other).norm() / moved.norm()) < 0.02
    assert torch.equal(ours[-1], torch.ones(8, 8))  # no gradient, no update


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonal_factors_are_those_of_the_iteration_in_float64(dtype: torch.dtype) -> None:
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    factors = optim.orthogonal(matrices.to(dtype))
    assert factors.dtype == dtype
    error = (factors.double() - optim.orthogonal(matrices.double())).abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_many_matrices_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_AT_ONCE", 100)
    parameters = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in range(9)]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
    Muon(parameters, lr=1.0, weight_decay=0.0).step()
    for parameter in parameters:
        singular = torch.linalg.svdvals(parameter.detach()) / (0.2 * 6**0.5)
        assert singular.min() > 0.6
        assert singular.max() < 1.3


@pytest.mark.parametrize("known", [False, True])
def test_auto_is_bfloat16_where_it_is_faster(tiny, monkeypatch: pytest.MonkeyPatch, caplog, known: bool) -> None:
    monkeypatch.setattr("starflow.training.trainer.gains_from_bfloat16", lambda device: known)
    losses = {}
    for precision in ("auto", "float32", "bfloat16"):
        trainer, batches = trainer_of(tiny(precision=precision))
        shaken(trainer)
        losses[precision] = trainer._backward(*noisy(trainer, batches.make(0)))
    assert losses["auto"] == losses["bfloat16" if known else "float32"]
    assert losses["float32"] != losses["bfloat16"]
    # A model from another machine may bring the dtype that was fast there.
    told = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert len(told) == (0 if known else 1)


@pytest.mark.parametrize(
    ("levels", "speed", "expected"),
    [
        ({"amx": "", "avx512_bf16": ""}, 0.5, True),
        ({"amx": "not there", "avx512_bf16": ""}, 1.8, True),
        ({"amx": "not there", "avx512_bf16": ""}, 0.55, False),
        ({"avx512_bf16": ""}, 1.1, False),
        ({"amx": "not there", "avx512_bf16": "not there"}, 1.8, False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, levels: dict[str, str], speed: float, expected: bool
) -> None:
    monkeypatch.setattr(machine.native, "isa_levels", lambda: levels)
    monkeypatch.setattr(machine, "_speed_of_bfloat16", lambda: speed)
    gains_from_bfloat16.cache_clear()
    try:
        assert gains_from_bfloat16(CPU) == expected
        assert not gains_from_bfloat16(torch.device("meta"))
    finally:
        gains_from_bfloat16.cache_clear()


def test_a_run_of_muon_resumes_to_the_same_bits(tiny, tmp_path: Path) -> None:
    config = tiny(steps=4, optimizer="muon", checkpoint_every=2)

    def stop(done: object) -> None:
        if done.step == 3:
            raise KeyboardInterrupt

    whole = train(config, str(tmp_path / "whole"), quiet=True)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", quiet=True, on_step=stop)
    same(whole, train(config, tmp_path / "cut", quiet=True))


def test_muon_refuses_matrices_in_pieces(tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer is 'muon', expected 'adamw' with parallel 'fsdp'"):
        tiny(optimizer="muon", parallel="fsdp")


def test_the_first_guess_of_the_solver_follows_the_data(tiny) -> None:
    trainer, batches = trainer_of(tiny())
    shaken(trainer)
    x, y = noisy(trainer, batches.make(0))
    raw = trainer.flow.encode(x, y).affines[0].raw.mean((0, 1))
    trainer._backward(x, y)
    torch.testing.assert_close(trainer.flow.blocks[0].guess, TRACK_RATE * raw)


def test_training_learns(tiny, tmp_path: Path) -> None:
    losses = []
    flow = train(
        tiny(steps=60, batch_size=8, lr=3e-3),
        tmp_path,
        quiet=True,
        on_step=lambda done: losses.append((done.bits_per_dim, done.denoiser_loss)),
    )
    assert not flow.training
    assert losses[-1][0] < losses[0][0] - 2.0
    assert all(math.isfinite(value) for pair in losses for value in pair)


def test_a_denoiser_that_learns_less_often_leaves_the_flow_as_it_was(tiny) -> None:
    flows = []
    for every in (1, 2):
        trainer, batches = trainer_of(tiny(denoiser_every=every))
        done = [trainer.run(batches.make(step)) for step in range(4)]
        assert [step.denoiser_loss is not None for step in done] == [step % every == 0 for step in range(4)]
        flows.append(trainer.flow)
    one, other = (flow.state_dict() for flow in flows)
    differing = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"denoiser"}


def test_large_gradients_are_skipped_after_a_hundred_steps(tiny) -> None:
    trainer, batches = trainer_of(tiny(grad_clip=0.01, grad_skip=1.0))
    trainer.step, trainer.updates = 99, 99
    assert not trainer.run(batches.make(0)).skipped
    before = {name: tensor.clone() for name, tensor in trainer.flow.state_dict().items() if "guess" not in name}
    done = trainer.run(batches.make(1))
    assert done.skipped
    assert (trainer.step, trainer.updates) == (101, 100)
    for name, tensor in before.items():
        assert torch.equal(trainer.flow.state_dict()[name], tensor)


def test_many_skipped_steps_are_told_and_then_stop_the_run(tiny, caplog, tmp_path) -> None:
    config = tiny(grad_clip=0.01, grad_skip=1.0, steps=700)
    trainer, batches = trainer_of(config)
    trainer.step = 100
    batch = batches.make(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            assert trainer.run(batch).skipped
        assert not caplog.messages
        trainer.save(tmp_path)
        # A resumed run counts on.
        trainer, _ = trainer_of(config)
        trainer.load(latest_state(tmp_path))
        trainer.run(batch)
        (told,) = caplog.messages
        assert told.startswith(
            "step 151: 51 of the last 100 steps were skipped for gradients above train.grad_skip * train.grad_clip = "
            "0.01 (the last norm is "
        )
        assert told.endswith("; raise train.grad_skip, or set it to 0")
        for _ in range(99):
            trainer.run(batch)
        assert len(caplog.messages) == 1
        trainer.run(batch)
        assert caplog.messages[1].startswith("step 251: 100 of the last 100 steps were skipped")
    trainer._skips.in_a_row = MOST_SKIPS - 1
    with pytest.raises(TrainingError, match=r"^training: 500 steps in a row were skipped for gradients above "):
        trainer.run(batch)


# -- what a step reads ------------------------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_step(tiny) -> None:
    config = tiny(drop_label=0.5)
    codec, _ = make_parts(config)
    one, other = (Batches(config, make_dataset(config), codec) for _ in range(2))
    ahead = list(one.run(2, 5))
    for step, batch in enumerate(ahead, start=2):
        again = other.make(step)
        assert torch.equal(batch.pixels, again.pixels)
        assert torch.equal(batch.noise, again.noise)
        assert (batch.captions, batch.names) == (again.captions, again.names)
    assert len({tuple(batch.captions) for batch in ahead}) > 1
    assert not torch.equal(ahead[0].noise, ahead[1].noise)
    moved = replace(config, train=replace(config.train, seed=1))
    assert not torch.equal(Batches(moved, make_dataset(moved), codec).make(2).noise, ahead[0].noise)


def test_captions_are_dropped_at_their_rate(tiny) -> None:
    config = tiny(drop_label=0.25, batch_size=100)
    batches = trainer_of(config)[1]
    captions = [caption for step in range(4) for caption in batches.make(step).captions]
    assert captions.count("") / 400 == pytest.approx(0.25, abs=0.1)
    words = {word for caption in captions for word in caption.split()}
    assert {"moving", "three"} <= words


def telling(tiny, mode: str, **train: Any) -> RunConfig:
    """A run whose captions may begin with the word of a mode, and are never dropped."""
    words = [*RunConfig.load("tiny").text["vocabulary"], mode]
    text = {"kind": "words", "size": 4, "vocabulary": words}
    return tiny(flow={"txt_dim": 16, "txt_size": 4}, text=text, drop_label=0.0, **train)


def test_a_dropped_first_frame_is_told(tiny) -> None:
    trainer, batches = trainer_of(telling(tiny, "extend", drop_image=0.5))
    seen = set()
    for step in range(8):
        batch = batches.make(step)
        x, y = noisy(trainer, batch)
        whole = trainer.codec.encode(batch.pixels) + 0.1 * batch.noise
        assert torch.equal(x, whole[:, 1:] if batch.extend else whole)
        assert all(caption.startswith("(extend) ") == batch.extend for caption in batch.captions)
        assert bool((y[:, 0, -1] == 1).all()) == batch.extend
        seen.add(batch.extend)
    assert seen == {True, False}


def test_a_last_frame_stands_before_its_clip(tiny) -> None:
    config = telling(tiny, "last", last_frame_prob=0.5)
    trainer, batches = trainer_of(config)
    seen = set()
    for step in range(8):
        batch = batches.make(step)
        x, y = noisy(trainer, batch)
        last = batch.reference is not None
        shown = torch.cat([batch.pixels[:, -1:], batch.pixels], 1) if last else batch.pixels
        assert torch.equal(x, trainer.codec.encode(shown) + 0.1 * batch.noise)
        assert all(caption.startswith("(last) ") == last for caption in batch.captions)
        assert bool((y[:, 0, -1] == 1).all()) == last
        seen.add(last)
    assert seen == {True, False}
    assert math.isfinite(trainer.run(batches.make(0)).loss)
    # What else a seed chooses does not depend on it.
    plain = trainer_of(replace(config, train=replace(config.train, last_frame_prob=0.0)))[1]
    assert all(torch.equal(plain.make(step).pixels, batches.make(step).pixels) for step in range(4))


def test_image_steps_show_single_frames(tiny) -> None:
    trainer, batches = trainer_of(tiny(image_prob=1.0, drop_image=1.0, drop_label=0.0))
    batch = batches.make(0)
    assert not batch.extend
    assert batch.pixels.shape == (4, 1, 16, 16)
    assert batch.noise.shape == (4, 16, 4, 4)
    assert math.isfinite(trainer.run(batch).loss)
    larger = trainer_of(tiny(image_prob=1.0, image_batch_size=6))[1].make(0)
    assert (len(larger.pixels), len(larger.captions), len(larger.noise)) == (6, 6, 6)


def test_image_steps_take_a_set_of_their_own(tiny, tmp_path: Path, caplog) -> None:
    (tmp_path / "images").mkdir()
    for index, caption in enumerate(("a three", "a seven")):
        Image.new("L", (20, 40), 255 * index).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(caption)
    data = {"images": str(tmp_path / "images"), "image_height": 16, "image_width": 8}
    config = tiny(data=data, image_prob=0.5, drop_label=0.0, steps=3)
    codec, _ = make_parts(config)
    batches = Batches(config, make_dataset(config), codec, make_images(config))
    kinds = set()
    for step in range(8):
        batch = batches.make(step)
        kinds.add(batch.pixels.dim())
        if batch.pixels.dim() == 4:
            assert batch.pixels.shape == (4, 1, 16, 8)
            assert batch.noise.shape == (4, 16, 4, 2)
            whites = [float(picture.mean()) for picture in batch.pixels]
            assert [{"a three": -1.0, "a seven": 1.0}[caption] for caption in batch.captions] == whites
    assert kinds == {4, 5}
    train(config, tmp_path / "run", quiet=True)
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    train(replace(config, train=replace(config.train, steps=4)), tmp_path / "run", quiet=True)
    assert "data changed since step-00000003: 2 files were, 3 files are" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.images is .*, expected train\.image_prob > 0 with it"):
        train(tiny(data=data), tmp_path / "none", quiet=True)
    with pytest.raises(ConfigError, match=r"data\.image_height is 16, expected data\.images together with it"):
        tiny(data={"image_height": 16})


def test_images_of_their_own_need_no_vectors_and_are_read_for_words(tiny, tmp_path: Path) -> None:
    for name in ("clips", "images"):
        (tmp_path / name).mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("harbour")
    write_video(tmp_path / "clips" / "a.mp4", torch.zeros(6, 16, 16, 3, dtype=torch.uint8), 8.0)
    (tmp_path / "clips" / "a.txt").write_text("waves")
    (tmp_path / "clips" / "a.jsonl").write_text('{"action": 0}\n' * 6)
    data = {"kind": "folder", "path": str(tmp_path / "clips"), "images": str(tmp_path / "images")}
    data["actions"] = ("up",)
    config = tiny(flow={"frame_dim": 1}, data=data, image_prob=1.0, text={"kind": "words", "vocabulary": None})
    images, dataset = make_images(config), make_dataset(config)
    filled = with_vocabulary(config, dataset, images)
    assert {"harbour", "waves"} <= set(filled.text["vocabulary"])
    codec, _ = make_parts(filled)
    batch = Batches(filled, dataset, codec, images).make(0)
    assert batch.frame_conditions is not None
    assert batch.frame_conditions.isnan().all()


@pytest.mark.parametrize("which", ["any", "first"])
def test_image_steps_take_any_frame_or_the_first(tiny, which: str) -> None:
    batches = trainer_of(tiny(image_prob=1.0, image_frame=which))[1]
    clips = trainer_of(tiny())[1]
    chosen = set()
    for step in range(8):
        whole, frame = clips.make(step).pixels, batches.make(step).pixels
        chosen |= {t for t in range(whole.shape[1]) if torch.equal(whole[:, t], frame)}
    assert chosen == ({0} if which == "first" else {0, 1, 2, 3})


def test_class_labels_are_integers_with_none_negative(tiny) -> None:
    flow = replace(tiny().flow, txt_size=0, txt_dim=0, cond_top_only=False, conditional_denoiser=False, num_classes=3)
    features = Features(flow, ClassEncoder(3, names=["cat", "dog", "fish"]))
    assert features(["dog", "", "cat"]).tolist() == [1, -1, 0]


# -- interruptions ----------------------------------------------------------------------------------------------------


def uninterrupted(config: RunConfig, folder: Path) -> tuple[Flow, list[tuple[int, float, float]]]:
    seen: list[tuple[int, float, float]] = []
    flow = train(config, folder, quiet=True, on_step=lambda done: seen.append((done.step, done.loss, done.grad_norm)))
    return flow, seen


def test_a_run_that_died_resumes_to_the_same_bits(tiny, tmp_path: Path) -> None:
    config = tiny(steps=6, checkpoint_every=3, accumulate=2, drop_label=0.5)
    whole, seen = uninterrupted(config, tmp_path / "whole")
    again = []

    def die(done) -> None:
        if done.step == 5:
            raise RuntimeError("dead")

    with pytest.raises(RuntimeError, match="dead"):
        train(config, tmp_path / "cut", quiet=True, on_step=die)
    flow = train(
        config, tmp_path / "cut", quiet=True, on_step=lambda done: again.append((done.step, done.loss, done.grad_norm))
    )
    assert again == seen[3:]
    same(whole, flow)
    same(whole, load_model(tmp_path / "cut").flow)
    same(whole, train(config, tmp_path / "cut", quiet=True, on_step=lambda done: pytest.fail("was complete")))
    with pytest.raises(TrainingError, match=r"train\.steps is 4, expected at least 6: .*cut was trained so far"):
        train(tiny(steps=4, checkpoint_every=3, accumulate=2, drop_label=0.5), tmp_path / "cut", quiet=True)


def test_a_killed_process_resumes_to_the_same_bits(tiny, tmp_path: Path) -> None:
    config = tiny(steps=6, checkpoint_every=3)
    whole, _ = uninterrupted(config, tmp_path / "whole")
    # Killed inside the write of the second checkpoint, before it gets its name.
    program = f"""
import os, signal, torch
from pathlib import Path
from starflow.config import RunConfig
from starflow.distributed import World
from starflow.training import train
torch.set_num_threads(1)
save = World.save
def killed(world, tensors, folder):
    names = save(world, tensors, folder)
    if "step-00000006" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return names
World.save = killed
train(RunConfig.load({str(tmp_path / "whole" / "config.yaml")!r}), Path({str(tmp_path / "cut")!r}), quiet=True)
"""
    code = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ).returncode
    assert code == -signal.SIGKILL
    assert latest_state(tmp_path / "cut").name == "step-00000003"
    same(whole, train(config, tmp_path / "cut", quiet=True))


def test_ctrl_c_saves_and_a_second_run_continues(tiny, tmp_path: Path) -> None:
    config = tiny(steps=5)
    whole, seen = uninterrupted(config, tmp_path / "whole")

    def press(done) -> None:
        if done.step == 2:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", quiet=True, on_step=press)
    assert signal.getsignal(signal.SIGINT) is handler
    assert latest_state(tmp_path / "cut").name == "step-00000002"
    again: list[tuple[int, float, float]] = []
    flow = train(
        config, tmp_path / "cut", quiet=True, on_step=lambda done: again.append((done.step, done.loss, done.grad_norm))
    )
    assert again == seen[2:]
    same(whole, flow)


def test_a_codec_or_text_of_another_run_is_refused_however_it_is_written(tiny, tmp_path: Path, caplog) -> None:
    config = tiny(steps=1)
    train(config, tmp_path, quiet=True)
    other = replace(config, codec={**config.codec, "equalize": True})
    with pytest.raises(TrainingError, match=re.escape("another model: codec.equalize was False, is True")):
        train(other, tmp_path, quiet=True)
    other = replace(config, text={**config.text, "stop_words": ["moving"]})
    with pytest.raises(TrainingError, match=r"another model: text\.stop_words was .*, is \['moving'\]"):
        train(other, tmp_path, quiet=True)
    with caplog.at_level(logging.WARNING):
        train(replace(config, codec={**config.codec, "equalize": False}), tmp_path, quiet=True)
    assert "options changed" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, 'sample.prompts: WordEncoder: "zebra" in "a zebra" is not a known word'),
        ({"text": {}, "flow": _NO_TEXT}, "sample.prompts is ('a zebra',), expected none: the model is trained"),
    ],
)
def test_prompts_of_samples_are_checked_before_training(tiny, tmp_path: Path, change: dict, message: str) -> None:
    config = tiny(sample_every=1, **change)
    config = replace(config, sample=replace(config.sample, prompts=("a zebra",)))
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_subfolders_of_splits_leave_out_is_told(tiny, tmp_path: Path, caplog) -> None:
    folder = _videos(tmp_path / "clips", "b.mp4")
    _videos(folder / "train", "a.mp4")
    config = tiny(data={"kind": "folder", "path": str(folder)})
    assert len(make_dataset(config)) == 1
    assert caplog.messages == [f"skipped: {folder}: clips are those of {folder / 'train'}, so not b.mp4"]
    caplog.clear()
    assert len(make_dataset(config, "test")) == 2
    assert caplog.messages == [
        f"{folder} has no subfolder test: its clips are held out only where no training shows them"
    ]


def test_a_folder_of_another_run_is_refused(tiny, tmp_path: Path, caplog) -> None:
    train(tiny(steps=1), tmp_path, quiet=True)
    with pytest.raises(TrainingError, match="holds a run up to step-00000001, expected an empty folder"):
        train(tiny(steps=1), tmp_path, quiet=True, resume=False)
    with pytest.raises(TrainingError, match=re.escape("belongs to another model: flow.soft_clip was 4.0, is 3.0")):
        train(tiny(steps=1, flow={"soft_clip": 3.0}), tmp_path, quiet=True)
    with caplog.at_level(logging.WARNING):
        train(tiny(steps=2), tmp_path, quiet=True)
    assert "options changed since step-00000001: train.steps was 1, is 2" in caplog.text
    assert "nothing is trained" not in caplog.text
    train(tiny(steps=2, parallel="fsdp"), tmp_path, quiet=True)
    assert f"{tmp_path} has its 2 steps already, so that nothing is trained" in caplog.messages
    assert "train.parallel is 'fsdp' and this is one process, which holds all weights (see torchrun)" in caplog.messages


def test_without_tensorboard_a_run_has_no_log_and_says_so(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train(tiny(steps=1), tmp_path, quiet=True)
    said = "no log is written: a training log needs the package tensorboard: pip install 'starflow-ext[train]'"
    assert said in caplog.messages
    assert not (tmp_path / "log").exists()


def test_weights_and_biases_go_on_in_their_own_run(tiny, tmp_path: Path, monkeypatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            logged.append((step, scalars))

        def finish(self) -> None:
            begun[-1]["finished"] = True

    def init(**how: Any) -> Run:
        begun.append(how)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for steps in (1, 2):
        train(tiny(steps=steps, log="wandb"), tmp_path / "mine", quiet=True)
    assert [step for step, _ in logged] == [1, 2]
    assert {"loss/bits_per_dim", "gradient/flow", "lr"} <= set(logged[0][1])
    first, second = begun
    assert (first["name"], first["resume"], first["finished"]) == ("mine", "allow", True)
    assert first["id"] == second["id"]
    assert first["config"]["train"]["steps"] == 1
    assert not list((tmp_path / "mine" / "log").glob("events*"))


def test_a_log_can_be_left_out_and_one_that_is_missing_is_told(tiny, tmp_path: Path, monkeypatch) -> None:
    train(tiny(steps=1, log="none"), tmp_path / "none", quiet=True)
    assert not (tmp_path / "none" / "log").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImportError, match=r"train\.log 'wandb' needs the package wandb: pip install 'starflow-ext\[wandb"
    ):
        train(tiny(steps=1, log="wandb"), tmp_path / "wandb", quiet=True)


def test_a_run_without_average_keeps_one_copy_and_can_begin_one(tiny, tmp_path: Path) -> None:
    config = tiny(steps=2, ema=0.0)
    trainer, _ = trainer_of(config)
    assert trainer.average.flow is trainer.flow
    flow = train(config, tmp_path, quiet=True)
    assert not any(p.requires_grad for p in flow.parameters())
    assert not flow.training
    same(flow, load_model(tmp_path).flow)
    state = {tensor.partition(":")[0] for tensor in _names(tmp_path)}
    assert state == {"flow", "optimizer", "denoiser_optimizer"}
    begun, _ = trainer_of(tiny(steps=2, ema=0.5))
    begun.load(latest_state(tmp_path))
    same(begun.average.flow, flow)
    # And one that had an average goes on without.
    train(tiny(steps=3, ema=0.5), tmp_path, quiet=True)
    assert "average" in {tensor.partition(":")[0] for tensor in _names(tmp_path)}
    train(tiny(steps=4, ema=0.0), tmp_path, quiet=True)
    assert latest_state(tmp_path).name == "step-00000004"


def _names(folder: Path) -> list[str]:
    (file,) = latest_state(folder).glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_a_damaged_state_is_named(tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path, quiet=True)
    (state,) = (tmp_path / "checkpoints" / "step-00000001").glob("*.safetensors")
    whole = state.read_bytes()
    state.write_bytes(whole[:-10])
    message = f"step-00000001 is damaged: {state.name} missing or without the checksum of state.json"
    with pytest.raises(CheckpointError, match=message):
        train(tiny(steps=2), tmp_path, quiet=True)
    state.write_bytes(whole)
    (state.parent / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json is damaged, expected json of a training state"):
        train(tiny(steps=2), tmp_path, quiet=True)


def test_a_folder_holds_one_run_at_a_time(tiny, tmp_path: Path) -> None:
    def second(done: object) -> None:
        # A second run, with another seed, while the first one is on its way.
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(InUseError, match="is in use by another run, expected one that no running process writes"):
            train(tiny(steps=1, seed=9), tmp_path, quiet=True)
        assert (tmp_path / "config.yaml").read_text() == before

    train(tiny(steps=1), tmp_path, quiet=True, on_step=second)
    train(tiny(steps=2), tmp_path, quiet=True)
    assert latest_state(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_that_holds_a_model_alone_is_refused(tiny, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a model")
    message = "holds a model and no checkpoint of its run, expected an empty folder"
    for resume in (True, False):
        with pytest.raises(TrainingError, match=message):
            train(tiny(steps=1), tmp_path, quiet=True, resume=resume)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "a model")]


def test_files_that_changed_before_a_resume_are_told(tiny, tmp_path: Path, caplog) -> None:
    videos = _videos(tmp_path / "videos", "a.mp4", "b.mp4")
    config = tiny(data={"kind": "folder", "path": str(videos), "name_captions": True}, text={}, flow=_NO_TEXT)

    def resumed(steps: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "starflow"):
            train(replace(config, train=replace(config.train, steps=steps)), tmp_path / "run", quiet=True)
        return [record.getMessage() for record in caplog.records if "data changed" in record.getMessage()]

    assert resumed(1) == []
    assert resumed(2) == []
    write_video(videos / "c.mp4", torch.zeros(6, 16, 16, 1, dtype=torch.uint8), 8.0)
    assert resumed(3) == ["data changed since step-00000002: 2 files were, 3 files are; the run goes on with these"]
    assert resumed(4) == []
    # As many files, one of them another.
    write_video(videos / "c.mp4", torch.ones(7, 16, 16, 1, dtype=torch.uint8), 8.0)
    assert len(resumed(5)) == 1


def test_another_text_encoder_in_the_same_folder_is_told(tiny, tmp_path: Path, caplog) -> None:
    encoder, run = make_t5(tmp_path / "t5"), tmp_path / "run"
    config = tiny(flow={"txt_size": 8, "txt_dim": 16}, text={"kind": "t5", "folder": str(encoder), "size": 8})

    def told(steps: int, folder: Path = run, **options: Any) -> list[str]:
        caplog.clear()
        train(replace(config, train=replace(config.train, steps=steps, **options)), folder, quiet=True)
        return [message for message in caplog.messages if "the weights of" in message]

    assert told(1) == []
    assert told(2) == []
    others = f"the weights of the text encoder in {encoder} are others than those that the model was trained with"
    make_t5(encoder, seed=1)
    assert told(3) == [f"checkpoint {run}/checkpoints/step-00000002: {others}"]
    # The run went on with them, and so is its model.
    assert told(4) == []
    load_model(run)
    assert others not in caplog.text
    make_t5(encoder, seed=2)
    load_model(run)
    assert f"checkpoint {run}: {others}" in caplog.messages
    assert told(1, tmp_path / "next", init=str(run)) == [f"train.init {run}: {others}"]
    options = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**options, "layer_norm_epsilon": 0.1}))
    with pytest.raises(
        CheckpointError, match=r"step-00000004: config\.json of the text encoder in its folder is another"
    ):
        told(5)


def test_splits_and_pairs_are_tar_files_too(tiny, tmp_path: Path, caplog) -> None:
    for name in ("train", "test"):
        _videos(tmp_path / name, f"{name}.mp4")
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("train", "test"):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / name, ".")
    config = tiny(data={"kind": "folder", "path": str(folder)})
    sets = [make_dataset(config, split) for split in ("train", "test")]
    assert [found.names for found in sets if isinstance(found, VideoFolder)] == [("train.mp4",), ("test.mp4",)]
    assert not [message for message in caplog.messages if "skipped" in message or "held out" in message]
    paired = tiny(data={"kind": "folder", "path": str(tmp_path / "pairs")}, source_prob=0.5)
    (tmp_path / "pairs").mkdir()
    for name in ("source", "target"):
        (tmp_path / "pairs" / f"{name}.tar").hardlink_to(folder / "train.tar")
    assert make_dataset(paired).item(0).source is not None
    # One file with both has no splits.
    with tarfile.open(tmp_path / "both.tar", "w") as archive:
        for name in ("train", "test"):
            archive.add(tmp_path / name, name)
    both = tiny(data={"kind": "folder", "path": str(tmp_path / "both.tar")})
    caplog.clear()
    tell_data(both, make_dataset(both))
    assert [message for message in caplog.messages if "held out" in message] == [
        f"{tmp_path / 'both.tar'} has a folder test: its clips are trained on, too, so they are not held out (a folder "
        "with train.tar and test.tar keeps them apart)"
    ]


@dataclass
class _OneItem:
    """A data set that always gives the same."""

    what: Any

    def __len__(self) -> int:
        return 1

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Any:
        return self.what


def test_a_run_does_not_go_on_with_another_optimiser(tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(
        TrainingError, match=r"step-0+1 holds what another optimiser keeps: train.optimizer was 'adamw', is 'muon', exp"
    ):
        train(tiny(steps=2, optimizer="muon"), tmp_path / "run", quiet=True)


def test_a_run_stays_in_its_folder_whatever_the_working_directory_becomes(tiny, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(tiny(steps=2), "run", quiet=True, on_step=lambda _: os.chdir(tmp_path / "there"))
    assert (tmp_path / "here" / "run" / "model.safetensors").is_file()
    assert not any((tmp_path / "there").iterdir())


class _OneBuffer:
    """A data set that reads every item into the same memory, as loaders of arrays do."""

    def __init__(self) -> None:
        self._pixels, self._source = torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16, 16)
        self._told = torch.zeros(4, 2)

    def __len__(self) -> int:
        return 50

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        for tensor in (self._pixels, self._source, self._told):
            tensor.numpy().fill(index / 50)
        return Clip(self._pixels, "a three", str(index), self._source, self._told)


def test_a_data_set_may_read_every_item_into_the_same_memory(tiny) -> None:
    config = tiny()
    config = replace(
        config,
        flow=replace(config.flow, frame_dim=2),
        train=replace(config.train, drop_frame_condition=0.0, drop_image=0.0, source_prob=1.0),
    )
    codec, _ = make_parts(config)
    batch = Batches(config, _OneBuffer(), codec).make(0)
    expected = torch.tensor([int(name) / 50 for name in batch.names])
    assert len(set(expected.tolist())) > 1
    assert torch.equal(batch.pixels[:, 0, 0, 0, 0], expected)
    assert batch.reference is not None
    assert torch.equal(batch.reference[:, 0, 0, 0, 0], expected)
    assert batch.frame_conditions is not None
    assert torch.equal(batch.frame_conditions[:, -1, 0], expected)
    pixels, _ = sample_batch(_OneBuffer(), 0, 0, 4)
    drawn = [index / 50 for index, _ in sample_indices(0, 0, 4, 50)]
    assert torch.equal(pixels[:, 0, 0, 0, 0], torch.tensor(drawn))


def test_captions_of_several_lines_are_told(tiny, tmp_path: Path, caplog) -> None:
    """A file with a caption a line is one caption, of all lines together."""
    for name, caption in (("a", "a three\nmoving up\n"), ("b", "a four\n")):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(8, 16, 16, 1, dtype=torch.uint8), 8)
        (tmp_path / f"{name}.txt").write_text(caption)
    config = tiny(data={"kind": "folder", "path": str(tmp_path)})
    tell_data(config, make_dataset(config))
    (line,) = [line for line in caplog.messages if "several lines" in line]
    assert line == (
        f"captions of 1 of the 2 files in {tmp_path} have several lines (such as that of a.mp4), and each is one "
        'caption; several of a video stand in NAME.json, {"captions": [...]}'
    )


class _Redrawn(_OneBuffer):
    """Items are drawn anew at each call, into one buffer."""

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        clip = super().item(index)
        self._pixels.uniform_(-1, 1)
        return clip


def test_items_that_are_drawn_anew_are_told_though_they_share_memory(tiny, caplog) -> None:
    """The first one was compared with itself."""
    check_own(tiny(), _Redrawn())
    assert "clip 0 of the data set is another one the second time" in caplog.text
    caplog.clear()
    check_own(tiny(), _OneBuffer())
    assert "another one" not in caplog.text


def test_samples_of_pairs_begin_with_their_own_sources(tiny, tmp_path: Path, monkeypatch) -> None:
    """A data set that reads into one buffer showed the last source four times."""
    sheets: list[list[np.ndarray]] = []
    monkeypatch.setattr(trainer, "write_contact_sheet", lambda path, clips, titles: sheets.append(clips))
    words = [*RunConfig.load("tiny").text["vocabulary"], "v2v"]
    config = tiny(
        flow={"txt_dim": 16, "txt_size": 4},
        text={"kind": "words", "size": 4, "vocabulary": words},
        steps=1,
        sample_every=1,
        source_prob=1.0,
        drop_image=0.0,
    )
    train(config, tmp_path, quiet=True, dataset=_OneBuffer())
    ((first, *rest),) = sheets
    values = [float(to_frames(torch.full((1, 1, 1, 1), index / 50)).flatten()[0]) for index in range(4)]
    assert [float(clip[0].flatten()[0]) for clip in (first, *rest)] == values


def test_clips_of_a_batch_are_of_one_shape_and_dtype() -> None:
    clips = [Clip(torch.zeros(1, 1, 4, 4), "", "a"), Clip(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "", "b")]
    with pytest.raises(ValueError, match=r"^read_batch: b has dtype torch.uint8, expected torch.float32 like a$"):
        read_batch(clips, 2)
    with pytest.raises(ValueError, match=r"^read_batch: c has shape \[1, 1, 4, 8\], expected \[1, 1, 4, 4\] like a$"):
        read_batch([clips[0], Clip(torch.zeros(1, 1, 4, 8), "", "c")], 2)
    with pytest.raises(ValueError, match="clips is empty"):
        read_batch([], 0)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([1, 2], r"the data set is \[1, 2\], expected one with the methods of starflow.data.ClipDataset"),
        (_OneItem((torch.zeros(4, 1, 16, 16), "a three")), r"item 0 of the data set is \(tensor.*, expected a star"),
        (_OneItem(Clip(torch.zeros(4, 1, 16, 16), None, "a")), "item 0 .*, expected a starflow.data.Clip whose"),  # type: ignore[arg-type]
        (
            _OneItem(Clip(torch.zeros(4, 1, 16, 16), "", "a", source=Path("a.mp4"))),  # type: ignore[arg-type]
            "item 0 of the data set, a, has the source PosixPath.*, expected a tensor or None",
        ),
    ],
)
def test_what_is_no_data_set_of_clips_is_refused(tiny, tmp_path: Path, dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^training: {message}"):
        train(tiny(), str(tmp_path / "run"), quiet=True, dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_a_rate_that_no_file_has_is_told(tiny, tmp_path: Path, caplog) -> None:
    data = {"kind": "folder", "path": str(_videos(tmp_path / "clips", "a.mp4")), "fps": 8.0}
    config = tiny(data={**data, "mix_fps": (8.0, 24.0, 30.0)})
    tell_data(config, make_dataset(config))
    told = f"no clip has 24, 30 of data.mix_fps frames a second: no file in {tmp_path / 'clips'} is that fast and"
    assert f"{told} long enough" in caplog.messages


def test_a_run_removes_what_a_killed_one_left(tiny, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    left = [
        tmp_path / ".model.0a1b2c3d.partial.safetensors",
        tmp_path / ".config.01234567-1-0a1b2c3d.partial.yaml",
        tmp_path / "samples" / ".step-00000001.01234567-1-0a1b2c3d.partial.png",
    ]
    for path in left:
        path.write_text("half")
    train(tiny(steps=1), tmp_path, quiet=True)
    assert not any(path.exists() for path in left)


def test_a_state_of_an_earlier_version_with_odd_counters_is_refused(tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path, quiet=True)
    file = latest_state(tmp_path) / "state.json"
    inner = json.loads(file.read_text())["state"]
    del inner["data"]
    file.write_text(json.dumps(inner))
    train(tiny(steps=1), tmp_path, quiet=True)
    for change in ({"step": "1"}, {"step": -1}, {"bad": True}, {"config": []}, {"config": {"flow": 3}}, {"data": 3}):
        file.write_text(json.dumps({**inner, **change}))
        with pytest.raises(CheckpointError, match="is damaged, expected counters and a configuration in it"):
            train(tiny(steps=2), tmp_path, quiet=True)


def test_samples_while_training_change_nothing(tiny, tmp_path: Path) -> None:
    config = tiny(steps=2)
    whole, _ = uninterrupted(config, tmp_path / "whole")
    flow = train(replace(config, train=replace(config.train, sample_every=1)), tmp_path / "shown", quiet=True)
    same(whole, flow)
    assert sorted(p.name for p in (tmp_path / "shown" / "samples").iterdir()) == [
        "step-00000001.png",
        "step-00000002.png",
    ]
    assert list((tmp_path / "shown" / "log").iterdir())


def test_a_folder_of_videos_trains(tiny, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, files in (("train", 2), ("test", 1)):
        (tmp_path / "videos" / split).mkdir(parents=True)
        for index in range(files):
            frames = torch.randint(0, 256, (6, 24, 32, 3), generator=generator, dtype=torch.uint8)
            write_video(tmp_path / "videos" / split / f"{index}.mp4", frames, 8.0)
            (tmp_path / "videos" / split / f"{index}.txt").write_text("a three moving up")
    config = tiny(data={"kind": "folder", "path": str(tmp_path / "videos")}, steps=2)
    assert [len(make_dataset(config, split)) for split in ("train", "test")] == [2, 1]
    assert make_dataset(config).item(0).pixels.shape == (4, 1, 16, 16)
    losses: list[float] = []
    train(config, tmp_path / "run", quiet=True, on_step=lambda done: losses.append(done.loss))
    assert all(math.isfinite(loss) for loss in losses)


def test_shards_and_mixed_rates_resume_to_the_same_bits(tiny, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shard = tmp_path / "clips.tar"
    with tarfile.open(shard, "w") as archive:
        for number in range(5):
            frames = torch.randint(0, 256, (12, 16, 16, 1), generator=generator, dtype=torch.uint8)
            write_video(tmp_path / f"{number}.mp4", frames, 16.0)
            (tmp_path / f"{number}.txt").write_text(("a three moving up", "a five")[number % 2])
            for suffix in ("mp4", "txt"):
                archive.add(tmp_path / f"{number}.{suffix}", f"{number}.{suffix}")
    rates = (6.0, 8.0, 16.0)
    data = {"kind": "folder", "path": str(shard), "fps": 8.0, "mix_fps": rates, "caption_fps": True}
    config = tiny(data=data, text={"kind": "words", "vocabulary": None}, steps=6, checkpoint_every=3, drop_label=0.3)
    told: list[str] = []

    def read(run: str, steps: int) -> tuple[Flow, list[tuple[int, float, float]]]:
        part = replace(config, train=replace(config.train, steps=steps, min_lr=config.train.lr, warmup_steps=1))
        return uninterrupted(part, tmp_path / run)

    whole, seen = read("whole", 6)
    _, first = read("cut", 3)
    again, rest = read("cut", 6)
    assert first + rest == seen
    same(whole, again)
    # The same files in a folder are the same clips.
    (tmp_path / "folder").mkdir()
    for path in [*tmp_path.glob("*.mp4"), *tmp_path.glob("*.txt")]:
        path.rename(tmp_path / "folder" / path.name)
    config = replace(config, data=replace(config.data, path=str(tmp_path / "folder")))
    same(whole, read("plain", 6)[0])
    # Captions tell the drawn rate, and prompts that of samples.
    filled = load_model(tmp_path / "whole").config
    assert {"6", "8", "16"} <= set(filled.text["vocabulary"])
    batches = Batches(filled, make_dataset(filled), make_parts(filled)[0])
    for step in range(4):
        told += batches.make(step).captions
    assert {caption.split("\n")[0] for caption in told} == {f"A video with {rate:g} fps:" for rate in rates}
    pipeline = Pipeline(whole, filled, *make_parts(filled))
    assert pipeline.caption("a five").startswith("A video with 8 fps:")
    assert pipeline.caption("a five", fps=16).startswith("A video with 16 fps:")
    # Held-out clips have one rate.
    assert make_dataset(filled, "test").item(0).fps is None
    with pytest.raises(ConfigError, match=r"data.mix_fps is .*, expected an empty list with flow.frame_dim"):
        replace(filled, flow=replace(filled.flow, frame_dim=2))


def _videos(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        write_video(folder / name, torch.zeros(6, 16, 16, 1, dtype=torch.uint8), 8.0)
    return folder


def _open_vocabulary(tiny, path: Path, **train: object) -> RunConfig:
    data = {"kind": "folder", "path": str(path), "name_captions": True}
    return tiny(data=data, text={"kind": "words", "vocabulary": None}, **train)


def test_the_vocabulary_can_be_that_of_the_captions(tiny, tmp_path: Path) -> None:
    videos = _videos(tmp_path / "videos", "two_cats.mp4", "the-sea.mp4", "b.mp4")
    (videos / "b.json").write_text('{"captions": ["waves at sea", "Cats!"]}')
    config = _open_vocabulary(tiny, videos)
    filled = with_vocabulary(config, make_dataset(config))
    assert filled.text == {"kind": "words", "vocabulary": ["at", "cats", "sea", "two", "waves"], "size": 3}
    assert (filled.flow.txt_size, filled.flow.txt_dim) == (3, 5)
    assert with_vocabulary(filled, make_dataset(filled)) is filled
    named = replace(config, text={"kind": "classes", "names": None})
    named = with_vocabulary(named, make_dataset(named))
    assert named.text == {
        "kind": "classes",
        "names": ["Cats!", "the sea", "two cats", "waves at sea"],
        "num_classes": 4,
    }
    assert (named.flow.txt_size, named.flow.txt_dim) == (1, 4)
    assert make_parts(named)[1].encode(["the sea"]).tolist() == [[[0.0, 1.0, 0.0, 0.0]]]
    extended = _open_vocabulary(tiny, videos, drop_image=0.5)
    assert "extend" in with_vocabulary(extended, make_dataset(extended)).text["vocabulary"]


def test_a_run_keeps_the_vocabulary_it_found(tiny, tmp_path: Path) -> None:
    config = _open_vocabulary(tiny, _videos(tmp_path / "videos", "cats.mp4", "sea.mp4"), steps=2)
    train(config, tmp_path / "run", quiet=True)
    loaded = load_model(tmp_path / "run")
    assert loaded.config.text["vocabulary"] == ["cats", "sea"]
    assert loaded.text.encode(["sea"]).tolist() == [[[0.0, 1.0]]]
    assert RunConfig.load(tmp_path / "run" / "config.yaml").text["vocabulary"] == ["cats", "sea"]
    # The same command goes on.
    train(replace(config, train=replace(config.train, steps=3)), tmp_path / "run", quiet=True)
    assert latest_state(tmp_path / "run").name == "step-00000003"


def test_a_vocabulary_that_cannot_be_found_is_an_error(tiny, tmp_path: Path) -> None:
    digits = tiny(text={"kind": "words", "vocabulary": None})
    with pytest.raises(ConfigError, match=r"text\.vocabulary is None, expected a list \(only a folder"):
        train(digits, tmp_path / "run", quiet=True)
    silent = _open_vocabulary(tiny, _videos(tmp_path / "videos", "cats.mp4"))
    silent = replace(silent, data=replace(silent.data, name_captions=False))
    with pytest.raises(ConfigError, match=r"text\.vocabulary is None, expected captions that are not empty in"):
        train(silent, tmp_path / "run", quiet=True)


def test_clips_of_a_file_can_be_cut_evenly_in_training(tiny, tmp_path: Path) -> None:
    data = {"kind": "folder", "path": str(_videos(tmp_path / "videos", "a.mp4")), "clips_per_file": 3, "cut": "even"}
    dataset = make_dataset(tiny(data=data))
    names = [[dataset.item(index, epoch=epoch).name for index in range(len(dataset))] for epoch in range(3)]
    assert names == [["a.mp4@0", "a.mp4@1", "a.mp4@2"]] * 3


def test_clips_of_one_shape_make_a_step_and_captions_tell_it(tiny, tmp_path: Path) -> None:
    for name, height, width in (("a", 18, 32), ("b", 36, 64), ("c", 32, 32), ("d", 48, 27), ("e", 27, 48)):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(6, height, width, 1, dtype=torch.uint8), 8.0)
    data = {"kind": "folder", "path": str(tmp_path), "name_captions": True, "mix_aspect": True}
    config = tiny(data=data, text={"kind": "words", "vocabulary": None}, batch_size=2, drop_label=0.0, steps=2)
    dataset = make_dataset(config)
    # Areas of about 16 x 16 in multiples of codec and patch.
    sizes = {"16:9": (12, 20), "1:1": (16, 16), "9:16": (20, 12)}
    assert set(dataset.sizes) == set(sizes.values())
    config = with_vocabulary(config, dataset)
    assert {"16", "9", "1"} <= set(config.text["vocabulary"])
    codec, _ = make_parts(config)
    batches = Batches(config, dataset, codec)
    # An epoch: two batches of three wide clips (one comes twice), one of each other shape.
    for epoch in range(3):
        made = [batches.make(4 * epoch + step) for step in range(4)]
        seen = [name.partition(".")[0] for batch in made for name in batch.names]
        assert sorted(set(seen)) == ["a", "b", "c", "d", "e"]
        assert sorted(seen.count(name) for name in "abe") == [1, 1, 2]
        assert (seen.count("c"), seen.count("d")) == (2, 2)
        for batch in made:
            (ratio,) = {caption.split(" in a ")[1].split()[0] for caption in batch.captions}
            assert tuple(batch.pixels.shape[-2:]) == sizes[ratio]
            assert batch.noise.shape[-2:] == (batch.pixels.shape[-2] // 4, batch.pixels.shape[-1] // 4)
    flow = train(config, tmp_path / "run", quiet=True)
    pipeline = Pipeline(flow, config, *make_parts(config))
    sampled = pipeline.sample("a", size=(20, 12))
    assert sampled.captions == ("a\n in a 9:16 aspect ratio.\n",)
    with pytest.raises(ConfigError, match=r"data.mix_aspect is True, expected false for digits"):
        make_dataset(tiny(data={"mix_aspect": True}))


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(tiny, size: int) -> None:
    config = tiny(batch_size=8, drop_label=0.5, image_prob=0.5)
    codec, _ = make_parts(config)
    whole = Batches(config, make_dataset(config), codec)
    parts = [Batches(config, make_dataset(config), codec, rank=rank, size=size) for rank in range(size)]
    for step in range(3):
        batch, made = whole.make(step), [part.make(step) for part in parts]
        for name in ("pixels", "noise"):
            assert torch.equal(torch.cat([getattr(part, name) for part in made]), getattr(batch, name))
        for name in ("captions", "names"):
            assert [item for part in made for item in getattr(part, name)] == getattr(batch, name)


# -- bad input --------------------------------------------------------------------------------------------------------


@dataclass
class Poisoned:
    """Digits, one clip of which holds NaN."""

    digits: MovingDigits

    def __len__(self) -> int:
        return 8

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        clip = self.digits.item(index, epoch=epoch, seed=seed)
        if index == 5:
            clip.pixels[1, 0, 3, 3] = math.nan
        return clip


def test_a_centred_flow_takes_the_mean_of_its_data(tiny, tmp_path: Path) -> None:
    """Of 64 clips spread over the set, once: a resumed run keeps it."""
    config = tiny(flow={"centred": True}, steps=2, ema=0.9)
    flow = train(config, tmp_path, quiet=True)
    dataset, (codec, _) = make_dataset(config), make_parts(config)
    clips = torch.stack([dataset.item(number * len(dataset) // 64).pixels for number in range(64)])
    latents = codec.encode(clips).mean((0, 1))
    assert flow.centre is not None
    assert flow.denoiser is not None
    assert flow.denoiser.centre is not None
    side, size = flow.config.img_size // flow.config.patch_size, flow.config.patch_size
    mean = latents.reshape(-1, side, size, side, size).permute(1, 3, 2, 4, 0).flatten(2)
    for centre in (flow.centre, flow.denoiser.centre):
        torch.testing.assert_close(centre.mean, mean, atol=1e-5, rtol=1e-5)
    assert mean.abs().max() > 0.1
    resumed = train(replace(config, train=replace(config.train, steps=3)), tmp_path, quiet=True)
    assert torch.equal(resumed.centre.mean, flow.centre.mean)  # type: ignore[union-attr]
    pipeline = Pipeline.load(tmp_path)
    assert torch.equal(pipeline.flow.centre.mean, flow.centre.mean)  # type: ignore[union-attr]


def test_a_denoiser_begins_from_the_covariance_of_its_data(tiny, tmp_path: Path) -> None:
    """Of each place, around the mean, of the same clips; a resumed run keeps it."""
    config = tiny(flow={"centred": True, "denoiser_components": 4}, steps=2)
    flow = train(config, tmp_path, quiet=True)
    dataset, (codec, _) = make_dataset(config), make_parts(config)
    clips = torch.stack([dataset.item(number * len(dataset) // 64).pixels for number in range(64)])
    assert flow.centre is not None
    assert flow.denoiser is not None
    found = flow.denoiser.gaussian
    assert found is not None
    with torch.no_grad():
        tokens = flow.to_grid(codec.encode(clips)).double().flatten(2, 3)
    covariance = torch.einsum("bfpc,bfpd->pcd", tokens, tokens) / (64 * clips.shape[1])
    expected = Gaussian(flow.config).requires_grad_(False)
    expected.fit(covariance, config.train.noise_std, config.train.noise_std)
    torch.testing.assert_close(found.rest, expected.rest)
    grid = torch.randn(1, 2, *flow.centre.mean.shape)
    torch.testing.assert_close(found(grid), expected(grid), atol=1e-3, rtol=1e-3)
    silent = train(replace(config, train=replace(config.train, noise_std=0.0)), tmp_path / "silent", quiet=True)
    assert silent.denoiser.gaussian(grid).count_nonzero() == 0  # type: ignore[union-attr, misc]
    resumed = train(replace(config, train=replace(config.train, steps=3)), tmp_path, quiet=True)
    for kept in (resumed, Pipeline.load(tmp_path).flow):
        assert all(torch.equal(a, b) for a, b in zip(kept.denoiser.gaussian.buffers(), found.buffers(), strict=True))


@dataclass
class Clips:
    """Two clips of one colour each, of which the second is twice as wide."""

    bad: bool = False

    def __len__(self) -> int:
        return 2

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        pixels = torch.full((4, 1, 16, 16 + 16 * index), -0.5 * index)
        return Clip(pixels * (math.nan if self.bad else 1.0), "", f"clip {index}")


def test_a_mean_of_clips_of_several_sizes_is_that_of_channels(tiny) -> None:
    config = tiny(flow={"centred": True, "denoiser_components": 4})
    codec, _ = make_parts(config)
    flow = Flow(config.flow)
    mean, covariance = moments(flow, Clips(), codec, CPU)
    channels = flow.config.in_channels
    expected = codec.encode(torch.full((1, 4, 1, 16, 16), -0.25)).mean((0, 1, 3, 4)).double()
    torch.testing.assert_close(mean[0].view(-1, channels).mean(0), expected)
    # The first coefficient of each clip is the same distance from the mean, the others are 0.
    assert covariance is not None
    first = (covariance[0].abs() > 1e-5).sum()
    assert first == flow.config.patch_size**4
    deviation = codec.encode(torch.full((1, 4, 1, 16, 16), -0.25)).abs().max().double()
    torch.testing.assert_close(covariance[0, 0, 0], deviation.square(), atol=1e-5, rtol=1e-5)
    begin_from_data(flow, Clips(), codec, config.train, ALONE, new=True)
    assert flow.centre is not None
    torch.testing.assert_close(flow.centre.mean, mean.float().expand_as(flow.centre.mean))
    with pytest.raises(TrainingError, match="clip 0 holds NaN or infinity, expected finite pixels"):
        moments(flow, Clips(bad=True), codec, CPU)
    with pytest.raises(ConfigError, match=r"^training: item 0 of the data set is 'a clip', expected a starflow"):
        moments(flow, Others(), codec, CPU)  # type: ignore[arg-type]


@dataclass
class Others:
    """A data set whose items are no clips."""

    def __len__(self) -> int:
        return 1

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> str:
        return "a clip"


@dataclass
class Bright:
    """Clips far from zero that hardly differ, and how often each is read."""

    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return 100

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        self.read.append(index)
        noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(index))
        return Clip((0.9 + 1e-3 * noise).clamp_max(1.0), "", f"clip {index}")


@pytest.mark.parametrize("init", [False, True], ids=["new", "of a model"])
def test_moments_are_those_of_numpy_and_each_clip_is_read_once(tiny, init: bool) -> None:
    """Around the mean of 64 clips, or around that of a model that a run goes on from, which is kept."""
    config = tiny(flow={"centred": True, "denoiser_components": 4})
    codec, _ = make_parts(config)
    flow, dataset = Flow(config.flow), Bright()
    assert flow.centre is not None
    assert flow.denoiser is not None
    gaussian = flow.denoiser.gaussian
    assert gaussian is not None
    clips = torch.stack([dataset.item(number * 100 // 64).pixels for number in range(64)])
    tokens = flow.to_grid(codec.encode(clips)).double().flatten(2, 3).flatten(0, 1).numpy()
    mean = tokens.mean(0)
    about = mean + 0.5 if init else mean
    if init:
        flow.centre_on(
            flow.from_grid(torch.from_numpy(about).float().unflatten(0, flow.nominal_sides)[None, None])[0, 0]
        )
        kept = flow.centre.mean.clone()
    dataset.read.clear()
    begin_from_data(flow, dataset, codec, config.train, ALONE, new=not init)
    assert dataset.read == [number * 100 // 64 for number in range(64)]
    if init:
        assert torch.equal(flow.centre.mean, kept)
        about = kept.double().flatten(0, 1).numpy()
    else:
        np.testing.assert_allclose(flow.centre.mean.flatten(0, 1).numpy(), mean, rtol=1e-6, atol=1e-6)
    covariances = np.einsum("npc,npd->pcd", tokens - about, tokens - about) / len(tokens)
    expected = Gaussian(flow.config).requires_grad_(False)
    expected.fit(torch.from_numpy(covariances), config.train.noise_std, config.train.noise_std)
    torch.testing.assert_close(gaussian.rest, expected.rest, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gaussian.gains, expected.gains, rtol=1e-4, atol=1e-6)
    if not init:
        found_mean, found = moments(Flow(config.flow), dataset, codec, CPU)
        np.testing.assert_allclose(found_mean.numpy(), mean, rtol=1e-12)
        assert found is not None
        np.testing.assert_allclose(found.numpy(), covariances, rtol=1e-6, atol=1e-12)


def test_data_that_is_not_finite_is_named(tiny, tmp_path: Path) -> None:
    dataset = Poisoned(MovingDigits(frames=4, size=16))
    message = "clip digits/train/5 holds NaN or infinity, expected finite pixels"
    with pytest.raises(TrainingError, match=message):
        train(tiny(), tmp_path, quiet=True, dataset=dataset)


def test_a_loss_that_is_not_finite_is_skipped_and_then_stops_the_run(tiny, caplog) -> None:
    trainer, batches = trainer_of(tiny(steps=20))
    weight = trainer.flow.blocks[0].conditioner.proj_out.bias
    kept = weight.detach().clone()
    weight.data.fill_(math.nan)
    with caplog.at_level(logging.WARNING):
        done = trainer.run(batches.make(0))
    assert done.skipped
    assert math.isnan(done.loss)
    assert "step 1: loss or gradient is not finite, step skipped" in caplog.text
    for name, tensor in trainer.average.flow.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), name
    weight.data.copy_(kept)
    assert not trainer.run(batches.make(1)).skipped
    weight.data.fill_(math.nan)
    for step in range(2, 1 + PATIENCE):
        assert trainer.run(batches.make(step)).skipped
    with pytest.raises(TrainingError, match=f"the loss was not finite in {PATIENCE} steps in a row, up to step 7"):
        trainer.run(batches.make(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": {"in_channels": 3}}, "flow.in_channels is 3, expected the 16 latent channels of the codec"),
        ({"flow": {"txt_dim": 9}}, "flow.txt_dim is 9, expected the width 15 of the text encoder"),
        ({"flow": {"txt_size": 2}}, "flow.txt_size is 2, expected at least the 3 of the encoder"),
        ({"data": {"channels": 3}}, "data.channels is 3, expected the 1 of the codec"),
        ({"data": {"width": 18}}, "data.width is 18, expected a multiple of 4 (codec times patch)"),
        ({"text": {}}, "text is {}, expected a text encoder exactly when flow reads text or classes"),
        ({"data": {"width": 20}}, "data.width is 20, expected the height 16 for digits"),
        ({"data": {"path": "clips"}}, "data.path is 'clips', expected None with data.kind 'digits' (or kind 'folder')"),
        ({"data": {"caption_second": True}}, "data.caption_second is True, expected False with data.kind 'digits'"),
        ({"data": {"kind": "folder"}}, "data.path is None, expected a folder of videos or images"),
        ({"lr": 1e-7}, "train.min_lr is 1e-06, expected at most train.lr (1e-07), which falls to it"),
        ({"denoiser_lr": 0.0}, "train.min_lr is 1e-06, expected at most train.denoiser_lr (0)"),
    ],
)
def test_parts_that_do_not_fit_are_named(tiny, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(tiny(**change), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flow", "sample", "message"),
    [
        (_NO_TEXT, {"guidance": 2.0}, r"sample.guidance is 2.0, expected 0: the model reads neither text nor classes"),
        ({}, {"guidance": 1.0, "guidance_frames": 3}, "sample.guidance_frames is 3, expected nothing without flow.att"),
        (
            {"learnable_self_denoiser": False, "conditional_denoiser": False},
            {"denoise": "learned"},
            "sample.denoise is 'learned', expected 'score', 'auto' or 'none' without flow.learnable_self_denoiser",
        ),
        (
            {"attention_frames": 2, "text_embed": True},
            {"guidance_frames": 3},
            r"sample.guidance is 0.0, expected a number above 0 with sample.guidance_f",
        ),
    ],
)
def test_guidance_that_no_sample_could_have_is_refused_before_training(
    tiny, tmp_path: Path, flow: dict[str, object], sample: dict[str, object], message: str
) -> None:
    config = tiny(flow=flow, text={} if flow is _NO_TEXT else None)
    config = replace(config, sample=replace(config.sample, **sample))
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_is_probably_of_another_scale_is_told_once(tiny, caplog) -> None:
    config = tiny()
    codec, text = make_parts(config)
    batch = Batches(config, make_dataset(config), codec).make(0)
    told = "training: no pixel of the first batch is below 0, the middle of [-1, 1]"
    for pixels, times in ((batch.pixels / 2 + 0.5, 1), (batch.pixels, 0)):
        caplog.clear()
        trainer = Trainer(config, codec, text, CPU)
        for _ in range(2):
            trainer.run(replace(batch, pixels=pixels))
        assert sum(message.startswith(told) for message in caplog.messages) == times


class _Own:
    """A data set of the caller's own: four clips of one form."""

    def __init__(self, shape: tuple[int, ...] = (4, 1, 16, 16), length: int = 4, **parts: Tensor) -> None:
        self._shape, self._length, self._parts = shape, length, parts

    def __len__(self) -> int:
        return self._length

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        pixels = torch.rand(self._shape, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return Clip(pixels, "a three", f"own/{index}", **self._parts)


def test_a_data_set_of_the_callers_own_is_what_the_configuration_says(tiny, tmp_path: Path, caplog) -> None:
    config = tiny(steps=1)
    for shape in ((6, 1, 16, 16), (4, 1, 32, 32)):
        with pytest.raises(ConfigError, match=r"clip own/0 of the data set has shape .*, expected \[4, 1, 16, 16\]"):
            train(config, tmp_path / "other", quiet=True, dataset=_Own(shape))
    with pytest.raises(ConfigError, match="training: the data set is empty, expected at least one clip"):
        train(config, tmp_path / "empty", quiet=True, dataset=_Own(length=0))
    assert not any(tmp_path.iterdir())
    given = {"source": torch.zeros(4, 1, 16, 16), "frame_conditions": torch.zeros(4, 3)}
    train(tiny(_NO_TEXT, text={}, steps=1), tmp_path / "run", quiet=True, dataset=_Own(**given))
    assert [message for message in caplog.messages if message.startswith("skipped")] == [
        f"skipped: the {what} of the data set (clip own/0 has such), the model reads none"
        for what in ("captions", "sources", "vectors of frames")
    ]


def test_captions_and_rates_that_do_not_fit_are_told(tiny, tmp_path: Path, caplog) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(8, 16, 16, 1, dtype=torch.uint8), 24)

    def told(config: RunConfig) -> list[str]:
        caplog.clear()
        tell_data(config, make_dataset(config))
        return caplog.messages

    folder = {"kind": "folder", "path": str(tmp_path)}
    speed = "clips have 24 frames a second and samples are written at 8 (sample.fps): they play at another speed"
    text = "of the 2 files in {} have no caption (such as {}): of these the model learns nothing about text"
    assert told(tiny(data=folder)) == [speed, "all " + text.format(tmp_path, "a.mp4")]
    (tmp_path / "a.txt").write_text("a three")
    assert told(tiny(data=folder)) == [speed, "1 " + text.format(tmp_path, "b.mp4")]
    unread = f"skipped: the captions of 1 files in {tmp_path}, the model reads none"
    assert told(tiny(_NO_TEXT, data=folder, text={})) == [speed, unread]
    (tmp_path / "b.txt").write_text("a two")
    assert told(tiny(data={**folder, "fps": 8.0, "frames": 2})) == []


def test_clips_that_are_held_out_by_name_alone_are_told(tiny, tmp_path: Path, caplog) -> None:
    (tmp_path / "test").mkdir()
    for name in ("a", "test/b"):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(8, 16, 16, 1, dtype=torch.uint8), 8)
    config = tiny(data={"kind": "folder", "path": str(tmp_path)})
    assert len(make_dataset(config)) == 2
    assert caplog.messages == [
        f"{tmp_path} has no subfolder train: clips of {tmp_path / 'test'} are trained on, too, so they are not held out"
    ]
    caplog.clear()
    for kind in ("source", "target"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        write_video(tmp_path / "train" / kind / "c.mp4", torch.zeros(8, 16, 16, 1, dtype=torch.uint8), 8)
    assert len(make_dataset(config)) == 2
    part = tmp_path / "train"
    assert caplog.messages[1:] == [
        f"{part} has subfolders source and target: files of both are clips (train.source_prob is 0)"
    ]


def test_options_that_undo_others_are_told(tiny, tmp_path: Path, caplog) -> None:
    train(tiny(steps=1, warmup_steps=1, image_batch_size=4, drop_label=1.0), tmp_path / "run", quiet=True)
    assert [message for message in caplog.messages if message.startswith("train.")] == [
        "train.warmup_steps is 1 and train.steps 1: the learning rate does not get to train.lr",
        "train.image_batch_size is 4 and nothing reads it: no step is on images",
        "train.drop_label is 1: the flow never sees what it is to be told by",
    ]


def _warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package warns of."""
    of_ours = [record for record in caplog.records if record.name.startswith("starflow")]
    return [record.getMessage() for record in of_ours if record.levelno >= logging.WARNING]


def test_training_does_not_depend_on_modes_of_torch(tiny, tmp_path: Path) -> None:
    config = tiny(steps=2, log="none")
    expected = train(config, tmp_path / "usual", quiet=True).state_dict()
    for name, mode in {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "meta": torch.device("meta"),
    }.items():
        with mode:
            found = train(config, tmp_path / name, quiet=True, device="cpu").state_dict()
        assert all(map(torch.equal, found.values(), expected.values())), name
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = train(config, tmp_path / "dtype", quiet=True).state_dict()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found.values(), expected.values()))


def test_given_data_is_held_to_the_configuration(tiny, tmp_path: Path, caplog) -> None:
    config = tiny(steps=1, warmup_steps=0, log="none", denoiser_every=1)
    for wrong in (MovingDigits(frames=8, size=16), MovingDigits(frames=4, size=32)):
        with pytest.raises(ConfigError, match=r"^training: clip digits/train/0 of the data set has shape"):
            train(config, tmp_path / "wrong", quiet=True, dataset=wrong)
    train(config, tmp_path / "usual", quiet=True, dataset=MovingDigits(frames=4, size=16))
    assert not _warned(caplog)
    given = MovingDigits(frames=4, size=16, start="anywhere", split="test")
    train(config, tmp_path / "other", quiet=True, dataset=given)
    assert _warned(caplog) == [
        "the data set is that of the split test: its clips are trained on, so they are not held out",
        "the data set has start 'anywhere', and data.start, which the model is sampled and scored by, is 'middle'",
    ]


class _Drawn:
    """Clips that are other ones each time, or none at all from the second on."""

    def __init__(self, length: int = 4, wrong: object = None) -> None:
        self.length, self.wrong = length, wrong

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Any:
        return self.wrong if self.wrong and index else Clip(torch.rand(4, 1, 16, 16) * 2 - 1, "three", f"clip {index}")


def test_given_data_that_is_drawn_anew_or_no_clips_is_told(tiny, tmp_path: Path, caplog) -> None:
    config = tiny(steps=1, warmup_steps=0, log="none")
    train(config, tmp_path / "run", quiet=True, dataset=_Drawn())
    (line,) = _warned(caplog)
    assert line.startswith("clip clip 0 of the data set is another one the second time")
    for wrong in ("text", Clip(torch.zeros(4, 1, 16, 16), None, "x")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"^training: item \d of the data set is .*, expected a starflow"):
            train(config, tmp_path / "wrong", quiet=True, dataset=_Drawn(wrong=wrong))


def test_other_given_data_is_told_when_a_run_goes_on(tiny, tmp_path: Path, caplog) -> None:
    train(tiny(steps=1, log="none"), tmp_path, quiet=True, dataset=_Drawn(4))
    caplog.clear()
    train(tiny(steps=2, log="none"), tmp_path, quiet=True, dataset=_Drawn(5))
    told = "data changed since step-00000001: 4 clips of _Drawn were, 5 clips of _Drawn are; the run goes on with these"
    assert told in caplog.messages
    caplog.clear()
    train(tiny(steps=3, log="none"), tmp_path, quiet=True)
    assert "5 clips of _Drawn were, 10000 clips of MovingDigits are" in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_frame": "first"}, "train.image_frame is 'first' and nothing reads it: no step is on images"),
        ({"drop_frame_condition": 0.7}, "train.drop_frame_condition is 0.7 and nothing reads it: the flow reads no"),
        ({"denoiser_every": 50}, "train.denoiser_every is 50 and train.steps 2: the denoiser learns in one step"),
        ({"noise_std": 0.0}, "train.noise_std is 0: the denoiser has no noise to learn, and samples are not cleaned"),
        ({"lr": 0.0, "min_lr": 0.0}, "train.lr is 0: the flow does not learn"),
        ({"image_prob": 1.0}, "train.image_prob is 1: every step is on images, and the flow never sees a clip"),
    ],
)
def test_recipes_that_do_nothing_are_told(tiny, tmp_path: Path, caplog, options: dict[str, Any], told: str) -> None:
    train(tiny(steps=2, warmup_steps=0, log="none", **options), tmp_path, quiet=True)
    (line,) = _warned(caplog)
    assert line.startswith(told)


def test_a_loss_of_weight_zero_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"^train.noise_std is 0.0, expected a number above 0 with train.cond_noise"):
        make_parts(tiny(noise_std=0.0, cond_noise_level=True))


def test_samples_without_prompts_of_a_conditional_model_are_made(tiny, tmp_path: Path) -> None:
    config = tiny(steps=1, sample_every=1, log="none")
    train(replace(config, sample=replace(config.sample, prompts=())), tmp_path, quiet=True)
    assert (tmp_path / "samples" / "step-00000001.png").is_file()


def test_checkpoints_do_not_read_the_text_encoder_again(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_t5(tmp_path / "t5")
    text = {"kind": "t5", "folder": str(folder), "size": 8}
    config = tiny(text=text, flow={"txt_size": 8, "txt_dim": 16}, steps=3, checkpoint_every=1, log="none")
    read = []
    known = parts._sum_of
    monkeypatch.setattr(parts, "_sum_of", lambda files: read.append(files) or known(files))
    train(config, tmp_path / "run", quiet=True, dataset=_Animals())
    assert len(read) == 1
    load_model(tmp_path / "run")  # finds them to be those of the header
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert file.metadata()["text_weights_sha256"] == parts.fingerprints(config)["text_weights_sha256"]


class _Animals(_Drawn):
    """Clips of a cat."""

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        return Clip(torch.full((4, 1, 16, 16), -0.5), "a cat", f"clip {index}")
