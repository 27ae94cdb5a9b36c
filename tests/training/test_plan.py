"""What is planned against what is counted and measured on small models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import starflow_ext
from starflow.config import ConfigError, RunConfig
from starflow.model import Flow, make_layout, nll_of
from starflow.training import Batches, Plan, Trainer, fitting, make_dataset, make_parts, plan
from starflow.training.plan import TokenGrid, forward_flops, grid_of, step_flops

CPU = torch.device("cpu")


def counted(flow: Flow, clip: TokenGrid, *, backward: bool) -> int:
    """Operations that torch counts, of attention that knows no mask."""
    config = flow.config
    x = torch.randn(1, clip.frames, config.in_channels, clip.height, clip.width)
    y = torch.randn(1, clip.text, config.txt_dim) if clip.text else None
    with starflow_ext.reference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = nll_of(flow.encode(x, y)).mean()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def dense(flow: Flow, clip: TokenGrid) -> float:
    return sum(forward_flops(block.conditioner, clip, local=block.frame_local, dense=True) for block in flow.blocks)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("options", [{}, {"position_embed": True, "text_embed": True, "use_swiglu": True}])
def test_arithmetic_is_what_torch_counts(tiny, local: bool, options: dict) -> None:
    config = tiny(flow={"shallow_block_local": local, "num_kv_heads": 1, **options})
    flow, clip = Flow(config.flow), grid_of(config)
    assert clip == TokenGrid(4, 4, 4, 3)
    forward = counted(flow, clip, backward=False)
    assert dense(flow, clip) == pytest.approx(forward, rel=1e-3)
    # Gradients by the weights and by what they multiply: but for those by the data, twice as much again.
    assert counted(flow, clip, backward=True) == pytest.approx(3 * forward, rel=0.03)


def test_the_longest_clip_of_training_is_counted(tiny) -> None:
    assert grid_of(tiny(last_frame_prob=0.1)).frames == 5
    assert grid_of(tiny(last_frame_prob=0.1, source_prob=0.1)).frames == 8


def test_only_pairs_that_see_each_other_are_counted(tiny) -> None:
    config = tiny(flow={"denoiser_window": 1})
    flow, clip = Flow(config.flow), grid_of(config)
    tokens = 3 + 64
    top, denoiser = flow.blocks[-1].conditioner, flow.denoiser
    for network, pairs in (
        (top, tokens * (tokens + 1) // 2),
        # Of 4 frames each sees itself and the next; text sees text and two frames.
        (denoiser, 3 * (3 + 32) + 64 * 3 + 16 * 16 * (2 + 2 + 2 + 1)),
    ):
        more = forward_flops(network, clip, dense=True) - forward_flops(network, clip)
        width = network.heads * network.head_dim
        assert more == 4 * len(network.layers) * width * (tokens**2 - pairs)


def test_recomputing_costs_another_forward_pass_of_the_layers(tiny) -> None:
    once, again = (Flow(tiny(flow={"use_checkpoint": every}).flow) for every in (0, 1))
    clip = grid_of(tiny())
    layers = sum(
        forward_flops(block.conditioner, clip, local=block.frame_local, layers_only=True) for block in once.blocks
    )
    layers += forward_flops(once.denoiser, clip, layers_only=True)
    assert step_flops(again, clip) - step_flops(once, clip) == pytest.approx(layers)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_of_the_optimiser(tiny, optimizer: str) -> None:
    config = tiny(flow={"channels": 128}, optimizer=optimizer)
    trainer = Trainer(config, *make_parts(config), CPU)
    kept = [part for part in (trainer.optimizer, trainer.denoiser_optimizer) if part is not None]
    moments = sum(t.nbytes for part in kept for name, t in part.state().items() if not name.endswith("/step"))
    assert plan(config).moments == moments


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [0, 1])
def test_memory_is_what_a_step_takes(tiny, precision: str, recompute: int) -> None:
    # Wide enough for activations and weights to outweigh the rest.
    config = tiny(
        flow={"channels": 128, "use_checkpoint": recompute, "layers_per_block": (1, 1, 4)},
        batch_size=8,
        precision=precision,
    )
    planned = plan(config)
    codec, text = make_parts(config)
    trainer = Trainer(config, codec, text, CPU)
    batch = Batches(config, make_dataset(config), codec).make(0)
    trainer.run(batch)
    kept = sum(t.nbytes for t in trainer._tensors(averaged=True).values())
    assert planned.weights + planned.moments + planned.average == pytest.approx(kept, rel=0.01)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.run(batch)
    used = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    # All gradients beside all activations, which a step of one part does not have at once.
    assert 0.9 * most < planned.gradients + planned.activations + planned.workspace < 1.25 * most


def test_planning_leaves_no_layouts_without_numbers(tiny) -> None:
    plan(tiny())
    layout = make_layout(tiny().flow, "raster", 4, 4, 4, 3, still=False)
    assert type(layout.order) is torch.Tensor
    assert type(layout.query.cos) is torch.Tensor


def test_pieces_share_everything_but_activations(tiny) -> None:
    config = tiny(batch_size=8)
    one = plan(replace(config, train=replace(config.train, batch_size=2)))
    whole = plan(config, devices=4)
    pieces = plan(replace(config, train=replace(config.train, parallel="fsdp")), devices=4)
    assert (whole.weights, whole.gathered) == (one.weights, 0)
    for part in ("weights", "gradients", "moments", "average"):
        assert getattr(pieces, part) == pytest.approx(getattr(whole, part) / 4, rel=1e-3)
    assert pieces.activations == whole.activations == one.activations
    assert 0 < pieces.gathered < whole.weights * 3
    assert whole.flops == one.flops
    assert plan(config, devices=4, peak=2e12, efficiency=0.5).seconds == pytest.approx(whole.flops / 1e12)


def test_what_fits_is_the_nearest_to_what_was_asked(tiny) -> None:
    config = tiny(batch_size=8, flow={"layers_per_block": (1, 1, 6)})
    asked = plan(config, devices=2)
    same, _ = fitting(config, asked.memory, devices=2)
    assert same == config
    changed, found = fitting(config, asked.memory - 1, devices=2)
    assert changed == replace(config, train=replace(config.train, parallel="fsdp"))
    assert isinstance(found, Plan)
    assert found.memory < asked.memory
    changed, found = fitting(config, found.memory - 1, devices=2)
    assert changed.flow.use_checkpoint == 1
    tried = 0
    while changed.train.accumulate == 1:
        changed, found = fitting(config, found.memory - 1, devices=2)
        tried += 1
    assert tried <= 2
    assert config.train.batch_size % (2 * changed.train.accumulate) == 0
    assert fitting(config, 1000, devices=2) is None


def test_the_published_video_model_is_planned_without_its_memory() -> None:
    config = RunConfig.load("starflow-v_7B_t2v_caus_480p")
    planned = plan(replace(config, train=replace(config.train, parallel="fsdp")), devices=96)
    assert sum(planned.parameters.values()) == pytest.approx(6.9e9, rel=0.02)
    assert planned.tokens == 256 + 21 * 30 * 53
    assert planned.clips == 2


def test_numbers_out_of_range_are_named(tiny) -> None:
    for how, message in (
        ({"devices": 0}, "plan: devices is 0, peak 1e+15, efficiency 0.4, expected at least 1"),
        ({"efficiency": 2.0}, "efficiency 2, expected"),
        ({"devices": 3}, "plan: train.batch_size is 4, expected a multiple of 3: 3 devices times train.accumulate"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan(tiny(), **how)
