"""The arguments that models have, and what every op says of a wrong one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import starflow_ext
from starflow_ext import Cache, FrameMask, InputNorm, Rotation, ops, pack_weight
from starflow_ext._check import types_of
from starflow_ext._spec import Spec, tensors
from starflow_ext.jacobi_solve import SolveProgress

from . import battery, modes
from .battery import SPECS
from .blocks import block, state_of


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 7, 40, generator=generator)


def test_norms_of_published_models(x: Tensor, isa: str) -> None:
    weight, bias = torch.randn(40), torch.randn(40)
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    llama = F.rms_norm(x, (40,), weight, 1e-5)
    torch.testing.assert_close(ops.norm(x, weight, kind="rms_norm", eps=1e-5, weight_offset=0.0), llama, **near)
    gemma = F.rms_norm(x, (40,), 1 + weight, 1e-6)
    torch.testing.assert_close(ops.norm(x, weight, kind="rms_norm"), gemma, **near)
    # Transformers of diffusion modulate a norm that has no parameters of its own.
    torch.testing.assert_close(ops.norm(x, eps=1e-6), F.layer_norm(x, (40,), eps=1e-6), **near)
    torch.testing.assert_close(ops.norm(x, None, bias, eps=1e-3), F.layer_norm(x, (40,), None, bias, 1e-3), **near)


@pytest.mark.parametrize("size", [1.0, 1e4, 3e7])
@pytest.mark.parametrize("channels", [3, 40, 1300])
def test_rows_that_are_constant(size: float, channels: int, isa: str) -> None:
    """The distances from the mean are zero, whatever rounding left of the mean."""
    weight, bias = torch.randn(channels), torch.randn(channels)
    rows = (size * torch.tensor([1.0, -1.2345678, 0.1]))[:, None].expand(3, channels)
    assert torch.equal(ops.norm(rows, weight, bias), bias.expand(3, channels))
    fused = ops.linear(rows, pack_weight(torch.eye(channels)), norm=InputNorm(weight, bias))
    assert torch.equal(fused, bias.expand(3, channels))


def test_rows_that_are_nearly_constant(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 1000.0 + torch.randn(5, 333, generator=generator)
    got, want = ops.norm(rows, torch.ones(333)), F.layer_norm(rows.double(), (333,))
    # The bound of the op, over the magnitudes of what is subtracted; the standard deviation is 1.
    assert (got - want).abs().max() < 2e-6 * 2000.0


@pytest.mark.parametrize("packed", [False, True])
def test_swiglu(x: Tensor, packed: bool, isa: str) -> None:
    gate, up = torch.randn(2, 50, 40) / 40**0.5
    given = [pack_weight(weight) if packed else weight for weight in (gate, up)]
    got = ops.linear(x, given[0], epilogue="silu", multiply=ops.linear(x, given[1]))
    want = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_silu_of_large_values(isa: str) -> None:
    values = torch.tensor([[-1e4, -100.0, -87.0, -1.0, 0.0, 1.0, 87.0, 1e4]]).T
    got = ops.linear(values, pack_weight(torch.ones(1, 1)), epilogue="silu")
    torch.testing.assert_close(got, F.silu(values), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_a_fused_norm_takes_the_options_of_the_op(x: Tensor, kind: Any, isa: str) -> None:
    packed = pack_weight(torch.randn(50, 40) / 40**0.5)
    for norm in (InputNorm(torch.randn(40), None, kind, 0.3, 0.25), InputNorm(kind=kind, eps=2.0)):
        alone = ops.norm(x, norm.weight, kind=kind, eps=norm.eps, weight_offset=norm.weight_offset)
        torch.testing.assert_close(ops.linear(x, packed, norm=norm), ops.linear(alone, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_left_padding_and_scale_of_attention(dtype: torch.dtype, isa: str) -> None:
    """As a causal language model calls it: a boolean mask of what is no padding, and a scale of its own."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, heads, 80, 24, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    first = torch.tensor([0, 13, 79])
    mask = torch.ones(80, 80, dtype=torch.bool).tril() & (torch.arange(80) >= first[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    want = torch.where(mask.any(-1, keepdim=True), want, 0.0)
    torch.testing.assert_close(ops.block_attention(q, k, v, k_start=first, scale=0.3), want, rtol=1e-5, atol=1e-5)
    both = ops.block_attention(q, k, v, k_start=first, scale=0.6, temperature=2.0)
    torch.testing.assert_close(both, want, rtol=1e-5, atol=1e-5)
    # A sample that is padded is the shorter sample alone.
    alone = ops.block_attention(*(t[1:2, :, 13:] for t in (q, k, v)), scale=0.3)
    padded = ops.block_attention(q, k, v, k_start=first, scale=0.3)[1:2, :, 13:]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_of_tokens() -> None:
    q, k, v = torch.randn(3, 2, 2, 50, 16, generator=torch.Generator().manual_seed(3))
    behind = torch.arange(50)[:, None] - torch.arange(50)
    want = F.scaled_dot_product_attention(q, k, v, (behind >= 0) & (behind < 7))
    got = ops.block_attention(q, k, v, frames=FrameMask(0, 1, 1, 6), causal=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_plain_tuples_stand_for_the_named_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 5, 4 * 8, generator=generator)
    angles = torch.randn(5, 4, generator=generator)
    tables = (angles.cos(), angles.sin())
    buffers = [torch.zeros(2, 1, 9, 8) for _ in range(4)]
    call: dict[str, Any] = {"heads": 2, "kv_heads": 1}
    named = ops.rope_append(qkv, **call, query_rotation=Rotation(*tables), cache=Cache(*buffers[:2]))
    plain = ops.rope_append(qkv, **call, query_rotation=tables, cache=(buffers[2], buffers[3]))
    assert all(torch.equal(a, b) for a, b in zip(named, plain, strict=True))
    q = torch.randn(1, 2, 14, 8, generator=generator)
    assert torch.equal(
        ops.block_attention(q, q, q, frames=(2, 4, 1)), ops.block_attention(q, q, q, frames=FrameMask(2, 4, 1))
    )
    packed, weight = pack_weight(torch.randn(6, 32)), torch.randn(32)
    assert torch.equal(ops.linear(qkv, packed, norm=(weight,)), ops.linear(qkv, packed, norm=InputNorm(weight)))


IGNORED = {
    "norm": [({"weight": None, "bias": None, "weight_offset": 1.0}, "weight_offset is 1, expected None without a")],
    "block_attention": [
        ({"k_start": 1, "frames": FrameMask(0, 7, 1)}, "k_start is given, expected None with frames"),
        ({"q_start": 1, "causal": False}, "q_start is given, expected None without causal"),
    ],
    "rope_append": [
        ({"start": 3}, "start is given, expected none without a cache"),
        ({"final": torch.tensor([1, 1])}, "final is given, expected none without a cache"),
        ({"slots": 3}, "slots is given, expected none without a cache"),
    ],
}


@pytest.mark.parametrize("name", IGNORED)
def test_no_argument_is_ignored_in_silence(name: str) -> None:
    spec = ops.SPECS[name]
    for changed, sentence in IGNORED[name]:
        given = {**battery.plain(spec).arguments, **changed}
        for context in (starflow_ext.reference_mode(), torch.no_grad()):
            with context, pytest.raises(RuntimeError, match=f"^{name}: {sentence}"):
                spec.call(**given)


def test_a_product_input_that_torch_does_not_take() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r'^linear: product_input is "bfloat16", expected None, as x is float64$'):
        ops.linear(x, x, product_input="bfloat16")


VALUES: list[Any] = [
    {"eps": -1.0},
    {"eps": torch.nan},
    {"eps": torch.inf},
    {"weight_offset": torch.nan},
    {"scale": 0.0},
    {"scale": -1.0},
    {"scale": torch.nan},
    {"temperature": 0.0},
    {"temperature": torch.inf},
    {"soft_clip": -1.0},
    {"soft_clip": torch.nan},
    {"guidance": torch.nan},
    {"heads": 0},
    {"kv_heads": -1},
    {"frames": (1,)},
    {"frames": (0, 0, 1)},
    {"norm": (1, 2, 3, 4, 5, 6)},
    {"norm": (torch.ones(48), None, "layer_norm", -1.0)},
    {"norm": (torch.ones(48), None, "batch_norm")},
    {"query_rotation": (torch.ones(5, 8),)},
    {"cache": (torch.ones(2),)},
    {"slots": -1, "cache": (torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 16))},
    {"slots": 10, "cache": (torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 16))},
]


