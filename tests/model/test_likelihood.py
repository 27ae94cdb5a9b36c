"""Likelihoods of flows that are linear are those of normal distributions, to the last digits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from starflow import Flow
from starflow.model import patchify

from ..flows import CASES, VIDEO, condition, inputs, latents, make_flow

SHAPE = (3, 2, 2, 3)  # frames, channels, height, width
TEXTLESS = VIDEO | {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "soft_clip": 0.0, "use_final_norm": False}


def linear_flow(**options: object) -> Flow:
    """A flow whose layers add nothing: the shift of a token is linear in the token before it, its scale constant."""
    flow = make_flow(TEXTLESS | {"use_softplus": False} | options).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in flow._blocks():
            assert block.conditioner is not None
            for layer in block.conditioner.layers:
                for out in (layer.attention.proj, layer.mlp.down):
                    out.weight.zero_()
                    out.bias.zero_()
            weight, bias = block.conditioner.proj_out.weight, block.conditioner.proj_out.bias
            weight[: len(weight) // 2] = 0.0  # of the log-scale
            weight[len(weight) // 2 :] = 0.3 * torch.randn(len(weight) // 2, weight.shape[1], generator=generator)
            bias.copy_(0.3 * torch.randn(len(bias), generator=generator))
    return flow


def normal_of(flow: Flow, frames: int, height: int, width: int) -> torch.distributions.MultivariateNormal:
    """The distribution of the flow over (frames, rows, columns, channels), from its weights alone."""
    channels = flow.config.token_channels
    area = height * width
    size = frames * area * channels
    matrix, offset = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for block in flow._blocks():
        c = block.conditioner
        assert c is not None
        assert c.sos_embed is not None
        log_scale, shift = c.proj_out.bias.detach().chunk(2)
        gain = (c.proj_out.weight[channels:] @ c.proj_in.weight).detach()
        shift = shift + (c.proj_out.weight[channels:] @ c.proj_in.bias).detach()
        start = (gain @ c.sos_embed.detach()[0, 0]) + shift
        order = block.layout(1 if block.frame_local else frames, height, width, None, image=False).order
        seen = [order + first * area for first in range(frames)] if block.frame_local else [order]
        step, constant = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for sequence in seen:
            before = None
            for token in sequence.tolist():
                here = slice(token * channels, (token + 1) * channels)
                step[here, here] = torch.diag(torch.exp(-log_scale))
                if before is None:
                    constant[here] = -start * torch.exp(-log_scale)
                else:
                    step[here, before] = -gain * torch.exp(-log_scale)[:, None]
                    constant[here] = -shift * torch.exp(-log_scale)
                before = here
        matrix, offset = step @ matrix, step @ offset + constant
    mean = torch.linalg.solve(matrix, -offset)
    covariance = torch.linalg.inv(matrix.mT @ matrix)
    return torch.distributions.MultivariateNormal(mean, (covariance + covariance.mT) / 2)


def first_of(normal: torch.distributions.MultivariateNormal, places: Tensor, x: Tensor) -> Tensor:
    """Log-density of some of the coordinates alone."""
    covariance = normal.covariance_matrix[places][:, places]
    return torch.distributions.MultivariateNormal(normal.mean[places], covariance).log_prob(x[:, places])


@pytest.mark.parametrize("order", ["raster", "spread", "farthest"])
@pytest.mark.parametrize("layers", [(1,), (1, 1, 2)])
def test_a_linear_flow_is_a_normal_distribution(order: str, layers: tuple[int, ...]) -> None:
    flow = linear_flow(top_order=order, layers_per_block=layers)
    frames, _, height, width = SHAPE
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    vectors = patchify(x, 1).flatten(1)
    normal = normal_of(flow, frames, height, width)
    torch.testing.assert_close(flow.log_prob(x), normal.log_prob(vectors), rtol=1e-10, atol=1e-9)
    per_frame = vectors.shape[1] // frames
    whole = [first_of(normal, torch.arange(t * per_frame), vectors) for t in range(1, frames + 1)]
    expected = torch.stack([whole[0], *(b - a for a, b in pairwise(whole))], 1)
    torch.testing.assert_close(flow.log_prob(x, by="frame"), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("order", ["raster", "spread", "checkerboard", "random"])
def test_terms_of_tokens_in_a_flow_of_one_block_are_conditional_densities(order: str) -> None:
    flow = linear_flow(top_order=order, layers_per_block=(1,))
    frames, channels, height, width = SHAPE
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    vectors = patchify(x, 1).flatten(1)
    normal = normal_of(flow, frames, height, width)
    terms = flow.log_prob(x, by="token").flatten(1)
    visited = flow._blocks()[0].layout(frames, height, width, None, image=False).order
    places = torch.empty(0, dtype=torch.int64)
    before = torch.zeros(2, dtype=torch.float64)
    for token in visited.tolist():
        places = torch.cat([places, torch.arange(token * channels, (token + 1) * channels)])
        upto = first_of(normal, places, vectors)
        torch.testing.assert_close(terms[:, token], upto - before, rtol=1e-8, atol=1e-8)
        before = upto


@pytest.mark.parametrize("name", ["video", "video spread", "video backwards in time", "video of classes", "tarflow"])
def test_tokens_add_up_to_frames_and_frames_to_clips(name: str) -> None:
    flow = make_flow(CASES[name]).double()
    x, y = inputs(name, flow)
    tokens, frames, clips = (flow.log_prob(x, y, by=by) for by in ("token", "frame", "clip"))
    side = flow.config.patch_size
    assert tokens.shape == (2, 3 if x.dim() == 5 else 1, x.shape[-2] // side, x.shape[-1] // side)
    torch.testing.assert_close(tokens.flatten(2).sum(2), frames)
    torch.testing.assert_close(frames.sum(1), clips)
    torch.testing.assert_close(flow.log_prob(x, y), clips)


@pytest.mark.parametrize("name", ["video spread", "video backwards in time"])
def test_a_term_stands_at_the_place_of_its_token(name: str) -> None:
    """A token that is changed changes its own term, and none of the tokens before it in the only block."""
    flow = make_flow(CASES[name] | {"layers_per_block": (2,)}).double()
    x, y = latents(flow, image=False), condition(flow)
    grid = patchify(x, 1)
    order = flow._blocks()[0].layout(*grid.shape[1:4], y, image=False).order
    number = 20
    frame, row, column = (int(i) for i in torch.unravel_index(order[number], grid.shape[1:4]))
    other = x.clone()
    other[:, frame, :, row, column] += 1.0
    a, b = (flow.log_prob(data, y, by="token").flatten(1)[:, order] for data in (x, other))
    assert torch.equal(a[:, :number], b[:, :number])
    assert ((a[:, number] - b[:, number]).abs() > 1e-3).all()


def test_the_noise_that_a_constant_flow_expects() -> None:
    """Of a flow that is the identity every token has the density of standard normal numbers."""
    flow = make_flow(TEXTLESS, spread=0.0).double()
    for block in flow._blocks():
        assert block.conditioner is not None
        torch.nn.init.zeros_(block.conditioner.proj_out.bias)
    x = latents(flow)
    expected = -0.5 * patchify(x, 1).square().sum(-1) - math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(x, by="token"), expected)


def test_an_unknown_part_is_refused() -> None:
    flow = make_flow(TEXTLESS)
    with pytest.raises(ValueError, match=r"^flow: by is 'pixel', expected 'clip', 'frame' or 'token'$"):
        flow.log_prob(latents(flow), by="pixel")  # type: ignore[arg-type]
