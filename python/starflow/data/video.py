"""Video files through ffmpeg: read, write, probe; pictures through Pillow.

ffmpeg-python builds the argument lists and nothing else: the processes are started here, with standard error always
drained by a thread of its own, since a full pipe would block ffmpeg for ever. Output files appear under their name
complete or not at all.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from starflow.files import replacing

__all__ = [
    "VideoError",
    "VideoInfo",
    "VideoWriter",
    "enlarge",
    "ffmpeg_binary",
    "frames_at",
    "probe",
    "read_image",
    "read_video",
    "write_contact_sheet",
    "write_gif",
    "write_video",
]

# Containers round timestamps, Matroska to a millisecond; a frame counts as shown this much before its timestamp.
_TOLERANCE = 0.001
# Seeking goes to the key frame before this much before the wanted time, so that the frame on screen is never missed.
_SEEK_MARGIN = 1.0
_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# ITU-R BT.709 luma weights.
_LUMA = (0.2126, 0.7152, 0.0722)


class VideoError(ValueError):
    """A file cannot be read as video or image; the message names the file and the reason in one sentence."""


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


def ffmpeg_binary() -> str:
    """Find ffmpeg: the system's, else the one that the package imageio-ffmpeg carries.

    Returns:
        path of the executable.

    Raises:
        FileNotFoundError: when there is neither.
    """
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise FileNotFoundError(
            "ffmpeg_binary: no ffmpeg on PATH and none in the package imageio-ffmpeg, "
            "expected one of them: install ffmpeg with the system's package manager"
        ) from error


class _Drain(threading.Thread):
    """Reads a process's standard error to its end and keeps the last lines."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self.start()

    def run(self) -> None:
        for line in self._stream:
            self._lines.append(line.decode("utf-8", "replace").strip())

    def text(self) -> str:
        self.join()
        return "\n".join(self._lines)


def _reason(log: str) -> str:
    """The one line of ffmpeg's output that tells most, without the name of the part that says it."""
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line) for line in log.splitlines() if line] or ["no message"]
    telling = r"no space left|too large|invalid data|not found|matches no streams|permission denied|no such"
    return next((line for line in reversed(lines) if re.search(telling, line, re.IGNORECASE)), lines[-1])


def _run(stream: Any) -> tuple[int, bytearray, str]:
    """Run a graph of ffmpeg-python and collect exit status, standard output and the end of standard error."""
    command = stream.global_args("-hide_banner", "-nostdin", "-loglevel", "info").compile(cmd=ffmpeg_binary())
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        drain = _Drain(process.stderr)
        output = bytearray()
        while chunk := process.stdout.read(1 << 20):
            output += chunk
        log = drain.text()
    return process.returncode, output, log


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
    status, output, log = _run(first)
    header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)[^\n]* A(\d+):(\d+)[^\n]*\nFRAME", output)
    if status != 0 or header is None:
        if "matches no streams" in log:
            raise VideoError(f"{path}: the file has no video stream")
        raise VideoError(f"{path}: not a video that ffmpeg can decode ({_reason(log)})")
    width, height, numerator, denominator, across, down = (int(group) for group in header.groups())
    if across and down:
        width = max(1, round(width * across / down))
    frames, duration = None, None
    if clock := re.search(r"Duration: (\d+):(\d+):([\d.]+)", log):
        duration = int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
    if count:
        copy = _source(path).output("pipe:", map="0:V:0", vcodec="copy", format="framehash", hash="adler32")
        status, output, log = _run(copy)
        table = [line.split(b",") for line in output.splitlines() if line and not line.startswith(b"#")]
        ticks = re.search(rb"#tb 0: (\d+)/(\d+)", output)
        if status != 0 or not table or ticks is None:
            raise VideoError(f"{path}: not a video that ffmpeg can read to its end ({_reason(log)})")
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


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (RGB)")


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
    _check_channels(channels)
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
        video = video.filter("fps", fps=str(_fraction(fps)), start_time=f"{start:.6f}", round="up")
    video = video.filter("scale", *scaled, flags="bicubic+accurate_rnd+full_chroma_int").filter("setsar", 1)
    video = video.filter("crop", out_width, out_height)
    target: dict[str, Any] = {"format": "rawvideo", "pix_fmt": "rgb24", "fps_mode": "passthrough"}
    if frames is not None:
        target["vframes"] = frames
    status, output, log = _run(video.output("pipe:", **target))
    size = out_height * out_width * 3
    found = len(output) // size
    if status != 0 or len(output) % size:
        raise VideoError(f"{path}: decoding failed ({_reason(log)})")
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
    _check_channels(channels)
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


