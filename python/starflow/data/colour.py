"""Decoded frames to RGB of the wanted size: upright, square pixels, opaque, in the colours of a common screen."""

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

# Numbers of the transfer functions with more range than a common screen, ITU-T H.273, table 3.
_PQ, _HLG = 16, 18
HIGH_RANGE = {_PQ: "PQ", _HLG: "HLG"}

# ITU-R BT.2408: diffuse white of a picture of high dynamic range, and the peak that HLG is graded for; in cd/m^2.
_WHITE = 203.0
_PEAK = 1000.0

# Up to this share of diffuse white the tone curve is the identity.
_KNEE = 0.75

# Primaries of ITU-R BT.2020 to those of BT.709, both with white D65 (ITU-R BT.2407, section 2.2).
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)

# A picture whose scaled size would have more pixels than this is cropped before it is scaled: one of 20,000 x 1
# pixels that shall cover 256 x 256 would grow to 1.3 billion.
_MAX_SCALED = 1 << 24

_SCALING = "bicubic+accurate_rnd+full_chroma_int"


def cover(width: int, height: int, out_width: int, out_height: int) -> tuple[int, int]:
    """Size of the smallest picture of this aspect that covers the wanted one."""
    factor = max(out_width / width, out_height / height)
    return max(out_width, round(width * factor)), max(out_height, round(height * factor))


def must_crop_first(width: int, height: int, out_width: int, out_height: int) -> bool:
    """Whether the picture that covers the wanted one would be far larger than both."""
    scaled_width, scaled_height = cover(width, height, out_width, out_height)
    return scaled_width * scaled_height > max(_MAX_SCALED, 4 * width * height, 4 * out_width * out_height)


def to_channels(frames: torch.Tensor, channels: int) -> torch.Tensor:
    """RGB frames (..., 3) as they are, or as BT.709 luma (..., 1)."""
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
        rgba: uint8 or uint16 (height, width, 4), colours not multiplied by their opacity.
        opaque: the opacity from which on nothing shines through.

    Returns:
        (height, width, 3) in the same dtype.
    """
    wide = np.uint32 if rgba.dtype == np.uint8 else np.uint64
    mixed = rgba[..., :3].astype(wide) * np.minimum(rgba[..., 3:], opaque)
    shown: np.ndarray = ((mixed + opaque // 2) // opaque).astype(rgba.dtype)
    return shown


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How the file asks to show a frame: whether to transpose it first, then to mirror it left to right, up to down."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, Buffer):
        return False, False, False
    # (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(memoryview(data), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def size_on_screen(frame: VideoFrame, pixel_shape: Fraction) -> tuple[int, int]:
    """Width and height of a frame with square pixels, as the file asks to show it."""
    return _shown(frame, orientation(frame)[0], pixel_shape)


def _shown(frame: VideoFrame, transpose: bool, pixel_shape: Fraction) -> tuple[int, int]:
    if transpose:
        return max(1, round(frame.height / pixel_shape)), frame.width
    return max(1, round(frame.width * pixel_shape)), frame.height


@functools.lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
    """Code values 0..65535 to light, 1 at diffuse white; of HLG the light of the scene, before the system's gamma."""
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
    """Show a picture of high dynamic range on a common screen.

    Light up to 3/4 of diffuse white stays as it is. Above that the largest of the three colours is compressed, with the
    others in proportion, so that diffuse white comes to 7/8 of the screen's and the peak of 1000 cd/m^2 to all of it.

    Args:
        code: uint16 (height, width, 3), R'G'B' of the primaries of BT.2020 in PQ or HLG, full range.
        transfer: the number of the transfer function.

    Returns:
        uint8 (height, width, 3), R'G'B' of BT.709 for a screen of gamma 2.4 (BT.1886).

    Reference: ITU-R BT.2100 (transfer functions), BT.2408 (203 cd/m^2 for diffuse white).
    """
    light = _light(transfer)[code]
    if transfer == _HLG:
        # The system's gamma of 1.2 for a screen of 1000 cd/m^2, on the luminance of BT.2020.
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
        light *= (_PEAK / _WHITE * luminance**0.2)[..., None]
    light = np.maximum(light @ _TO_709.T, 0)
    largest = light.max(axis=-1, keepdims=True)
    # Reinhard's curve with a white point, above the knee; the slope at the knee is 1.
    above, most = np.maximum(largest - _KNEE, 0) / (1 - _KNEE), (_PEAK / _WHITE - _KNEE) / (1 - _KNEE)
    curve = _KNEE + (1 - _KNEE) * above * (1 + above / most**2) / (1 + above)
    light *= np.where(largest > _KNEE, curve / np.maximum(largest, _KNEE), 1)
    shown: np.ndarray = np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)
    return shown


class Converter:
    """Turns decoded frames into RGB of one size. The frames may differ in size, shape, format and orientation.

    Args:
        width, height: wanted; each frame is scaled to cover them and cropped in the middle.
    """

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._key: tuple[object, ...] = ()
        self._graph = Graph()

    def __call__(self, frame: VideoFrame, pixel_shape: Fraction) -> np.ndarray:
        """A frame as uint8 (height, width, 3).

        Args:
            frame: decoded.
            pixel_shape: width of its pixels over their height.
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
            # Mode 0 is the plain transposition, 1 mirrors it left to right, 2 up to down, 3 both.
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
    """A graph of ffmpeg's filters, one after the other, for frames like this."""
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
    """Bits of the opacity of each pixel; 0 where there is none."""
    if frame.format.has_palette:
        return 8
    return max((part.bits for part in frame.format.components if part.is_alpha), default=0)


def _opaque(frame: VideoFrame) -> VideoFrame:
    """A frame with transparency over black; one that has none in any pixel stays as it is."""
    bits = min(16, _alpha_bits(frame))
    if not bits:
        return frame
    graph = _chain(frame, [("scale", f"flags={_SCALING}"), ("format", "rgba" if bits <= 8 else "rgba64le")])
    graph.push(frame)
    rgba: Any = graph.vpull().to_ndarray()
    # ffmpeg widens 10 or 12 bits to 16 by zeros.
    opaque = 255 if bits <= 8 else ((1 << bits) - 1) << (16 - bits)
    if rgba[..., 3].min() >= opaque:
        return frame
    return av.VideoFrame.from_ndarray(over_black(rgba, opaque), format="rgb24" if bits <= 8 else "rgb48le")
