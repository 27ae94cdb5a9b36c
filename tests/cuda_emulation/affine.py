"""Calls of the affine ops and jacobi_update on the emulated device, and what they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from starflow_ext._check import arithmetic_dtype
from starflow_ext._spec import Dtypes, Sample, Spec

from ..ops import battery
from .emulator import Kernels, Report

OPS = ("affine_forward", "affine_inverse", "jacobi_update")


def source_of(name: str) -> str:
    return f"ops/{name}/{name}.cu"


def rows_of(tensor: Tensor) -> Tensor:
    """(..., tokens, channels) as (batch, tokens, channels)."""
    return tensor.reshape(prod(tensor.shape[:-2]), *tensor.shape[-2:])


def shape_of(data: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> dict[str, Any]:
    batch, tokens, channels = data.shape
    options = {"activation": "exponential" if activation == "exp" else activation}
    options |= {"soft_clip": soft_clip, "shifted": shifted}
    return {
        "batch": batch,
        "tokens": tokens,
        "channels": channels,
        "data": data.dtype,
        "raw": raw.dtype,
        "options": options,
    }


def _forward(
    kernels: Kernels, seed: int, x: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool
) -> tuple[Report, tuple[Tensor, ...]]:
    rows, raws = rows_of(x), rows_of(raw)
    z, log_det = torch.empty_like(rows), rows.new_empty(rows.shape[:2], dtype=arithmetic_dtype(x.dtype))
    shape = shape_of(rows, raws, activation, soft_clip, shifted)
    report = kernels.launch("affine_forward_cuda", seed, shape=shape, x=rows, raw=raws, z=z, log_det=log_det)
    return report, (z.reshape(x.shape), log_det.reshape(x.shape[:-1]))


def _inverse(
    kernels: Kernels, seed: int, z: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool
) -> tuple[Report, tuple[Tensor, ...]]:
    rows, raws = rows_of(z), rows_of(raw)
    x = torch.empty_like(rows)
    shape = shape_of(rows, raws, activation, soft_clip, shifted)
    return kernels.launch("affine_inverse_cuda", seed, shape=shape, z=rows, raw=raws, x=x), (x.reshape(z.shape),)


def _update(
    kernels: Kernels, seed: int, x: Tensor, z: Tensor, raw: Tensor, activation: str, soft_clip: float, guidance: float
) -> tuple[Report, tuple[Tensor, ...]]:
    change = x.new_empty(x.shape[:2], dtype=torch.float32)
    shape = shape_of(x, raw, activation, soft_clip, False)
    given = {"x": x, "z": z, "raw": raw, "change": change, "guidance": guidance}
    return kernels.launch("jacobi_update_cuda", seed, shape=shape, **given), (change, x)


CALLS: dict[str, Callable[..., tuple[Report, tuple[Tensor, ...]]]] = {
    "affine_forward": _forward,
    "affine_inverse": _inverse,
    "jacobi_update": _update,
}


def run(spec: Spec, kernels: Kernels, seed: int, sample: Sample) -> tuple[Report, tuple[Tensor, ...]]:
    return CALLS[spec.name](kernels, seed, **spec.arguments(**battery.copied(sample).arguments))


@dataclass(frozen=True)
class Traffic:
    """Bytes of each tensor that a call read and wrote, and those of what it was given and of what it made."""

    read: Mapping[str, int]
    written: Mapping[str, int]
    given: Mapping[str, int]
    made: Mapping[str, int]

    @property
    def counted(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def least(self) -> int:
        """Each input read once, each result written once."""
        return sum(self.given.values()) + sum(self.made.values())


def traffic(spec: Spec, kernels: Kernels, dtypes: Dtypes, channels: int) -> Traffic:
    """Of six tokens, with guidance where the op has it."""
    data, other = dtypes
    x = torch.randn(2, 3, channels).to(data)
    raw = torch.randn(2, 3, 2 * channels).to(other)
    given: dict[str, Any] = {
        "affine_forward": {"x": x, "raw": raw},
        "affine_inverse": {"z": x, "raw": raw},
        "jacobi_update": {"x": x, "z": x.clone(), "raw": torch.cat([raw, raw]), "guidance": 1.5},
    }[spec.name]
    made = {"affine_forward": ("z", "log_det"), "affine_inverse": ("x",), "jacobi_update": ("change", "x")}[spec.name]
    report, results = run(spec, kernels, 0, Sample("", given))
    nothing = dict.fromkeys(report.read, 0)
    return Traffic(
        report.read,
        report.written,
        nothing | {name: value.nbytes for name, value in given.items() if isinstance(value, Tensor)},
        nothing | {name: value.nbytes for name, value in zip(made, results, strict=True)},
    )
