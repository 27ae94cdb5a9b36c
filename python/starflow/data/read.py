"""Video files through ffmpeg: read, write, probe; pictures through Pillow.

ffmpeg-python builds the argument lists and nothing else: the processes are started here, with standard error always
drained by a thread of its own, since a full pipe would block ffmpeg for ever. Output files appear under their name
complete or not at all.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps

from starflow.data.ffmpeg import VideoError, as_fraction, check_channels, reason, run

# Containers round timestamps, Matroska to a millisecond; a frame counts as shown this much before its timestamp.
_TOLERANCE = 0.001


# Seeking goes to the key frame before this much before the wanted time, so that the frame on screen is never missed.
_SEEK_MARGIN = 1.0


# ITU-R BT.709 luma weights.
_LUMA = (0.2126, 0.7152, 0.0722)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Args:
        width, height: as shown, that is rotated as the file asks, with square pixels.
        fps: nominal frames per second.
        frames: number of frames; None unless they were counted.
        duration: in seconds, of the video stream where frames were counted, else of the container; None if unknown.
    """

    width: int
    height: int
    fps: float
    frames: int | None
    duration: float | None


def _source(path: Path, **options: Any) -> Any:
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    # "file:" keeps ffmpeg from taking a name with a colon for a protocol.
    return ffmpeg.input(f"file:{path}", **options)


def probe(path: str | os.PathLike[str], *, count: bool = False) -> VideoInfo:
    """Say what a video file holds, after decoding its first frame.

    Args:
        path: of the file.
        count: also count the frames, which reads the whole file once without decoding it.

    Returns:
        its `VideoInfo`.

    Raises:
        VideoError: when the file is missing, empty, corrupt, or holds no video (a cover picture is none).
    """
    path = Path(path)
    # The header of a yuv4mpeg stream states size, frame rate and pixel shape, after ffmpeg has rotated the picture.
    first = _source(path).output("pipe:", map="0:V:0", format="yuv4mpegpipe", pix_fmt="yuv420p", vframes=1)
    status, output, log = run(first)
    header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)[^\n]* A(\d+):(\d+)[^\n]*\nFRAME", output)
    if status != 0 or header is None:
        if "matches no streams" in log:
            raise VideoError(f"{path}: the file has no video stream")
        raise VideoError(f"{path}: not a video that ffmpeg can decode ({reason(log)})")
    width, height, numerator, denominator, across, down = (int(group) for group in header.groups())
    if across and down:
        width = max(1, round(width * across / down))
    frames, duration = None, None
    if clock := re.search(r"Duration: (\d+):(\d+):([\d.]+)", log):
        duration = int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
    if count:
        copy = _source(path).output("pipe:", map="0:V:0", vcodec="copy", format="framehash", hash="adler32")
        status, output, log = run(copy)
        table = [line.split(b",") for line in output.splitlines() if line and not line.startswith(b"#")]
        ticks = re.search(rb"#tb 0: (\d+)/(\d+)", output)
        if status != 0 or not table or ticks is None:
            raise VideoError(f"{path}: not a video that ffmpeg can read to its end ({reason(log)})")
        frames = len(table)
        duration = float(max(int(row[2]) + int(row[3]) for row in table) * Fraction(int(ticks[1]), int(ticks[2])))
    return VideoInfo(width, height, numerator / denominator, frames, duration)


def frames_at(info: VideoInfo, fps: float) -> int:
    """Count the frames that `read_video` finds at a frame rate.

    Args:
        info: of a file whose frames were counted.
        fps: the rate.

    Returns:
        the number of frames from the start to the end of the file.

    Raises:
        ValueError: when the frames were not counted.
    """
    if info.frames is None or info.duration is None:
        raise ValueError("frames_at: info has no frame count, expected that of probe(path, count=True)")
    return max(1, math.ceil((info.duration - _TOLERANCE) * fps))


def _cover(width: int, height: int, out_width: int, out_height: int) -> tuple[int, int]:
    """Size of the smallest picture of this aspect that covers the wanted one."""
    factor = max(out_width / width, out_height / height)
    return max(out_width, round(width * factor)), max(out_height, round(height * factor))


def _size(width: int, height: int, out_width: int | None, out_height: int | None) -> tuple[int, int]:
    """The wanted size; a missing side follows the aspect of the source."""
    for name, side in (("width", out_width), ("height", out_height)):
        if side is not None and side < 1:
            raise ValueError(f"read_video: {name} is {side}, expected at least 1")
    if out_width is None and out_height is None:
        return width, height
    if out_width is None:
        assert out_height is not None
        return max(1, round(width * out_height / height)), out_height
    if out_height is None:
        return out_width, max(1, round(height * out_width / width))
    return out_width, out_height


