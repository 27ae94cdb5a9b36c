"""Frames to video files and animated pictures. A file appears under its name complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import ffmpeg
import torch
import torch.nn.functional as F

from starflow.arguments import check_flag, check_tensor
from starflow.config import LEAST_FPS, MOST_FPS
from starflow.data.ffmpeg import Drain, as_fraction, check_channels, ffmpeg_binary, reason
from starflow.files import replacing
from starflow.messages import shown
from starflow.numeric import integer, number

# Matroska counts milliseconds.
_MATROSKA_FPS = 1000.0
# Stands for the file in a command: ffmpeg-python takes no name that is not UTF-8.
_TARGET = "file:target"
_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}


def check_frames(function: str, frames: torch.Tensor) -> None:
    """Raise ValueError unless frames are uint8 of shape (frames, height, width, 1 or 3)."""
    check_tensor(function, "frames", frames)
    if frames.dtype != torch.uint8:
        raise ValueError(
            f"{function}: frames have dtype {frames.dtype}, expected torch.uint8 (starflow.data.to_frames)"
        )
    if frames.ndim != 4 or frames.shape[3] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"{function}: frames have shape {list(frames.shape)}, expected [frames, height, width, 1 or 3], none empty"
        )


def _plays(path: Path) -> bool:
    """Whether a file has a frame that can be shown."""
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0), None) is not None
    except (av.FFmpegError, OSError, IndexError):
        return False


class _Encoder:
    """One ffmpeg process that reads RGB frames from its standard input and writes one file."""

    def __init__(self, path: Path, target: Path, stream: Any, *, growing: bool = False) -> None:
        self._path, self._growing = path, growing
        command = stream.global_args("-hide_banner", "-loglevel", "error").compile(cmd=ffmpeg_binary())
        command = [f"file:{target}" if part == _TARGET else part for part in command]
        # Ctrl-C goes to all processes of the terminal. A file that grows shall be completed all the same, so its
        # process gets a session of its own and ends when its input does.
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
        self._drain = Drain(self._process.stderr)

    def write(self, frames: torch.Tensor) -> None:
        rgb = frames.detach().to("cpu").expand(-1, -1, -1, 3).contiguous()
        try:
            self._stdin.write(rgb.numpy().data.cast("B"))
            self._stdin.flush()
        except BrokenPipeError:
            self.finish()

    def finish(self) -> None:
        """End the input, wait for ffmpeg, and raise OSError unless it has written the file."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        status = self._process.wait()
        log = self._drain.text()
        if status != 0:
            full = "no space left" in log.lower()
            code = errno.ENOSPC if full else errno.EIO
            left = "no file was left behind"
            if self._growing:
                left = "what was written before plays" if _plays(self._path) else "nothing in it plays"
            raise OSError(code, f"ffmpeg could not write {self._path}: {reason(log)}; {left}")

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

    The file holds H.264 in yuv420p at crf 17 with the matrix and tags of BT.709, and its index stands in front (fast
    start). An odd side is made even by repeating the last row or column. With `lossless` every bit of the RGB frames is
    kept instead, at the exact size: this is H.264 in RGB, which most browsers do not play.

    The file appears when the block ends without an error, and otherwise not at all. With `growing` it exists from the
    first frame on and plays up to the last frame that was written, whatever ends the process. It is then an mp4 of
    fragments of one frame each, without an index in front, and every frame is passed on before `write` returns.

    Args:
        path: .mp4, .m4v, .mov or .mkv, in a folder that exists.
        fps: frames per second, from 0.01 to 100,000 (1000 in .mkv, which counts milliseconds).
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
        most = _MATROSKA_FPS if self.path.suffix.lower() == ".mkv" else MOST_FPS
        rate = number(fps)
        if rate is None or not LEAST_FPS <= rate <= most:
            raise ValueError(
                f"VideoWriter: fps is {shown(fps)}, expected {LEAST_FPS:g} to {most:g} in {self.path.suffix}"
            )
        rows, columns = integer(height), integer(width)
        if rows is None or columns is None or min(rows, columns) < 1:
            raise ValueError(f"VideoWriter: size is {shown(height)}x{shown(width)}, expected integers of at least 1")
        check_channels(channels)
        for name, flag in (("lossless", lossless), ("growing", growing)):
            check_flag("VideoWriter", name, flag)
        self.fps = rate
        self.height = rows
        self.width = columns
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
            # The last function that is pushed runs first, so ffmpeg ends before the file takes its name.
            ending.push(self._finish)
            self._ending = ending.pop_all()
        return self

    def _start(self, target: Path) -> _Encoder:
        height, width = self._padded_size()
        video = ffmpeg.input(
            "pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=str(as_fraction(self.fps))
        )
        options: dict[str, Any] = {"format": _CONTAINERS[self.path.suffix.lower()], "an": None}
        if self.lossless:
            options |= {"vcodec": "libx264rgb", "qp": 0}
        else:
            video = video.filter(
                "scale", out_color_matrix="bt709", out_range="tv", flags="bicubic+accurate_rnd+full_chroma_int"
            ).filter("format", "yuv420p")
            # The encoder takes its tags from the frames and ignores those of the output options.
            video = video.filter(
                "setparams", range="tv", colorspace="bt709", color_primaries="bt709", color_trc="bt709"
            )
            options |= {"vcodec": "libx264", "crf": 17}
        if self.growing:
            # Neither the encoder nor the container holds a frame back until later ones arrive.
            options |= {"tune": "zerolatency", "flush_packets": 1}
        if self.path.suffix.lower() != ".mkv":
            options["movflags"] = "+frag_every_frame+empty_moov+default_base_moof" if self.growing else "+faststart"
        output = video.output(_TARGET, **options)
        return _Encoder(self.path, target, output.overwrite_output() if self.growing else output, growing=self.growing)

    def _padded_size(self) -> tuple[int, int]:
        if self.lossless:
            return self.height, self.width
        return self.height + self.height % 2, self.width + self.width % 2

    def write(self, frames: torch.Tensor) -> None:
        """Append frames.

        Args:
            frames: uint8 of shape (frames, height, width, channels).

        Raises:
            ValueError: when dtype or shape are not those that the writer was made for.
            OSError: when ffmpeg has stopped.
        """
        if self._encoder is None:
            raise ValueError("VideoWriter: write outside of the with block, expected it inside")
        check_frames("VideoWriter", frames)
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
    """Write a whole video (see `VideoWriter`).

    Args:
        path: of the file.
        frames: uint8 of shape (frames, height, width, 1 or 3).
        fps: frames per second.
        lossless: whether every bit is kept.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    check_frames("write_video", frames)
    _, height, width, channels = frames.shape
    with VideoWriter(path, fps=fps, height=height, width=width, channels=channels, lossless=lossless) as writer:
        writer.write(frames)


def write_gif(path: str | os.PathLike[str], frames: torch.Tensor, fps: float) -> None:
    """Write an animated GIF that repeats for ever, with a palette that is made for this clip.

    Args:
        path: .gif, in a folder that exists.
        frames: uint8 of shape (frames, height, width, 1 or 3).
        fps: frames per second, at most 50, since browsers slow down faster ones. A GIF counts hundredths of a second:
            at a rate that is not 100 / n delays differ by one of them, and frames come at that rate on average.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    path = Path(path)
    check_frames("write_gif", frames)
    if path.suffix.lower() != ".gif":
        raise ValueError(f'write_gif: path {path} ends in "{path.suffix}", expected .gif')
    rate = number(fps)
    if rate is None or not LEAST_FPS <= rate <= 50:
        raise ValueError(f"write_gif: fps is {shown(fps)}, expected {LEAST_FPS:g} to 50")
    _, height, width, _ = frames.shape
    video = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=str(as_fraction(rate)))
    halves = video.filter_multi_output("split")
    pictures = ffmpeg.filter([halves[0], halves[1].filter("palettegen")], "paletteuse", dither="sierra2_4a")
    with replacing(path) as temporary:
        encoder = _Encoder(path, temporary, pictures.output(_TARGET, format="gif", loop=0))
        try:
            encoder.write(frames)
            encoder.finish()
        finally:
            encoder.abort()


def enlarge(frames: torch.Tensor, scale: int) -> torch.Tensor:
    """Repeat every pixel, so that small frames are shown at a size that people can see.

    Args:
        frames: of shape (frames, height, width, channels).
        scale: whole factor.

    Returns:
        the frames, (frames, scale * height, scale * width, channels).

    Raises:
        ValueError: when the factor is no whole number of at least 1, or the frames have their channels elsewhere.
    """
    factor = integer(scale)
    if factor is None or factor < 1:
        raise ValueError(f"enlarge: scale is {shown(scale)}, expected a whole number of at least 1")
    check_tensor("enlarge", "frames", frames)
    if frames.ndim != 4 or frames.shape[3] not in (1, 3):
        raise ValueError(f"enlarge: frames have shape {list(frames.shape)}, expected [frames, height, width, 1 or 3]")
    return frames.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
