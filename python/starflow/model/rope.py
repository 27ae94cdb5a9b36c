"""Rotary positions: coordinates to tables of cosines and sines, which have no maximum length.

Reference: Su et al., RoFormer (2021); the axes are those of STARFlow-V (rows, columns, and a third axis that text
and frames share).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from starflow_ext.rope_append import Rotation

# Planes of the third axis (text position, frame index) in models that have one.
THIRD_AXIS_PLANES = 8


def grid_positions(frames: int, height: int, width: int, side: float, *, still: bool = False) -> Tensor:
    """Coordinates of the tokens of a clip in raster order.

    Args:
        frames, height, width: of the token grid.
        side: rows and columns are scaled as if the frame had `side * side` tokens.
        still: an image or a frame-local block: the third coordinate is 0.

    Returns:
        (frames * height * width, 3) float32: row, column, frame.
    """
    scale = side / math.sqrt(height * width)
    axes = (torch.arange(length, dtype=torch.float32) for length in (frames, height, width))
    t, i, j = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([i * scale, j * scale, t * (0.0 if still else 1.0)], -1).reshape(-1, 3)


def text_positions(tokens: int, side: float) -> Tensor:
    """Coordinates of text tokens, (tokens, 3) float32: (0, 0, l / tokens * side)."""
    positions = torch.zeros(tokens, 3, dtype=torch.float32)
    positions[:, 2] = torch.arange(tokens, dtype=torch.float32) / max(tokens, 1) * side
    return positions


def rotation(positions: Tensor, head_dim: int, *, third_axis: bool) -> Rotation:
    """Cosines and sines of the rotary angles.

    Args:
        positions: (..., 3) row, column, third coordinate; in float64 angles are computed in float64.
        head_dim: size of a head; a multiple of 4, at least 16 with the third axis.
        third_axis: whether the last 8 planes carry the third coordinate (models of text or video).

    Returns:
        Rotation of (..., head_dim / 2) float32 tables.
    """
    third = THIRD_AXIS_PLANES if third_axis else 0
    spatial = head_dim // 2 - third
    frequencies = 10000.0 ** (-2.0 * torch.arange(spatial // 2, dtype=torch.float32) / max(spatial, 1))
    axes = [positions[..., 0:1] * frequencies, positions[..., 1:2] * frequencies]
    if third:
        axes.append(positions[..., 2:3] * _third_frequencies(third))
    angles = torch.cat(axes, -1)
    return Rotation(angles.cos().float(), angles.sin().float())


def later(table: Rotation | None, frames: int) -> Rotation | None:
    """The table of the same tokens so many frames later, of a model with a third axis; None without rotary positions.

    The angles are added in float64: a table is as exact after any number of frames as it was.
    """
    if table is None or frames == 0:
        return table
    angles = frames * _third_frequencies(THIRD_AXIS_PLANES).to(table.cos.device).double()
    cos, sin = (wave[..., -THIRD_AXIS_PLANES:].double() for wave in table)
    turned = cos * angles.cos() - sin * angles.sin(), sin * angles.cos() + cos * angles.sin()
    return Rotation(
        *(torch.cat([own[..., :-THIRD_AXIS_PLANES], t.float()], -1) for own, t in zip(table, turned, strict=True))
    )


def _third_frequencies(planes: int) -> Tensor:
    """Angle of each plane of the third axis, for a coordinate of 1."""
    return 10000.0 ** (-torch.arange(planes, dtype=torch.float32) / planes)


def concatenate(first: Rotation | None, second: Rotation | None, device: torch.device) -> Rotation | None:
    """Tables of text and grid, one behind the other, on `device`; None without rotary positions."""
    if first is None or second is None:
        return None
    cos, sin = (torch.cat(pair).to(device) for pair in zip(first, second, strict=True))
    return Rotation(cos, sin)