def _fraction(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(100_000)


def _check_frames(function: str, frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8:
        raise ValueError(
            f"{function}: frames have dtype {frames.dtype}, expected torch.uint8 (starflow.data.to_frames)"
        )
    if frames.ndim != 4 or frames.shape[3] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"{function}: frames have shape {list(frames.shape)}, expected [frames, height, width, 1 or 3], none empty"
        )


class _Encoder:
    """One ffmpeg process that takes RGB frames on standard input and writes one file."""

    def __init__(self, path: Path, stream: Any, *, growing: bool = False) -> None:
        self._path, self._growing = path, growing
        command = stream.global_args("-hide_banner", "-loglevel", "error").compile(cmd=ffmpeg_binary())
        # What is sent to the terminal's processes (Ctrl-C) does not reach one that shall end the file when its input
        # ends.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=growing,
        )
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin
        self._drain = _Drain(self._process.stderr)

    def write(self, frames: torch.Tensor) -> None:
        rgb = frames.detach().to("cpu").expand(-1, -1, -1, 3).contiguous()
        try:
            self._stdin.write(rgb.numpy().data.cast("B"))
            self._stdin.flush()
        except BrokenPipeError:
            self.finish()

    def finish(self) -> None:
        """Wait for ffmpeg to end, and raise unless it ended well."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        status = self._process.wait()
        log = self._drain.text()
        if status != 0:
            full = "no space left" in log.lower()
            code = errno.ENOSPC if full else errno.EIO
            left = "what was written before plays" if self._growing else "no file was left behind"
            raise OSError(code, f"ffmpeg could not write {self._path}: {_reason(log)}; {left}")

    @property
    def ended(self) -> bool:
        """Whether ffmpeg has stopped by itself."""
        return self._process.poll() is not None

    def abort(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()
        self._drain.join()


class VideoWriter:
    """Writes a video that every browser plays, frame by frame as the frames come.

    H.264, yuv420p, crf 17, the index in front (fast start), BT.709 matrix and tags. Odd sizes are padded to even
    ones by repeating the last row or column. `lossless` keeps every bit of the RGB frames instead (H.264 in RGB,
    which most browsers do not play, at the exact size).

    The file appears when the block ends without an error, and not at all otherwise. With `growing` it is there from the
    first frame on and holds what was written so far, whatever ends the process: an mp4 in fragments of a frame, without
    the index in front, so that every frame is on its way to the file when `write` returns.

    Args:
        path: .mp4, .m4v, .mov or .mkv, in a folder that exists.
        fps: frames per second.
        height, width: of the frames.
        channels: 1 (grey) or 3 (RGB).
        lossless, growing: see above.

    Raises:
        ValueError: when an argument is out of range.
        OSError: from `write` or at the end of the block, when ffmpeg cannot write the file (a full disk).

    Examples:
        >>> with VideoWriter("out.mp4", fps=8, height=32, width=32, channels=1) as writer:  # doctest: +SKIP
        ...     writer.write(frames)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float,
        height: int,
        width: int,
        channels: int,
        lossless: bool = False,
        growing: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in _CONTAINERS:
            raise ValueError(
                f'VideoWriter: path {self.path} ends in "{self.path.suffix}", expected one of {", ".join(_CONTAINERS)}'
            )
        if not 0 < fps < math.inf:
            raise ValueError(f"VideoWriter: fps is {fps}, expected a positive number")
        if height < 1 or width < 1:
            raise ValueError(f"VideoWriter: size is {height}x{width}, expected at least 1x1")
        _check_channels(channels)
        self.fps = fps
        self.height = height
        self.width = width
        self.channels = channels
        self.lossless = lossless
        self.growing = growing
        self._encoder: _Encoder | None = None
        self._written = 0
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> VideoWriter:
        with contextlib.ExitStack() as ending:
            target = self.path if self.growing else ending.enter_context(replacing(self.path))
            self._encoder = self._start(target)
            # Before the file takes its place: the last to be pushed is the first to run.
            ending.push(self._finish)
            self._ending = ending.pop_all()
        return self

    def _start(self, target: Path) -> _Encoder:
        height, width = self._padded_size()
        video = ffmpeg.input(
            "pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=str(_fraction(self.fps))
        )
        options: dict[str, Any] = {"format": _CONTAINERS[self.path.suffix.lower()], "an": None}
        if self.lossless:
            options |= {"vcodec": "libx264rgb", "qp": 0}
        else:
            video = video.filter(
                "scale", out_color_matrix="bt709", out_range="tv", flags="bicubic+accurate_rnd+full_chroma_int"
            ).filter("format", "yuv420p")
            # Tags set as output options do not survive: the encoder takes them from the frames.
            video = video.filter(
                "setparams", range="tv", colorspace="bt709", color_primaries="bt709", color_trc="bt709"
            )
            options |= {"vcodec": "libx264", "crf": 17}
        if self.growing:
            # No frame waits for later ones, neither in the encoder nor in the container.
            options |= {"tune": "zerolatency", "flush_packets": 1}
        if self.path.suffix.lower() != ".mkv":
            options["movflags"] = "+frag_every_frame+empty_moov+default_base_moof" if self.growing else "+faststart"
        output = video.output(f"file:{target}", **options)
        return _Encoder(self.path, output.overwrite_output() if self.growing else output, growing=self.growing)

    def _padded_size(self) -> tuple[int, int]:
        if self.lossless:
            return self.height, self.width
        return self.height + self.height % 2, self.width + self.width % 2

    def write(self, frames: torch.Tensor) -> None:
        """Append frames.

        Args:
            frames: uint8 of shape (frames, height, width, channels).

        Raises:
            ValueError: when dtype or shape differ from what was announced.
            OSError: when ffmpeg has stopped.
        """
        if self._encoder is None:
            raise ValueError("VideoWriter: write outside of the with block, expected it inside")
        _check_frames("VideoWriter", frames)
        if tuple(frames.shape[1:]) != (self.height, self.width, self.channels):
            raise ValueError(
                f"VideoWriter: frames have shape {list(frames.shape)}, "
                f"expected [frames, {self.height}, {self.width}, {self.channels}]"
            )
        height, width = self._padded_size()
        planar = frames.movedim(3, 1)
        padding = (0, width - self.width, 0, height - self.height)
        self._encoder.write(F.pad(planar, padding, mode="replicate").movedim(1, 3) if any(padding) else frames)
        self._written += len(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.__exit__(kind, error, trace)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        encoder, self._encoder = self._encoder, None
        assert encoder is not None
        try:
            if kind is None and not self._written:
                raise ValueError(f"VideoWriter: no frame was written to {self.path}, expected at least one")
            if kind is None or (self.growing and self._written and not encoder.ended):
                encoder.finish()
        finally:
            encoder.abort()
            if self.growing and not self._written:
                self.path.unlink(missing_ok=True)


def write_video(path: str | os.PathLike[str], frames: torch.Tensor, fps: float, lossless: bool = False) -> None:
    """Write a video in one call; see `VideoWriter`.

    Args:
        path: of the file.
        frames: uint8 of shape (frames, height, width, 1 or 3).
        fps: frames per second.
        lossless: keep every bit.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    _check_frames("write_video", frames)
    _, height, width, channels = frames.shape
    with VideoWriter(path, fps=fps, height=height, width=width, channels=channels, lossless=lossless) as writer:
        writer.write(frames)


def write_gif(path: str | os.PathLike[str], frames: torch.Tensor, fps: float) -> None:
    """Write an animated GIF that loops for ever, with a palette made for this clip.

    Args:
        path: of the file.
        frames: uint8 of shape (frames, height, width, 1 or 3).
        fps: frames per second, at most 50: browsers slow faster ones down.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    path = Path(path)
    _check_frames("write_gif", frames)
    if not 0 < fps <= 50:
        raise ValueError(f"write_gif: fps is {fps}, expected more than 0 and at most 50")
    _, height, width, _ = frames.shape
    video = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=str(_fraction(fps)))
    halves = video.filter_multi_output("split")
    pictures = ffmpeg.filter([halves[0], halves[1].filter("palettegen")], "paletteuse", dither="sierra2_4a")
    with replacing(path) as temporary:
        encoder = _Encoder(path, pictures.output(f"file:{temporary}", format="gif", loop=0))
        try:
            encoder.write(frames)
            encoder.finish()
        finally:
            encoder.abort()


