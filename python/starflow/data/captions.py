"""Captions in the form that the published models were trained on, and the picture sizes of their training."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from starflow.arguments import check_text

__all__ = ["ASPECT_RATIOS", "CaptionMode", "aspect_size", "assemble", "nearest_aspect"]

CaptionMode: TypeAlias = Literal["extend", "last", "v2v"]
"""What a caption tells about the frames: "extend" marks a clip whose first frame is cut off, "last" one with its last
frame placed in front, "v2v" one with its source clip in front."""

ASPECT_RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
"""Aspect ratios, width to height, of the training clips of the published models."""

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

    The parts are added in the order of the arguments, each only where it is given. The unconditional caption of
    guidance has the same parts around an empty text (`drop`).

    Args:
        text: what the clip shows.
        mode: see `CaptionMode`.
        drop: whether text and mode are replaced by "", as training does for a share of the captions.
        fps: frames per second; 0 for an image.
        noise_level: standard deviation of the noise on the latents; the caption holds a thousand times it, truncated.
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
    check_text("assemble", "text", text)
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
    """Width divided by height, from "W:H"."""
    width, colon, height = text.partition(":")
    if not (colon and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f'aspect ratio is "{text}", expected "W:H" such as "16:9"')
    return int(width) / int(height)


def aspect_size(side: int, ratio: str, multiple: int) -> tuple[int, int]:
    """Find the size of a picture with a given aspect ratio and about the area of a given square.

    Args:
        side: of the square, in pixels.
        ratio: width to height, "W:H".
        multiple: both sides of the picture are multiples of it: pixels per latent position times the model's patch.

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
    """The one of `ASPECT_RATIOS` that is nearest to the shape of a picture, by the ratio of both."""
    return min(ASPECT_RATIOS, key=lambda ratio: abs(math.log(width / height / _ratio(ratio))))
