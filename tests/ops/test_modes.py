"""Ops in the modes of torch: the table of docs/ops.md, places that nobody sees, and graphs for every position."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import FrameMask, Rotation, ops, pack_weight, reference_mode
from starflow_ext._spec import tensors

from . import modes

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"
MARKS = ("<!-- modes: python -m tests.ops.modes -->", "<!-- end of modes -->")


@cache
def rows() -> Mapping[str, list[modes.Call]]:
    return modes.rows()


@cache
def documented() -> dict[tuple[str, str], str]:
    """The cells of the page's table, by op and mode."""
    text = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    head, _, *lines = (line.strip("| ").split("|") for line in text.strip().splitlines())
    names = [name.strip(" `") for name in head]
    return {(name, line[0].strip()): cell.strip() for line in lines for name, cell in zip(names, line[1:], strict=True)}


def test_the_page_has_every_op_and_mode() -> None:
    assert set(documented()) == set(modes.cells())


# A call is traced, which takes seconds: the first of each op here, every one by hand with `python -m tests.ops.modes`.
# Of AOTInductor the first calls are all in one package.
TRACED = ("dynamic compile", "strict export", "AOTInductor")


@pytest.mark.parametrize("mode", modes.MODES)
def test_every_cell_is_what_the_page_says(mode: str) -> None:
    for name, calls in rows().items():
        for call in calls[:1] if mode in TRACED else calls:
            assert modes.outcome(mode, call) == documented()[name, mode], f"{name}, {call.label}"


# Positions and lengths as numbers, which change from call to call.
def _decode(start: int, q: Tensor, qkv: Tensor, cache: tuple[Tensor, Tensor], tables: Rotation) -> Tensor:
    """A step of a decode loop: a token into the cache, and its attention."""
    rotation = Rotation(tables.cos[start : start + 1], tables.sin[start : start + 1])
    q, k, v = ops.rope_append(
        qkv, heads=4, kv_heads=2, query_rotation=rotation, key_rotation=rotation, cache=cache, start=start
    )
    return ops.block_attention(q, k, v, q_start=start)


@pytest.fixture
def loop() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    angles = draw(40, 8)
    return {
        "q": draw(3, 4, 1, 16),
        "qkv": draw(3, 1, 8 * 16),
        "cache": (draw(3, 2, 40, 16), draw(3, 2, 40, 16)),
        "tables": Rotation(angles.cos(), angles.sin()),
    }


