"""The program ffmpeg, which writes video files: the choice of the binary, and what it reports."""

from __future__ import annotations

import collections
import functools
import logging
import re
import shutil
import subprocess
import threading
from fractions import Fraction
from typing import IO

logger = logging.getLogger(__name__)

# Seconds that the trial of a binary may take.
_PATIENCE = 30.0


class VideoError(ValueError):
    """A file cannot be read as a video or a picture; the message names the file and the reason in one sentence."""


def ffmpeg_binary() -> str:
    """Find an ffmpeg that can write what `VideoWriter` and `write_gif` write.

    The ffmpeg on PATH is preferred to the one in the package imageio-ffmpeg. It may lack a part, as that of conda lacks
    libx264 and old versions lack filters. So it is tried once, on two frames; where it fails the log names it, and the
    other one is used.

    Returns:
        path of the executable.

    Raises:
        FileNotFoundError: when neither can.
    """
    found = shutil.which("ffmpeg")
    fault = None if found is None else _fault(found)
    if found is not None and fault is None:
        return found
    import imageio_ffmpeg

    try:
        carried = str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        if found is not None:
            raise FileNotFoundError(
                f"ffmpeg_binary: {found} cannot write H.264 and GIF ({fault}) and there is none in the package "
                "imageio-ffmpeg, expected one of them with the encoders libx264, libx264rgb and gif: install another "
                "ffmpeg with the system's package manager"
            ) from error
        raise FileNotFoundError(
            "ffmpeg_binary: no ffmpeg on PATH and none in the package imageio-ffmpeg, "
            "expected one of them: install ffmpeg with the system's package manager"
        ) from error
    if found is not None and carried != found:
        _tell_passed_over(found, str(fault), carried)
    return carried


@functools.lru_cache(maxsize=16)
def _tell_passed_over(found: str, fault: str, carried: str) -> None:
    logger.warning("%s cannot write H.264 and GIF (%s): %s is used in its place", found, fault, carried)


@functools.lru_cache(maxsize=16)
def _fault(binary: str) -> str | None:
    """Why a binary cannot write our files; None where it can. Only a trial tells that for filters and options too."""
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    # fmt: off
    command = [
        binary, "-hide_banner", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "16x16", "-r", "8",
        "-i", "pipe:", "-filter_complex",
        f"[0]split=4[a][b][c][d];[a]{scale},format=yuv420p,{tags}[video];[c]palettegen[palette];"
        "[d][palette]paletteuse=dither=sierra2_4a[gif]",
        "-map", "[video]", "-vcodec", "libx264", "-crf", "17", "-tune", "zerolatency", "-f", "null", "-",
        "-map", "[b]", "-vcodec", "libx264rgb", "-qp", "0", "-f", "null", "-",
        "-map", "[gif]", "-vcodec", "gif", "-f", "null", "-",
    ]
    # fmt: on
    try:
        done = subprocess.run(
            command, input=bytes(2 * 16 * 16 * 3), capture_output=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {_PATIENCE:g} s"
    except OSError as error:
        return str(error.strerror or error)
    return None if done.returncode == 0 else reason(done.stderr.decode("utf-8", "replace"))


class Drain(threading.Thread):
    """Reads the standard error of a process to its end and keeps the last lines."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self.start()

    def run(self) -> None:
        """Read until the process closes the pipe. A pipe that nobody empties would block ffmpeg."""
        with self._stream:
            for line in self._stream:
                self._lines.append(line.decode("utf-8", "replace").strip())

    def text(self) -> str:
        """Wait until the process has closed its standard error, and return what it wrote."""
        self.join()
        return "\n".join(self._lines)


def reason(log: str) -> str:
    """The most telling line of ffmpeg's output, without the name of the component in front."""
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line)[:200] for line in log.splitlines() if line] or ["no message"]
    for telling in (r"no space left", r"unknown encoder|no such filter", r"too large|not found|denied|no such|invalid"):
        for line in reversed(lines):
            if re.search(telling, line, re.IGNORECASE):
                return line
    return lines[-1]


def check_channels(channels: int) -> None:
    """Raise ValueError unless the number of channels is one that pictures have here."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (RGB)")


def as_fraction(fps: float) -> Fraction:
    """The frame rate as the fraction that ffmpeg is given."""
    return Fraction(fps).limit_denominator(100_000)
