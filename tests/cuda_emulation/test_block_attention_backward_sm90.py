"""The gradient of block_attention on sm_90a on the emulated device (TMA, mbarriers, wgmma), against float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Sample
from starflow_ext.block_attention import FrameMask

from ..ops import battery
from .attention import (
    BACKWARD_SM90,
    COLUMNS,
    HALVES,
    Above,
    Call,
    arguments_for,
    assert_gradients,
    draw,
    exact_gradients,
    gradient_rows,
    gradients_of,
    in_chunks,
    run_backward,
)
from .emulator import SEEDS, EmulationError, Kernels, Report, emulated
from .switches import BOUND, NOT, STATEMENT, Switches


def _run(kernels: Kernels, seed: int, call: Call, above: Above) -> tuple[Report, tuple[Tensor, ...]]:
    return run_backward(kernels, "block_attention_backward_sm90_cuda", seed, call, above)


def _placed(arguments: Mapping[str, Any], above: Above, *where: int) -> tuple[Call, Above]:
    """All that TMA reads in rows that it takes."""
    rows = {name: in_chunks(arguments[name], *where) for name in ("q", "k", "v")}
    return Call.of({**arguments, **rows}), replace(above, grad_out=in_chunks(above.grad_out, *where))


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Call, Above, tuple[Tensor, ...]]]:
    """Those calls of the battery that the kernel takes."""
    for sample, above, expected in exact_gradients(dtype):
        shape = sample.arguments["k"].shape
        if shape[-1] <= 128 and shape[2] > 0:
            yield sample.label, *_placed(sample.arguments, above), expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, through both results; each call in another schedule."""
    calls = list(_calls(dtype))
    assert len(calls) > 20
    for seed, (label, call, above, expected) in enumerate(calls):
        report, grads = _run(emulated(BACKWARD_SM90), seed, call, above)
        assert_gradients(dtype, label, grads, expected)
        assert report.bank_conflicts == 0 or not call.wide, label


def _long(dtype: torch.dtype, head_dim: int = 64) -> dict[str, Any]:
    """Three tiles of keys, and more tiles of queries than stages: each sample sees others, the last ones in part.

    NaN behind each sample's keys, and in queries that see no key.
    """
    keys = 3 * COLUMNS - 9
    arguments = arguments_for(
        dtype,
        head_dim,
        queries=150,
        keys=keys,
        q_start=torch.tensor([keys - 150, -20]),
        k_length=torch.tensor([keys, 260]),
        frames=None,
    )
    arguments["q"][1, :, :20] = torch.nan
    for name in ("k", "v"):
        arguments[name][1, :, 130:] = torch.nan
    return arguments


@cache
def _exact_long(dtype: torch.dtype, head_dim: int) -> tuple[Call, Above, tuple[Tensor, ...]]:
    arguments = _long(dtype, head_dim)
    above, expected = gradients_of(arguments)
    above.grad_out[1, :, :20] = torch.nan
    return *_placed(arguments, above), expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_gradient(dtype: torch.dtype, head_dim: int) -> None:
    """Stages that are used again, three blocks that add to one tile of grad_q, NaN wherever nobody looks."""
    kernels = emulated(BACKWARD_SM90)
    call, above, expected = _exact_long(dtype, head_dim)
    _, first = _run(kernels, SEEDS[0], call, above)
    assert_gradients(dtype, "long", first, expected)
    for seed in SEEDS[1:]:
        battery.assert_equal(_run(kernels, seed, call, above)[1], first)
