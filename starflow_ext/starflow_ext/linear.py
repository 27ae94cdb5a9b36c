"""linear: a matrix product, fused with the norm before it and the bias, activation, gate and residual after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from starflow_ext._check import (
    as_record,
    autocast_dtype,
    check_floating,
    dtype_text,
    refuse_types,
    require,
    require_first_order,
    types_of,
    without_autocast,
)
from starflow_ext._load import native, operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import (
    DTYPES,
    EPILOGUES,
    LINEAR_CHOICES,
    NORM_KINDS,
    PRODUCT_INPUTS,
    WEIGHT_STORAGES,
    check_name,
    name_of,
)
from starflow_ext._spec import DOT_VARIANTS, Bound, Dtypes, Sample, Spec
from starflow_ext.linear_pack import (
    DEVICE_STORAGES,
    PackedWeight,
    check_device_storage,
    pack_for_call,
    pack_weight,
    unpack,
)
from starflow_ext.norm import EPSILON, OFFSET, NormKind, check_epsilon, check_weight_offset
from starflow_ext.norm import norm as normalise

Epilogue = Literal["none", "gelu", "gelu_tanh", "silu"]
ProductInput = Literal["float32", "bfloat16", "two_bfloat16", "float16"]

# Product inputs that the CPU's kernels take; on CUDA the input has the type of the weight.
CPU_PRODUCT_INPUTS: Final = tuple(name for name in PRODUCT_INPUTS if name != "float16")
_NATIVE: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _slow_in_torch() -> frozenset[torch.dtype]:
    """Half types whose products torch computes one element at a time on this processor."""
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, known in supported.items() if not known)


_SLOW_IN_TORCH: Final = _slow_in_torch()


class InputNorm(NamedTuple):
    """A norm of ``x`` on its way into the product; arguments as of ``norm``."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    kind: NormKind = "layer_norm"
    eps: float | None = None
    weight_offset: float | None = None


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue = "none",
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
    product_input: ProductInput | None = None,
    norm: InputNorm | tuple[Any, ...] | None = None,
) -> Tensor:
    """Compute ``residual + epilogue(norm(x) @ weight.T + bias) * multiply``.

    A packed weight runs the native kernels of its device, with sums, norm and epilogue in float32; a row's bits depend
    neither on the other rows nor on the number of threads. A plain tensor runs torch's own product, unless
    ``product_input`` is given: packing for one call takes longer than it saves. float64 runs torch's too. Half types
    that torch multiplies one element at a time on this processor are multiplied in float32.

    On CUDA a packed weight is bfloat16 or float16, and ``x`` enters the product rounded to the same type; tensor cores
    multiply and sum in float32. The gradient is torch's own products there. These kernels have not run on a device yet
    (docs/cuda.md).

    Args:
        x: (..., in_channels); float32, bfloat16, float16, or float64 with a plain weight of float64.
        weight: (out_channels, in_channels), or what ``pack_weight`` made of it. ``x`` is rounded to the dtype of a
            plain weight; under autocast both are rounded to its dtype.
        bias: (out_channels,).
        epilogue: "none", "gelu" (exact, erf), "gelu_tanh" or "silu".
        multiply: (..., out_channels), the other factor of a gated unit (SwiGLU: "silu" and the product of the other
            weight).
        residual: (..., out_channels); the sum has its dtype, so a float32 residual stream stays float32.
        product_input: how ``x`` enters the native product: "float32"; "bfloat16", rounded; "two_bfloat16", as the sum
            of two (16 bits). Default: "bfloat16" for weights stored in bfloat16, as torch does, else "float32". A
            level without an instruction for products of bfloat16 computes in float32, which is more exact. On CUDA it
            can only be the type of the weight.
        norm: LayerNorm or RMSNorm of ``x`` first, as the op ``norm`` computes it; or a plain tuple of its arguments.

    Returns:
        (..., out_channels), in the dtype of ``residual`` if given, else of a plain ``weight``, else of ``x``.

    Raises:
        RuntimeError: if a type, an option, a dtype or a device is wrong, a shape does not agree, or ``product_input``
            is given for a call that is left to torch.

    Reference:
        Hendrycks and Gimpel, Gaussian Error Linear Units (2016); Shazeer, GLU Variants Improve Transformer (2020).
    """
    given = (x, weight, bias, epilogue, multiply, residual, product_input, norm)
    if not all(map(isinstance, given, _TYPES)):
        refuse_types("linear", linear, given)
    if isinstance(weight, PackedWeight):
        _check_fresh(weight)
    if norm is not None:
        norm = as_record("linear", "norm", norm, InputNorm, _NORM_TYPES)
    arguments = (x, weight, bias, epilogue, multiply, residual, product_input, norm)
    if in_reference_mode():
        return linear_reference(*arguments)
    if reason := _why_torch(*arguments):
        require(product_input is None, "linear", "product_input is", f'"{product_input}"', "None, as", reason)
        return linear_reference(*arguments)
    # The native op checks the rest, with the words of check().
    operator, lowered = _lower(*arguments)
    out: Tensor = operator(*lowered)[0]
    return out


