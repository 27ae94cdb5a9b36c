"""Where terms cancel, an error is small beside the sum of their magnitudes, not beside the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import Rotation, ops, pack_weight
from starflow_ext._affine import affine_terms
from starflow_ext._spec import tensors

# Largest error of float32 over the sum of the magnitudes of all terms: 8 units of rounding; docs/ops.md says so.
BOUND = 5e-7

Magnitudes = tuple[Tensor, ...]


def _draw(*shape: int, spread: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return offset + spread * torch.randn(shape, generator=generator)


def _affine(raw: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale, and how much an error of raw's rounding grows in the scale."""
    terms = affine_terms(raw, raw.dtype, options.get("activation", "softplus"), 0.0, False)
    return terms.shift, terms.scale, 1.0 + raw.chunk(2, -1)[0].abs()


def affine_forward(x: Tensor, raw: Tensor, **options: Any) -> Magnitudes:
    shift, scale, grown = _affine(raw, **options)
    return (x.abs() + shift.abs()) / scale * grown, (scale.log().abs() + grown).sum(-1)


def affine_inverse(z: Tensor, raw: Tensor, **options: Any) -> Magnitudes:
    shift, scale, grown = _affine(raw, **options)
    return (shift.abs() + scale * z.abs() * grown,)


def jacobi_update(x: Tensor, z: Tensor, raw: Tensor, guidance: float, **options: Any) -> Magnitudes:
    """What is overwritten: guidance divides by a difference, which cancels where both halves agree."""
    (shift, scale, grown), (free, free_scale, free_grown) = (_affine(half, **options) for half in raw.chunk(2))
    ratio = (scale / free_scale).clamp(max=1.0).square()
    precision = 1.0 + guidance - guidance * ratio
    magnitude = (1.0 + guidance + guidance * ratio * (grown + free_grown)) / precision
    shifts = ((1.0 + guidance) * shift.abs() + guidance * ratio * free.abs() * (grown + free_grown)) / precision
    return (shifts * magnitude + scale / precision.sqrt() * z.abs() * (grown + magnitude),)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Magnitudes:
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return ((x.abs() + x.abs().mean(-1, keepdim=True)) * inverse * weight.abs() + bias.abs(),)


def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Magnitudes:
    return (x.abs() @ weight.abs().T + bias.abs() + residual.abs(),)


def block_attention(q: Tensor, k: Tensor, v: Tensor, temperature: float, **options: Any) -> Magnitudes:
    """A weight is off by the rounding of its product's terms, relative to itself."""
    scale = q.shape[-1] ** -0.5 / temperature
    weights = (q @ k.mT * scale).softmax(-1)
    terms = q.abs() @ k.abs().mT * scale
    largest = terms.amax(-1, keepdim=True)
    return (weights @ v.abs() + (weights * (terms + largest)) @ v.abs(), largest[..., 0] + 1.0)


