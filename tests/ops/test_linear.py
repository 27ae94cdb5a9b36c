"""What is special to linear: packed weights of every storage, how x enters a product, and rows that stand alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import starflow_ext
from starflow_ext import ops, pack_weight
from starflow_ext._load import native
from starflow_ext._options import EPILOGUES, WEIGHT_STORAGES
from starflow_ext.linear import CPU_PRODUCT_INPUTS, InputNorm, _kernel_of

# Largest error of the product over the sum of the magnitudes of its terms: float32 rounds the sums, bfloat16 each
# activation by 2^-9; two of them leave 2^-17, and of two split factors the product of the small terms is left out.
BOUNDS = {"float32": 1e-6, "bfloat16": 2.0**-8, "two_bfloat16": 3e-5}


def _draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def _epilogue(product: Tensor, epilogue: str) -> Tensor:
    if epilogue == "none":
        return product
    if epilogue == "silu":
        return F.silu(product)
    return F.gelu(product, approximate="tanh" if epilogue == "gelu_tanh" else "none")


@pytest.mark.parametrize("storage", WEIGHT_STORAGES)
@pytest.mark.parametrize("product_input", CPU_PRODUCT_INPUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_storage_activation_and_epilogue(storage: Any, product_input: Any, epilogue: Any, isa: str) -> None:
    for rows, out, channels in ((1, 7, 19), (5, 33, 64), (16, 32, 100), (37, 65, 257), (190, 40, 33)):
        x, weight, bias = _draw(rows, channels), _draw(out, channels, seed=6), _draw(out, seed=7)
        gate, residual = _draw(rows, out, seed=8), _draw(rows, out, seed=9)
        packed = pack_weight(weight, storage)
        got = ops.linear(
            x, packed, bias, epilogue=epilogue, multiply=gate, residual=residual, product_input=product_input
        ).double()
        held = packed.unpack().double()
        product = x.double() @ held.T + bias
        want = residual + _epilogue(product, epilogue) * gate
        size = (x.double().abs() @ held.abs().T + bias.abs()) * gate.abs()
        # The slopes are at most 1.13; the error of GELU and of SiLU is at most 40 units of float32.
        allowed = 1.13 * BOUNDS[product_input] * size + 4e-6 * (want.abs() + residual.abs() + size)
        assert ((got - want).abs() <= allowed).all(), (rows, out, channels)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([level for level, missing in native.isa_levels().items() if not missing]),
    st.integers(0, 40),
    st.integers(0, 70),
    st.integers(0, 130),
    st.sampled_from(list(WEIGHT_STORAGES)),
    st.sampled_from(CPU_PRODUCT_INPUTS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, "layer_norm", "rms_norm"]),
    st.booleans(),
)
def test_any_shape(
    level: str, rows: int, out: int, channels: int, storage: Any, product_input: Any, dtype: Any, kind: Any, more: bool
) -> None:
    x = _draw(rows, channels).to(dtype)
    packed = pack_weight(_draw(out, channels, seed=6) / max(1, channels) ** 0.5, storage)
    norm = None
    if kind == "rms_norm":
        norm = InputNorm(0.1 * _draw(channels, seed=7), kind=kind)
    elif kind == "layer_norm":
        norm = InputNorm(_draw(channels, seed=7), _draw(channels, seed=8))
    residual = _draw(rows, out, seed=9) if more else None
    native.set_isa(level)
    try:
        got = ops.linear(x, packed, residual=residual, product_input=product_input, norm=norm)
    finally:
        native.set_isa("")
    entered = x.double()
    if norm is not None and channels:
        doubles = [None if part is None else part.double() for part in norm[:2]]
        entered = ops.norm(entered, doubles[0], doubles[1], kind=norm.kind)
    held = packed.unpack().double()
    want = entered @ held.T + (0.0 if residual is None else residual.double())
    size = entered.abs() @ held.abs().T + want.abs()
    stored = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[got.dtype]
    assert got.dtype == (torch.float32 if more else dtype)
    allowed = (BOUNDS[product_input] + 4e-6) * size + stored * want.abs() + 1e-6
    # LayerNorm multiplies what rounding left of a row's differences, which may be small: alone in its row, all of it.
    slack = {None: 1.0, "rms_norm": 1.0, "layer_norm": 40.0 if channels > 1 else float("inf")}[kind]
    assert (~((got.double() - want).abs() > slack * allowed)).all()


@pytest.mark.parametrize("storage", WEIGHT_STORAGES)
@pytest.mark.parametrize("product_input", CPU_PRODUCT_INPUTS)
def test_a_row_does_not_depend_on_the_rows_beside_it(storage: Any, product_input: Any, isa: str) -> None:
    x, packed = _draw(400, 530), pack_weight(_draw(70, 530, seed=6), storage)
    together = ops.linear(x, packed, product_input=product_input, epilogue="gelu")
    for first, last in ((0, 1), (0, 2), (3, 16), (17, 50), (100, 301), (399, 400)):
        alone = ops.linear(x[first:last], packed, product_input=product_input, epilogue="gelu")
        assert torch.equal(alone, together[first:last]), (first, last)


@pytest.mark.parametrize("storage", WEIGHT_STORAGES)
def test_one_group_of_rows_streams_large_weights_in_parts(storage: Any, isa: str) -> None:
    """Weights that the second-level cache does not keep are taken part by part, to the same bits."""
    x, packed = _draw(64, 600), pack_weight(_draw(8000, 600, seed=6), storage)
    together = ops.linear(x, packed, product_input="float32")
    for rows in (1, 5):
        assert torch.equal(ops.linear(x[:rows], packed, product_input="float32"), together[:rows])
    narrow = ops.linear(x[:1], pack_weight(_draw(8000, 600, seed=6)[:64], storage), product_input="float32")
    assert torch.equal(narrow, together[:1, :64])


def test_any_number_of_threads(isa: str) -> None:
    x, packed = _draw(333, 200), pack_weight(_draw(130, 200, seed=6))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, packed, residual=_draw(333, 130)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nan_stays_in_its_row_or_column(isa: str) -> None:
    x, weight = _draw(9, 40), _draw(50, 40, seed=6)
    x[4, 39] = torch.nan
    weight[33, 0] = torch.inf
    for storage in ("float32", "bfloat16", "two_bfloat16"):
        wrong = ~ops.linear(x, pack_weight(weight, storage), product_input="float32").isfinite()
        assert wrong[4].all()
        assert wrong[:, 33].all()
        assert wrong.sum() == 50 + 9 - 1


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_fused_norm_is_the_op_norm(kind: Any, isa: str) -> None:
    x, packed = 3 + _draw(7, 100), pack_weight(_draw(20, 100, seed=6))
    norm = InputNorm(_draw(100, seed=7), _draw(100, seed=8) if kind == "layer_norm" else None, kind)
    fused = ops.linear(x, packed, norm=norm)
    torch.testing.assert_close(fused, ops.linear(ops.norm(x, *norm[:2], kind=kind), packed), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_packed_weight(isa: str) -> None:
    """To x always; to the original weight where it is kept, as if it had not been rounded."""
    weight = _draw(30, 50, seed=6).requires_grad_()
    for storage in WEIGHT_STORAGES:
        x, gate = _draw(4, 50).requires_grad_(), _draw(4, 30).requires_grad_()
        packed = pack_weight(weight, storage)
        inputs = (x, weight, gate)
        out = ops.linear(x, packed, epilogue="gelu", multiply=gate, product_input="float32")
        got = torch.autograd.grad(out.sum(), inputs)
        held = packed.unpack()
        plain = F.gelu(x @ (held + (weight - weight.detach())).T) * gate
        for a, b in zip(got, torch.autograd.grad(plain.sum(), inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        dropped = pack_weight(weight, storage, keep=False)
        out = ops.linear(x, dropped, epilogue="gelu", multiply=gate, product_input="float32")
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], got[0], rtol=1e-5, atol=1e-5)


def test_autocast_rounds_a_plain_weight_as_torch_does() -> None:
    x, weight, residual = _draw(5, 40), _draw(30, 40, seed=6).requires_grad_(), _draw(5, 30)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.linear(x, weight, epilogue="gelu")
        want = F.gelu(F.linear(x, weight))
        stream = ops.linear(x, weight, residual=residual)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert stream.dtype == torch.float32
    stream.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("slow", [True, False])
def test_half_types_that_torch_multiplies_slowly(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is torch's in float32, and so are its gradients; either way they are those of rounded operands."""
    monkeypatch.setattr(starflow_ext.linear, "_SLOW_IN_TORCH", frozenset((torch.bfloat16,) if slow else ()))
    x, weight = _draw(6, 64).requires_grad_(), _draw(20, 64, seed=6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.linear(x, weight)
    grad = _draw(6, 20, seed=7).bfloat16()
    got = torch.autograd.grad(out, (x, weight), grad)
    rounded = [tensor.detach().bfloat16().double() for tensor in (x, weight, grad)]
    want = rounded[0] @ rounded[1].T, rounded[2] @ rounded[1], rounded[2].T @ rounded[0]
    assert out.dtype == torch.bfloat16
    for a, b in zip((out, *got), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2.0**-8, atol=2.0**-8)


def test_explain() -> None:
    x, weight = torch.zeros(3, 40), torch.zeros(30, 40)
    plain = starflow_ext.explain("linear", x, weight)
    assert plain.runs == "torch"
    assert plain.refused["scalar"] == (
        "the weight is not packed, and packing it for one call takes longer than it saves (see pack_weight)"
    )
    assert starflow_ext.explain("linear", x, weight, product_input="float32").runs == native.selected_isa()
    assert starflow_ext.explain("linear", x, pack_weight(weight)).runs == native.selected_isa()
    assert starflow_ext.explain("linear", x.double(), weight.double()).refused["scalar"] == "x is float64"
    assert ops.linear(x.double(), pack_weight(weight)).dtype == torch.float64


def test_which_cuda_kernel_runs() -> None:
    """By device and weight, and what was asked for; the rest is in tests/native."""
    architectures = str(native.build_info()["cuda_architectures"]).split(";")

    def if_built(architecture: str, kernel: str) -> str:
        missing = "mma.sync, as this build has no code for this architecture alone (sm_90a, sm_100f)"
        return kernel if f"{architecture}-real" in architectures else missing

    unproven = 'mma.sync, as tcgen05 has run on no device yet: _load.native.set_linear_kernel("own") asks for it'
    asked = "mma.sync, which set_linear_kernel asks for"
    by_request = {
        "": ("wgmma and TMA (sm_90a)", unproven),
        "own": ("wgmma and TMA (sm_90a)", "tcgen05 and TMA (sm_100f), which set_linear_kernel asks for"),
        "portable": (asked, asked),
    }
    try:
        for request, (hopper, blackwell) in by_request.items():
            native.set_linear_kernel(request)
            assert _kernel_of(64, 9) == if_built("90a", hopper)
            assert _kernel_of(64, 10) == if_built("100f", blackwell)
            for major in (9, 10):
                expected = if_built("90a" if major == 9 else "100f", "mma.sync, as the weight has no input channels")
                assert _kernel_of(0, major) == expected
            for major in (8, 11, 12):
                assert _kernel_of(64, major) == "mma.sync, as the device is not of compute capability 9 or 10"
        refused = r'^set_linear_kernel: name is "wgmma", expected "portable", "own" or ""$'
        with pytest.raises(RuntimeError, match=refused):
            native.set_linear_kernel("wgmma")
    finally:
        native.set_linear_kernel("")


def test_compiles_with_a_packed_weight() -> None:
    packed = pack_weight(_draw(30, 40, seed=6))
    norm = InputNorm(_draw(40), None, "rms_norm")

    def call(x: Tensor) -> Tensor:
        return ops.linear(
            ops.linear(x, packed, epilogue="gelu", norm=norm).sum(-1, keepdim=True).expand(-1, 40), packed
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(_draw(6, 40)), call(_draw(6, 40)))
    x = _draw(6, 40).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(call(x).sum(), x)[0], rtol=1e-4, atol=1e-4
    )