@pytest.mark.parametrize("changed", VALUES, ids=str)
def test_values_that_no_option_has(changed: dict[str, Any]) -> None:
    for spec in SPECS:
        given = battery.plain(spec).arguments
        if changed.keys() <= spec.arguments(**given).keys():
            for context in (starflow_ext.reference_mode(), torch.no_grad()):
                with context, pytest.raises(RuntimeError) as refusal:
                    spec.call(**{**given, **changed})
                assert modes.is_sentence(str(refusal.value)), refusal.value


# One of each type that somebody may hand over in place of another.
OTHERS = (None, True, 3, 2.5, "x", [1, 2], {}, (1, 2), torch.ones(2), torch.ones(2).numpy(), object())


def _arguments() -> dict[str, tuple[Any, dict[str, Any]]]:
    calls = {spec.name: (spec.call, spec.arguments(**battery.plain(spec).arguments)) for spec in SPECS}
    weights = block({})
    state = state_of(weights, 2, 9)
    sweep = {"weights": weights, "state": state, "rows": torch.zeros(2, 7, 5), "start": torch.zeros(2).long()}
    progress = SolveProgress.begin(torch.zeros(2, 8, 5), 0, halves=1, out_channels=10)
    solve = {"weights": weights, "state": state, "progress": progress, "z": torch.zeros(2, 7, 5)}
    numbers = {"first": 0, "first_token": 0, "frame_tokens": 7, "window": 3, "tolerance": 0.0}
    calls["jacobi_sweep"] = ops.jacobi_sweep, sweep
    calls["jacobi_solve"] = ops.jacobi_solve, {**solve, **numbers}
    return calls


