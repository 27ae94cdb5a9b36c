"""The flow is invertible, causal, and its likelihood is the change of variables."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch

import starflow_ext
from starflow import Flow, FlowConfig, Sequential, Window, decode
from starflow.model import nll_of, to_grid, to_sequence

from ..flows import CASES, IMAGE, TARFLOW, VIDEO, condition, inputs, latents, make_flow, null

EXACT = Window(size=6, tolerance=0.0)


@pytest.mark.parametrize("name", CASES)
def test_round_trips(name: str) -> None:
    flow = make_flow(CASES[name]).double()
    x, y = inputs(name, flow)
    encoded = flow.encode(x, y)
    assert (encoded.z - x).abs().max() > 0.1  # the flow does something
    # The prior of a volume-preserving flow has a variance of its own: noise is z over its standard deviation.
    noise = encoded.z / flow._join(
        flow._prior_variance(encoded.latents[0]).sqrt().expand_as(encoded.latents[0]), x.dim() == 4
    )
    torch.testing.assert_close(decode(flow, noise, y, schedule=EXACT).x, x, atol=1e-7, rtol=1e-7)
    z = latents(flow, image=x.dim() == 4, seed=5)
    decoded = decode(flow, z, y, schedule=EXACT)
    torch.testing.assert_close(decoded.latents[-1], flow.encode(decoded.x, y).latents[0], atol=1e-12, rtol=0.0)
    back = flow.encode(decoded.x.clone(), y).latents[-1]
    scaled = flow._cut(z) * flow._prior_variance(back).sqrt()
    torch.testing.assert_close(back, scaled, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    flow = make_flow(CASES[name]).double()
    x, y = inputs(name, flow, batch=1)
    if flow.config.rope:  # a clip of few dimensions
        x = x[..., : 2 * flow.config.patch_size, : 2 * flow.config.patch_size]
        x = x if x.dim() == 4 else x[:, :2]

    def noise(flat: torch.Tensor) -> torch.Tensor:
        return flow.encode(flat.view_as(x), y).z.flatten()

    with starflow_ext.reference_mode():
        jacobian = torch.autograd.functional.jacobian(noise, x.flatten())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    total = sum(d.sum() for d in flow.encode(x, y).log_det)
    torch.testing.assert_close(total, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["video", "video spread", "video spread shifted", "image grouped", "tarflow"])
def test_strict_causality(name: str) -> None:
    """In the order of a block, no affine map depends on its own token or a later one, and each on the one before."""
    flow = make_flow(CASES[name], spread=1.0).double()
    x, y = inputs(name, flow, batch=1)
    for block in flow._blocks():
        grid = block.fold(torch.randn_like(flow.encode(x, y).latents[0]))[:1]
        context = flow._context(block, y)
        layout = block.layout(*grid.shape[1:4], context, image=x.dim() == 4)
        sequence = to_sequence(grid, layout.order).requires_grad_()
        assert block.conditioner is not None
        terms = block.conditioner(sequence, context, layout)[0].terms()
        for n in range(0, layout.tokens, 3):
            (seen,) = torch.autograd.grad(
                terms.shift[0, n].sum() + terms.scale[0, n].sum(), sequence, retain_graph=True, allow_unused=True
            )
            by_token = torch.zeros(layout.tokens) if seen is None else seen[0].abs().sum(-1)
            assert (by_token[n:] == 0).all()
            assert n == 0 or by_token[n - 1] > 0


def test_frame_local_blocks_see_their_frame_alone() -> None:
    flow = make_flow(VIDEO)
    x, y = inputs("video", flow)
    other = x.clone()
    other[:, 1] += 1.0
    block = flow._blocks()[0]
    grids = [flow.encode(data, y).latents[0] for data in (x, other)]
    a, b = (block.encode(grid, None, image=False)[0] for grid in grids)
    assert torch.equal(a[:, 0], b[:, 0])
    assert torch.equal(a[:, 2], b[:, 2])
    assert not torch.equal(a[:, 1], b[:, 1])


@pytest.mark.parametrize("name", ["video", "video backwards in time", "image", "tarflow shift only"])
def test_likelihood_by_frame(name: str) -> None:
    flow = make_flow(CASES[name]).double()
    x, y = inputs(name, flow)
    encoded = flow.encode(x, y)
    by_frame = flow.log_likelihood(encoded)
    assert by_frame.shape == (2, 1 if x.dim() == 4 else 3)
    torch.testing.assert_close(flow.log_prob(x, y), by_frame.sum(1))
    variance = flow._prior_variance(encoded.latents[-1]).expand_as(encoded.latents[-1])
    prior = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(encoded.latents[-1])
    expected = prior.flatten(1).sum(1) + sum(d.flatten(1).sum(1) for d in encoded.log_det)
    torch.testing.assert_close(flow.log_prob(x, y), expected)
    nats = 0.5 * encoded.z.square().flatten(1).sum(1) - sum(d.flatten(1).sum(1) for d in encoded.log_det)
    torch.testing.assert_close(nll_of(encoded) * x[0].numel(), nats)


def test_first_frames_have_the_likelihood_that_they_have_alone() -> None:
    flow = make_flow(VIDEO | {"top_order": "spread"}).double()
    x, y = inputs("video", flow)
    by_frame = flow.log_likelihood(flow.encode(x, y))
    for frames in (1, 2):
        torch.testing.assert_close(flow.log_prob(x[:, :frames], y), by_frame[:, :frames].sum(1))


def test_log_dets_of_a_block_that_goes_backwards_stand_at_their_frames() -> None:
    """Data that differ in the first frame alone: a backwards block standardises the other frames before it."""
    options = CASES["video backwards in time"] | {"layers_per_block": (2,), "seq_order": "L2R"}
    flow = make_flow(options).double()
    assert flow._blocks()[0].backwards
    x, y = latents(flow, image=False), condition(flow)
    other = x.clone()
    other[:, 0] += 1.0
    a, b = (flow.log_likelihood(flow.encode(data, y)) for data in (x, other))
    torch.testing.assert_close(a[:, 1:], b[:, 1:], atol=1e-12, rtol=0)
    assert (a[:, 0] - b[:, 0]).abs().max() > 0.1


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_a_flow_that_predicts_constants_is_gaussian(bias: float) -> None:
    flow = make_flow(VIDEO, spread=0.0).double()
    shift, log_half = bias, -bias
    with torch.no_grad():
        for block in flow._blocks():
            assert block.conditioner is not None
            block.conditioner.proj_out.bias[:2] = log_half
            block.conditioner.proj_out.bias[2:] = shift
    x, y = inputs("video", flow)
    scale = torch.nn.functional.softplus(
        torch.tensor(4 * math.tanh(log_half / 4) + 0.541324854612918, dtype=torch.float64)
    )
    mean = 4 * math.tanh(shift / 4) * (1 + scale + scale**2)
    expected = torch.distributions.Normal(mean, scale**3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x, y), expected)


@pytest.mark.parametrize("name", ["video", "video spread", "video without text"])
def test_an_image_is_a_video_of_one_frame(name: str) -> None:
    flow = make_flow(CASES[name])
    x, y = latents(flow, image=True), condition(flow)
    torch.testing.assert_close(flow.encode(x, y).z, flow.encode(x[:, None], y).z[:, 0])
    torch.testing.assert_close(flow.log_prob(x, y), flow.log_prob(x[:, None], y))
    image, clip = (decode(flow, z, y, schedule=EXACT).x for z in (x, x[:, None]))
    torch.testing.assert_close(image, clip[:, 0])


@pytest.mark.parametrize("name", ["video", "video spread", "video of classes", "image gated", "tarflow classes"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    flow = make_flow(CASES[name])
    x, y = inputs(name, flow, batch=3)
    together = flow.encode(x, y)
    decoded = decode(flow, x, y, schedule=EXACT).x
    for i in range(3):
        one = slice(i, i + 1)
        alone = flow.encode(x[one], None if y is None else y[one])
        torch.testing.assert_close(together.z[one], alone.z, atol=1e-5, rtol=1e-5)
        sample = decode(flow, x[one], None if y is None else y[one], schedule=EXACT).x
        torch.testing.assert_close(decoded[one], sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["video", "video spread", "image exp", "image shift only", "tarflow"])
def test_native_ops_agree_with_plain_torch_end_to_end(name: str) -> None:
    flow = make_flow(CASES[name])
    x, y = inputs(name, flow)
    results = []
    for mode in (contextlib.nullcontext(), starflow_ext.reference_mode()):
        flow.zero_grad()
        leaf = x.clone().requires_grad_()
        with mode:
            loss = flow.nll(leaf, y).mean()
            loss.backward()
            decoded = decode(flow, x, y, null=null(flow), guidance=1.5 if flow.config.txt_size else 0.0, schedule=EXACT)
        gradients = [p.grad.clone() for p in flow.parameters() if p.grad is not None]
        results.append([loss.detach(), leaf.grad, decoded.x, *gradients])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_bf16_weights_stay_close() -> None:
    """Of z at 2 % of its range: eight bits of mantissa, and a float32 residual stream."""
    flow = make_flow(VIDEO)
    x, y = inputs("video", flow)
    rounded = copy.deepcopy(flow).bfloat16()
    exact, got = flow.encode(x, y), rounded.encode(x, y)
    assert got.z.dtype == torch.float32
    assert (got.z - exact.z).abs().max() < 0.02 * exact.z.abs().max()
    torch.testing.assert_close(nll_of(got), nll_of(exact), atol=0.01, rtol=0.01)
    decoded = decode(rounded, x, y, schedule=EXACT)
    assert decoded.x.dtype == torch.float32
    back = rounded.encode(decoded.x.clone(), y).z
    assert (back - x).abs().max() < 0.1  # bf16 products differ with the shape of a call


def test_weights_of_mixed_dtypes() -> None:
    flow = make_flow(VIDEO)
    x, y = inputs("video", flow)
    mixed = copy.deepcopy(flow)
    state = {
        name: tensor.bfloat16() if "layers" in name and "norm" not in name else tensor
        for name, tensor in flow.state_dict().items()
    }
    mixed.load_state_dict(state, assign=True)
    assert (mixed.encode(x, y).z - flow.encode(x, y).z).abs().max() < 0.1
    assert decode(mixed, x, y, schedule=EXACT).x.isfinite().all()
    back = Flow(flow.config).eval()
    back.load_state_dict(mixed.state_dict())
    torch.testing.assert_close(back.encode(x, y).z, mixed.encode(x, y).z, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_give_the_same_gradients(every: int) -> None:
    flow = make_flow(VIDEO)
    x, y = inputs("video", flow)
    recomputing = make_flow(VIDEO, use_checkpoint=every)
    recomputing.load_state_dict(flow.state_dict())
    for model in (flow, recomputing):
        model.nll(x, y).mean().backward()
    for (name, p), q in zip(flow.named_parameters(), recomputing.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_grids_keep_their_place() -> None:
    """Latents are grids in raster order whatever the order of a block: with constant maps nothing moves."""
    flow = make_flow(VIDEO | {"top_order": "spread"}, spread=0.0)
    with torch.no_grad():
        for block in flow._blocks():
            block.conditioner.proj_out.bias.zero_()  # type: ignore[union-attr]
    x, y = inputs("video", flow)
    encoded = flow.encode(x, y)
    for latent in encoded.latents:
        torch.testing.assert_close(latent, encoded.latents[0], atol=1e-6, rtol=0)
    order = flow._blocks()[-1].layout(3, 3, 5, y, image=False).order
    grid = encoded.latents[0]
    assert torch.equal(to_grid(to_sequence(grid, order), order, 3, 3, 5), grid)


@pytest.mark.parametrize("nominal", [True, False])
def test_a_centred_flow_is_one_of_data_without_their_mean(nominal: bool) -> None:
    flow = make_flow(CASES["video centred"]).double()
    plain = make_flow(CASES["video centred"] | {"centred": False}).double()
    plain.load_state_dict({name: value for name, value in flow.state_dict().items() if "centre" not in name})
    config, y = flow.config, condition(flow)
    side = config.img_size if nominal else 2 * config.patch_size
    mean = torch.randn(config.in_channels, config.img_size, config.img_size, dtype=torch.float64)
    flow.centre_on(mean)
    # Frames of another size have the mean of each channel of a token.
    cut = mean.unfold(1, config.patch_size, config.patch_size).unfold(2, config.patch_size, config.patch_size)
    taken = mean if nominal else cut.mean((1, 2)).repeat(1, 2, 2)
    x = torch.randn(2, 3, config.in_channels, side, side, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x, y), plain.log_prob(x - taken, y))
    torch.testing.assert_close(flow.encode(x, y).z, plain.encode(x - taken, y).z)
    assert flow.denoiser is not None
    assert plain.denoiser is not None
    torch.testing.assert_close(flow.denoiser(x), plain.denoiser(x - taken))
    z = torch.randn_like(x)
    torch.testing.assert_close(decode(flow, z, y).x, decode(plain, z, y).x + taken, atol=1e-5, rtol=1e-5)
    given = {"prefix": x[:, :1].clone()}, {"prefix": x[:, :1] - taken}
    torch.testing.assert_close(
        decode(flow, z, y, **given[0]).x, decode(plain, z, y, **given[1]).x + taken, atol=1e-5, rtol=1e-5
    )


def test_tracked_means_are_means_of_network_outputs() -> None:
    flow = make_flow(VIDEO)
    x, y = inputs("video", flow)
    encoded = flow.encode(x, y)
    flow.track(encoded, 1.0)
    for block, affine in zip(flow._blocks(), encoded.affines, strict=True):
        torch.testing.assert_close(block.guess, affine.raw.mean((0, 1)))  # type: ignore[union-attr]
    volume = make_flow(TARFLOW | {"nvp": False})
    x = latents(volume)
    before, encoded = volume.prior_variance.clone(), volume.encode(x)
    volume.track(encoded, 0.1)
    squares = encoded.latents[-1].square().mean(0).flatten(0, 2)
    torch.testing.assert_close(volume.prior_variance, before + 0.1 * (squares - before))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_are_labels(dtype: torch.dtype) -> None:
    """As many labels as classes, of uint8, would be a mask."""
    flow = make_flow(TARFLOW | {"num_classes": 3})
    x, y = latents(flow, batch=3), torch.tensor([2, 2, 0])
    expected = flow.log_prob(x, y)
    assert not torch.equal(expected, flow.log_prob(x, torch.tensor([0, 1, 2])))
    assert torch.equal(flow.log_prob(x, y.to(dtype)), expected)
    assert torch.equal(decode(flow, x, y.to(dtype)).x, decode(flow, x, y).x)
    if dtype != torch.uint8:
        assert torch.equal(flow.log_prob(x, torch.full((3,), -1, dtype=dtype)), flow.log_prob(x))
    with pytest.raises(ValueError, match=r"y has shape \[3\] and dtype torch.bool, expected 3 integer labels below 3"):
        flow.log_prob(x, y > 0)


ERRORS = [
    (VIDEO, {"x": torch.zeros(1, 3, 7, 4, 4)}, r"x has shape \[1, 3, 7, 4, 4\], expected \(batch, frames, 2, height"),
    (VIDEO, {"x": torch.zeros(2, 4)}, r"flow: x has shape \[2, 4\], expected"),
    (VIDEO, {"x": torch.zeros(1, 1, 2, 4, 4, dtype=torch.int64)}, r"x has dtype int64, expected float32"),
    (VIDEO, {"x": torch.zeros(0, 1, 2, 4, 4)}, r"x has shape \[0, 1, 2, 4, 4\], expected at least one of each"),
    (VIDEO, {"x": torch.zeros(1, 0, 2, 4, 4)}, r"x has shape \[1, 0, 2, 4, 4\], expected at least one of each"),
    (VIDEO, {"x": torch.zeros(1, 1, 2, 4, 4).double()}, r"x has dtype float64, expected float32, bfloat16 or float16"),
    (VIDEO, {"y": None}, r"flow: y is None, expected text features"),
    (VIDEO, {"y": torch.zeros(1, 4, 5)}, r"y has shape \[1, 4, 5\], expected \(1, at most 3 text tokens, 5\)"),
    (VIDEO, {"y": torch.zeros(1, 3, 5, dtype=torch.int64)}, r"y has dtype torch\.int64, expected text features, which"),
    (VIDEO, {"y": torch.zeros(2, 3, 5)}, r"y has shape \[2, 3, 5\], expected \(1, at most 3"),
    (IMAGE, {"x": torch.zeros(1, 3, 4, 4), "y": torch.zeros(1)}, "y is given, expected None"),
    (IMAGE, {"x": torch.zeros(1, 2, 3, 4, 4), "y": None}, "the clip has 2 frames, expected 1: without text"),
    (TARFLOW, {"x": torch.zeros(1, 3, 8, 4), "y": None}, "the clip has 8 tokens, expected the 16 of the learned"),
    (TARFLOW | {"num_classes": 3}, {"x": torch.zeros(1, 3, 8, 8), "y": torch.tensor([3])}, "1 integer labels below 3"),
    (TARFLOW | {"num_classes": 3}, {"x": torch.zeros(1, 3, 8, 8), "y": torch.tensor([0.5])}, "dtype torch.float32"),
]


@pytest.mark.parametrize(("options", "given", "message"), ERRORS)
def test_errors(options: dict, given: dict, message: str) -> None:
    flow = make_flow(options)
    arguments = {"x": torch.zeros(1, 1, 2, 4, 4), "y": torch.zeros(1, 3, 5)} | given
    with pytest.raises(ValueError, match=message):
        flow.encode(**arguments)


def test_errors_of_decoding_name_the_argument() -> None:
    flow = make_flow(VIDEO)
    z, y = inputs("video", flow)
    for given, message in [
        ({"guidance": 1.0}, "flow: null is None, expected text features of the empty prompt"),
        ({"null": torch.zeros(2, 3, 4)}, r"flow: null has shape \[2, 3, 4\], expected \(2, at most 3"),
        ({"guidance": -1.0}, "guidance: weight is -1.0, expected a finite number >= 0"),
        ({"guidance": float("nan")}, "guidance: weight is nan"),
        ({"temperature": 0.0}, "flow: temperature is 0.0, expected a finite number > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(flow, z, y, **given)
    with pytest.raises(ValueError, match=r"flow: z has shape \[2, 3\]"):
        decode(flow, torch.zeros(2, 3), y)
    free = make_flow(IMAGE)
    with pytest.raises(ValueError, match=r"guidance is 2.0, expected 0 without text or classes to guide by"):
        decode(free, latents(free), guidance=2.0, schedule=Sequential())


def test_compiles_without_a_graph_break() -> None:
    flow = make_flow(VIDEO, layers_per_block=(1, 1))
    x, y = inputs("video", flow)
    # `aot_eager` traces forward and backward but needs no compiler.
    compiled = torch.compile(lambda x, y: flow.encode(x, y).z, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), flow.encode(x, y).z, atol=1e-5, rtol=1e-5)


def test_config_of_one_case_is_accepted_as_a_list() -> None:
    flow = Flow(FlowConfig(**(VIDEO | {"layers_per_block": [1, 1, 1]})))  # type: ignore[arg-type]
    assert flow.encode(*inputs("video", flow)).z.isfinite().all()
