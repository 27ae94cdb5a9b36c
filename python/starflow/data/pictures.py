"""Pictures through Pillow, as videos of one frame."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from starflow.data.colour import cover, must_crop_first, over_black, to_channels
from starflow.data.decode import MAX_PIXELS, head_of, tell_once
from starflow.data.ffmpeg import VideoError, check_channels
from starflow.data.read import wanted_size

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".heic", ".heif", ".jpeg", ".jpg", ".jxl", ".png", ".tif", ".tiff", ".webp"}
)
"""Names of files that are pictures, whether or not they can be read here."""

_HEIF = frozenset({b"heic", b"heim", b"heis", b"heix", b"mif1", b"mif2"})


def read_image(
    path: str | os.PathLike[str], *, height: int | None = None, width: int | None = None, channels: int = 3
) -> torch.Tensor:
    """Read a picture as a video of one frame, scaled and cropped like `read_video` does.

    Args:
        path: of the file, in any format that Pillow reads; HEIC with the package pillow-heif. Of several pictures in
            one file the first is read. Integers of 16 bits go from black (0) to white (65535), floating point from 0
            to 1.
        height, width: of the result; None as in `read_video`.
        channels: 3 for RGB, 1 for grey (BT.709 luma).

    Returns:
        uint8 of shape (1, height, width, channels); transparent parts are black.

    Raises:
        VideoError: when the file cannot be read, or its numbers have no agreed black and white.
    """
    check_channels(channels)
    picture = _load(Path(path))
    out_width, out_height = wanted_size(picture.width, picture.height, width, height)
    if must_crop_first(picture.width, picture.height, out_width, out_height):
        scale = max(out_width / picture.width, out_height / picture.height)
        sides = [
            min(side, math.ceil(wanted / scale))
            for side, wanted in zip(picture.size, (out_width, out_height), strict=True)
        ]
        picture = _middle(picture, sides[0], sides[1]).resize((out_width, out_height), Image.Resampling.BICUBIC)
    else:
        scaled = cover(picture.width, picture.height, out_width, out_height)
        if scaled != picture.size:
            picture = picture.resize(scaled, Image.Resampling.BICUBIC)
        picture = _middle(picture, out_width, out_height)
    return to_channels(torch.from_numpy(np.array(picture))[None], channels)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture that `read_image` can read.

    Raises:
        VideoError: when it cannot.
    """
    picture = _load(path)
    return picture.height, picture.width


def _load(path: Path) -> Image.Image:
    """A picture upright, in opaque RGB."""
    _open_heif(path, head_of(path))
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise VideoError(
                    f"{path}: a picture of {file.width}x{file.height} pixels, expected at most {MAX_PIXELS} pixels"
                )
            if getattr(file, "is_animated", False):
                tell_once(f"{path}: several pictures in one file, the first is read")
            upright = ImageOps.exif_transpose(file)
            return _opaque(_eight_bits(path, upright))
    except VideoError:
        raise
    # Pillow's readers of malformed files raise about anything.
    except (Exception, MemoryError) as error:
        raise VideoError(f"{path}: not an image that Pillow can read ({str(error)[:200]})") from error


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _open_heif(path: Path, head: bytes) -> None:
    """Let Pillow read HEIF where the file is one, by the package that does it."""
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF:
        return
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise VideoError(
            f"{path}: a picture in HEIC needs the package pillow-heif: pip install 'starflow-ext[heic]'"
        ) from error
    heif.register_heif_opener()


def _eight_bits(path: Path, picture: Image.Image) -> Image.Image:
    """A picture with 8 bits a colour; Pillow's own conversion clips wider numbers at 255."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        # Grey of 16 bits. Earlier versions of Pillow open such a PNG with 32.
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if mode == "F":
        numbers = np.asarray(picture)
        if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 1):
            raise VideoError(
                f"{path}: floating-point pixels from {numbers.min():g} to {numbers.max():g}, expected 0 to 1"
            )
        return Image.fromarray(np.rint(numbers * 255).astype(np.uint8))
    if mode == "I":
        raise VideoError(f"{path}: pixels are integers of 32 bits, expected 8 or 16, whose white is agreed")
    return picture


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, over black where there is transparency."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.fromarray(over_black(np.array(picture.convert("RGBA")), 255))
