"""What the denoiser sees, how clips are cut into chunks, and what a score step recovers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow import Flow
from starflow.config import ConfigError
from starflow.model import STEP, Denoiser, Gaussian, score_target, tweedie_step
from starflow.sampling import score_denoise
from starflow_ext.block_attention import FrameMask, block_attention

from ..flows import VIDEO, condition, latents, make_flow

OPTIONS = VIDEO | {"learnable_self_denoiser": True, "conditional_denoiser": True}


def denoiser(**changes: object) -> tuple[Flow, Denoiser]:
    flow = make_flow(OPTIONS, **changes)
    assert flow.denoiser is not None
    return flow, flow.denoiser


def frames_seen(network: Denoiser, x: Tensor, y: Tensor | None, frame: int) -> list[int]:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf, y)[:, frame].square().sum(), leaf)
    return [f for f in range(x.shape[1]) if gradient[:, f].abs().max() > 0]


@pytest.mark.parametrize("look_ahead", [1, 2, 3])
def test_one_layer_sees_the_frames_of_the_mask(look_ahead: int) -> None:
    for window in (None, 2, 3):
        flow, network = denoiser(
            temporal_causal=look_ahead, denoiser_window=window, conditional_denoiser=False, denoiser_layers=1
        )
        x = latents(flow, batch=1, frames=5)
        for frame in range(5):
            furthest = frame + look_ahead - 1
            expected = [f for f in range(5) if f <= furthest and (window is None or f >= furthest - window)]
            assert frames_seen(network, x, None, frame) == expected


def test_text_is_seen_everywhere_and_time_zero_sees_everything() -> None:
    flow, network = denoiser(denoiser_layers=1)
    x, y = latents(flow), condition(flow)
    assert y is not None
    for frame in range(3):
        leaf = y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, leaf)[:, frame].square().sum(), leaf)
        assert (gradient.abs().amax((0, 2)) > 0).all()
    flow, network = denoiser(temporal_causal=0, shallow_block_local=False, denoiser_layers=1)
    assert frames_seen(network, latents(flow, image=False), y, 0) == [0, 1, 2]


def low_rank(places: int, channels: int, rank: int) -> Tensor:
    """Covariances of normal data in few directions, (places, channels, channels)."""
    roots = torch.randn(places, channels, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return roots @ roots.mT


@pytest.mark.parametrize("nominal", [True, False])
def test_a_gaussian_of_all_components_is_wieners_filter(nominal: bool) -> None:
    """Each place by its own covariance, frames of another size by that of all: m + C (C + s^2)^-1 (y - m)."""
    flow, network = denoiser(in_channels=6, centred=True, denoiser_components=3, conditional_denoiser=False)
    config, sigma = flow.config, 0.3
    flow.double().centre_on(torch.randn(config.in_channels, config.img_size, config.img_size))
    covariance = low_rank(config.img_size**2 if nominal else 1, config.token_channels, 3)
    assert isinstance(network.gaussian, Gaussian)
    network.gaussian.fit(covariance, sigma, sigma)
    with torch.no_grad():
        network.proj_out.weight.zero_()
        network.proj_out.bias.zero_()
    height = config.img_size if nominal else config.img_size + 1
    clean = torch.randn(2, 3, config.in_channels, height, config.img_size, dtype=torch.float64)
    assert flow.centre is not None
    mean = flow.centre(clean.movedim(2, -1))
    noisy = clean.movedim(2, -1) - mean
    wiener = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(config.token_channels))
    flat = noisy.flatten(2, 3)
    expected = torch.einsum("pcd,bfpd->bfpc", wiener.expand(flat.shape[2], -1, -1), flat).reshape(noisy.shape) + mean
    with torch.no_grad():
        torch.testing.assert_close(network.denoise(clean, step=sigma), expected.movedim(-1, 2), atol=1e-6, rtol=1e-6)


def test_what_a_gaussian_does_not_keep_is_spread_over_all_other_directions() -> None:
    flow, network = denoiser(in_channels=6, centred=True, denoiser_components=1, conditional_denoiser=False)
    channels, sigma = flow.config.token_channels, 0.5
    variances = torch.tensor([4.0, 1.0, *[0.25] * (channels - 2)], dtype=torch.float64)
    assert network.gaussian is not None
    network.gaussian.double().fit(variances.diag()[None], sigma, STEP)
    rest = (1.0 + 0.25 * (channels - 2)) / (channels - 1)
    kept = torch.tensor([4.0, *[rest] * (channels - 1)], dtype=torch.float64)
    grid = torch.randn(1, 2, flow.config.img_size, flow.config.img_size, channels, dtype=torch.float64)
    torch.testing.assert_close(network.gaussian(grid), grid * sigma**2 / STEP / (kept + sigma**2))


def test_gaussians_that_cannot_be() -> None:
    for changes in (
        {"denoiser_components": 100},
        {"denoiser_components": -1},
        {"centred": False},
        {"denoiser_skip": 1.0},
        {"learnable_self_denoiser": False, "conditional_denoiser": False},
    ):
        with pytest.raises(ConfigError, match=r"^flow\.denoiser_components is -?\d+, expected an integer from"):
            denoiser(**{"centred": True, "denoiser_components": 2} | changes)


@pytest.mark.parametrize("changes", [{}, {"norm_type": "none"}, {"use_swiglu": True, "use_post_norm": True}])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_packed_weights_predict_the_same(changes: dict[str, object], dtype: torch.dtype, bound: float) -> None:
    """In inference mode the products are the native ones of packed weights; a changed weight is packed anew."""
    flow, network = denoiser(**changes)
    x, y = latents(flow), condition(flow)
    network.to(dtype)
    for _ in range(2):
        with torch.no_grad():
            expected = network(x, y)
        with torch.inference_mode():
            got = network(x, y)
        assert got.dtype == expected.dtype
        assert (got - expected).norm() < bound * expected.norm()
        assert not torch.equal(got, expected)
        with torch.no_grad():
            network.layers[0].mlp.up.weight.mul_(-1.0)


TOLD = {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "frame_dim": 3, "conditional_denoiser": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"denoiser_window": 0},
        {"denoiser_window": 1},
        {"temporal_causal": 0},
        {"denoiser_window": 1, "use_swiglu": True, "use_post_norm": True, "use_qk_norm": True},
        {"denoiser_window": 2, "hf_style_rope": True, "norm_type": "none", "use_final_norm": False},
        TOLD,
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_all_layers_in_one_call_predict_the_same(
    changes: dict[str, object], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a network reads no text and looks no further ahead than its frame."""
    flow, network = denoiser(**{"conditional_denoiser": False, "temporal_causal": 1, "denoiser_layers": 3} | changes)
    x = latents(flow, frames=5)
    told = torch.randn(x.shape[0], 5, 3) if "frame_dim" in changes else None
    if told is not None:
        told[:, 2] = torch.nan
    network.to(dtype)
    cases = [(x, told)] if changes is TOLD or x.dim() == 4 else [(x, told), (x[:, 0], None)]
    with torch.no_grad():
        expected = [network(given, None, vectors) for given, vectors in cases]

    def refuse(*_: object) -> Tensor:
        raise AssertionError("layer by layer")

    monkeypatch.setattr(Denoiser, "_by_layer", refuse)
    with torch.inference_mode():
        got = [network(given, None, vectors) for given, vectors in cases]
    for own, other in zip(got, expected, strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        assert (own - other).norm() < bound * other.norm()


def test_a_clip_whose_keys_take_much_memory_is_denoised_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, network = denoiser(conditional_denoiser=False, temporal_causal=1)
    x = latents(flow)
    with torch.inference_mode():
        expected = network(x)
        monkeypatch.setattr("starflow.model.denoiser._ONE_CALL", 0)
        monkeypatch.setattr(Denoiser, "_at_once", None)
        assert (network(x) - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("prefix", [0, 3, 5])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("look_ahead", [1, 2])
def test_frame_by_frame_attention_is_masked_attention(prefix: int, window: int | None, look_ahead: int) -> None:
    mask = FrameMask(prefix, 4, look_ahead, window)
    tokens = prefix + 5 * 4
    q, k, v = torch.randn(3, 2, 4, tokens, 8, dtype=torch.float64)
    k, v = k[:, :2], v[:, :2]
    index = torch.arange(tokens)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.visible(index, index), enable_gqa=True
    )
    torch.testing.assert_close(block_attention(q, k, v, causal=False, frames=mask), expected)


def test_masks_and_attention_that_do_not_fit() -> None:
    q = torch.zeros(1, 2, 7, 4)
    for call, message in [
        (lambda: FrameMask(0, 4, 0), "frames.look_ahead is 0, expected at least 1"),
        (lambda: FrameMask(0, 4, 3, 1), "frames.window is 1, expected at least look_ahead - 1 = 2"),
        (lambda: block_attention(q, q, q, causal=False, frames=FrameMask(0, 4, 1)), "whole frames of 4"),
        (lambda: block_attention(q, q, q, frames=FrameMask(0, 4, 1)), "whole frames of 4"),
        (lambda: block_attention(q, q[:, :, :, :3], q), "k has head_dim 3, expected 4 like q"),
        (lambda: block_attention(q, q[:, :, :5], q), r"v has shape \[1, 2, 7, 4\], expected \[1, 2, 5, 4\] like k"),
        (lambda: block_attention(q, q.expand(3, 2, 7, 4), q), "k has batch 3, expected 1 like q"),
        (lambda: block_attention(q, q, q, causal=False, q_start=2), "q_start is given, expected None without causal"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_chunks() -> None:
    flow, network = denoiser(local_attn_window=4, denoiser_window=2)
    x, y = latents(flow, frames=7), condition(flow)
    with torch.no_grad():
        for frames in (3, 4):  # fits: one step
            clip = x[:, :frames]
            assert torch.equal(network.denoise_video(clip, y), network.denoise(clip, y))
        before = x.clone()
        got = network.denoise_video(x, y, step=0.1)
        assert torch.equal(x, before)
        expected = x.clone()
        expected[:, :4] = network.denoise(x[:, :4], y, step=0.1)
        for start in (2, 4):  # a chunk sees the cleaned frames of the one before
            expected[:, start + 2 : start + 4] = network.denoise(expected[:, start : start + 4], y, step=0.1)[:, 2:]
        torch.testing.assert_close(got, expected)
        image = x[:, 0]
        torch.testing.assert_close(network.denoise_video(image, y), network.denoise(image[:, None], y)[:, 0])


@pytest.mark.parametrize("overlap", [4, 10])
def test_chunks_that_would_never_end(overlap: int) -> None:
    flow, network = denoiser(local_attn_window=4, denoiser_window=overlap)
    with pytest.raises(ValueError, match=rf"denoiser_window is {overlap}, expected less than the 4 frames of a chunk"):
        network.denoise_video(latents(flow, frames=5), condition(flow))
    # A clip of one chunk needs no overlap.
    with torch.no_grad():
        assert network.denoise_video(latents(flow, frames=4), condition(flow)).isfinite().all()


def test_a_conditional_denoiser_insists_on_text() -> None:
    flow, network = denoiser()
    with pytest.raises(ValueError, match="denoiser: text is None, expected text features"):
        network(latents(flow))


def test_a_flow_of_one_wide_block_has_a_denoiser_of_its_own_width() -> None:
    flow, network = denoiser(layers_per_block=(1,), top_block_channels=64)
    assert network(latents(flow), condition(flow)).shape == latents(flow).shape


def test_score_target() -> None:
    gradient = torch.randn(2, 3, 4)
    torch.testing.assert_close(score_target(gradient, 0.3), gradient * 24 * 0.3)
    assert tweedie_step(0.5, weighted=True) == STEP
    assert tweedie_step(0.5, weighted=False) == 0.5


def test_a_score_step_leaves_the_model_alone() -> None:
    flow = make_flow(VIDEO)
    x, y = latents(flow), condition(flow)
    for training in (True, False):
        flow.train(training)
        with torch.inference_mode():
            denoised = score_denoise(flow, x, y, 0.3)
        assert flow.training == training
        assert all(p.grad is None for p in flow.parameters())
        assert not denoised.requires_grad
    leaf = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(-flow.log_prob(leaf, y).sum(), leaf)
    torch.testing.assert_close(denoised, x - 0.3**2 * score, atol=1e-5, rtol=1e-5)


def linear_gaussian_flow(mean: float, deviation: float) -> Flow:
    """The flow whose density is exactly Normal(mean, deviation^2) in every dimension."""
    flow = make_flow(VIDEO | {"layers_per_block": (1,), "soft_clip": 0.0, "use_softplus": False}, spread=0.0).double()
    bias = flow._blocks()[0].conditioner.proj_out.bias.data  # type: ignore[union-attr]
    bias[:2], bias[2:] = torch.tensor(deviation).log(), mean
    return flow


def test_a_perfect_score_recovers_the_posterior_mean() -> None:
    """Clean data Normal(m, s^2) seen through noise of deviation t: the flow of the noisy data has s^2 + t^2."""
    mean, clean, noise = 0.7, 1.5, 0.4
    flow = linear_gaussian_flow(mean, (clean**2 + noise**2) ** 0.5)
    x, y = latents(flow), condition(flow)
    posterior = (clean**2 * x + noise**2 * mean) / (clean**2 + noise**2)
    torch.testing.assert_close(score_denoise(flow, x, y, noise), posterior, atol=1e-6, rtol=1e-6)
    # A network that has learned its target exactly takes the same step.
    for weighted in (False, True):
        leaf = x.clone().requires_grad_()
        loss = (noise / STEP if weighted else 1.0) * flow.nll(leaf, y).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        prediction = score_target(gradient, noise)
        step = x - tweedie_step(noise, weighted=weighted) * prediction
        torch.testing.assert_close(step, posterior, atol=1e-6, rtol=1e-6)
