"""What is special to block_attention: the mask as a rule, rows that see nothing, and rows that stand alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import starflow_ext
from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext.block_attention import SPEC, FrameMask, _backward_kernel, _forward_kernel

from .battery import assert_refused, plain

# Of results, relative to the largest value, and of gradients: bfloat16 rounds weights to 8 bits before each product.
BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LEVELS = [level for level, missing in native.isa_levels().items() if not missing]


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """By the definition, in float64, with a dense mask (batch, queries, keys)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    products = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5 * temperature)
    mask = mask[:, None].expand_as(products)
    weights = torch.where(mask, products, -1e300).softmax(-1) if k.shape[2] else products
    lse = torch.where(mask, products, -torch.inf).logsumexp(-1)
    return torch.where(mask, weights, 0.0) @ v, lse


def _dense(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    start: Tensor,
    length: Tensor,
    frames: FrameMask | None,
) -> Tensor:
    position, key = start[:, None] + torch.arange(queries), torch.arange(keys)
    mask = (key < length[:, None, None]).expand(batch, queries, keys).clone()
    if causal:
        mask &= key <= position[..., None]
    if frames is not None:
        for b in range(batch):
            mask[b] &= frames.visible(position[b], key)
    return mask


@st.composite
def _calls(draw: Any) -> dict[str, Any]:
    """Any shape and any mask."""
    queries, keys = draw(st.integers(0, 140)), draw(st.integers(0, 140))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 5]))
    frames = None
    if draw(st.booleans()):
        look_ahead = draw(st.integers(1, 3))
        window = draw(st.sampled_from([None, look_ahead - 1, look_ahead, 4]))
        frames = FrameMask(draw(st.integers(0, 70)), draw(st.integers(1, 40)), look_ahead, window)
    causal = draw(st.booleans())
    given_start = frames is not None or (causal and draw(st.booleans()))
    number = st.integers(-5, 150)
    return {
        "level": draw(st.sampled_from(LEVELS)),
        "dtype": draw(st.sampled_from(list(BOUNDS))),
        "shape": (batch, kv_heads, group, queries, keys, draw(st.integers(1, 70))),
        "causal": causal,
        "frames": frames,
        "start": [draw(number) for _ in range(batch)] if given_start else None,
        "length": [draw(number) for _ in range(batch)] if draw(st.booleans()) else None,
        "each": draw(st.booleans()),
        "temperature": draw(st.sampled_from([1.0, 0.6])),
    }


def _assert_call(call: dict[str, Any], device: str) -> None:
    """Results and gradients on a device are those of the definition in float64."""
    batch, kv_heads, group, queries, keys, head_dim = call["shape"]
    dtype, each = call["dtype"], call["each"]
    q = _draw(batch, kv_heads * group, queries, head_dim, dtype=dtype).to(device).requires_grad_()
    k, v = (
        _draw(batch, kv_heads, keys, head_dim, dtype=dtype, seed=seed).to(device).requires_grad_() for seed in (6, 7)
    )

    def numbers(values: list[int] | None, default: int) -> tuple[Tensor, int | Tensor | None]:
        if values is None:
            return torch.full((batch,), default), None
        values = values if each else values[:1] * batch
        return torch.tensor(values), torch.tensor(values, device=device) if each else values[0]

    start, q_start = numbers(call["start"], keys - queries)
    length, k_length = numbers(call["length"], keys)
    mask = _dense(batch, queries, keys, causal=call["causal"], start=start, length=length, frames=call["frames"])
    native.set_isa(call["level"])
    try:
        got = ops.block_attention(
            q,
            k,
            v,
            causal=call["causal"],
            q_start=q_start,
            k_length=k_length,
            frames=call["frames"],
            temperature=call["temperature"],
            return_lse=True,
        )
        seen = torch.where(got[1].isfinite(), got[1], 0.0)
        loss = (got[0].double() * _draw(*got[0].shape, dtype=torch.float64, seed=8).to(device)).sum() + seen.sum()
        grads = [grad.cpu() for grad in torch.autograd.grad(loss, (q, k, v))]
        got = (got[0].detach().cpu(), got[1].detach().cpu())
    finally:
        native.set_isa("")
    doubles = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    want = _exact(*doubles, mask, call["temperature"])
    seen = torch.where(want[1].isfinite(), want[1], 0.0)
    # What comes from above is rounded to the dtype of the result.
    above = _draw(*want[0].shape, dtype=torch.float64, seed=8).to(dtype).double()
    exact = torch.autograd.grad((want[0] * above).sum() + seen.sum(), doubles)
    assert torch.equal(got[1].isinf(), ~mask.any(-1)[:, None].expand(got[1].shape))
    assert (got[0][~mask.any(-1)[:, None].expand(got[1].shape)] == 0).all()
    for a, b in zip((got[0], *grads), (want[0], *exact), strict=True):
        if b.numel():
            torch.testing.assert_close(a.double(), b, rtol=0, atol=BOUNDS[dtype] * max(1.0, 4 * b.abs().max().item()))
    finite = want[1].isfinite()
    torch.testing.assert_close(got[1].double()[finite], want[1][finite], rtol=4e-6, atol=4e-6)


