"""What the flow is compared with: the cache, causality, the bound of the likelihood, and sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from baselines import (
    Baseline,
    Diffusion,
    Draws,
    LastFrame,
    Past,
    Regression,
    Task,
    drawn_levels,
    schedule,
    shifted,
)
from study import MODELS, Row, config_of
from torch import Tensor, nn

from starflow.model import Flow
from starflow.model.cache import DecodeState
from starflow.noise import draw

SHAPE = (192, 4, 4)


def _model(kind: type[Baseline]) -> Baseline:
    config = config_of(Row("paddle", "flow", 0), 1, 1e-3).flow
    torch.manual_seed(0)
    model = kind(config, width=64, layers=2, mean=torch.zeros(SHAPE[0], 1, 1), scale=1.5)
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
    flow, channels = sum(p.numel() for p in Flow(config.flow).parameters()), config.flow.in_channels
    model = recipe.baseline(
        config.flow, width=recipe.width, layers=recipe.layers, mean=torch.zeros(channels, 1, 1), scale=1.0
    )
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


def _network(diffusion: Baseline, x: Tensor, beside: Tensor, told: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = diffusion.network(x, told, beside=beside)
    return out


def test_a_frame_depends_on_the_frames_and_vectors_up_to_its_own(diffusion: Baseline) -> None:
    x, beside, told = torch.randn(1, 6, *SHAPE), torch.randn(1, 6, *SHAPE), torch.zeros(1, 6, diffusion.extra + 3)
    first = _network(diffusion, x, beside, told)
    for place, value in enumerate((x, beside, told)):
        given = [x, beside, told]
        given[place] = torch.cat([value[:, :3], torch.full_like(value[:, 3:], 0.5)], 1)
        second = _network(diffusion, *given)
        assert torch.equal(first[:, :3], second[:, :3])
        assert bool((first[:, 3:] != second[:, 3:]).flatten(2).any(2).all())


def test_a_frame_sees_no_further_than_the_frames_of_attention(diffusion: Baseline) -> None:
    # Two layers, each of which sees 6 frames behind.
    x, told = torch.randn(1, 16, *SHAPE), torch.zeros(1, 16, diffusion.extra + 3)
    changed = x.clone()
    changed[:, 0] = 0.5
    same = (_network(diffusion, x, x, told) == _network(diffusion, changed, x, told)).flatten(2).all(2)[0]
    reach = 2 * 6
    assert not bool(same[: reach // 2].any())
    assert bool(same[reach + 1 :].all())


class _Recorded(Diffusion):
    """Diffusion that keeps what it was last asked of each frame."""

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
        out = super().clean(noisy, levels, past, text, told, state, first)
        for frame in range(noisy.shape[1]):
            one = slice(frame, frame + 1)
            self.asked[first + frame] = noisy[:, one], levels[:, one], past.x[:, one], past.levels[:, one], out[:, one]
        return out

    asked: ClassVar[dict[int, tuple[Tensor, ...]]] = {}


def test_frames_of_diffusion_made_with_a_cache_are_those_of_one_pass() -> None:
    model, task = _model(_Recorded), _task(5)
    assert isinstance(model, _Recorded)
    model.steps = 3
    made = model.follow(task) / 1.5
    noisy, levels, past, past_levels, out = (torch.cat(parts, 1) for parts in zip(*model.asked.values(), strict=True))
    with torch.inference_mode():
        whole = Diffusion.clean(model, noisy, levels, Past(past, past_levels), None, task.told)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(made, whole[:, 2:], rtol=0, atol=1e-5)


def test_a_frame_follows_the_one_before_it_with_the_noise_of_the_past() -> None:
    model, task = _model(_Recorded), _task(3)
    assert isinstance(model, _Recorded)
    assert task.given is not None
    model.context = 0.05
    made = torch.cat([task.given, model.follow(task)], 1) / 1.5
    alpha, sigma = schedule(torch.full((2, 5), 0.05))
    expected = alpha * shifted(made) + sigma * draw(task.seeds, 5, *SHAPE, purpose="train")
    torch.testing.assert_close(torch.cat([model.asked[frame][2] for frame in range(5)], 1), expected)


def test_no_gradient_reaches_a_frame_from_later_ones(diffusion: Baseline) -> None:
    assert isinstance(diffusion, Diffusion)
    x = torch.randn(1, 5, *SHAPE, requires_grad=True)
    levels = torch.full((1, 5), 0.5)
    out = diffusion.clean(x, levels, Past(shifted(x), 0.1 * levels), None, torch.zeros(1, 5, 3))
    (gradient,) = torch.autograd.grad(out[:, 2].square().sum(), x)
    reached = gradient.flatten(2).abs().sum(2)[0] > 0
    assert reached.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("kind", [Diffusion, Regression])
def test_every_parameter_of_a_baseline_has_a_gradient(kind: type[Baseline]) -> None:
    model = _model(kind)
    latents = torch.randn(2, 3, *SHAPE)
    model.loss(latents, None, torch.eye(3).expand(2, 3, 3), Draws(0, 0, torch.randn_like(latents))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_most_levels_that_are_drawn_are_high() -> None:
    shares = torch.linspace(0.0, 1.0, 5)
    # 1 - (1 - share)^3
    torch.testing.assert_close(drawn_levels(shares), torch.tensor([0.0, 37 / 64, 56 / 64, 63 / 64, 1.0]))


@pytest.mark.parametrize("kind", [Diffusion, Regression])
def test_what_a_model_makes_moves_with_the_mean_of_the_data(kind: type[Baseline]) -> None:
    model, task = _model(kind), _task(3)
    assert task.given is not None
    made, mean = model.follow(task), torch.linspace(-13.0, 2.0, SHAPE[0])[:, None, None]
    model.mean.copy_(mean)
    torch.testing.assert_close(model.follow(replace(task, given=task.given + mean)), made + mean, rtol=0, atol=1e-4)


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
    draws = Draws(0, 0, torch.randn_like(latents))
    assert float(model.loss(latents, None, None, draws)) < float(_model(Diffusion).loss(latents, None, None, draws))
