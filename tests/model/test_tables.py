"""Tables of positions and orders are kept for the process: in whatever mode of torch they are first asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from starflow import Flow, FlowConfig, decode
from starflow.model import make_layout, token_order
from starflow.model.tables import kept_tables

from ..flows import VIDEO, condition, latents, make_flow

CONFIG = FlowConfig(**VIDEO)  # type: ignore[arg-type]


class _Encoder(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.flow.encode(x, y).z


def _exported(x: Tensor, y: Tensor) -> None:
    flow = make_flow(VIDEO)
    program = torch.export.export(_Encoder(flow).eval(), (x, y), strict=False)
    torch.testing.assert_close(program.module()(x, y), flow.encode(x, y).z)


def _fake(x: Tensor, y: Tensor) -> None:
    with FakeTensorMode():
        _Encoder(Flow(CONFIG))(torch.empty(x.shape), torch.empty(y.shape))


def _fake_with_real(x: Tensor, y: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        _Encoder(Flow(CONFIG))(torch.empty(x.shape), torch.empty(y.shape))


def _meta(x: Tensor, y: Tensor) -> None:
    with torch.device("meta"):
        for order in ("raster", "spread", "reverse", "random", "farthest"):
            make_layout(CONFIG, order, x.shape[1], 4, 4, y.shape[1], still=False)


def _double(x: Tensor, y: Tensor) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        _Encoder(Flow(CONFIG))(x.double(), y.double())
    finally:
        torch.set_default_dtype(torch.float32)


def _inference(x: Tensor, y: Tensor) -> None:
    with torch.inference_mode():
        _Encoder(make_flow(VIDEO))(x, y)


@pytest.mark.parametrize("first", [_exported, _fake, _fake_with_real, _meta, _double, _inference])
def test_a_mode_leaves_nothing_behind(first: Callable[[Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow(VIDEO)
    x, y = latents(flow), condition(flow)
    expected, decoded = flow.encode(x, y).z, decode(flow, x, y).x
    # As in a process where nobody has asked yet.
    import starflow.model.block as block
    import starflow.model.conditioner as conditioner
    import starflow.model.denoiser as denoiser

    layouts = kept_tables(128)(make_layout.__wrapped__)  # type: ignore[attr-defined]
    orders = kept_tables(256)(token_order.__wrapped__)  # type: ignore[attr-defined]
    for module in (block, conditioner, denoiser):
        for name, table in (("make_layout", layouts), ("token_order", orders)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, table)
    first(x, y)
    z = flow.encode(x, y).z
    assert type(z) is Tensor
    assert torch.equal(z, expected)
    assert torch.equal(decode(flow, x, y).x, decoded)
    flow.encode(x, y).z.sum().backward()


def test_tables_are_float32_whatever_the_default() -> None:
    expected = make_layout(CONFIG, "spread", 2, 3, 4, 3, still=False)
    torch.set_default_dtype(torch.float64)
    try:
        found = make_layout.__wrapped__(CONFIG, "spread", 2, 3, 4, 3, still=False)  # type: ignore[attr-defined]
    finally:
        torch.set_default_dtype(torch.float32)
    for table, other in zip(
        (expected.text, expected.query, expected.key), (found.text, found.query, found.key), strict=False
    ):
        for one, two in zip(table, other, strict=False):
            assert torch.equal(one, two)