@settings(max_examples=200, deadline=None)
@given(_calls())
def test_any_shape_and_mask(call: dict[str, Any]) -> None:
    _assert_call(call, "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA")
@settings(max_examples=200, deadline=None)
@given(_calls())
def test_any_shape_and_mask_on_a_device(call: dict[str, Any]) -> None:
    _assert_call(call, "cuda")


def test_rows_stand_alone(isa: str) -> None:
    """A query's bits are those that it has alone, in any tile, beside any other query and for any number of threads."""
    q, k, v = _draw(1, 4, 200, 24), _draw(1, 2, 300, 24, seed=6), _draw(1, 2, 300, 24, seed=7)
    for dtype in (torch.float32, torch.bfloat16):
        x = [t.to(dtype) for t in (q, k, v)]
        together = ops.block_attention(*x, q_start=60)
        for i in (0, 1, 77, 199):
            alone = ops.block_attention(x[0][:, :, i : i + 1], x[1], x[2], q_start=60 + i)
            assert torch.equal(alone, together[:, :, i : i + 1])


@pytest.mark.parametrize("head_dim", [1, 20, 24, 48, 64, 80])
def test_few_rows_have_the_bits_of_many(head_dim: int, isa: str) -> None:
    """Also where keys and values are not packed, and whatever lies in the padding before the first key."""
    q, k, v = (_draw(2, 2, count, head_dim, seed=count) for count in (20, 150, 151))
    v, first = v[:, :, :150], torch.tensor([70, 0])
    for padded in (k, v):
        padded[0, :, :70] = torch.nan
    together = ops.block_attention(q, k, v, k_start=first)
    exact, _ = _exact(q[:1], k[:1, :, 70:], v[:1, :, 70:], torch.ones(1, 20, 80).tril(60).bool())
    torch.testing.assert_close(together[:1].double(), exact, rtol=4e-6, atol=4e-6)
    for count in range(1, 6):
        few = ops.block_attention(q[:, :, -count:], k, v, k_start=first)
        assert torch.equal(few, together[:, :, -count:])
        by_token = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        assert torch.equal(ops.block_attention(q[:, :, -count:], *by_token, k_start=first), few)


def test_hidden_keys_are_not_read(isa: str) -> None:
    """What lies in a cache behind the last visible key may be anything."""
    q, k, v = _draw(2, 2, 5, 24), _draw(2, 2, 200, 24, seed=6), _draw(2, 2, 200, 24, seed=7)
    length = torch.tensor([3, 131])
    expected = ops.block_attention(q, k, v, causal=False, k_length=length)
    for b in range(2):
        k[b, :, length[b] :] = torch.nan
        v[b, :, length[b] :] = torch.inf
    assert torch.equal(ops.block_attention(q, k, v, causal=False, k_length=length), expected)


def test_gradients_do_not_depend_on_threads_nor_on_the_run(isa: str) -> None:
    q, k, v = (_draw(2, heads, 150, 40, seed=heads) for heads in (6, 2, 2))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, *[2] * 30):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = ops.block_attention(*leaves, return_lse=True)
            found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_large_products_do_not_overflow(isa: str) -> None:
    q, k, v = 60 * _draw(1, 1, 40, 32), 60 * _draw(1, 1, 200, 32, seed=6), _draw(1, 1, 200, 32, seed=7)
    out, lse = ops.block_attention(q, k, v, return_lse=True)
    want = _exact(q, k, v, torch.arange(200) <= torch.arange(160, 200)[None, :, None])
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=0)


def test_nan_stays_in_its_row(isa: str) -> None:
    q, k, v = _draw(1, 1, 70, 16), _draw(1, 1, 70, 16, seed=6), _draw(1, 1, 70, 16, seed=7)
    q[0, 0, 13, 5] = torch.nan
    out, lse = ops.block_attention(q, k, v, return_lse=True)
    assert out[0, 0, 13].isnan().all()
    assert lse[0, 0, 13].isnan()
    others = torch.arange(70) != 13
    assert out[0, 0, others].isfinite().all()
    assert lse[0, 0, others].isfinite().all()


def test_heads_of_a_token_lie_side_by_side() -> None:
    q = _draw(2, 3, 5, 8)
    out = ops.block_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()