def _graphs(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> int:
    """The number of graphs that the calls compile to; their results are those of the function, to the bit."""
    torch._dynamo.reset()
    backend = modes.Counting()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch.no_grad():
        for call in calls:
            assert torch.equal(compiled(*call), function(*call)), call[0]
    return backend.graphs


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_decode_loop_is_compiled_once_for_all_positions(loop: dict[str, Any]) -> None:
    # The first position is a constant of the first graph; the second graph is that of all.
    assert _graphs(lambda start: _decode(start, **loop), [(start,) for start in range(5, 30)]) <= 2


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_decode_loop_with_positions_in_a_tensor_is_one_graph(loop: dict[str, Any]) -> None:
    keys, values = loop["cache"]

    def step(start: Tensor) -> Tensor:
        q, k, v = ops.rope_append(loop["qkv"], heads=4, kv_heads=2, cache=(keys, values), start=start, slots=40)
        return ops.block_attention(q, k, v, q_start=start)

    assert _graphs(step, [(torch.tensor([n, n + 3, n - 2]),) for n in range(4, 20)]) == 1


@pytest.mark.parametrize("option", ["q_start", "k_start", "k_length"])
def test_positions_of_attention_are_compiled_once(loop: dict[str, Any], option: str) -> None:
    keys, values = loop["cache"]

    def attend(number: int) -> Tensor:
        return ops.block_attention(loop["q"], keys, values, **{option: number})  # type: ignore[arg-type]

    assert _graphs(attend, [(number,) for number in range(5, 30)]) <= 2


# What nobody sees, and so may be NaN or infinite.
UNSEEN: dict[str, tuple[dict[str, Any], slice]] = {
    "beyond k_length": ({"causal": False, "k_length": 70}, slice(70, None)),
    "behind a causal window": ({"q_start": 60}, slice(67, None)),
    "before k_start": ({"k_start": 70}, slice(0, 70)),
    "before k_start, all in one block": ({"k_start": torch.tensor([5, 5])}, slice(0, 5)),
    "between the prefix and the window": ({"frames": FrameMask(3, 10, 1, 1), "q_start": 93}, slice(3, 83)),
    "no key at all": ({"k_length": 0}, slice(None)),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", UNSEEN)
def test_keys_that_no_query_sees_may_hold_anything(case: str, dtype: torch.dtype, value: float, isa: str) -> None:
    options, hidden = UNSEEN[case]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, 32, generator=generator).to(dtype) for n in (7, 100, 100))

    def results(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ops.block_attention(*leaves, **options)
        return (out, *torch.autograd.grad(out.float().square().sum(), leaves))

    expected = results(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = value, value
    with reference_mode():
        assert all(part.isfinite().all() for part in results(k, v))
    assert all(torch.equal(a, b) for a, b in zip(results(k, v), expected, strict=True))


def test_queries_that_see_no_key_may_hold_anything(isa: str) -> None:
    """Padding on the left: the first five queries of a sample stand before its first key."""
    q, k, v = torch.randn(3, 2, 2, 9, 16, generator=torch.Generator().manual_seed(2))

    def results(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ops.block_attention(*leaves, k_start=5)
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    expected = results(q, k)
    assert not expected[0][:, :, :5].any()
    q, k = q.clone(), k.clone()
    q[:, :, :5], k[:, :, :5] = torch.nan, torch.nan
    with reference_mode():
        assert all(part.isfinite().all() for part in results(q, k))
    assert all(torch.equal(a, b) for a, b in zip(results(q, k), expected, strict=True))


@pytest.mark.parametrize("op", [ops.affine_forward, ops.affine_inverse])
@pytest.mark.parametrize("soft_clip", [0.0, 3.0])
def test_the_last_row_of_shifted_raw_may_hold_anything(op: Any, soft_clip: float, isa: str) -> None:
    data, raw = torch.randn(2, 5, 7), torch.randn(2, 5, 14)

    def results(raw: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (data, raw)]
        out = tensors(op(*leaves, soft_clip=soft_clip, shifted=True))
        return (*out, *torch.autograd.grad(sum(part.square().sum() for part in out), leaves))

    expected = results(raw)
    spoiled = raw.clone()
    spoiled[:, -1] = torch.nan
    with reference_mode():
        assert all(part.isfinite().all() for part in results(spoiled))
    assert all(torch.equal(a, b) for a, b in zip(results(spoiled), expected, strict=True))


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_clamped_scales_have_no_gradient_and_no_nan(activation: Any, isa: str) -> None:
    """Log-scales far outside of the clamp, where the slope is zero, also where the noise overflows."""
    below, above = [-1e4, -200.0, -100.0], [1e4, 200.0, 100.0]
    # Softplus is linear above, and nothing is clamped there.
    raw = torch.tensor([below + (above if activation == "exp" else below) + [1e4, -1e4, 0.0, 1.0, 2.0, 3.0]]).repeat(
        2, 1
    )
    x = torch.randn(2, 6)

    def log_det(raw: Tensor) -> Tensor:
        return ops.affine_forward(x, raw, activation=activation)[1]

    leaf = raw.clone().requires_grad_()
    (grad,) = torch.autograd.grad(log_det(leaf).sum(), leaf)
    assert not grad.any()
    (grad,) = torch.autograd.grad(ops.affine_inverse(x, leaf, activation=activation).sum(), leaf)
    assert not grad[:, :6].any()
    assert not torch.func.jvp(log_det, (raw,), (torch.ones_like(raw),))[1].any()


def test_an_inference_tensor_cannot_be_saved_for_a_gradient() -> None:
    """The words are torch's own."""
    with torch.inference_mode():
        x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=r"^Inference tensors cannot be saved for backward"):
        ops.norm(x, torch.ones(4, requires_grad=True))


def test_transforms_are_explained() -> None:
    from starflow_ext import explain

    def seen(x: Tensor) -> Tensor:
        record = explain("norm", x)
        assert record.runs == "torch"
        assert set(record.refused.values()) >= {"a transform of torch.func or forward-mode differentiation is active"}
        return x

    torch.func.vmap(seen)(torch.ones(3, 4))


def test_gradients_of_linear_are_those_of_its_product() -> None:
    """With float32 x, and the weight stored in a half type: float16 holds no gradient above 65504 or below 6e-8."""
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(8, 16).to(dtype).requires_grad_()
        for size in (1e5, 1e-8):
            x, bias = torch.randn(4, 16, requires_grad=True), torch.zeros(8, requires_grad=True)
            upstream = torch.full((4, 8), size)
            got = torch.autograd.grad(ops.linear(x, pack_weight(weight), bias), (x, bias), upstream)
            torch.testing.assert_close(got[0], upstream @ weight.detach().float(), rtol=1e-5, atol=0)
            torch.testing.assert_close(got[1], upstream.sum(0), rtol=1e-6, atol=0)


def test_the_page_shows_the_marks_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [len(re.findall(re.escape(mark), text)) for mark in MARKS] == [1, 1]