@pytest.mark.parametrize("name", ops.__all__)
def test_every_argument_of_another_type_is_told(name: str) -> None:
    call, given = _arguments()[name]
    allowed = dict(zip(inspect.signature(call).parameters, types_of(call), strict=True))
    for argument, kinds in allowed.items():
        for other in OTHERS:
            if isinstance(other, kinds):
                continue
            with pytest.raises(RuntimeError) as refusal:
                call(**{**given, argument: other})
            text = str(refusal.value)
            assert modes.is_sentence(text), text
            assert text.startswith(f"{name}: {argument} is "), text


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_wrong_shape_is_told_through_every_tracer(spec: Spec) -> None:
    sample = battery.plain(spec)
    name, tensor = next((n, v) for n, v in sample.arguments.items() if isinstance(v, Tensor))
    given = {**sample.arguments, name: torch.cat([tensor, tensor], -1)[..., 1:]}
    with pytest.raises(RuntimeError) as refusal:
        spec.call(**given)
    sentence = str(refusal.value)
    assert modes.is_sentence(sentence)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as traced:
        torch.compile(spec.call, fullgraph=True, backend="eager")(**given)
    assert sentence in str(traced.value), traced.value

    class Module(torch.nn.Module):
        def forward(self, value: Tensor) -> Any:
            return tensors(spec.call(**{**given, name: value}))

    with pytest.raises(RuntimeError) as exported:
        torch.export.export(Module(), (given[name],), strict=False)
    assert sentence in str(exported.value), exported.value
