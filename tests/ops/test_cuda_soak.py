"""Every kernel two hundred times on a CUDA device that is busy with other work: the same bits; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Spec

from .battery import DIFFERENTIABLE, SPECS, assert_equal, gradients, large, outcome
from .blocks import KINDS, block, solve, state_of, sweeps

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]

TIMES = 200


class Busy:
    """Products on a stream of their own, so many that they outlast the calls that they disturb."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.factor = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def work(self) -> None:
        with torch.cuda.stream(self.stream):
            torch.mm(self.factor, self.factor)


@pytest.fixture
def busy() -> Busy:
    return Busy()


def _dtype(spec: Spec) -> torch.dtype:
    return torch.bfloat16 if any(set(dtypes) == {torch.bfloat16} for dtypes in spec.dtypes) else torch.float32


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values(spec: Spec, busy: Busy) -> None:
    sample = spec.on_cuda(large(spec, _dtype(spec)))
    expected = outcome(spec, sample)
    for _ in range(TIMES):
        busy.work()
        assert_equal(outcome(spec, sample), expected)


# The gradient of linear is torch's products, whose order of sums is cuBLAS's to choose.
@pytest.mark.parametrize("spec", [spec for spec in DIFFERENTIABLE if spec.name != "linear"], ids=lambda spec: spec.name)
def test_gradients(spec: Spec, busy: Busy) -> None:
    sample = spec.on_cuda(large(spec, _dtype(spec)))

    def run() -> tuple[Tensor, ...]:
        return tuple(gradients(spec, sample, torch.square).values())

    expected = run()
    for _ in range(TIMES):
        busy.work()
        assert_equal(run(), expected)


def test_sweeps_and_solves(busy: Busy) -> None:
    weights = block(KINDS["whole tiles"], "bfloat16", "cuda")

    def run() -> tuple[Tensor, ...]:
        state = state_of(weights, 3, 90, storage="bfloat16")
        return (*sweeps(weights, state), solve(weights, 7, 0.05)[0])

    expected = run()
    for _ in range(TIMES // 10):
        busy.work()
        assert_equal(run(), expected)