def enlarge(frames: torch.Tensor, scale: int) -> torch.Tensor:
    """Repeat every pixel, to show small frames at a size that people can see.

    Args:
        frames: of shape (frames, height, width, channels).
        scale: whole factor.

    Returns:
        the frames, (frames, scale * height, scale * width, channels).

    Raises:
        ValueError: when the factor is not positive.
    """
    if scale < 1:
        raise ValueError(f"enlarge: scale is {scale}, expected at least 1")
    return frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def write_contact_sheet(
    path: str | os.PathLike[str],
    clips: Sequence[torch.Tensor],
    captions: Sequence[str] | None = None,
    frames_per_row: int = 8,
    scale: int = 1,
) -> None:
    """Write a PNG that shows each clip as a row of frames, spread evenly from the first to the last.

    Args:
        path: of the file.
        clips: uint8 of shape (frames, height, width, 1 or 3) each.
        captions: a line above each row.
        frames_per_row: the most frames shown of a clip.
        scale: whole factor by which pixels are repeated.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    if not len(clips):
        raise ValueError("write_contact_sheet: clips is empty, expected at least one clip")
    if captions is not None and len(captions) != len(clips):
        raise ValueError(f"write_contact_sheet: got {len(captions)} captions for {len(clips)} clips, expected as many")
    if frames_per_row < 1:
        raise ValueError(f"write_contact_sheet: frames_per_row is {frames_per_row}, expected at least 1")
    gap, line = 2, 14
    rows = []
    for clip in clips:
        _check_frames("write_contact_sheet", clip)
        shown = np.linspace(0, len(clip) - 1, min(frames_per_row, len(clip))).round().astype(int)
        pictures = enlarge(clip[shown].cpu().expand(-1, -1, -1, 3), scale)
        rows.append([Image.fromarray(picture.numpy()) for picture in pictures])
    header = 0 if captions is None else line
    font = ImageFont.load_default(size=11)
    texts = [] if captions is None else [caption.replace("\n", " ") for caption in captions]
    pictures_width = max(sum(picture.width + gap for picture in row) for row in rows)
    texts_width = max((math.ceil(font.getlength(text)) + gap for text in texts), default=0)
    sheet_height = sum(row[0].height + gap + header for row in rows)
    sheet = Image.new("RGB", (max(pictures_width, texts_width) + gap, sheet_height + gap), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    top = gap
    for index, row in enumerate(rows):
        if texts:
            draw.text((gap, top), texts[index], font=font, fill=(230, 230, 230))
        left = gap
        for picture in row:
            sheet.paste(picture, (left, top + header))
            left += picture.width + gap
        top += row[0].height + gap + header
    with replacing(Path(path)) as temporary:
        try:
            sheet.save(temporary, format="PNG")
        except OSError as error:
            message = f"cannot write {path}: {error.strerror or error}; no file was left behind"
            raise OSError(error.errno, message) from error