def _channels(frames: torch.Tensor, channels: int) -> torch.Tensor:
    """RGB frames (..., 3) as they are, or as BT.709 luma (..., 1)."""
    if channels == 3:
        return frames
    # Frame by frame, so that the float copy stays small.
    weights = torch.tensor(_LUMA)
    luma = [(frame.to(torch.float32) @ weights).round().to(torch.uint8) for frame in frames]
    return torch.stack(luma)[..., None]


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    channels: int = 3,
    info: VideoInfo | None = None,
) -> torch.Tensor:
    """Read frames of a video of any format and size.

    Which frames: with `fps`, frame k is what a player shows at the time start + k/fps, that is the last source frame
    whose timestamp is not later (a millisecond of rounding is forgiven); before the first timestamp it is the first
    frame. Without `fps`, every source frame whose timestamp is not before `start`, once. Time 0 is the start of the
    file. The end is the end of the last source frame.

    Which pixels: the picture is scaled to cover the wanted size, keeping its shape on screen, and cropped in the
    middle. Without `height` and `width` it keeps its size on screen; one of them alone sets the other by the aspect.

    Args:
        path: of the file.
        frames: how many; None for all up to the end.
        height, width: of the result.
        fps: frames per second of the result, or None for the file's own frames.
        start: in seconds.
        channels: 3 for RGB, 1 for grey (BT.709 luma).
        info: of this file, where the caller has it already; it saves one process.

    Returns:
        uint8 of shape (frames, height, width, channels).

    Raises:
        VideoError: when the file cannot be read, or ends before the wanted number of frames.
        ValueError: when an argument is out of range.
    """
    path = Path(path)
    check_channels(channels)
    if frames is not None and frames < 1:
        raise ValueError(f"read_video: frames is {frames}, expected at least 1")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"read_video: fps is {fps}, expected a positive number")
    if not 0 <= start < math.inf:
        raise ValueError(f"read_video: start is {start}, expected at least 0 seconds")
    info = probe(path) if info is None else info
    out_width, out_height = _size(info.width, info.height, width, height)
    scaled = _cover(info.width, info.height, out_width, out_height)

    source: dict[str, Any] = {}
    if fps is None:
        if start > 0:
            source["ss"] = f"{max(0.0, start - _TOLERANCE):.6f}"
        video = _source(path, **source)["V:0"]
    else:
        seek = max(0.0, start - _SEEK_MARGIN)
        if seek > 0:
            source |= {"noaccurate_seek": None, "ss": f"{seek:.6f}"}
        video = _source(path, **source)["V:0"]
        # A fine time base, else the shift by a millisecond would be rounded to whole frames.
        video = video.filter("settb", "AVTB").filter("setpts", f"PTS+({seek:.6f}-{_TOLERANCE})/TB")
        video = video.filter("fps", fps=str(as_fraction(fps)), start_time=f"{start:.6f}", round="up")
    video = video.filter("scale", *scaled, flags="bicubic+accurate_rnd+full_chroma_int").filter("setsar", 1)
    video = video.filter("crop", out_width, out_height)
    target: dict[str, Any] = {"format": "rawvideo", "pix_fmt": "rgb24", "fps_mode": "passthrough"}
    if frames is not None:
        target["vframes"] = frames
    status, output, log = run(video.output("pipe:", **target))
    size = out_height * out_width * 3
    found = len(output) // size
    if status != 0 or len(output) % size:
        raise VideoError(f"{path}: decoding failed ({reason(log)})")
    if found < (frames or 1):
        rate = "" if fps is None else f" at {fps:g} frames per second"
        raise VideoError(f"{path}: {found} frames from {start:g} s on{rate}, expected at least {frames or 1}")
    rgb = torch.frombuffer(output, dtype=torch.uint8).view(found, out_height, out_width, 3)
    return _channels(rgb, channels)


def read_image(
    path: str | os.PathLike[str], *, height: int | None = None, width: int | None = None, channels: int = 3
) -> torch.Tensor:
    """Read a picture as a video of one frame, scaled and cropped like `read_video` does.

    Args:
        path: of the file, in any format that Pillow reads.
        height, width: of the result; None as in `read_video`.
        channels: 3 for RGB, 1 for grey (BT.709 luma).

    Returns:
        uint8 of shape (1, height, width, channels); transparent parts are black.

    Raises:
        VideoError: when the file cannot be read.
    """
    path = Path(path)
    check_channels(channels)
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not an image that Pillow can read ({error})") from error
    black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
    picture = Image.alpha_composite(black, upright).convert("RGB")
    out_width, out_height = _size(picture.width, picture.height, width, height)
    scaled = _cover(picture.width, picture.height, out_width, out_height)
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - out_width) // 2, (scaled[1] - out_height) // 2
    cropped = picture.crop((left, top, left + out_width, top + out_height))
    return _channels(torch.from_numpy(np.array(cropped))[None], channels)
