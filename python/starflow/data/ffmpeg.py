"""ffmpeg as a child process: which binary, its errors, and streams that it writes."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import threading
from fractions import Fraction
from typing import IO, Any


class VideoError(ValueError):
    """A file cannot be read as video or image; the message names the file and the reason in one sentence."""


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


class Drain(threading.Thread):
    """Reads a process's standard error to its end and keeps the last lines."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self.start()

    def run(self) -> None:
        """Runs a stream to its end: status, what it wrote, and what it said."""
        for line in self._stream:
            self._lines.append(line.decode("utf-8", "replace").strip())

    def text(self) -> str:
        """All that was written, once the other end is closed."""
        self.join()
        return "\n".join(self._lines)


def reason(log: str) -> str:
    """What ffmpeg said last, in one line."""
    """The one line of ffmpeg's output that tells most, without the name of the part that says it."""
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line) for line in log.splitlines() if line] or ["no message"]
    telling = r"no space left|too large|invalid data|not found|matches no streams|permission denied|no such"
    return next((line for line in reversed(lines) if re.search(telling, line, re.IGNORECASE)), lines[-1])


def run(stream: Any) -> tuple[int, bytearray, str]:
    """Run a graph of ffmpeg-python and collect exit status, standard output and the end of standard error."""
    command = stream.global_args("-hide_banner", "-nostdin", "-loglevel", "info").compile(cmd=ffmpeg_binary())
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        drain = Drain(process.stderr)
        output = bytearray()
        while chunk := process.stdout.read(1 << 20):
            output += chunk
        log = drain.text()
    return process.returncode, output, log


def check_channels(channels: int) -> None:
    """Refuses numbers of colours that pictures do not have here."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (RGB)")


def as_fraction(fps: float) -> Fraction:
    """Frames a second as ffmpeg is told them."""
    return Fraction(fps).limit_denominator(100_000)