def rope_append(qkv: Tensor, query_rotation: Rotation, **options: Any) -> Magnitudes:
    u, v = qkv[..., : qkv.shape[-1] // 3].abs().unsqueeze(1).chunk(2, -1)
    cos, sin = (table.abs() for table in query_rotation)
    return (torch.cat([u * cos + v * sin, v * cos + u * sin], -1),)


def _rotation() -> dict[str, Any]:
    """Queries along which u cos - v sin cancels."""
    angles = _draw(40, 16)
    cos, sin = angles.cos(), angles.sin()
    u = _draw(2, 40, 16)
    nearly = torch.cat([u * sin, u * cos * (1.0 + 1e-4)], -1)
    rest = torch.zeros(2, 40, 64)
    return {"qkv": torch.cat([nearly, rest], -1), "query_rotation": Rotation(cos, sin)}


# Calls whose terms cancel, and what the sum of magnitudes is.
CALLS: dict[str, tuple[str, dict[str, Any], Callable[..., Magnitudes]]] = {
    "affine_forward, near the shift": (
        "affine_forward",
        {"x": _draw(2, 9, 64, spread=1e-3, offset=30.0), "raw": _draw(2, 9, 128, spread=1e-3, offset=30.0)},
        affine_forward,
    ),
    "affine_forward, a log-determinant of many channels": (
        "affine_forward",
        {"x": _draw(2, 3, 4096), "raw": _draw(2, 3, 8192, spread=3.0), "activation": "exp"},
        affine_forward,
    ),
    "affine_inverse, a shift that cancels": (
        "affine_inverse",
        {"z": -_draw(2, 9, 64, spread=1e-3, offset=1.0), "raw": _draw(2, 9, 128, spread=1e-3, offset=3.0)},
        affine_inverse,
    ),
    "jacobi_update, large guidance": (
        "jacobi_update",
        {
            "x": _draw(2, 9, 64),
            "z": _draw(2, 9, 64),
            "raw": _draw(2, 9, 128).repeat(2, 1, 1) + _draw(4, 9, 128, spread=1e-2),
            "guidance": 100.0,
        },
        jacobi_update,
    ),
    "norm, far from zero": (
        "norm",
        {"x": _draw(3, 9, 4096, offset=25.0), "weight": _draw(4096), "bias": _draw(4096)},
        norm,
    ),
    "norm, further": (
        "norm",
        {"x": _draw(3, 9, 333, offset=1000.0), "weight": _draw(333), "bias": _draw(333)},
        norm,
    ),
    "linear, many channels": (
        "linear",
        {
            "x": torch.cat([_draw(2, 9, 4096), -_draw(2, 9, 4096)], -1) + 1e-3 * _draw(2, 9, 8192),
            "weight": _draw(33, 4096).repeat(1, 2),
            "bias": _draw(33),
            "residual": _draw(2, 9, 33),
        },
        linear,
    ),
    "block_attention, a small temperature": (
        "block_attention",
        {
            "q": _draw(2, 2, 9, 64),
            "k": _draw(2, 2, 200, 64),
            "v": _draw(2, 2, 200, 64),
            "causal": False,
            "temperature": 0.02,
            "return_lse": True,
        },
        block_attention,
    ),
    "block_attention, many channels": (
        "block_attention",
        {
            "q": _draw(2, 2, 9, 256, offset=3.0),
            "k": _draw(2, 2, 300, 256),
            "v": _draw(2, 2, 300, 256, offset=5.0),
            "causal": False,
            "temperature": 1.0,
            "return_lse": True,
        },
        block_attention,
    ),
    "rope_append, along the rotation": (
        "rope_append",
        {"heads": 1, "kv_heads": 1, "pairing": "half", **_rotation()},
        rope_append,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_are_small_beside_the_magnitudes(name: str, isa: str) -> None:
    op, given, magnitudes = CALLS[name]
    spec = ops.SPECS[op]
    wide = {key: _wide(value) for key, value in given.items()}
    exact = spec.reference(**spec.arguments(**{key: _copy(value) for key, value in wide.items()}))
    native = {key: _copy(value) for key, value in given.items()}
    if op == "linear":
        native["weight"] = pack_weight(native["weight"])
    results = spec.call(**native)
    if op == "jacobi_update":
        changed = {key: _copy(value) for key, value in wide.items()}
        spec.reference(**spec.arguments(**changed))
        results, exact = native["x"], changed["x"]
    options = {key: value for key, value in wide.items() if key not in ("return_lse", "heads", "kv_heads", "pairing")}
    for got, want, magnitude in zip(tensors(results), tensors(exact), magnitudes(**options), strict=False):
        share = ((got.double() - want).abs() / magnitude).max().item()
        assert share < BOUND, f"{name}: {share:.2e} of the sum of magnitudes"


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Magnitudes:
    return grad.abs() @ weight.abs(), grad.flatten(0, -2).abs().T @ x.flatten(0, -2).abs()


def norm_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Magnitudes:
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    # A normed value is off by the rounding of what it was before the mean was subtracted.
    normed = (x.abs() + x.abs().mean(-1, keepdim=True)) * inverse
    weighed = (grad * weight).abs()
    inner = (weighed * normed).mean(-1, keepdim=True)
    return inverse * (weighed + weighed.mean(-1, keepdim=True) + normed * inner), (grad.abs() * normed).sum((0, 1))


def attention_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: float) -> Magnitudes:
    """Of a product p (g . v - g . out), both terms of which are sums themselves, beside the rounding of p."""
    scale = q.shape[-1] ** -0.5 / temperature
    # Powers below 2^-125 are not computed in float32.
    weights = (q @ k.mT * scale).softmax(-1).clamp(min=1e-30)
    terms = q.abs() @ k.abs().mT * scale
    grown = weights * (1.0 + terms + terms.amax(-1, keepdim=True))
    # The result is subtracted with its own error.
    slopes = grad.abs() @ v.abs().mT + (grad.abs() * (grown @ v.abs())).sum(-1, keepdim=True)
    products = grown * slopes * scale
    return products @ k.abs(), products.mT @ q.abs(), grown.mT @ grad.abs()


def _attention(temperature: float, offset: float = 0.0) -> dict[str, Any]:
    q, k, v = _draw(2, 2, 9, 64, offset=offset), _draw(2, 2, 200, 64), _draw(2, 2, 200, 64, offset=5.0 * offset)
    return {"q": q, "k": k, "v": v, "causal": False, "temperature": temperature}


# Gradients whose terms cancel: the arguments that have one come first.
GRADIENTS: dict[str, tuple[str, int, dict[str, Any], Callable[..., Magnitudes]]] = {
    "linear, many channels": ("linear", 2, {"x": _draw(2, 9, 4096), "weight": _draw(33, 4096)}, linear_gradients),
    "norm, far from zero": (
        "norm",
        2,
        {"x": _draw(3, 9, 4096, offset=25.0), "weight": _draw(4096), "bias": _draw(4096)},
        norm_gradients,
    ),
    "block_attention, a small temperature": ("block_attention", 3, _attention(0.02), attention_gradients),
    "block_attention, values far from zero": ("block_attention", 3, _attention(1.0, 1.0), attention_gradients),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_errors_of_gradients_are_small_beside_the_magnitudes(name: str, isa: str) -> None:
    op, count, given, magnitudes = GRADIENTS[name]
    spec = ops.SPECS[op]

    def gradients(call: Callable[..., Any], arguments: dict[str, Any], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in list(arguments.values())[:count]]
        changed = {**arguments, **dict(zip(arguments, leaves, strict=False))}
        if op == "linear" and call is spec.call:
            changed["weight"] = pack_weight(changed["weight"])
        elif call is not spec.call:
            changed = spec.arguments(**changed)
        (out,) = tensors(call(**changed))
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    wide = {key: _wide(value) for key, value in given.items()}
    shape = tensors(spec.call(**given))[0].shape
    grad = _draw(*shape)
    found, exact = gradients(spec.call, given, grad), gradients(spec.reference, wide, grad)
    values = [value for value in wide.values() if isinstance(value, Tensor)][:count]
    options = {"temperature": given["temperature"]} if op == "block_attention" else {}
    for got, want, magnitude in zip(found, exact, magnitudes(grad.double(), *values, **options), strict=True):
        share = ((got.double() - want).abs() / magnitude).max().item()
        assert share < BOUND, f"{name}: {share:.2e} of the sum of magnitudes"


def _wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*(part.double() for part in value))
    return value.double() if isinstance(value, Tensor) else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
