"""The examples run and agree with what they are compared with. How fast they are is for those who run them to see."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starflow import Flow
from starflow.config import RunConfig
from starflow.data import to_pixels
from starflow.sampling import Pipeline
from starflow.training import make_parts
from starflow.worlds import PaddleBall, Policy, draw_court

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    """What the script defines; its `main` does not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_ops_in_a_plain_tarflow() -> None:
    done = example("tarflow_ops")["compare"](tokens=24, channels=3, width=64, layers=1, blocks=2, batch=2)
    assert done.log_prob_error < 1e-5
    assert done.sample_error < 1e-4
    assert done.solve_error < 1e-3


def test_ops_in_a_decoder_with_a_cache() -> None:
    done = example("decoder_cache")["compare"](prompt=40, new=5, chunk=16, width=256, layers=2, batch=2)
    assert done.error < 1e-5


def test_a_causal_model_of_transformers() -> None:
    """Padding on the left, dynamic and static caches, packed linears."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra `text`)")
    found = example("hugging_face")["compare"](width=128, layers=2, prompts=(40, 17, 5), new=6)
    assert found["logits"] < 1e-5
    assert found["dynamic"] == found["static"] == 1.0


def test_padding_that_is_not_on_the_left_is_refused() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra `text`)")
    _, model = example("hugging_face")["build"](width=128, layers=1)
    seen = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="expected padding on the left alone"):
        model(torch.ones(1, 4, dtype=torch.int64), attention_mask=seen)


def test_a_diffusion_transformer() -> None:
    """An image and a text that attend to each other, norms of queries and keys, swapped linears."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra `vae`)")
    assert example("diffusers_transformer")["compare"](width=128, layers=2, tokens=16, repeats=1).error < 1e-5


def test_inverse_of_a_zuko_flow() -> None:
    pytest.importorskip("zuko", reason="zuko is not installed (extra `examples`)")
    zuko_inverse = example("zuko_inverse")
    flow = zuko_inverse["train"](side=4, steps=50, hidden=32)
    done = zuko_inverse["compare"](flow, batch=3, repeats=1)
    assert done.error < 1e-3
    assert done.zuko_error < 1e-4
    assert done.sweeps <= 3 * (16 + 1)


@pytest.mark.parametrize(("size", "channels"), [(24, 1), (64, 3), (48, 1)])
def test_a_reader_of_the_paddle_world_reads_every_frame(size: int, channels: int) -> None:
    world = PaddleBall(seed=3)
    policy = Policy(world, "mixed", np.random.default_rng(0))
    states = []
    for _ in range(600):
        world.advance(policy())
        states.append(world.state)
    seen = example("plan_in_a_dream")["read"](to_pixels(torch.from_numpy(draw_court(states, size, channels))))
    assert seen.paddle.tolist() == [state.paddle for state in states]
    there = [state.ball[0] >= 0 for state in states]
    assert seen.balls.bool().tolist() == there
    assert set(seen.balls.tolist()) == {0, 1}
    places = list(zip(seen.x.tolist(), seen.y.tolist(), strict=True))
    assert [place for place, here in zip(places, there, strict=True) if here] == [
        state.ball for state in states if state.ball[0] >= 0
    ]


def test_a_reader_counts_balls() -> None:
    world = PaddleBall()
    frames = torch.from_numpy(np.stack([world.frame] * 3))
    (x, y) = world.state.ball
    frames[0, y : y + 2, x : x + 2] = 0
    frames[2, 3:5, 5:7] = 255
    assert example("plan_in_a_dream")["read"](to_pixels(frames)).balls.tolist() == [0, 1, 2]


def test_a_future_in_which_the_ball_is_met_is_better() -> None:
    futures = []
    for key in (0, 1):
        world = PaddleBall()
        world.state = replace(world.state, paddle=8, ball=(9, 6), velocity=(-1, 1))
        states = []
        for _ in range(10):
            world.advance(key)
            states.append(world.state)
        futures.append(to_pixels(torch.from_numpy(draw_court(states))))
    met, missed = example("plan_in_a_dream")["value"](torch.stack(futures)).tolist()
    assert met > 0 > missed


def test_planning_in_a_dream() -> None:
    """An untrained model plays, the same under one seed."""
    config = RunConfig.load("paddle")
    small = replace(config.flow, channels=64, top_block_channels=64, layers_per_block=(1, 1))
    config = replace(config, flow=small)
    torch.manual_seed(0)
    pipeline = Pipeline(Flow(small), config, *make_parts(config))
    plan = example("plan_in_a_dream")
    games = [plan["play"](pipeline, 40, futures=2, horizon=3, every=16, seed=1) for _ in range(2)]
    assert games[0] == games[1]
    chance = plan["play_randomly"](2000)
    assert chance.met > 0
    assert chance.lost > chance.met
