"""Decoded frames to RGB of the wanted size: upright, with square pixels, opaque, in the colours of an SDR screen."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.buffer import Buffer
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame

# ITU-R BT.709 luma weights.
_LUMA = (0.2126, 0.7152, 0.0722)

# Pixels of a frame whose luma is computed at once.
_LUMA_PIXELS = 1 << 24

# Transfer functions of high dynamic range, by their numbers in ITU-T H.273, table 3.
_PQ, _HLG = 16, 18
HIGH_RANGE = {_PQ: "PQ", _HLG: "HLG"}

# Luminance of diffuse white and nominal peak luminance of a picture of high dynamic range, in cd/m^2 (ITU-R BT.2408).
_WHITE = 203.0
_PEAK = 1000.0

# The tone curve is the identity up to this share of diffuse white.
_KNEE = 0.75

# Linear RGB with the primaries of ITU-R BT.2020 to linear RGB with those of BT.709 (ITU-R BT.2407, section 2.2).
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)

# A picture that would have more pixels than this once it is scaled is cropped first. One of 20,000 x 1 pixels that is
# scaled to cover 256 x 256 would have 1.3 billion.
_MAX_SCALED = 1 << 24

_SCALING = "bicubic+accurate_rnd+full_chroma_int"


def cover(width: int, height: int, out_width: int, out_height: int) -> tuple[int, int]:
    """Width and height of the smallest picture with the aspect of the source that covers the wanted size."""
    factor = max(out_width / width, out_height / height)
    return max(out_width, round(width * factor)), max(out_height, round(height * factor))


def must_crop_first(width: int, height: int, out_width: int, out_height: int) -> bool:
    """Whether the scaled picture (see `cover`) would be far larger than both the source and the wanted picture."""
    scaled_width, scaled_height = cover(width, height, out_width, out_height)
    return scaled_width * scaled_height > max(_MAX_SCALED, 4 * width * height, 4 * out_width * out_height)


def to_channels(frames: torch.Tensor, channels: int) -> torch.Tensor:
    """Frames with the wanted number of channels.

    Args:
        frames: uint8 RGB (frames, height, width, 3).
        channels: 3 returns the frames as they are, 1 their BT.709 luma, (frames, height, width, 1).
    """
    if channels == 3:
        return frames
    # A piece at a time, so that the float copy stays small.
    weights = torch.tensor(_LUMA)
    grey = torch.empty(frames.shape[:-1], dtype=torch.uint8)
    rows = max(1, _LUMA_PIXELS // frames.shape[-2])
    for frame, out in zip(frames, grey, strict=True):
        for first in range(0, len(frame), rows):
            piece = frame[first : first + rows].to(torch.float32) @ weights
            out[first : first + rows] = piece.round()
    return grey[..., None]


def over_black(rgba: np.ndarray, opaque: int) -> np.ndarray:
    """Lay a picture with transparency over black.

    Args:
        rgba: uint8 or uint16 (height, width, 4); the colours are not multiplied by their opacity.
        opaque: the value of the fourth channel that means fully opaque; larger ones mean the same.

    Returns:
        (height, width, 3) in the same dtype.
    """
    wide = np.uint32 if rgba.dtype == np.uint8 else np.uint64
    mixed = rgba[..., :3].astype(wide) * np.minimum(rgba[..., 3:], opaque)
    shown: np.ndarray = ((mixed + opaque // 2) // opaque).astype(rgba.dtype)
    return shown


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How the file asks to turn a frame: whether to transpose it, then mirror it left to right, then top to bottom."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, Buffer):
        return False, False, False
    # (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(memoryview(data), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def size_on_screen(frame: VideoFrame, pixel_shape: Fraction) -> tuple[int, int]:
    """Width and height of a frame once it is turned as the file asks and its pixels are square."""
    return _shown(frame, orientation(frame)[0], pixel_shape)


def _shown(frame: VideoFrame, transpose: bool, pixel_shape: Fraction) -> tuple[int, int]:
    if transpose:
        return max(1, round(frame.height / pixel_shape)), frame.width
    return max(1, round(frame.width * pixel_shape)), frame.height


@functools.lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
    """A table from code values 0..65535 to light.

    For PQ it is the light of the screen, 1 at diffuse white; for HLG that of the scene, in [0, 1], before the OOTF.
    """
    code = np.linspace(0.0, 1.0, 65536)
    if transfer == _PQ:
        # SMPTE ST 2084.
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = code ** (1 / m2)
        light = 10_000 / _WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        # ITU-R BT.2100, table 5.
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


def tone_map(code: np.ndarray, transfer: int) -> np.ndarray:
    """Map the tones of a picture of high dynamic range to those of an SDR screen.

    Light up to 3/4 of diffuse white is kept. Above that the largest of the three colours is compressed, and the others
    in proportion: diffuse white is shown with 7/8 of the light of the screen's white, 1000 cd/m^2 with all of it.

    Args:
        code: uint16 (height, width, 3), full-range R'G'B' with the primaries of BT.2020, in PQ or HLG.
        transfer: number of the transfer function, a key of `HIGH_RANGE`.

    Returns:
        uint8 (height, width, 3), full-range R'G'B' of BT.709 for a screen of gamma 2.4 (BT.1886).

    Reference: ITU-R BT.2100 (transfer functions), BT.2408 (203 cd/m^2 for diffuse white).
    """
    light = _light(transfer)[code]
    if transfer == _HLG:
        # The OOTF of BT.2100 for a screen of 1000 cd/m^2: a gamma of 1.2 on the luminance.
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
        light *= (_PEAK / _WHITE * luminance**0.2)[..., None]
    light = np.maximum(light @ _TO_709.T, 0)
    largest = light.max(axis=-1, keepdims=True)
    # Reinhard's curve with a white point, moved and scaled to begin at the knee, where its slope is 1.
    above, most = np.maximum(largest - _KNEE, 0) / (1 - _KNEE), (_PEAK / _WHITE - _KNEE) / (1 - _KNEE)
    curve = _KNEE + (1 - _KNEE) * above * (1 + above / most**2) / (1 + above)
    light *= np.where(largest > _KNEE, curve / np.maximum(largest, _KNEE), 1)
    shown: np.ndarray = np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)
    return shown


class Converter:
    """Turns decoded frames into RGB of one size, even where their own size, format or orientation changes.

    Args:
        width, height: of the result. Each frame is scaled to cover them and cropped in the middle.
    """

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._key: tuple[object, ...] = ()
        self._graph = Graph()

    def __call__(self, frame: VideoFrame, pixel_shape: Fraction) -> np.ndarray:
        """Convert a frame.

        Args:
            frame: as the decoder gave it.
            pixel_shape: width of a pixel of it divided by its height.

        Returns:
            uint8 RGB (height, width, 3).
        """
        turn, transfer = orientation(frame), frame.color_trc
        frame = _opaque(frame)
        key = (*_properties(frame), transfer, turn, pixel_shape)
        if key != self._key:
            format_ = "rgb48le" if transfer in HIGH_RANGE else "rgb24"
            self._graph, self._key = self._make(frame, turn, pixel_shape, format_), key
        self._graph.push(frame)
        picture: np.ndarray = self._graph.vpull().to_ndarray()
        return tone_map(picture, transfer) if transfer in HIGH_RANGE else picture

    def _make(self, frame: VideoFrame, turn: tuple[bool, bool, bool], pixel_shape: Fraction, format_: str) -> Graph:
        transpose, mirror, flip = turn
        width, height = _shown(frame, transpose, pixel_shape)
        chain: list[tuple[str, str]] = []
        if transpose:
            # Mode 0 only transposes; 1 also mirrors left to right, 2 top to bottom, 3 both.
            chain.append(("transpose", str(mirror + 2 * flip)))
        else:
            chain += [("hflip", "")] * mirror + [("vflip", "")] * flip
        if must_crop_first(width, height, self._width, self._height):
            stored = (frame.height, frame.width) if transpose else (frame.width, frame.height)
            scale = max(self._width / width, self._height / height)
            kept = [
                min(side, math.ceil(wanted / scale * side / shown))
                for side, wanted, shown in zip(stored, (self._width, self._height), (width, height), strict=True)
            ]
            chain.append(("crop", f"{kept[0]}:{kept[1]}:exact=1"))
            scaled = self._width, self._height
        else:
            scaled = cover(width, height, self._width, self._height)
        chain.append(("scale", f"{scaled[0]}:{scaled[1]}:flags={_SCALING}"))
        chain.append(("crop", f"{self._width}:{self._height}"))
        chain.append(("format", format_))
        return _chain(frame, chain)


def _properties(frame: VideoFrame) -> tuple[int | str, ...]:
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _chain(frame: VideoFrame, filters: list[tuple[str, str]]) -> Graph:
    """A chain of ffmpeg's filters for frames with the properties of this one."""
    graph = Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/1000000",
        pixel_aspect="1/1",
        colorspace=str(frame.colorspace),
        range=str(frame.color_range),
    )
    nodes: list[FilterContext] = [source]
    nodes += [graph.add(name, options or None) for name, options in filters]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def _alpha_bits(frame: VideoFrame) -> int:
    """Bits of the opacity of a pixel; 0 for formats without transparency."""
    if frame.format.has_palette:
        return 8
    return max((part.bits for part in frame.format.components if part.is_alpha), default=0)


def _opaque(frame: VideoFrame) -> VideoFrame:
    """The frame over black; one that is opaque everywhere is returned as it is."""
    bits = min(16, _alpha_bits(frame))
    if not bits:
        return frame
    graph = _chain(frame, [("scale", f"flags={_SCALING}"), ("format", "rgba" if bits <= 8 else "rgba64le")])
    graph.push(frame)
    rgba: Any = graph.vpull().to_ndarray()
    # Opacities of 10 or 12 bits are widened to 16 by zeros at the end.
    opaque = 255 if bits <= 8 else ((1 << bits) - 1) << (16 - bits)
    if rgba[..., 3].min() >= opaque:
        return frame
    return av.VideoFrame.from_ndarray(over_black(rgba, opaque), format="rgb24" if bits <= 8 else "rgb48le")