def test_wrong_arguments() -> None:
    x, packed, plain = torch.zeros(2, 5, 40), pack_weight(torch.zeros(30, 40)), torch.zeros(30, 40)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.zeros(2, 5, 39)}, r"x has shape [2, 5, 39], expected [..., 40] for weight of shape [30, 40]"),
        ({"x": x.long()}, "x has dtype int64, expected float32, bfloat16, float16 or float64"),
        ({"epilogue": "relu"}, 'epilogue is "relu", expected "none", "gelu", "gelu_tanh" or "silu"'),
        ({"product_input": "int8"}, 'product_input is "int8", expected "float32", "bfloat16" or "two_bfloat16"'),
        ({"bias": torch.zeros(31)}, "bias has shape [31], expected [30]"),
        ({"multiply": torch.zeros(5, 30)}, "multiply has shape [5, 30], expected [2, 5, 30]"),
        ({"residual": torch.zeros(2, 5, 1)}, "residual has shape [2, 5, 1], expected [2, 5, 30]"),
        ({"norm": InputNorm(torch.zeros(4))}, "norm_weight has shape [4], expected [40]"),
        (
            {"norm": InputNorm(torch.zeros(40), torch.zeros(40), "rms_norm")},
            "norm_bias is given, expected None for rms_norm",
        ),
    ]
    for weight in (packed, plain):
        for arguments, sentence in wrong:
            given = {"x": x, "weight": weight, **arguments}
            for call in (ops.linear, lambda **given: starflow_ext.explain("linear", **given)):
                with pytest.raises(RuntimeError) as refusal:
                    call(**given)
                assert str(refusal.value) == f"linear: {sentence}"
            with starflow_ext.reference_mode(), pytest.raises(RuntimeError) as refusal:
                ops.linear(**given)
            assert str(refusal.value) == f"linear: {sentence}"
    with pytest.raises(
        RuntimeError, match=r"^linear: weight has shape \[40\], expected \(out_channels, in_channels\)$"
    ):
        ops.linear(x, torch.zeros(40))
    with pytest.raises(RuntimeError, match=r"^linear: x is on meta, expected cpu for a packed weight$"):
        ops.linear(x.to("meta"), packed)


