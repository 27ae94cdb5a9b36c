"""Pictures, read by Pillow as videos of one frame."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from starflow.data.colour import cover, must_crop_first, over_black, to_channels
from starflow.data.decode import MAX_PIXELS, head_of, tell_once
from starflow.data.ffmpeg import VideoError, check_channels
from starflow.data.read import wanted_size
from starflow.data.shards import Member, Place, place_of
from starflow.extras import import_extra

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".heic", ".heif", ".jpeg", ".jpg", ".jxl", ".png", ".tif", ".tiff", ".webp"}
)
"""Suffixes of the names of picture files; a file of such a name is not opened as a video."""

SHEET = ("Title", "starflow contact sheet")
"""The text in a PNG that shows clips beside each other, which is no picture of anything."""

_HEIF = frozenset({b"heic", b"heim", b"heis", b"heix", b"mif1", b"mif2"})


def read_image(
    path: str | os.PathLike[str] | Member, *, height: int | None = None, width: int | None = None, channels: int = 3
) -> torch.Tensor:
    """Read a picture as a video of one frame, scaled and cropped like `read_video` does.

    Args:
        path: of the file, or a member of a shard, in any format that Pillow reads, or in HEIC where the package
            pillow-heif is installed. In a file of several pictures the first is read, and the log tells so. White is
            65535 in pictures of 16 bits a channel, and 1 in those of floating point.
        height, width: of the result; None as in `read_video`.
        channels: 3 for RGB, 1 for grey (BT.709 luma).

    Returns:
        uint8 of shape (1, height, width, channels); transparent parts are black.

    Raises:
        VideoError: when the file cannot be read, has more than 2^27 pixels, or holds numbers without an agreed white:
            integers of 32 bits, or floating point outside [0, 1].
    """
    check_channels(channels)
    picture = _load(place_of(path))
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


def image_size(path: Place) -> tuple[int, int]:
    """Height and width of a picture that `read_image` can read.

    Raises:
        VideoError: when it cannot.
    """
    picture = _load(path)
    return picture.height, picture.width


def is_contact_sheet(path: Place) -> bool:
    """Whether a picture is a sheet that `write_contact_sheet` wrote."""
    if path.suffix.lower() != ".png" or not head_of(path).startswith(b"\x89PNG"):
        return False
    try:
        with path.open("rb") as stored, Image.open(stored) as file:
            return bool(file.info.get(SHEET[0]) == SHEET[1])
    # What Pillow raises for a malformed file is told where the picture is read.
    except (Exception, MemoryError):
        return False


def _load(path: Place) -> Image.Image:
    """A picture upright, in opaque RGB."""
    _open_heif(path, head_of(path))
    try:
        with path.open("rb") as stored, Image.open(stored) as file:
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
    # What Pillow raises for a malformed file depends on the format and is not documented.
    except (Exception, MemoryError) as error:
        raise VideoError(f"{path}: not an image that Pillow can read ({str(error)[:200]})") from error


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _open_heif(path: Place, head: bytes) -> None:
    """Register the reader of pillow-heif with Pillow, if the file is a HEIF picture."""
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF:
        return
    try:
        heif = import_extra("pillow_heif", purpose=f"{path}: a picture in HEIC", extra="heic")
    except ImportError as error:
        raise VideoError(str(error)) from error
    heif.register_heif_opener()


def _eight_bits(path: Place, picture: Image.Image) -> Image.Image:
    """A picture with 8 bits a channel. Pillow's own conversion clips larger numbers at 255 instead of scaling them."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        # Grey of 16 bits; earlier versions of Pillow open a PNG of it in the mode of 32 bits.
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
    """The picture in RGB, over black where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.fromarray(over_black(np.array(picture.convert("RGBA")), 255))
