"""jacobi_sweep on the emulated device, all launches of all layers, against its reference in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext._sweep_reference import jacobi_sweep_reference

from ..ops.blocks import KINDS, block, state_of
from .blocks import DeviceBlock, reference_caches, sweep_kernels
from .emulator import Kernels

# Distance from the reference, whose products are of float32; values are of order 1.
BOUNDS = {"float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return sweep_kernels()


def _sweeps(kernels: Kernels, options: dict[str, Any], storage: Any, cache: Any, seed: int = 0) -> None:
    """Text, a prefix, two windows at other places in each row, and what the caches then hold."""
    weights = block(options, storage)
    expected, got = state_of(weights, 3, 40, storage=cache), state_of(weights, 3, 40, storage=cache)
    device = DeviceBlock.of(weights, got)
    g = torch.Generator().manual_seed(7)
    width, channels = weights.proj_in.weight.shape
    calls: list[tuple[Tensor, Tensor, int, bool]] = [
        (torch.randn(3, 2, width, generator=g), torch.zeros(3, dtype=torch.int64), 0, True),
        (torch.randn(3, 23, channels, generator=g), torch.full((3,), 2), 0, False),
        (torch.randn(3, 9, channels, generator=g), 23 + torch.arange(3), 25, False),
    ]
    for rows, start, keep, text in calls:
        kept = torch.full((3,), keep)
        _, raw = device.sweep(kernels, rows, start, kept, text=text, seed=seed)
        want = jacobi_sweep_reference(weights, expected, rows, start, kept, text)
        torch.testing.assert_close(raw, want, atol=BOUNDS[storage], rtol=BOUNDS[storage])
    # Slots that no window of a row has reached are as they were.
    reached = torch.arange(40) < 32 + torch.arange(3)[:, None]
    for mine, theirs in zip((device.keys, device.values), reference_caches(weights, expected), strict=True):
        seen = reached[None, :, None, :, None].expand_as(mine)
        torch.testing.assert_close(mine[seen].float(), theirs[seen], atol=BOUNDS[storage], rtol=BOUNDS[storage])
        assert mine[~seen].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage, cache", [("float16", "float16"), ("bfloat16", "float32")])
def test_sweeps_are_those_of_the_reference(kind: str, storage: Any, cache: Any, kernels: Kernels) -> None:
    _sweeps(kernels, KINDS[kind], storage, cache)