def test_temperature_divides_the_products(isa: str) -> None:
    q, k, v = _draw(3, 2, 5, 24), _draw(3, 2, 9, 24, seed=6), _draw(3, 2, 9, 24, seed=7)
    each = torch.tensor([0.5, 1.0, 2.0])
    together = ops.block_attention(q, k, v, temperature=each)
    for b, temperature in enumerate(each.tolist()):
        one = [x[b : b + 1] for x in (q, k, v)]
        assert torch.equal(ops.block_attention(*one, temperature=temperature), together[b : b + 1])
        # Halving is exact.
        assert torch.equal(ops.block_attention(one[0] / temperature, *one[1:]), together[b : b + 1])


def test_keys_of_another_dtype_are_rounded_to_that_of_the_queries() -> None:
    q, k, v = _draw(1, 2, 5, 24), _draw(1, 2, 9, 24, seed=6).bfloat16(), _draw(1, 2, 9, 24, seed=7).half()
    assert torch.equal(ops.block_attention(q, k, v), ops.block_attention(q, k.float(), v.float()))


def test_float64_runs_plain_torch() -> None:
    explanation = starflow_ext.explain("block_attention", *(_draw(1, 1, 2, 4, dtype=torch.float64),) * 3)
    assert explanation.runs == "torch"
    assert explanation.refused["scalar"] == "q is float64"


def _on_hopper(kernel: str) -> str:
    """What runs on a device of compute capability 9, if this build has code for it."""
    built = "90a-real" in str(native.build_info()["cuda_architectures"]).split(";")
    return kernel if built else "mma.sync, as this build has no sm_90a"


def test_which_cuda_kernel_runs() -> None:
    """By device, dtype, head_dim and the places of keys and values; the rest is in tests/native."""
    q, k = (_draw(2, 4, rows, 64).bfloat16() for rows in (3, 9))
    for major in (8, 10, 12):
        assert _forward_kernel(q, k, k, major) == "mma.sync, as the device is not of compute capability 9"
    assert _forward_kernel(q, k, k, 9) == _on_hopper("wgmma and TMA (sm_90a)")
    assert _forward_kernel(q, k.mT.contiguous().mT, k, 9) == _on_hopper("wgmma and TMA (sm_90a)")
    for changed, kernel in (
        ((q.float(), k.float(), k.float()), "mma.sync, as q is float32"),
        ([torch.cat((x, x, x), -1) for x in (q, k, k)], "mma.sync, as head_dim is above 128"),
        ((q, k[:, :, :0], k[:, :, :0]), "mma.sync, as there are no keys"),
        (
            (q, k, torch.empty(2, 4, 9, 68).bfloat16()[..., 2:66]),
            "mma.sync, as not every row of k and v starts at a multiple of 16 bytes",
        ),
        ((q, k[:1].expand(2, 4, 9, 64), k), "mma.sync, as rows of k or v lie on top of each other"),
    ):
        assert _forward_kernel(*changed, 9) == _on_hopper(kernel)


def test_which_cuda_kernel_runs_a_gradient() -> None:
    """As forward, and by the places of the queries; the rest is in tests/native."""
    q, k = (_draw(2, 4, rows, 64).bfloat16() for rows in (3, 9))
    for major in (8, 10, 12):
        assert _backward_kernel(q, k, k, major) == "mma.sync, as the device is not of compute capability 9"
    for queries in (q, q.mT.contiguous().mT, q[:, :, :1].expand(2, 4, 1, 64)):
        assert _backward_kernel(queries, k, k, 9) == _on_hopper("wgmma and TMA (sm_90a)")
    for changed, kernel in (
        ((q.float(), k.float(), k.float()), "mma.sync, as q is float32"),
        ((q[:, :, :0], k, k), "mma.sync, as there are no queries"),
        (
            (torch.empty(2, 4, 3, 68).bfloat16()[..., 2:66], k, k),
            "mma.sync, as not every row of q starts at a multiple of 16 bytes",
        ),
        ((q[:, :, :1].expand(2, 4, 3, 64), k, k), "mma.sync, as rows of q lie on top of each other"),
    ):
        assert _backward_kernel(*changed, 9) == _on_hopper(kernel)


def test_explanation_tells_the_kernel() -> None:
    explanation = starflow_ext.Explanation("block_attention", "cuda", {}, "mma.sync, as q is float32")
    assert str(explanation) == "block_attention runs as cuda: mma.sync, as q is float32"


def test_head_dims_without_a_cuda_kernel_are_refused() -> None:
    """By the head_dim alone, whether there is a device or not."""
    with FakeTensorMode():
        for gradient in (False, True):
            q = torch.empty(1, 1, 2, 257, device="cuda", requires_grad=gradient)
            with pytest.raises(RuntimeError, match="block_attention: q has head_dim 257, expected at most 256 on cuda"):
                ops.block_attention(q, q, q)
        # Without a gradient: a torch without CUDA aborts where autograd asks for the stream of such a tensor.
        q = torch.empty(1, 1, 2, 256, device="cuda")
        assert ops.block_attention(q, q, q).is_cuda


