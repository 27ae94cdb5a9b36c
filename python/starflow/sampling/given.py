"""Pictures and videos that a clip begins with, refers to or ends with, as pixels."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from starflow.data import VideoError, frames_at, probe, read_image, read_video, to_pixels


def picture_pixels(image: str | Path | Tensor, *, height: int, width: int, channels: int, name: str) -> Tensor:
    """A picture as the one frame of a clip, ([clips,] 1, channels, height, width)."""
    if isinstance(image, Tensor):
        return image.unsqueeze(-4)
    if not Path(image).is_file():
        raise VideoError(f"sample: {name} is {str(image)!r}, which does not exist, expected a picture")
    return to_pixels(read_image(image, height=height, width=width, channels=channels))


def video_pixels(
    video: str | Path | Tensor,
    most: int,
    *,
    exactly: bool,
    end: bool,
    fps: float | None,
    height: int,
    width: int,
    channels: int,
    name: str,
) -> Tensor:
    """The last or first frames of a video, ([clips,] frames, channels, height, width): `most`, or all of a shorter."""
    option = "given" if end else "frames"
    if most < 1:
        raise ValueError(f"sample: {option} is {most}, expected at least 1")
    at = ""
    if isinstance(video, Tensor):
        found, what = video.shape[-4] if video.dim() > 3 else 0, name
    else:
        if not Path(video).is_file():
            raise VideoError(f"sample: {name} is {str(video)!r}, which does not exist, expected a video file")
        info, what = probe(video, count=True), str(video)
        rate = info.fps if fps is None else fps
        found, at = frames_at(info, rate), f" at {rate:g} a second"
    if name == "source" and found != most:
        raise ValueError(f"sample: source has {found} frames{at}, expected {most} like the sources of training")
    if found < most and exactly:
        raise ValueError(f"sample: {option} is {most}, expected at most the {found} frames of {what}")
    count = min(most, found)
    first = found - count if end else 0
    if isinstance(video, Tensor):
        return video[..., first : first + count, :, :, :]
    size = {"height": height, "width": width, "channels": channels}
    return to_pixels(read_video(video, frames=count, fps=rate, start=first / rate, info=info, **size))