def _check_fresh(packed: PackedWeight) -> None:
    """Check that a packed weight is still that of its original; a compiled graph cannot read the values."""
    original = packed.weight
    if original is None or torch.compiler.is_compiling():
        return
    # Where it is trained, the product and its gradient read it several times anyway.
    trained = original.requires_grad and torch.is_grad_enabled()
    require(
        packed.is_fresh(exact=trained),
        "linear",
        "weight is",
        "packed from values that its original no longer has",
        "it packed again after a change (pack_weight), or a PackedLinear, which does so by itself",
    )


def linear_reference(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    epilogue: str,
    multiply: Tensor | None,
    residual: Tensor | None,
    product_input: str | None,
    norm: InputNorm | None,
) -> Tensor:
    """Compute ``linear`` in plain torch, a packed weight by its rounded values; arguments as there."""
    check(x, weight, bias, epilogue, multiply, residual, product_input, norm)
    if isinstance(weight, Tensor):
        x, weight, norm = _rounded(x, weight, norm)
        return _torch(x, weight, bias, epilogue, multiply, residual, norm, weight.dtype)
    exact = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        return _torch(x, _values(weight).to(exact), bias, epilogue, multiply, residual, norm, x.dtype)


def _values(packed: PackedWeight) -> Tensor:
    """The rounded weight that products use, with a gradient where the original is kept."""
    original = packed.weight
    if original is None:
        return packed.unpack()
    if dtype_text(original.dtype) == packed.storage:
        return original
    return packed.unpack() + (original - original.detach())


