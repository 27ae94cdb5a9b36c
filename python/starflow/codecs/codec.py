"""The interface of all codecs, and the checks that they share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Codec", "check_latents", "check_pixels", "tell_scale"]

logger = logging.getLogger(__name__)

# Pixels are in [-1, 1], and what filters and other networks make of them overshoots a little. Values beyond `_FAR` are
# of another scale, such as 0 to 255. Of a dark picture of that scale all values may be small, but then none is below 0,
# which is a middle grey of ours, and they go beyond `_FAR_ABOVE`, or are whole numbers beyond 1.
_FAR = 8.0
_FAR_ABOVE = 2.0


class Codec(Protocol):
    """Turns pixels in [-1, 1] into the latents that the flow models, and back.

    Attributes:
        channels: number of channels of the pixels.
        latent_channels: number of channels of the latents.
        spatial: pixels per latent position along height, and along width.
        temporal: pixel frames per latent frame.
    """

    channels: int
    latent_channels: int
    spatial: int
    temporal: int

    @property
    def exact(self) -> bool:
        """Whether decode(encode(pixels)) equals the pixels up to rounding."""

    @property
    def log_det_per_dimension(self) -> float | None:
        """Log |d latents / d pixels| per dimension, which converts a likelihood of latents into one of pixels.

        It is None for a codec that is not exact, since no such number exists.
        """

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a number of pixel frames; ValueError where the codec cannot encode so many."""

    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames of a number of latent frames."""

    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels (batch, frames, channels, height, width) to latents (batch, latent_frames, latent_channels, h, w).

        Images (batch, channels, height, width) become (batch, latent_channels, h, w). A codec with a posterior returns
        its mean, or with standard normal `noise` in the shape of the latents a sample of it.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that decodes one clip piece by piece: each call turns the next latent frames into pixel frames."""

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_codec` makes this codec again."""


def check_pixels(codec: str, pixels: torch.Tensor, channels: int, spatial: int) -> None:
    """Raise ValueError unless a codec can encode these pixels.

    Args:
        codec: name of the codec, for the message.
        pixels: expected floating point ([batch, frames,] channels, height, width), sides multiples of `spatial`.
        channels: expected number of channels.
        spatial: pixels per latent position.
    """
    expected = f"[batch, frames, {channels}, height, width] or [batch, {channels}, height, width]"
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != channels:
        raise ValueError(f"{codec}: pixels have shape {list(pixels.shape)}, expected {expected}")
    if not pixels.is_floating_point():
        raise ValueError(f"{codec}: pixels have dtype {pixels.dtype}, expected floating point in [-1, 1]")
    for name, side in (("height", pixels.shape[-2]), ("width", pixels.shape[-1])):
        if side < 1 or side % spatial:
            raise ValueError(f"{codec}: pixels have {name} {side}, expected a positive multiple of {spatial}")
    if pixels.numel() and (found := _other_scale(pixels.detach())):
        raise ValueError(f"{codec}: pixels {found}, expected [-1, 1] (those of 0 to 255 are divided by 127.5, less 1)")


def _other_scale(pixels: torch.Tensor) -> str:
    """What shows that pixels are not in [-1, 1], or "" where nothing does."""
    least, most = (float(end) for end in torch.aminmax(pixels))
    farthest = max(most, -least)
    if farthest > _FAR:
        return f"reach {farthest:.4g}"
    if least >= 0.0 and most > 1.0:
        if most > _FAR_ABOVE:
            return f"go from {least:.4g} to {most:.4g}"
        if bool((pixels == pixels.round()).all()):
            return f"are whole numbers from {least:.0f} to {most:.0f}"
    return ""


def tell_scale(name: str, pixels: Sequence[torch.Tensor]) -> None:
    """Tells in the log of pixels that are probably in [0, 1]: pictures without anything darker than a middle grey.

    Args:
        name: of the function and of what was given, for the message.
        pixels: all that were given together.
    """
    given = [some for some in pixels if some.is_floating_point() and some.numel()]
    if given and all(bool((some >= 0).all()) for some in given):
        logger.warning(
            "%s is below 0, the middle of [-1, 1]; pixels in [0, 1] are doubled, less 1, and those of 0 to 255 divided "
            "by 127.5, less 1",
            name,
        )


def check_latents(codec: str, latents: torch.Tensor, latent_channels: int) -> None:
    """Raise ValueError unless a codec can decode these latents.

    Args:
        codec: name of the codec, for the message.
        latents: expected floating point ([batch, frames,] latent_channels, h, w).
        latent_channels: expected number of channels.
    """
    if latents.ndim not in (4, 5) or latents.shape[-3] != latent_channels:
        raise ValueError(
            f"{codec}: latents have shape {list(latents.shape)}, "
            f"expected [batch, frames, {latent_channels}, h, w] or [batch, {latent_channels}, h, w]"
        )
    if not latents.is_floating_point():
        raise ValueError(f"{codec}: latents have dtype {latents.dtype}, expected floating point")
