"""Pixels to latents by a fixed linear transform of blocks of pixels in space and time, which is exactly invertible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from starflow.arguments import check_flag
from starflow.codecs.codec import check_latents, check_pixels
from starflow.messages import shown
from starflow.numeric import integer

__all__ = ["BlockTransform"]

# Opponent colours as orthonormal rows over RGB: luminance, red against blue, green against magenta.
_OPPONENT = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (-1 / math.sqrt(6), 2 / math.sqrt(6), -1 / math.sqrt(6)),
)


def _dct(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a float64 matrix (size, size), with rows in the order of rising frequency."""
    position = torch.arange(size, dtype=torch.float64) + 0.5
    frequency = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * frequency[:, None] * position) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def _haar(size: int) -> torch.Tensor:
    """The orthonormal Haar transform of all levels as a float64 matrix (size, size), with rows from coarse to fine."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        mean = torch.kron(matrix, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        difference = torch.kron(torch.eye(len(matrix), dtype=torch.float64), torch.tensor([[1.0, -1.0]]).double())
        matrix = torch.cat([mean, difference]) * math.sqrt(0.5)
    return matrix


def _gain(t: int, i: int, j: int, colour: int, *, patch: int, temporal: int) -> float:
    """The inverse of the typical standard deviation of a DCT coefficient of filmed scenes.

    The formula was fitted to blocks of 6, 8 and 12 pixels by 2 frames of small clips (48 pixels high, 8 frames per
    second), and is within a factor of 1.3 of them on average. The deviation falls with frequency in space and in time,
    and is smaller for colour than for luminance.

    Args:
        t, i, j: frequencies in time and in the two directions of space.
        colour: 0 for luminance or plain RGB, 1 and 2 for the opponent colours.
        patch, temporal: side of the block in pixels and its length in frames.
    """
    size = 0.6 * patch * math.sqrt(temporal)
    return math.pow(1 + math.hypot(i, j), 1.75) * math.pow(1 + t, 1.5) * (1.0, 5.5, 8.0)[colour] / size


def _coarseness(kind: str, index: int) -> int:
    """A number that orders the rows of a one-dimensional transform: their frequency (DCT) or their level (Haar)."""
    return index if kind == "dct" else index.bit_length()


class BlockTransform:
    """Orthonormal DCT or Haar transform of blocks of temporal x patch x patch pixels into channels.

    Each block becomes one latent position with temporal * patch * patch * channels values, ordered from coarse to fine;
    the colours of a coefficient stand together, luminance first. The transform is orthonormal, so its log-determinant
    is 0, a likelihood of latents is also one of pixels, and white noise stays white.

    In filmed scenes a few coarse coefficients of a block are large, and most are smaller than the noise that training
    adds. Most of the gradient of the loss then comes from that noise, and a flow learns the scene slowly. `equalize`
    multiplies each coefficient by a constant that brings its typical size near 1. The log-determinant is then another
    constant, and noise on the latents hides a share of every frequency instead of the fine ones alone.

    Args:
        kind: "dct" or "haar" (sizes must be powers of two).
        patch: side of a block in pixels.
        temporal: frames in a block.
        channels: 1 (grey) or 3 (RGB, rotated to opponent colours when `opponent`).
        opponent: whether RGB is rotated to opponent colours; without effect on grey.
        equalize: see above; for "dct" only.

    Raises:
        ValueError: when an argument is out of range.

    Reference: N. Ahmed, T. Natarajan, K. R. Rao, Discrete Cosine Transform, 1974; A. Haar, 1910.
    """

    exact = True

    def __init__(
        self,
        kind: Literal["dct", "haar"] = "dct",
        patch: int = 4,
        temporal: int = 1,
        channels: int = 3,
        opponent: bool = True,
        equalize: bool = False,
    ) -> None:
        if kind not in ("dct", "haar"):
            raise ValueError(f'BlockTransform: kind is "{kind}", expected "dct" or "haar"')
        for name, flag in (("opponent", opponent), ("equalize", equalize)):
            check_flag("BlockTransform", name, flag)
        for name, value in (("patch", patch), ("temporal", temporal)):
            if (whole := integer(value)) is None or whole < 1:
                raise ValueError(f"BlockTransform: {name} is {shown(value)}, expected an integer of at least 1")
            if kind == "haar" and value & (value - 1):
                raise ValueError(f"BlockTransform: {name} is {value}, expected a power of two for the Haar transform")
        if integer(channels) not in (1, 3):
            raise ValueError(f"BlockTransform: channels is {shown(channels)}, expected 1 (grey) or 3 (RGB)")
        if equalize and kind != "dct":
            raise ValueError(f'BlockTransform: equalize is on with kind "{kind}", expected "dct"')
        self.kind = kind
        self.patch = patch
        self.spatial = patch
        self.temporal = temporal
        self.channels = channels
        self.opponent = opponent
        self.equalize = equalize
        self.latent_channels = temporal * patch * patch * channels
        basis, gains = self._make_basis()
        self._encoder = gains[:, None] * basis
        self._decoder = basis / gains[:, None]
        self.log_det_per_dimension = float(gains.log().mean())

    def _make_basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float64 matrix of the transform, with orthonormal rows, and the gain of each row.

        Rows are latent channels. Columns are the pixels of a block, (temporal, channels, patch, patch) flattened.
        """
        transform = _dct if self.kind == "dct" else _haar
        space, time = transform(self.patch), transform(self.temporal)
        rotate = self.channels == 3 and self.opponent
        colour = torch.tensor(_OPPONENT, dtype=torch.float64) if rotate else torch.eye(self.channels).double()
        # The Kronecker product orders rows and columns of the matrix alike: (time, colour, row, column).
        basis = torch.kron(time, torch.kron(colour, torch.kron(space, space)))
        order = []
        for t in range(self.temporal):
            for c in range(self.channels):
                for i in range(self.patch):
                    for j in range(self.patch):
                        steps = [_coarseness(self.kind, index) for index in (t, i, j)]
                        order.append((sum(steps), max(steps), t, i, j, c))
        rows = sorted(range(len(order)), key=order.__getitem__)
        gains = torch.ones(len(rows), dtype=torch.float64)
        if self.equalize:
            size = {"patch": self.patch, "temporal": self.temporal}
            for row, (_, _, t, i, j, c) in enumerate(sorted(order)):
                gains[row] = _gain(t, i, j, c if rotate else 0, **size)
        return basis[rows], gains

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a number of pixel frames.

        Args:
            frames: a positive multiple of `temporal`.

        Raises:
            ValueError: when `frames` is any other number.
        """
        if frames < 1 or frames % self.temporal:
            raise ValueError(f"BlockTransform: frames is {frames}, expected a positive multiple of {self.temporal}")
        return frames // self.temporal

    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames of a number of latent frames; the inverse of `latent_frames`."""
        return latent_frames * self.temporal

    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Transform pixels to latents.

        Args:
            pixels: floating point (batch, frames, channels, height, width), or images (batch, channels, height,
                width) where `temporal` is 1.
            noise: must be None: the transform is deterministic and has no posterior.

        Returns:
            latents (batch, frames / temporal, latent_channels, height / patch, width / patch), images without the
            frame axis; in the dtype of the pixels.

        Raises:
            ValueError: when a side or the number of frames is not a multiple of the block's, or noise is given.
        """
        if noise is not None:
            raise ValueError("BlockTransform: noise is given, expected None: the transform is exact and draws nothing")
        check_pixels("BlockTransform", pixels, self.channels, self.spatial)
        if pixels.ndim == 4:
            return self.encode(pixels[:, None])[:, 0]
        batch, frames, channels, height, width = pixels.shape
        latent_frames, rows, columns = self.latent_frames(frames), height // self.patch, width // self.patch
        blocks = pixels.reshape(
            batch, latent_frames, self.temporal, channels, rows, self.patch, columns, self.patch
        ).permute(0, 1, 4, 6, 2, 3, 5, 7)
        blocks = blocks.reshape(batch, latent_frames, rows, columns, self.latent_channels)
        return (blocks @ self._encoder.to(pixels).T).movedim(-1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Transform latents to pixels; the inverse of `encode`.

        Args:
            latents: as `encode` returns them.

        Returns:
            pixels (batch, frames, channels, height, width), or (batch, channels, height, width); not clamped.

        Raises:
            ValueError: when the shape does not fit.
        """
        check_latents("BlockTransform", latents, self.latent_channels)
        if latents.ndim == 4:
            self.latent_frames(1)
            return self.decode(latents[:, None])[:, 0]
        batch, latent_frames, _, rows, columns = latents.shape
        blocks = latents.movedim(2, -1) @ self._decoder.to(latents)
        blocks = blocks.reshape(
            batch, latent_frames, rows, columns, self.temporal, self.channels, self.patch, self.patch
        ).permute(0, 1, 4, 5, 2, 6, 3, 7)
        return blocks.reshape(
            batch, latent_frames * self.temporal, self.channels, rows * self.patch, columns * self.patch
        )

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that decodes a clip piece by piece. It is `decode`, since latent frames are independent."""
        return self.decode

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_codec` makes this codec again."""
        return {
            "kind": self.kind,
            "patch": self.patch,
            "temporal": self.temporal,
            "channels": self.channels,
            "opponent": self.opponent,
            "equalize": self.equalize,
        }