def test_wrong_arguments() -> None:
    good = plain(SPEC).arguments
    q, k, v = good["q"], good["k"], good["v"]
    mask = FrameMask(0, 4, 1)
    for changed, sentence in (
        ({"q": q[0]}, "q has shape [2, 7, 16], expected (batch, heads, queries, head_dim)"),
        ({"k": k[0]}, "k has shape [2, 7, 16], expected (batch, kv_heads, keys, head_dim)"),
        ({"k": k[..., :5]}, "k has head_dim 5, expected 16 like q"),
        ({"k": k[:1]}, "k has batch 1, expected 2 like q"),
        ({"v": v[:, :, :5]}, "v has shape [2, 2, 5, 16], expected [2, 2, 7, 16] like k"),
        ({"q": q[:, :1]}, "k has heads 2, expected a divisor of the 1 heads of q"),
        ({"q": q[..., :0], "k": k[..., :0], "v": v[..., :0]}, "q has head_dim 0, expected at least 1"),
        ({"q": q.int()}, "q has dtype int32, expected float32, bfloat16, float16 or float64"),
        ({"causal": False, "q_start": 2}, "q_start is given, expected None without causal"),
        ({"frames": mask}, "k has tokens 7, expected 7 like q: 0 of the prefix and whole frames of 4"),
        ({"q_start": torch.tensor([1])}, "q_start has shape [1], expected [2] for batch of q"),
        ({"k_length": torch.tensor([1.0, 2.0])}, "k_length has dtype float32, expected an integer one"),
        ({"temperature": torch.ones(3)}, "temperature has shape [3], expected [2] for batch of q"),
        ({"temperature": 0.0}, "temperature is 0, expected a finite number > 0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature holds 0, expected finite numbers > 0"),
        ({"temperature": torch.tensor([-2.0, 1.0])}, "temperature holds -2, expected finite numbers > 0"),
        ({"temperature": torch.tensor([1.0, torch.inf])}, "temperature holds inf, expected finite numbers > 0"),
        ({"temperature": torch.tensor([torch.nan, 1.0])}, "temperature holds nan, expected finite numbers > 0"),
    ):
        assert_refused(SPEC, {**good, **changed}, sentence)


def test_temperatures_are_looked_at_where_python_does_not() -> None:
    """In a compiled graph, whose tensors have no numbers when it is made."""
    q = torch.ones(2, 1, 3, 4)
    compiled = torch.compile(lambda each: ops.block_attention(q, q, q, temperature=each), fullgraph=True)
    assert compiled(torch.tensor([1.0, 2.0])).shape == q.shape
    with pytest.raises(RuntimeError, match="block_attention: temperature holds 0, expected finite numbers > 0"):
        compiled(torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("frames", [None, (0, 2, 1, 3), (0, 2, 1 << 30, 1 << 30)])
@pytest.mark.parametrize("start", [(1 << 63) - 1, 1 << 40, -(1 << 63), [(1 << 63) - 1, -(1 << 63)]])
def test_positions_beyond_all_numbers_see_what_is_seen_far_away(start: Any, frames: Any, isa: str) -> None:
    q, k, v = (torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    place = torch.tensor(start) if isinstance(start, list) else start
    # Far behind all keys, or far before the first.
    near = torch.tensor([1000 if first > 0 else -1000 for first in (start if isinstance(start, list) else [start] * 2)])
    options = {"causal": True, "frames": frames}
    assert torch.equal(
        ops.block_attention(q, k, v, q_start=place, **options), ops.block_attention(q, k, v, q_start=near, **options)
    )
    with starflow_ext.reference_mode():
        expected = ops.block_attention(q, k, v, q_start=place, **options)
    torch.testing.assert_close(ops.block_attention(q, k, v, q_start=place, **options), expected, rtol=1e-5, atol=1e-6)


def test_masks_beyond_all_numbers_are_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    for frames in ((1 << 31, 2, 1, None), (0, 1 << 31, 1, None), (0, 2, 1 << 31, None), (0, 2, 1, 1 << 31)):
        with pytest.raises(RuntimeError, match=r"^block_attention: frames\.\w+ is 2147483648, expected at most"):
            ops.block_attention(q, q, q, frames=frames)
    with pytest.raises(RuntimeError, match=r"^block_attention: k has tokens 4, expected 4 like q: 6 of the prefix"):
        ops.block_attention(q, q, q, frames=(6, 2, 1, None))
