"""Inverts a masked autoregressive flow of the zuko library with `starflow.solve`.

    pip install 'starflow-ext[examples]' && python examples/zuko_inverse.py

zuko inverts such a transform by as many passes through its network as there are features; `solve` stops as soon as the
features have settled. The flow is trained on the 64 pixels of scikit-learn's digits for some seconds first, since in a
new flow features hardly depend on each other.

Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation (2017); Rozet et al., Zuko (2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import zuko
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import starflow

Value = TypeVar("Value")


def inverse(flow: zuko.flows.MAF, z: Tensor, tolerance: float = 1e-4) -> tuple[Tensor, list[starflow.SolveReport]]:
    """Noise to data (batch, features), and a report of each transform, the last one first."""
    reports = []
    for transform in reversed(flow.transform.transforms):

        def fn(x: Tensor, transform: zuko.flows.MaskedAutoregressiveTransform = transform) -> tuple[Tensor, Tensor]:
            affine = transform.meta(None, x).base  # z = affine.scale * x + affine.shift
            scale = affine.scale.reciprocal()
            return -affine.shift * scale, scale

        schedule = starflow.Window(tolerance=tolerance)
        z, report = starflow.solve(fn, z, order=transform.order.argsort(), schedule=schedule)
        reports.append(report)
    return z, reports


def train(side: int, steps: int, hidden: int = 256) -> zuko.flows.MAF:
    """A flow of the digits at `side * side` pixels, with noise of the size of a grey level."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8.0 - 1.0
    data = F.interpolate(images, size=(side, side), mode="bilinear").flatten(1)
    flow = zuko.flows.MAF(side * side, transforms=3, hidden_features=(hidden, hidden))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(steps):
        x = data[torch.randint(len(data), (64,))]
        loss = -flow().log_prob(x + 0.1 * torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.eval()


@dataclass(frozen=True)
class Outcome:
    """Both inverses of one flow and batch.

    Args:
        error, zuko_error: largest difference of the result's noise from the given noise, in standard deviations.
        sweeps: sweeps of all transforms together.
        seconds, zuko_seconds: time of each inverse.
    """

    error: float
    zuko_error: float
    sweeps: int
    seconds: float
    zuko_seconds: float

    @property
    def speedup(self) -> float:
        """Speed-up over zuko's own inverse."""
        return self.zuko_seconds / self.seconds


def compare(flow: zuko.flows.MAF, batch: int, repeats: int = 5) -> Outcome:
    """Time both inverses on the same noise."""
    z = torch.randn(batch, len(flow.transform.transforms[0].order), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        to_noise = flow.transform()
        zuko_seconds, theirs = _timed(lambda: to_noise.inv(z), repeats)
        seconds, (ours, reports) = _timed(lambda: inverse(flow, z), repeats)
        error, zuko_error = (float((to_noise(x) - z).abs().max()) for x in (ours, theirs))
    return Outcome(error, zuko_error, sum(report.sweeps for report in reports), seconds, zuko_seconds)


def _timed(call: Callable[[], Value], repeats: int) -> tuple[float, Value]:
    """Least seconds of `repeats` calls, and the value."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - begin)
    return min(times), value


def main() -> None:
    """Train, invert both ways, check and print."""
    for side, steps in ((8, 400), (16, 200)):
        flow = train(side, steps)
        for batch in (1, 64):
            done = compare(flow, batch)
            assert done.error < 1e-3, f"the noise of the result is off by {done.error:.1e} deviations"
            print(
                f"{side * side} features, batch {batch}: {done.zuko_seconds * 1e3:.1f} ms by zuko (error "
                f"{done.zuko_error:.0e}), {done.seconds * 1e3:.1f} ms by solve in {done.sweeps} sweeps (error "
                f"{done.error:.0e}): {done.speedup:.1f}x"
            )


if __name__ == "__main__":
    main()