def test_the_native_op_checks_for_itself() -> None:
    """Panels that do not belong to the shape that they are said to have."""
    packed = pack_weight(torch.zeros(30, 40))
    for change, sentence in (
        (
            {"in_channels": 72},
            r"panels has shape \[1, 64, 32\], expected \[1, 96, 32\] for a weight of shape \[30, 72\]",
        ),
        ({"storage": "bfloat16"}, 'panels has dtype float32, expected contiguous panels of storage "bfloat16"'),
        ({"storage": "int8", "panels": packed.panels.char()}, r"column_scale has shape \[0\], expected \[30\]"),
    ):
        channels = change.get("in_channels", 40)
        wrong = starflow_ext.PackedWeight(**{**vars(packed), "weight": None, **change})
        with pytest.raises(RuntimeError, match=f"^linear: {sentence}"):
            ops.linear(torch.zeros(3, channels), wrong)


def test_a_weight_on_cuda_is_packed_as_rows_for_tensor_cores() -> None:
    """Shapes, dtypes and refusals, which need no device: tensors without values."""
    with FakeTensorMode():
        x = torch.empty(2, 5, 37, device="cuda:0")
        weight = torch.empty(30, 37, device="cuda:0", dtype=torch.bfloat16)
        packed = pack_weight(weight)
        assert (list(packed.panels.shape), packed.panels.dtype, packed.storage) == (
            [30, 40],
            torch.bfloat16,
            "bfloat16",
        )
        for out, dtype in (
            (ops.linear(x, packed), torch.float32),
            (
                ops.linear(x.half(), packed, epilogue="gelu", norm=InputNorm(torch.empty(37, device="cuda:0"))),
                torch.float16,
            ),
            (ops.linear(x.half(), packed, residual=torch.empty(2, 5, 30, device="cuda:0")), torch.float32),
            (ops.linear(x, pack_weight(weight, "float16")), torch.float32),
        ):
            assert (out.shape, out.dtype, out.device.type) == ((2, 5, 30), dtype, "cuda")
        for storage in ("int8", "two_bfloat16", "float32"):
            sentence = f'^linear_pack: storage is "{storage}", expected "bfloat16" or "float16" for a weight on cuda:0$'
            with pytest.raises(RuntimeError, match=sentence):
                pack_weight(weight, storage)
        for call, sentence in (
            (lambda: ops.linear(x.cpu(), packed), "x is on cpu, expected cuda:0 for a packed weight"),
            (
                lambda: ops.linear(x, packed, product_input="float32"),
                'product_input is "float32", expected "bfloat16" like the weight on cuda:0',
            ),
        ):
            with starflow_ext.reference_mode(), pytest.raises(RuntimeError, match=f"^linear: {sentence}$"):
                call()
