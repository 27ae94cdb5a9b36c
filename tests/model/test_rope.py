"""Rotations: orthogonal, relative, and where each slot of a spread block stands."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from starflow import FlowConfig
from starflow.model import make_layout, token_order
from starflow.model.rope import grid_positions, rotation, text_positions
from starflow_ext.rope_append import Pairing, rope_append, rotate

from ..flows import VIDEO

PAIRINGS = get_args(Pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("head_dim", "third_axis"), [(8, False), (16, True), (64, True), (20, False)])
def test_rotation_keeps_lengths_and_angles_between_vectors(pairing: Pairing, head_dim: int, third_axis: bool) -> None:
    table = rotation(grid_positions(2, 3, 4, 5.0), head_dim, third_axis=third_axis)
    u, v = torch.randn(2, 1, 1, 24, head_dim, dtype=torch.float64)
    a, b = rotate(u, table, pairing), rotate(v, table, pairing)
    torch.testing.assert_close((a * b).sum(-1), (u * v).sum(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_scores_depend_on_relative_positions_alone(pairing: Pairing) -> None:
    positions = torch.rand(6, 3, dtype=torch.float64) * 9
    q, k = torch.randn(2, 1, 1, 6, 64, dtype=torch.float64)

    def scores(at: torch.Tensor) -> torch.Tensor:
        table = rotation(at, 64, third_axis=True)
        return rotate(q, table, pairing) @ rotate(k, table, pairing).mT

    moved = positions + torch.tensor([2.5, -1.0, 4.0])
    torch.testing.assert_close(scores(moved), scores(positions), atol=1e-5, rtol=1e-5)
    stretched = positions * torch.tensor([1.0, 1.0, 2.0])
    assert (scores(stretched) - scores(positions)).abs().max() > 0.1


def test_pairings_are_one_rotation_of_reordered_elements() -> None:
    table = rotation(torch.rand(5, 3) * 9, 16, third_axis=False)
    x = torch.randn(1, 2, 5, 16)
    reordered = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    expected = rotate(x, table, "interleaved")
    torch.testing.assert_close(
        rotate(reordered, table, "half"), torch.cat([expected[..., 0::2], expected[..., 1::2]], -1)
    )


def test_positions() -> None:
    grid = grid_positions(2, 3, 12, 12.0)
    assert grid.shape == (72, 3)
    assert grid[-1].tolist() == [2 * 2.0, 11 * 2.0, 1.0]  # scaled as if the frame had 12 x 12 tokens
    assert grid_positions(2, 3, 4, 5.0, still=True)[:, 2].abs().max() == 0
    assert text_positions(4, 8.0)[:, 2].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert text_positions(0, 8.0).shape == (0, 3)


@pytest.mark.parametrize("sos", [True, False])
def test_spread_queries_stand_at_what_they_predict_and_keys_at_what_they_hold(sos: bool) -> None:
    config = FlowConfig(**(VIDEO | {"top_order": "spread", "sos": sos}))
    layout = make_layout(config, "spread", 2, 3, 4, 3, still=False)
    assert layout.query is not None
    assert layout.key is not None
    visited = token_order("spread", 2, 3, 4)
    at = rotation(grid_positions(2, 3, 4, config.position_side)[visited], config.head_dim, third_axis=True)
    if sos:  # slot n predicts token n and holds token n - 1
        torch.testing.assert_close(layout.query.cos, at.cos)
        torch.testing.assert_close(layout.key.sin[1:], at.sin[:-1])
    else:  # slot n predicts token n + 1 and holds token n
        torch.testing.assert_close(layout.query.cos[:-1], at.cos[1:])
        torch.testing.assert_close(layout.key.sin, at.sin)


def test_raster_slots_keep_the_published_positions() -> None:
    config = FlowConfig(**VIDEO)
    layout = make_layout(config, "reverse_in_frame", 2, 3, 4, 3, still=False)
    at = rotation(grid_positions(2, 3, 4, config.position_side), config.head_dim, third_axis=True)
    assert layout.query is layout.key or torch.equal(layout.query.cos, layout.key.cos)  # type: ignore[union-attr]
    assert torch.equal(layout.query.cos, at.cos)  # type: ignore[union-attr]


def test_wrong_tables_and_pairings_are_refused() -> None:
    table = rotation(grid_positions(1, 1, 3, 3.0), 8, third_axis=False)
    with pytest.raises(RuntimeError, match=r"rotation has shape \[3, 4\], expected \[..., 5, 4\] for 5 tokens"):
        rotate(torch.zeros(1, 1, 5, 8), table, "half")
    with pytest.raises(RuntimeError, match=r'pairing is "other", expected "interleaved" or "half"'):
        rotate(torch.zeros(1, 1, 3, 8), table, "other")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"qkv has channels 10, expected a multiple of 4 \(heads \+ 2 kv_heads\)"):
        rope_append(torch.zeros(1, 3, 10), heads=2, kv_heads=1)
