"""On data with structure: what a tolerance promises holds for a flow that was trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow import Flow, FlowConfig, Sequential, Window, decode
from starflow.codecs import make_codec
from starflow.data.digits import DIGITS, MovingDigits

STEPS, BATCH = 60, 4


@pytest.fixture(scope="module")
def trained(one_thread: None) -> Flow:
    """Two blocks of width 32 after 60 steps: strokes where digits have them, no more."""
    torch.manual_seed(0)
    config = FlowConfig(
        in_channels=16,
        img_size=4,
        channels=32,
        layers_per_block=(1, 2),
        head_dim=16,
        soft_clip=4.0,
        txt_size=1,
        txt_dim=10,
        cond_top_only=True,
        use_final_norm=True,
        seq_order="L2R",
        top_order="spread",
        temporal_causal=2,
        shallow_block_local=True,
    )
    flow = Flow(config)
    data, codec = MovingDigits(frames=3, size=16), make_codec({"kind": "dct", "patch": 4, "channels": 1})
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        clips = [data.item(step * BATCH + i) for i in range(BATCH)]
        x = codec.encode(torch.stack([clip.pixels for clip in clips]))
        y = text([clip.caption.split()[1] for clip in clips])
        encoded = flow.encode(x + 0.1 * torch.randn_like(x), y)
        loss = -flow.log_likelihood(encoded).sum(1).mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flow.track(encoded, 0.1)
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < sum(losses[:10])
    return flow.eval()


def text(words: list[str]) -> Tensor:
    """One token a caption: the digit; nothing for no caption."""
    return torch.stack([torch.tensor([[float(word == digit) for digit in DIGITS]]) for word in words])


@pytest.mark.parametrize("weight", [0.0, 1.5])
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_backward_error_is_below_ten_tolerances(trained: Flow, weight: float, tolerance: float) -> None:
    z = torch.randn(3, 3, 16, 4, 4)
    options = {"y": text(["three", "eight", "zero"]), "null": text([""] * 3), "guidance": weight}
    fast = decode(trained, z, schedule=Window(size=16, tolerance=tolerance, certificate=True), **options)
    assert fast.backward_error is not None
    assert fast.backward_error < 10 * tolerance
    exact = decode(trained, z, schedule=Window(size=16, tolerance=0.0, certificate=True), **options)
    assert exact.backward_error is not None
    assert exact.backward_error < 1e-4
    torch.testing.assert_close(exact.x, decode(trained, z, schedule=Sequential(), **options).x, atol=1e-4, rtol=1e-4)
    assert fast.reports[0].sweeps < exact.reports[0].sweeps  # type: ignore[union-attr]
