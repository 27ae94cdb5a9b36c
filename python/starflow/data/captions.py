"""The captions that the published models were trained on, and their picture sizes."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

__all__ = ["ASPECT_RATIOS", "CaptionMode", "aspect_size", "assemble", "nearest_aspect"]

CaptionMode: TypeAlias = Literal["extend", "last", "v2v"]
"""What is special about a clip: its first frame is cut off, its last frame or its source clip stands before it."""

ASPECT_RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
"""Width to height of the published training buckets."""

_GEMMA = "<start_of_turn>user\nPlease generate {what} about: {caption}<end_of_turn>\n<start_of_turn>model\n"


def assemble(
    text: str,
    *,
    mode: CaptionMode | None = None,
    drop: bool = False,
    fps: float | None = None,
    noise_level: float | None = None,
    aspect_ratio: str | None = None,
    template: Literal["gemma"] | None = None,
) -> str:
    """Assemble the caption that the text encoder sees.

    The parts are added in this order, each only where it is given; the caption for guidance is that of "" (or
    `drop`) with the same parts.

    Args:
        text: what the clip shows.
        mode: "extend" for a clip whose first frame is cut off, "last" for one whose last frame is given in front,
            "v2v" for one that follows its source clip.
        drop: replace text and mode by "", as training does for a share of the captions.
        fps: frames per second; 0 for an image.
        noise_level: standard deviation of the noise on the latents; a thousand times it is written, truncated.
        aspect_ratio: "W:H".
        template: "gemma" for the chat turn that Gemma encoders expect.

    Returns:
        the caption.

    Raises:
        ValueError: when an argument is out of range.

    Reference: Gu et al., STARFlow-V, 2025, training details.
    """
    if mode not in (None, *get_args(CaptionMode)):
        raise ValueError(f'assemble: mode is "{mode}", expected "extend", "last", "v2v" or None')
    if template not in (None, "gemma"):
        raise ValueError(f'assemble: template is "{template}", expected "gemma" or None')
    for name, value in (("fps", fps), ("noise_level", noise_level)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"assemble: {name} is {value}, expected at least 0")
    caption = "" if drop else text if mode is None else f"({mode}) {text}"
    if fps is not None:
        caption = f"A video with {fps:g} fps:\n{caption}\n" if fps > 0 else f"An image:\n{caption}\n"
    if noise_level is not None:
        caption = f"Noise Level {math.trunc(1000 * noise_level)}:\n{caption}"
    if aspect_ratio is not None:
        _ratio(aspect_ratio)
        caption = f"{caption}\n in a {aspect_ratio} aspect ratio.\n"
    if template == "gemma":
        caption = _GEMMA.format(what="a video" if fps else "an image", caption=caption)
    return caption


def _ratio(text: str) -> float:
    """Width over height of "W:H"."""
    width, colon, height = text.partition(":")
    if not (colon and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f'aspect ratio is "{text}", expected "W:H" such as "16:9"')
    return int(width) / int(height)


def aspect_size(side: int, ratio: str, multiple: int) -> tuple[int, int]:
    """Size of a picture of a given shape, with about the area of a square.

    Args:
        side: of the square, in pixels.
        ratio: width to height, "W:H".
        multiple: of which both sides shall be: pixels per latent position times the patch of the model.

    Returns:
        (height, width).

    Raises:
        ValueError: when an argument is out of range.
    """
    if side < 1 or multiple < 1:
        raise ValueError(f"aspect_size: side is {side} and multiple is {multiple}, expected at least 1")
    root = math.sqrt(_ratio(ratio))
    height, width = multiple * round(side / root / multiple), multiple * round(side * root / multiple)
    if not height or not width:
        raise ValueError(f"aspect_size: side is {side}, too small for {ratio} in multiples of {multiple}")
    return height, width


def nearest_aspect(height: int, width: int) -> str:
    """The published aspect ratio, "W:H", that a picture of this size is nearest to."""
    return min(ASPECT_RATIOS, key=lambda ratio: abs(math.log(width / height / _ratio(ratio))))
