"""What the flow is compared with: the cache, causality, the bound of the likelihood, and sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from baselines import Baseline, Diffusion, Draws, LastFrame, Regression, Task, schedule
from study import MODELS, Row, config_of
from torch import Tensor, nn

from starflow.model import Flow
from starflow.noise import draw

SHAPE = (192, 4, 4)


def _model(kind: type[Baseline]) -> Baseline:
    config = config_of(Row("paddle", "flow", 0), 1, 1e-3).flow
    torch.manual_seed(0)
    model = kind(config, width=64, layers=2, scale=1.5)
    nn.init.normal_(model.network.proj_out.weight, std=0.05)
    return model.eval()


@pytest.fixture
def regression() -> Baseline:
    return _model(Regression)


@pytest.fixture
def diffusion() -> Baseline:
    return _model(Diffusion)


def _task(frames: int, given: int = 2) -> Task:
    torch.manual_seed(1)
    told = torch.nn.functional.one_hot(torch.randint(3, (2, given + frames)), 3).float()
    return Task((5, 9), SHAPE, frames, torch.randn(2, given, *SHAPE) if given else None, None, told)


@pytest.mark.parametrize("kind", ["paddle", "digits"])
@pytest.mark.parametrize("name", [name for name, recipe in MODELS.items() if recipe.baseline is not None])
def test_parameters_are_those_of_the_flow_within_3_percent(kind: str, name: str) -> None:
    config, recipe = config_of(Row(kind, "flow", 0), 1, 1e-3), MODELS[name]
    assert recipe.baseline is not None
    flow = sum(p.numel() for p in Flow(config.flow).parameters())
    model = recipe.baseline(config.flow, width=recipe.width, layers=recipe.layers, scale=1.0)
    assert abs(sum(p.numel() for p in model.parameters()) / flow - 1) < 0.03


def test_frames_made_with_a_cache_are_those_of_one_pass(regression: Baseline) -> None:
    assert isinstance(regression, Regression)
    task = _task(5)
    assert task.given is not None
    with torch.inference_mode():
        made = regression.follow(task) / 1.5
        given = task.given / 1.5
        before = torch.cat([torch.zeros(2, 1, *SHAPE), given, made[:, :-1]], 1)
        whole = regression.predicted(before, None, task.told)
    torch.testing.assert_close(made, whole[:, 2:], rtol=0, atol=1e-5)


def test_a_frame_depends_on_the_frames_and_vectors_up_to_its_own(diffusion: Baseline) -> None:
    x, told = torch.randn(1, 6, *SHAPE), torch.zeros(1, 6, 64 + 3)
    changed, other = x.clone(), told.clone()
    changed[:, 3:], other[:, 3:] = 0.5, 1.0
    with torch.no_grad():
        first, second = diffusion.network(x, told), diffusion.network(changed, other)
    assert torch.equal(first[:, :3], second[:, :3])
    assert bool((first[:, 3:] != second[:, 3:]).flatten(2).any(2).all())


def test_a_frame_sees_no_further_than_the_frames_of_attention(diffusion: Baseline) -> None:
    # Two layers, each of which sees 6 frames behind.
    x, told = torch.randn(1, 16, *SHAPE), torch.zeros(1, 16, 64 + 3)
    changed = x.clone()
    changed[:, 0] = 0.5
    with torch.no_grad():
        same = (diffusion.network(x, told) == diffusion.network(changed, told)).flatten(2).all(2)[0]
    reach = 2 * 6
    assert not bool(same[: reach // 2].any())
    assert bool(same[reach + 1 :].all())


def test_clips_depend_on_their_own_seed_alone(diffusion: Baseline) -> None:
    task = _task(3)
    assert task.given is not None
    assert task.told is not None
    alone = replace(task, seeds=task.seeds[1:], given=task.given[1:], told=task.told[1:])
    with torch.inference_mode():
        both, one = diffusion.follow(task), diffusion.follow(alone)
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


class _Normal(Diffusion):
    """Diffusion that knows the answer for standard normal data."""

    def clean(self, noisy: Tensor, levels: Tensor, *_: object) -> Tensor:
        return schedule(levels)[0] * noisy


def test_the_bound_meets_the_density_of_normal_data() -> None:
    model, noise_std, seeds = _model(_Normal), 0.4, tuple(range(4))
    assert isinstance(model, Diffusion)
    torch.manual_seed(0)
    latents = 1.5 * torch.randn(4, 2, *SHAPE)
    noisy = latents + noise_std * draw(seeds, 2, *SHAPE, purpose="train")
    normal = torch.distributions.Normal(0.0, math.sqrt(1.5**2 + noise_std**2))
    exact = normal.log_prob(noisy.double()).flatten(2).sum(2)
    bits = (exact - model.bound(latents, None, None, noise_std, seeds)) / latents[0, 0].numel() / math.log(2)
    # What is left is 0.01 bits of the 4,096 levels, and the draws of 16 of them.
    assert bits.shape == (4, 2)
    assert bool((bits.mean(0).abs() < 0.15).all())
    assert abs(float(bits.mean())) < 0.06


def test_the_bound_of_a_network_that_knows_nothing_is_lower() -> None:
    model = _model(Diffusion)
    assert isinstance(model, Diffusion)
    torch.manual_seed(0)
    latents = 1.5 * torch.randn(2, 1, *SHAPE)
    bounds = [each.bound(latents, None, torch.zeros(2, 1, 3), 0.4, (0, 1)) for each in (_model(_Normal), model)]
    assert bool((bounds[1] < bounds[0]).all())


def test_more_steps_follow_the_same_path_more_finely() -> None:
    # Of standard normal data the path of DDIM is known: it leaves the noise as it is.
    model = _model(_Normal)
    assert isinstance(model, Diffusion)
    errors = []
    for steps in (4, 64):
        model.steps = steps
        made = model.follow(_task(1, given=0)) / 1.5
        errors.append(float((made - draw((5, 9), 1, *SHAPE)).abs().max()))
    assert errors[1] < errors[0] / 8


def test_the_last_frame_needs_one() -> None:
    with pytest.raises(ValueError, match="last: no frame is given"):
        LastFrame().follow(_task(3, given=0))


def test_losses_fall_when_the_network_is_right() -> None:
    model = _model(_Normal)
    torch.manual_seed(0)
    latents = 1.5 * torch.randn(4, 3, *SHAPE)
    draws = Draws.of(0, 0, torch.randn_like(latents))
    assert float(model.loss(latents, None, None, draws)) < float(_model(Diffusion).loss(latents, None, None, draws))
