"""The affine parametrisation in plain torch, shared by the references of the affine ops.

Reference: Zhai et al., Normalizing Flows are Capable Generative Models (TarFlow), section 3; Gu et al., STARFlow,
section 3 (softplus scale, soft clip, guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import (
    arithmetic_dtype,
    check_device,
    check_floating,
    check_tensor,
    dtype_text,
    require,
)
from starflow_ext._options import CONSTANTS, SCALE_ACTIVATIONS, check_name, name_of
from starflow_ext._spec import Bound, Dtypes, Sample

ScaleActivation = Literal["softplus", "exp", "none"]

# log(e - 1): softplus of it is 1, so a raw value of zero means a scale of one.
SOFTPLUS_BIAS: Final = CONSTANTS["softplus_bias"]

# The scale stays within exp(+-80), 5.5e34 and 1.8e-35, so that it, its inverse and every gradient are finite in
# float32; sane networks stay within exp(+-10). The argument is clamped: clamping the result would leave NaN gradients.
LOG_SCALE_LIMIT: Final = CONSTANTS["log_scale_limit"]
SCALE_LIMIT: Final = CONSTANTS["scale_limit"]

# Float32 is allowed 16 units of rounding, for the longest chain (clip, softplus, quotient); log_det is a sum over
# channels. Half types add the rounding of stored values.
AFFINE_BOUNDS: Final[Mapping[torch.dtype, Bound]] = {
    torch.float64: Bound(1e-13, 1e-13),
    torch.float32: Bound(2e-6, 4e-6),
    torch.float16: Bound(1e-3, 4e-6),
    torch.bfloat16: Bound(8e-3, 4e-6),
}


class Terms(NamedTuple):
    """Shift, scale and log-scale, each (..., tokens, channels), in the dtype of the arithmetic."""

    shift: Tensor
    scale: Tensor
    log_scale: Tensor


def check_data(op: str, name: str, data: Tensor, *, dim: int | None = None) -> None:
    """Check the tensor that is transformed: dtype and number of dimensions."""
    check_floating(op, name, data)
    if dim is None:
        require(data.dim() >= 2, op, f"{name} has shape", data.shape, "(..., tokens, channels)")
    else:
        require(data.dim() == dim, op, f"{name} has shape", data.shape, "(batch, tokens, channels)")


def check_raw(
    op: str, name: str, data: Tensor, raw: Tensor, activation: str, soft_clip: float, *, halves: int = 1
) -> None:
    """Check ``raw`` and the options against the tensor that is transformed."""
    check_name(op, "activation", activation, SCALE_ACTIVATIONS)
    check_soft_clip(op, soft_clip)
    mixed = data.dtype == torch.float32 and raw.dtype in (torch.bfloat16, torch.float16)
    expected_dtype = dtype_text(data.dtype) + (", bfloat16 or float16" if data.dtype == torch.float32 else "")
    require(
        raw.dtype == data.dtype or mixed,
        op,
        "raw has dtype",
        dtype_text(raw.dtype),
        f"{expected_dtype} for {name} of {dtype_text(data.dtype)}",
    )
    check_device(op, "raw", raw, name, data)
    expected = list(data.shape)
    expected[-1] *= 1 if activation == "none" else 2
    expected[0] *= halves
    require(
        list(raw.shape) == expected,
        op,
        "raw has shape",
        raw.shape,
        expected,
        f"for {name} of shape",
        data.shape,
    )


def check_soft_clip(op: str, soft_clip: float) -> None:
    """Check the bound of the smooth clip."""
    require(0.0 <= soft_clip < float("inf"), op, "soft_clip is", f"{soft_clip:g}", "a finite number >= 0")


def activation_of(op: str, code: int) -> str:
    """Return the activation whose number a native op was given."""
    return name_of(op, "activation", code, SCALE_ACTIVATIONS)


def affine_terms(raw: Tensor, dtype: torch.dtype, activation: str, soft_clip: float, shifted: bool) -> Terms:
    """Turn the output of the network into shift and scale.

    Args:
        raw: (..., tokens, 2 * channels), log-scale before shift; (..., tokens, channels) with activation "none".
        dtype: dtype of the arithmetic.
        activation: "softplus", "exp" or "none".
        soft_clip: bound of the smooth clip; 0 is no clip.
        shifted: row n belongs to token n + 1, and token 0 is left alone.

    Returns:
        The terms, each (..., tokens, channels).
    """
    tokens = raw.shape[-2]
    raw = raw.to(dtype)
    if shifted:
        # The last row is unused, whatever it holds.
        raw = raw[..., :-1, :]
    if soft_clip > 0.0:
        raw = soft_clip * torch.tanh(raw / soft_clip)
    if activation == "none":
        shift = raw
        scale = torch.ones_like(shift)
        log_scale = torch.zeros_like(shift)
    else:
        log_half, shift = raw.chunk(2, dim=-1)
        if activation == "exp":
            log_scale = log_half.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
            scale = log_scale.exp()
        else:
            # From u = 40 on softplus(u) rounds to u in float64 too; torch's default threshold of 20 suits float32 only.
            scale = F.softplus((log_half + SOFTPLUS_BIAS).clamp(-LOG_SCALE_LIMIT, SCALE_LIMIT), threshold=40.0)
            log_scale = scale.log()
    if shifted:
        shift, scale, log_scale = (
            _behind(term, first, tokens) for term, first in ((shift, 0.0), (scale, 1.0), (log_scale, 0.0))
        )
    return Terms(shift, scale, log_scale)


def guided_terms(conditional: Terms, unconditional: Terms, guidance: float) -> tuple[Tensor, Tensor]:
    """Combine the two halves of a guided batch.

    Args:
        conditional: terms under the condition.
        unconditional: terms without it.
        guidance: weight w > 0.

    Returns:
        Shift and scale of the guided affine map.

    Reference:
        Gu et al., STARFlow, section 3.5 (guidance of two Gaussians).
    """
    ratio = (conditional.scale / unconditional.scale).clamp(max=1.0).square()
    precision = 1.0 + guidance - guidance * ratio
    shift = ((1.0 + guidance) * conditional.shift - guidance * ratio * unconditional.shift) / precision
    return shift, conditional.scale / precision.sqrt()


def check_log_det(op: str, grad_log_det: Tensor, data: Tensor) -> None:
    """Check the gradient of the log-determinant: (..., tokens) in the dtype of the arithmetic."""
    check_tensor(op, "grad_log_det", grad_log_det, arithmetic_dtype(data.dtype), data.shape[:-1], "x", data)


# Data and raw: the same dtype, or raw narrower than float32 data.
AFFINE_DTYPES: Final[tuple[Dtypes, ...]] = (
    *((dtype, dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)


def affine_samples(
    data_name: str, dtypes: Dtypes, generator: torch.Generator, *, shifted: bool = True
) -> Iterator[Sample]:
    """Draw calls of an affine op: every option, and the shapes where errors are likeliest.

    Args:
        data_name: name of the argument that is transformed.
        dtypes: dtypes of the data and of ``raw``.
        generator: source of the values.
        shifted: whether the op knows the option ``shifted``.

    Yields:
        Samples with data (..., tokens, channels) and ``raw``.
    """

    def draw(shape: tuple[int, ...], spread: float, kind: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (spread * values).to(kind)

    def sample(label: str, shape: tuple[int, ...], **options: Any) -> Sample:
        halves = 1 if options.get("activation") == "none" else 2
        raw = draw((*shape[:-1], halves * shape[-1]), 1.5, dtypes[1])
        return Sample(label, {data_name: draw(shape, 2.0, dtypes[0]), "raw": raw, **options})

    yield sample("defaults", (2, 5, 48))
    yield sample("one element", (1, 1, 1))
    yield sample("no samples", (0, 5, 7))
    yield sample("no tokens", (2, 0, 7))
    yield sample("no channels", (2, 5, 0))
    for channels in (3, 7, 8, 9, 15, 16, 17, 33):
        yield sample(f"{channels} channels", (2, 3, channels))
    yield sample("more channels than mantissas in a product", (1, 2, 1300))
    yield sample("large", (6, 301, 48))
    for activation in ("softplus", "exp", "none"):
        for soft_clip in (0.0, 3.0):
            for behind in (False, True) if shifted else (False,):
                options = {"activation": activation, "soft_clip": soft_clip} | ({"shifted": behind} if shifted else {})
                yield sample(" ".join(f"{key}={value}" for key, value in options.items()), (2, 4, 19), **options)


def affine_cases(*data_names: str) -> dict[str, Callable[[torch.Generator], Sample]]:
    """Calls that the benchmarks time, for an op with these data arguments beside ``raw``."""
    large = (64, 1024, 256)  # 64 MB of float32
    frame = (4, 256, 192)  # a frame of a video model, four samples
    window = (1, 64, 48)  # a window of the solver

    def case(
        shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any
    ) -> Callable[[torch.Generator], Sample]:
        def draw(generator: torch.Generator) -> Sample:
            shapes = dict.fromkeys(data_names, shape) | {"raw": (*shape[:-1], 2 * shape[-1])}
            values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
            return Sample(str(list(shape)), values | options)

        return draw

    return {
        "large": case(large),
        "large exp": case(large, activation="exp"),
        "large clipped": case(large, soft_clip=3.0),
        "large bfloat16": case(large, torch.bfloat16),
        "frame": case(frame),
        "window": case(window),
    }


def _behind(term: Tensor, first: float, tokens: int) -> Tensor:
    """Put a row for token 0 in front, where there is one."""
    return F.pad(term, (0, 0, 1, 0), value=first)[..., :tokens, :]
