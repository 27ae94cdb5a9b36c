"""Video files of any format: what they hold, and their frames at the wanted times, size and rate."""

from __future__ import annotations

import dataclasses
import math
import os

import av.error
import numpy as np
import torch
from av.video.frame import VideoFrame

from starflow.data.colour import HIGH_RANGE, Converter, size_on_screen, to_channels
from starflow.data.decode import MICROSECONDS, Source, reason_of, tell_once
from starflow.data.ffmpeg import VideoError, check_channels
from starflow.data.shards import Member, place_of
from starflow.messages import shown
from starflow.numeric import integer, number

# Containers round timestamps, Matroska to a millisecond. A frame counts as shown from this many microseconds before its
# timestamp on, or from this share of what a coarser clock counts in.
_TOLERANCE = 1000
_OF_CLOCK = 0.6

# Share by which frames a second differ where a film plays visibly faster or slower.
_OTHER_SPEED = 0.05

# Most bytes of a result: a file of a few kilobytes may hold frames that are an hour apart.
_MAX_BYTES = 1 << 36


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Args:
        width, height: of the picture on screen, that is turned as the file asks and with square pixels.
        fps: nominal frames per second.
        frames: number of frames; None unless they were counted.
        duration: in seconds; of the video stream where its frames were counted, else of the container. None if unknown.
        continuous: whether the frames were counted and the clock of the file does not jump between them. `read_video`
            then finds a start in the middle without decoding what stands before it, in more formats.
        clock: seconds that the file counts in, where it is so coarse that frames move by it (GIF); otherwise 0.
    """

    width: int
    height: int
    fps: float
    frames: int | None
    duration: float | None
    continuous: bool = False
    clock: float = 0.0


def probe(path: str | os.PathLike[str] | Member, *, count: bool = False) -> VideoInfo:
    """Say what a video file holds, after decoding its first frame.

    Args:
        path: of the file, or a member of a shard.
        count: also count the frames that are shown. This reads the whole file, and decodes it unless its packets are
            known to be the frames.

    Returns:
        its `VideoInfo`.

    Raises:
        VideoError: when the file is missing, empty or corrupt, or holds text or no video (a cover picture does not
            count as one).
    """
    path = place_of(path)
    # More than one thread would be started and stopped for a single frame.
    with Source(path, threads=1) as source:
        first = next(source.frames())[2]
        width, height = size_on_screen(first, source.pixel_shape)
        clock = source.clock / MICROSECONDS
        info = VideoInfo(width, height, source.rate, None, source.duration, clock=clock)
    if not count:
        return info
    if not first.interlaced_frame:
        # A packet of interlaced video may hold half a frame.
        with Source(path, threads=1) as source:
            counted = source.count_packets()
        if counted is not None:
            return dataclasses.replace(info, frames=counted[0], duration=counted[1] / MICROSECONDS, continuous=True)
    frames, end = 0, 0
    with Source(path) as source:
        for time, shown, _ in source.frames():
            frames, end = frames + 1, max(end, time + shown)
        continuous = source.continuous
    return dataclasses.replace(info, frames=frames, duration=end / MICROSECONDS, continuous=continuous)


def plays_otherwise(fps: float, usual: float) -> bool:
    """Whether a film at one rate plays visibly faster or slower than at the usual one."""
    return abs(fps - usual) > _OTHER_SPEED * usual


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
    return max(1, math.ceil((info.duration - _end_tolerance(info)) * fps - 1e-6))


def _end_tolerance(info: VideoInfo) -> float:
    """Seconds that the end of a file may be late by: its begin and its own length are rounded, up to half a frame."""
    return max(_TOLERANCE / MICROSECONDS, min(info.clock, 0.5 / info.fps))


def wanted_size(width: int, height: int, out_width: int | None, out_height: int | None) -> tuple[int, int]:
    """Width and height of the result; a side that is None follows from the other one and the aspect of the source."""
    for name, side in (("width", out_width), ("height", out_height)):
        if side is not None and ((pixels := integer(side)) is None or pixels < 1):
            raise ValueError(f"read_video: {name} is {shown(side)}, expected an integer of at least 1")
    if out_width is None and out_height is None:
        return width, height
    if out_width is None:
        assert out_height is not None
        return max(1, round(width * out_height / height)), out_height
    if out_height is None:
        return out_width, max(1, round(height * out_width / width))
    return out_width, out_height


def read_video(
    path: str | os.PathLike[str] | Member,
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
    Transparent parts are black. The tones of PQ and HLG (high dynamic range) are mapped to those of an SDR screen.

    The log tells of frames that are left out because they cannot be decoded, and of mapped tones.

    Args:
        path: of the file, or a member of a shard.
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
    path = place_of(path)
    check_channels(channels)
    if frames is not None:
        if (count := integer(frames)) is None or count < 1:
            raise ValueError(f"read_video: frames is {shown(frames)}, expected an integer of at least 1")
        frames = count
    if fps is not None and ((rate := number(fps)) is None or not 0 < rate < math.inf):
        raise ValueError(f"read_video: fps is {shown(fps)}, expected a positive number")
    if (begins := number(start)) is None or not 0 <= begins < math.inf:
        raise ValueError(f"read_video: start is {shown(start)}, expected at least 0 seconds")
    info = probe(path) if info is None else info
    out_width, out_height = wanted_size(info.width, info.height, width, height)
    begin = round(start * MICROSECONDS)
    size = out_width * out_height * 3
    output = bytearray()
    found = 0

    def put(picture: np.ndarray, times: int) -> None:
        nonlocal found
        if (found + times) * size > _MAX_BYTES:
            raise VideoError(
                f"{path}: more than {_MAX_BYTES >> 30} GiB of frames from {start:g} s on, expected fewer (the argument "
                "frames) or smaller ones (height, width)"
            )
        data = np.ascontiguousarray(picture).data.cast("B")
        for _ in range(times):
            output.extend(data)
        found += times

    with Source(path) as source:
        tolerance = max(_TOLERANCE, round(_OF_CLOCK * source.clock))
        converter = Converter(out_width, out_height)

        def convert(frame: VideoFrame) -> np.ndarray:
            try:
                return converter(frame, source.pixel_shape)
            except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
                raise VideoError(f"{path}: a frame cannot be converted to RGB ({reason_of(error)})") from error

        # The frame on screen, and the time at which it ends if no other one follows.
        held, end = None, 0
        for time, lasts, frame in source.frames(begin, seek=info.continuous):
            if frame.color_trc in HIGH_RANGE:
                tell_once(
                    f"{path}: a picture in {HIGH_RANGE[frame.color_trc]} (high dynamic range), its tones are mapped to "
                    "those of an SDR screen"
                )
            if fps is None:
                if time >= begin - tolerance:
                    put(convert(frame), 1)
            else:
                if held is not None:
                    count = _shown_until(time - tolerance, begin, fps, frames) - found
                    if count > 0:
                        put(convert(held), count)
                held, end = frame, time + lasts
            if frames is not None and found >= frames:
                break
        else:
            if fps is not None and held is not None:
                count = _shown_until(end - round(_end_tolerance(info) * MICROSECONDS), begin, fps, frames) - found
                if count > 0:
                    put(convert(held), count)
    if found < (frames or 1):
        at_rate = "" if fps is None else f" at {fps:g} frames per second"
        raise VideoError(f"{path}: {found} frames from {start:g} s on{at_rate}, expected at least {frames or 1}")
    rgb = torch.frombuffer(output, dtype=torch.uint8).view(found, out_height, out_width, 3)
    return to_channels(rgb, channels)


def _shown_until(time: int, begin: int, fps: float, most: int | None) -> int:
    """Number of frames k of the result with begin + k / fps < time (in microseconds), at most `most`."""
    count = max(0, math.ceil((time - begin) * fps / MICROSECONDS - 1e-6))
    return count if most is None else min(count, most)