def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: str,
    multiply: Tensor | None,
    residual: Tensor | None,
    norm: InputNorm | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute ``linear`` in the dtype of ``weight``; the result has that of ``residual``, else ``dtype``."""
    # The operands are contiguous, so that the bits do not depend on strides.
    x, weight = x.contiguous(), weight.contiguous()
    if norm is not None:
        x = _normalised(x, norm)
    out = _product(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    out = _activated(out, epilogue)
    if multiply is not None:
        out = out * multiply
    if residual is None:
        return out.to(dtype)
    return (residual + out.to(torch.promote_types(out.dtype, residual.dtype))).to(residual.dtype)


def _normalised(x: Tensor, norm: InputNorm) -> Tensor:
    """Compute the norm of ``x`` by the op of that name, which has the gradient."""
    weight, bias, kind, eps, weight_offset = norm
    return normalise(x, weight, bias, kind=kind, eps=eps, weight_offset=weight_offset)


def _activated(x: Tensor, epilogue: str) -> Tensor:
    if epilogue == "none":
        return x
    return F.silu(x) if epilogue == "silu" else F.gelu(x, approximate="tanh" if epilogue == "gelu_tanh" else "none")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, in float32 where torch is slow in the dtype (a training step on a Zen 3: 30 s in place of 1 s)."""
    if not x.is_cpu or x.dtype not in _SLOW_IN_TORCH:
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _rounded(x: Tensor, weight: Tensor, norm: InputNorm | None) -> tuple[Tensor, Tensor, InputNorm | None]:
    """The operands of a product with a plain weight in the dtype that torch would multiply in."""
    weight = weight.to(_product_dtype(weight))
    if norm is not None:
        x, norm = _normalised(x, norm), None
    return x.to(weight.dtype), weight, norm


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a product with a plain weight is computed in."""
    return autocast_dtype(weight) or weight.dtype


def _why_torch(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    epilogue: str,
    multiply: Tensor | None,
    residual: Tensor | None,
    product_input: str | None,
    norm: InputNorm | None,
) -> str:
    """Why a call is left to torch, or "" where it is not."""
    packed = isinstance(weight, PackedWeight)
    if not (x.is_cpu or x.is_cuda) or not (packed or x.device == weight.device):
        return f"x is on {x.device}"
    for name, tensor in (("x", x), ("bias", bias), ("multiply", multiply), ("residual", residual)):
        if tensor is not None and tensor.dtype not in _NATIVE:
            return f"{name} is {dtype_text(tensor.dtype)}"
    if isinstance(weight, Tensor) and weight.dtype not in _NATIVE:
        return f"weight is {dtype_text(weight.dtype)}"
    if packed or product_input is not None:
        return ""
    # Measured with 16 to 4096 rows: packing for one call takes longer than a better product and a fused epilogue save;
    # the call as a whole takes 1.2 to 2 times as long up to 256 rows, and a few per cent longer above.
    return "the weight is not packed, and packing it for one call takes longer than it saves (see pack_weight)"


# What `explain` says of each LinearChoice of csrc/ops/linear/linear_choice.h.
_CHOICES: Final = {
    "wgmma": "wgmma and TMA (sm_90a)",
    "tcgen05": "tcgen05 and TMA (sm_100f), which set_linear_kernel asks for",
    "other_device": "mma.sync, as the device is not of compute capability 9 or 10",
    "not_built": "mma.sync, as this build has no code for this architecture alone (sm_90a, sm_100f)",
    "no_channels": "mma.sync, as the weight has no input channels",
    "unproven": 'mma.sync, as tcgen05 has run on no device yet: _load.native.set_linear_kernel("own") asks for it',
    "asked": "mma.sync, which set_linear_kernel asks for",
}


def _kernel_of(channels: int, major: int) -> str:
    """Which kernel a device of compute capability ``major`` runs for weights of so many channels, and why."""
    return _CHOICES[LINEAR_CHOICES[native.linear_choice(major, channels)]]


def _kernel(x: Tensor, weight: Tensor | PackedWeight, **arguments: Any) -> str:
    """Which CUDA kernel would run a call; "" without a CUDA device, or for tensors without memory."""
    if is_fake(x) or not torch.cuda.is_available():
        return ""
    return _kernel_of(weight.shape[1], torch.cuda.get_device_capability(x.device)[0])


def _lower(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    epilogue: str,
    multiply: Tensor | None,
    residual: Tensor | None,
    product_input: str | None,
    norm: InputNorm | None,
) -> tuple[Any, tuple[Any, ...]]:
    """The native operator of a call and its arguments."""
    _check_options(epilogue, product_input, norm, weight.device)
    if isinstance(weight, Tensor):
        _check_weight(weight)
        x, weight, norm = _rounded(x, weight, norm)
        packed = pack_for_call(weight)
        dtype = weight.dtype
    else:
        packed, dtype = weight, x.dtype
    if product_input is None:
        stored = packed.device.type == "cuda" or packed.storage == "bfloat16"
        product_input = packed.storage if stored else "float32"
    gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (x, packed.weight, bias, multiply, residual, *(norm[:2] if norm else ()))
    )
    if norm is not None and gradient:
        x, norm = _normalised(x, norm), None
    return _native, (
        x,
        packed.weight if gradient else None,
        packed.panels,
        packed.column_scale,
        packed.out_channels,
        packed.in_channels,
        WEIGHT_STORAGES[packed.storage],
        bias,
        EPILOGUES[epilogue],
        multiply,
        residual,
        PRODUCT_INPUTS[product_input],
        *_lowered_norm(norm, x),
        DTYPES[_NATIVE[dtype if residual is None else residual.dtype]],
        gradient and (epilogue != "none" or multiply is not None),
    )


def _lowered_norm(norm: InputNorm | None, x: Tensor) -> tuple[int, Tensor | None, Tensor | None, float, float]:
    """The norm as the operator takes it: kind, weight, bias, epsilon and what is added to the weight."""
    if norm is None:
        return NORM_KINDS["none"], None, None, 0.0, 0.0
    weight, bias, kind, eps, weight_offset = norm
    offset = OFFSET[kind] if weight_offset is None else weight_offset
    if weight is None:
        weight, offset = x.new_zeros(x.shape[-1:]), 1.0
    return NORM_KINDS[kind], weight, bias, EPSILON[kind] if eps is None else eps, offset


def _check_weight(weight: Tensor | PackedWeight) -> None:
    require(len(weight.shape) == 2, "linear", "weight has shape", list(weight.shape), "(out_channels, in_channels)")


def _check_options(epilogue: str, product_input: str | None, norm: InputNorm | None, device: torch.device) -> None:
    check_name("linear", "epilogue", epilogue, EPILOGUES)
    if product_input is not None:
        known = PRODUCT_INPUTS if device.type == "cuda" else CPU_PRODUCT_INPUTS
        check_name("linear", "product_input", product_input, known)
    if norm is not None:
        check_name("linear", "norm", norm.kind, EPSILON)
        check_epsilon("linear", "norm.eps", norm.eps)
        check_weight_offset("linear", "norm.weight_offset", norm.weight_offset, norm.weight)


def check(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    epilogue: str,
    multiply: Tensor | None,
    residual: Tensor | None,
    product_input: str | None,
    norm: InputNorm | None,
) -> None:
    """Raise what ``linear`` raises for wrong arguments; arguments as there."""
    op = "linear"
    _check_options(epilogue, product_input, norm, weight.device)
    _check_weight(weight)
    out_channels, in_channels = weight.shape
    _check_x(x, out_channels, in_channels)
    shape = [*x.shape[:-1], out_channels]
    norm_weight, norm_bias, kind = (None, None, "layer_norm") if norm is None else norm[:3]
    require(kind == "layer_norm" or norm_bias is None, op, "norm_bias is", "given", "None for rms_norm")
    named = (
        ("x", x, None),
        ("bias", bias, shape[-1:]),
        ("multiply", multiply, shape),
        ("residual", residual, shape),
        ("norm_weight", norm_weight, [in_channels]),
        ("norm_bias", norm_bias, [in_channels]),
    )
    for name, tensor, expected in named:
        if tensor is None:
            continue
        if expected is not None:
            require(list(tensor.shape) == expected, op, f"{name} has shape", tensor.shape, expected)
        like = "like weight" if isinstance(weight, Tensor) else "for a packed weight"
        require(tensor.device == weight.device, op, f"{name} is on", tensor.device, weight.device, like)
        check_floating(op, name, tensor)
    if isinstance(weight, Tensor):
        check_floating(op, "weight", weight)
    native = not _why_torch(x, weight, bias, epilogue, multiply, residual, product_input, norm)
    if native and weight.device.type == "cuda" and product_input is not None:
        storage = dtype_text(_product_dtype(weight)) if isinstance(weight, Tensor) else weight.storage
        check_device_storage(storage, weight.device)
        expected_storage = f'"{storage}" like the weight on {weight.device}'
        require(product_input == storage, op, "product_input is", f'"{product_input}"', expected_storage)


def _check_x(x: Tensor, out_channels: int, in_channels: int) -> None:
    fits = x.dim() >= 1 and x.shape[-1] == in_channels
    shape = [out_channels, in_channels]
    require(fits, "linear", "x has shape", x.shape, f"[..., {in_channels}] for weight of shape", shape)


def _rows(tensor: Tensor) -> Tensor:
    """(..., channels) to (rows, channels), empty ones too."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


