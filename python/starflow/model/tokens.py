"""Patches, token orders and frame folding: pure, invertible, stateless.

A grid of tokens is (batch, frames, height, width, channels); an image is a grid of one frame. A sequence is
(batch, tokens, channels), its n-th token being the grid token `order[n]` in raster order (frame, row, column).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from starflow.model.tables import kept_tables

Order = Literal[
    "raster",
    "reverse",
    "reverse_in_frame",
    "spread",
    "farthest",
    "checkerboard",
    "interlace",
    "diagonal",
    "random",
]


def patchify(latents: Tensor, patch_size: int, *, channel_first: bool = False) -> Tensor:
    """Cuts frames into patches, one token each.

    Args:
        latents: (batch, frames, channels, height, width), or (batch, channels, height, width) for images.
        patch_size: side p of a patch.
        channel_first: order inside a token: (channel, row, column) instead of (row, column, channel).

    Returns:
        Grid (batch, frames, height / p, width / p, p * p * channels).

    Raises:
        ValueError: the patch does not divide the frame.
    """
    if latents.dim() == 4:
        latents = latents.unsqueeze(1)
    if latents.dim() != 5:
        raise ValueError(
            f"patchify: latents has shape {list(latents.shape)}, expected (batch, frames, channels, height, width) "
            "or (batch, channels, height, width)"
        )
    batch, frames, channels, height, width = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify: latents have frames of {height}x{width}, expected sides that patch_size {patch_size} divides"
        )
    cut = latents.reshape(
        batch, frames, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )  # b t c i r j s
    cut = cut.permute(0, 1, 3, 5, 2, 4, 6) if channel_first else cut.permute(0, 1, 3, 5, 4, 6, 2)
    return cut.flatten(4)


def unpatchify(grid: Tensor, patch_size: int, *, channel_first: bool = False, image: bool = False) -> Tensor:
    """Inverse of `patchify`; `image` drops the frame axis.

    Args:
        grid: (batch, frames, height, width, p * p * channels).

    Returns:
        (batch, frames, channels, height * p, width * p), without the frame axis for an image.
    """
    batch, frames, height, width, dims = grid.shape
    channels = dims // patch_size**2
    if channel_first:
        cut = grid.reshape(batch, frames, height, width, channels, patch_size, patch_size).permute(0, 1, 4, 2, 5, 3, 6)
    else:
        cut = grid.reshape(batch, frames, height, width, patch_size, patch_size, channels).permute(0, 1, 6, 2, 4, 3, 5)
    latents = cut.reshape(batch, frames, channels, height * patch_size, width * patch_size)
    return latents.squeeze(1) if image else latents


def _reverse_bits(value: int, bits: int) -> int:
    return int(format(value, f"0{bits}b")[::-1], 2) if bits else 0


def _spread(height: int, width: int) -> list[int]:
    """Raster indices of a frame in bit-reversed Morton order: each prefix of the sequence covers the frame evenly."""
    bits = max(height - 1, width - 1).bit_length()
    cells = []
    for row in range(height):
        for column in range(width):
            morton = 0
            for bit in range(bits):
                morton |= ((column >> bit) & 1) << (2 * bit) | ((row >> bit) & 1) << (2 * bit + 1)
            cells.append((_reverse_bits(morton, 2 * bits), row * width + column))
    return [cell for _, cell in sorted(cells)]


def _farthest(height: int, width: int) -> list[int]:
    """From the middle on, always a cell with the largest (Euclidean) distance to the nearest cell before it."""
    cells = [(row, column) for row in range(height) for column in range(width)]
    nearest = [math.inf] * len(cells)
    chosen: list[int] = []
    cell = height // 2 * width + width // 2
    while len(chosen) < len(cells):
        chosen.append(cell)
        nearest = [min(known, math.dist(place, cells[cell])) for known, place in zip(nearest, cells, strict=True)]
        cell = nearest.index(max(nearest))
    return chosen


def _checkerboard(height: int, width: int) -> list[int]:
    """The even squares of a checkerboard row by row, then the odd ones."""
    return sorted(range(height * width), key=lambda cell: ((cell // width + cell % width) % 2, cell))


def _interlace(height: int, width: int) -> list[int]:
    """Rows in bit-reversed order, each from left to right."""
    bits = (height - 1).bit_length()
    return sorted(range(height * width), key=lambda cell: (_reverse_bits(cell // width, bits), cell))


def _diagonal(height: int, width: int) -> list[int]:
    """Along rising diagonals: the left and the upper neighbour of a cell are on the diagonal before its own."""
    return sorted(range(height * width), key=lambda cell: (cell // width + cell % width, cell))


def _random(height: int, width: int) -> list[int]:
    """One shuffle, the same for every frame and every model."""
    cells = list(range(height * width))
    random.Random(0).shuffle(cells)
    return cells


_IN_FRAME: Final[dict[str, Callable[[int, int], list[int]]]] = {
    "reverse_in_frame": lambda height, width: list(range(height * width))[::-1],
    "spread": _spread,
    "farthest": _farthest,
    "checkerboard": _checkerboard,
    "interlace": _interlace,
    "diagonal": _diagonal,
    "random": _random,
}


@kept_tables(256)
def token_order(order: Order, frames: int, height: int, width: int) -> Tensor:
    """The sequence in which a block visits the tokens of a clip.

    Args:
        order: "raster"; "reverse" (the whole sequence backwards); "reverse_in_frame" (each frame backwards, frames in
            order); "spread" (each frame in bit-reversed Morton order, frames in order). The others visit frames in
            order too, and the tokens of each: "farthest" (the token that is farthest from those before it),
            "checkerboard" (even squares, then odd ones), "interlace" (bit-reversed rows), "diagonal", "random" (one
            shuffle); docs/token-order.md compares them.
        frames, height, width: of the grid.

    Returns:
        (frames * height * width,) int64: raster index of the n-th token. Shared: do not write to it.

    Raises:
        ValueError: an unknown order.
    """
    if order not in get_args(Order):
        raise ValueError(f"token_order: order is {order!r}, expected one of {', '.join(get_args(Order))}")
    area = height * width
    raster = torch.arange(frames * area)
    if order == "raster":
        return raster
    if order == "reverse":
        return raster.flip(0)
    frame = torch.tensor(_IN_FRAME[order](height, width))
    return (frame + area * torch.arange(frames)[:, None]).flatten()


def to_sequence(grid: Tensor, order: Tensor) -> Tensor:
    """Grid (batch, frames, height, width, channels) to the sequence (batch, tokens, channels) in `order`."""
    return grid.flatten(1, 3).index_select(1, order.to(grid.device))


def to_grid(sequence: Tensor, order: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Inverse of `to_sequence`."""
    grid = torch.empty_like(sequence).index_copy_(1, order.to(sequence.device), sequence)
    return grid.view(grid.shape[0], frames, height, width, -1)
