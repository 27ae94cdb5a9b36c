"""Patches and orders are invertible rearrangements."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from starflow.model import Order, patchify, to_grid, to_sequence, token_order, unpatchify

ORDERS: tuple[Order, ...] = get_args(Order)
SIZES = [(1, 1, 1), (1, 4, 4), (3, 2, 5), (2, 7, 3), (2, 8, 8), (3, 1, 6)]


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 10), (2, 5, 6, 10), (1, 1, 1, 2, 2)])
@pytest.mark.parametrize("patch", [1, 2])
def testfrom_grid_inverts_patchify(shape: tuple[int, ...], patch: int, channel_first: bool) -> None:
    x = torch.randn(shape)
    grid = patchify(x, patch, channel_first=channel_first)
    assert grid.numel() == x.numel()
    assert grid.dim() == 5
    assert torch.equal(unpatchify(grid, patch, channel_first=channel_first, image=x.dim() == 4), x)


@pytest.mark.parametrize("channel_first", [False, True])
def test_layout_inside_a_token(channel_first: bool) -> None:
    channels, patch = 3, 2
    x = torch.arange(channels * 4 * 6).view(1, channels, 4, 6)
    grid = patchify(x, patch, channel_first=channel_first)
    for k, i, j, r, s in [(0, 0, 0, 0, 0), (2, 1, 2, 0, 1), (1, 0, 1, 1, 0)]:
        place = (k * patch + r) * patch + s if channel_first else (r * patch + s) * channels + k
        assert grid[0, 0, i, j, place] == x[0, k, i * patch + r, j * patch + s]


def test_patchify_errors() -> None:
    with pytest.raises(ValueError, match=r"frames of 4x6, expected sides that patch_size 4 divides"):
        patchify(torch.zeros(1, 2, 4, 6), 4)
    with pytest.raises(ValueError, match=r"patchify: latents has shape \[4, 6\], expected \(batch, frames"):
        patchify(torch.zeros(4, 6), 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_orders_are_permutations(order: Order, size: tuple[int, int, int]) -> None:
    frames, height, width = size
    visited = token_order(order, frames, height, width)
    assert visited.sort().values.tolist() == list(range(frames * height * width))
    if order != "reverse":  # frames stay in order
        assert torch.equal(visited // (height * width), torch.arange(frames).repeat_interleave(height * width))
    x = torch.randn(2, *size, 3)
    sequence = to_sequence(x, visited)
    assert torch.equal(sequence[:, 0], x.flatten(1, 3)[:, visited[0]])
    assert torch.equal(to_grid(sequence, visited, *size), x)


def test_orders_by_example() -> None:
    assert token_order("reverse", 2, 1, 2).tolist() == [3, 2, 1, 0]
    assert token_order("reverse_in_frame", 3, 2, 2).tolist() == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]
    assert token_order("spread", 1, 2, 2).tolist()[0] == 0


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_spread_goes_from_coarse_to_fine(side: int) -> None:
    """The first 4^k tokens hit every cell of the 2^k x 2^k grid exactly once."""
    visited = token_order("spread", 1, side, side)
    for level in range(side.bit_length()):
        cells, cell = 2**level, side // 2**level
        head = visited[: cells * cells]
        coarse = (head // side) // cell * cells + (head % side) // cell
        assert coarse.sort().values.tolist() == list(range(cells * cells))


@pytest.mark.parametrize(("height", "width"), [(3, 5), (6, 7), (30, 53), (1, 9)])
def test_spread_of_any_size_keeps_the_order_of_its_power_of_two(height: int, width: int) -> None:
    side = 1 << (max(height, width) - 1).bit_length()
    whole = token_order("spread", 1, side, side)
    inside = whole[(whole // side < height) & (whole % side < width)]
    expected = inside // side * width + inside % side
    assert torch.equal(token_order("spread", 1, height, width), expected)


def test_farthest_keeps_its_distance() -> None:
    """No later token is farther from those before it than the one that was chosen."""
    height, width = 5, 7
    visited = token_order("farthest", 1, height, width)
    places = torch.stack([visited // width, visited % width], -1).double()
    for count in range(1, height * width):
        nearest = torch.cdist(places[count:], places[:count]).amin(1)
        assert nearest[0] == nearest.max()


def test_orders_that_put_a_neighbour_off() -> None:
    checkerboard = token_order("checkerboard", 1, 3, 3)
    assert checkerboard.tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert token_order("interlace", 1, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert token_order("diagonal", 1, 2, 3).tolist() == [0, 1, 3, 2, 4, 5]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 'hilbert', expected one of raster, reverse"):
        token_order("hilbert", 1, 2, 2)  # type: ignore[arg-type]