# The types that each argument may have, and each part of a norm.
_TYPES: Final = types_of(linear)
_NORM_TYPES: Final = types_of(InputNorm)

_native = operators().linear.default
_ARGUMENTS: Final = tuple(argument.name for argument in _native._schema.arguments)


def _fake(*given: Any) -> tuple[Tensor, Tensor]:
    call = dict(zip(_ARGUMENTS, given, strict=True))
    x, dtype = call["x"], name_of("linear", "out_dtype", call["out_dtype"], DTYPES)
    # Nothing else checks a traced call, as the operator does when it runs.
    _check_x(x, call["out_channels"], call["in_channels"])
    shape = [*x.shape[:-1], call["out_channels"]]
    expected = {"bias": shape[-1:], "multiply": shape, "residual": shape}
    for name, wanted in expected.items():
        if call[name] is not None:
            require(list(call[name].shape) == wanted, "linear", f"{name} has shape", call[name].shape, wanted)
    out = x.new_empty([*x.shape[:-1], call["out_channels"]], dtype=getattr(torch, dtype))
    return out, torch.empty_like(out) if call["keep_product"] else out.new_empty([0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = dict(zip(_ARGUMENTS, inputs, strict=True))
    saved = ("x", "weight", "panels", "column_scale", "multiply")
    ctx.save_for_backward(*(call[name] for name in saved), output[1])
    ctx.call = {name: call[name] for name in ("out_channels", "in_channels", "storage", "epilogue", "norm")}
    ctx.bias_dtype = None if call["bias"] is None else call["bias"].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    require_first_order("linear")
    call = ctx.call
    normalised = call["norm"] != NORM_KINDS["none"]
    require(not normalised, "linear", "norm is", "given", "none where a gradient is needed: the op norm has one")
    grads: dict[str, Tensor] = {}
    needed = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    if grad is None:
        return (None,) * len(_ARGUMENTS)
    x, weight, panels, column_scale, multiply, product = ctx.saved_tensors
    epilogue = name_of("linear", "epilogue", call["epilogue"], EPILOGUES)
    if needed["residual"]:
        grads["residual"] = grad
    if multiply is not None:
        if needed["multiply"]:
            grads["multiply"] = (grad * _activated(product, epilogue)).to(multiply.dtype)
        grad = grad * multiply
    if epilogue == "silu":
        grad = torch.ops.aten.silu_backward(grad, product.to(grad.dtype))
    elif epilogue != "none":
        approximate = "tanh" if epilogue == "gelu_tanh" else "none"
        grad = torch.ops.aten.gelu_backward(grad, product.to(grad.dtype), approximate=approximate)
    # The gradient uses the rounded weight, which is the weight itself where it is stored in its own dtype.
    storage = name_of("linear", "storage", call["storage"], WEIGHT_STORAGES)
    if weight is not None and dtype_text(weight.dtype) == storage:
        values = weight
    else:
        values = unpack(panels, column_scale, call["out_channels"], call["in_channels"], storage)
    # In the wider of both types, as the product itself: float16 holds no gradient above 65504 nor below 6e-8.
    dtype = torch.promote_types(values.dtype, x.dtype)
    rows = _rows(grad)
    if needed["bias"]:
        grads["bias"] = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    rows = rows.to(dtype)
    if needed["x"]:
        grads["x"] = _product(rows, values.to(dtype).t()).reshape(x.shape).to(x.dtype)
    if needed["weight"]:
        grads["weight"] = _product(rows.t(), _rows(x).to(dtype).t()).to(weight.dtype)
    return tuple(grads.get(name) for name in _ARGUMENTS)


torch.library.register_fake("starflow_ext::linear", _fake)
torch.library.register_autograd("starflow_ext::linear", _backward, setup_context=_save)

# Float32 bounds cover the rounding of the sums, and 40 units of rounding in GELU; half types add the rounding of stored
# values. Activations rounded to bfloat16 are off by 2^-9 each, those split in two terms by 2^-17.
_BOUNDS: Final = {
    torch.float64: Bound(1e-13, 1e-13),
    torch.float32: Bound(4e-6, 4e-6),
    torch.float16: Bound(1e-3, 8e-6),
    torch.bfloat16: Bound(8e-3, 8e-6),
}
_ROUNDED: Final = {dtype: Bound(2e-2, 2e-2) for dtype in _NATIVE}
_SPLIT: Final = {dtype: Bound(bound.relative + 2e-5, 2e-5) for dtype, bound in _BOUNDS.items()}


def _samples(dtypes: Dtypes, generator: torch.Generator) -> Iterator[Sample]:
    dtype, weight_dtype = dtypes
    # Weights are not packed in float64.
    exact = dtype == torch.float64

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    def sample(
        label: str, shape: tuple[int, int, int], out: int, *, storage: Any = None, plain: bool = exact, **options: Any
    ) -> Sample:
        weight = (draw(out, shape[-1], kind=torch.float64) / max(1, shape[-1]) ** 0.5).to(weight_dtype)
        given = {"bias": 0.1 * draw(out), **options}
        for name in ("multiply", "residual"):
            if given.get(name) is True:
                given[name] = draw(*shape[:-1], out)
        if isinstance(given.get("norm"), InputNorm):
            pass
        elif given.get("norm") == "layer_norm":
            given["norm"] = InputNorm(draw(shape[-1]), draw(shape[-1]))
        elif given.get("norm") == "rms_norm":
            given["norm"] = InputNorm(0.2 * draw(shape[-1]), kind="rms_norm")
        bounds = None
        stored = storage or dtype_text(weight_dtype)
        product_input = given.get("product_input") or ("bfloat16" if stored == "bfloat16" else "float32")
        if exact:
            pass
        elif (product_input == "bfloat16" and dtype != torch.bfloat16) or (plain and weight_dtype != torch.float32):
            # torch rounds after each step of the epilogue.
            bounds = _ROUNDED
        elif product_input == "bfloat16" and given.get("norm"):
            bounds = _ROUNDED
        elif product_input == "two_bfloat16":
            bounds = _SPLIT
        return Sample(
            f"{label} {list(shape)} to {out}",
            {"x": draw(*shape), "weight": weight if plain else pack_weight(weight, storage), **given},
            bounds,
        )

    yield sample("defaults", (2, 5, 48), 40)
    large = sample("", (6, 301, 48), 40, epilogue="gelu", residual=True)
    yield Sample("large", large.arguments, large.bounds)
    yield sample("one element", (1, 1, 1), 1)
    yield sample("no samples", (0, 5, 7), 9)
    yield sample("no tokens", (2, 0, 7), 9)
    yield sample("nothing in", (2, 5, 0), 9)
    yield sample("nothing out", (2, 5, 7), 0)
    for rows, channels, out in ((1, 33, 31), (7, 31, 33), (8, 64, 64), (15, 130, 1), (17, 1, 70), (29, 96, 97)):
        yield sample("rows", (2, rows, channels), out, bias=None)
    for epilogue in EPILOGUES:
        for multiply, residual in ((None, None), (True, None), (None, True), (True, True)):
            yield sample(f"{epilogue}", (2, 4, 19), 37, epilogue=epilogue, multiply=multiply, residual=residual)
    for kind in ("layer_norm", "rms_norm"):
        yield sample(kind, (2, 5, 50), 35, norm=kind)
        norms = InputNorm(0.2 * draw(50), kind=kind, eps=0.1, weight_offset=0.5), InputNorm(kind=kind)
        for given in norms:
            yield sample(f"{kind} with options", (2, 5, 50), 35, norm=given)
        yield sample(f"plain weight, {kind}", (2, 5, 50), 35, norm=kind, plain=True)
    yield sample("plain weight", (2, 5, 48), 40, plain=True)
    if not exact:
        options = {"epilogue": "gelu", "multiply": True, "residual": True, "product_input": "float32"}
        yield sample("plain weight, packed for the call", (2, 15, 48), 40, plain=True, **options)
    if dtype == weight_dtype == torch.float32:
        for storage in ("float16", "bfloat16", "int8", "two_bfloat16"):
            for product_input in CPU_PRODUCT_INPUTS:
                yield sample(
                    f"{storage}, {product_input}", (2, 9, 70), 45, storage=storage, product_input=product_input
                )


def _on_cuda(sample: Sample) -> Sample:
    """The call on a CUDA device, its weight packed in a type that products there take."""
    moved = sample.map(Tensor.cuda)
    weight = sample.arguments["weight"]
    if isinstance(weight, Tensor):
        return moved
    storage = weight.storage if weight.storage in DEVICE_STORAGES else "bfloat16"
    original = (weight.unpack() if weight.weight is None else weight.weight).cuda().to(getattr(torch, storage))
    packed = {"weight": pack_weight(original), "product_input": None}
    bounds = dict.fromkeys(_NATIVE, Bound(4e-2, 4e-2))
    return Sample(sample.label, {**moved.arguments, **packed}, bounds)


def _case(rows: int, out: int, channels: int) -> Any:
    def draw(generator: torch.Generator) -> Sample:
        weight = torch.randn((out, channels), generator=generator) / channels**0.5
        x = torch.randn((rows, channels), generator=generator)
        return Sample(f"[{rows}, {channels}] to {out}", {"x": x, "weight": pack_weight(weight)})

    return draw


def _operations(sample: Sample) -> int:
    x, weight = sample.arguments["x"], sample.arguments["weight"]
    return 2 * int(x.numel()) * int(weight.shape[0])


def _bytes(sample: Sample) -> int:
    x, weight = sample.arguments["x"], sample.arguments["weight"]
    return int(x.nbytes + weight.nbytes + x.nbytes // max(1, x.shape[-1]) * weight.shape[0])


SPEC = Spec(
    name="linear",
    call=linear,
    reference=linear_reference,
    check=check,
    dtypes=(
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ),
    samples=_samples,
    bounds=_BOUNDS,
    differentiable=("x", "weight", "bias", "multiply", "residual"),
    shared=("weight", "bias", "norm"),
    variants=DOT_VARIANTS,
    refuses=lambda variant, **arguments: _why_torch(**arguments),
    lower=_lower,
    kernel=_kernel,
    on_cuda=_on_cuda,
    cases={f"{rows} rows": _case(rows, out, channels) for rows, out, channels in ((16, 3072, 768), (64, 768, 3072))},
    bytes_moved=_bytes,
    operations=_operations,
)
