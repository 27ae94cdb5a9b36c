"""The frames of a video file with the time at which each is shown, decoded by ffmpeg's libraries (package av).

The decoder runs in this process, so the same libraries read the files on every machine, whatever ffmpeg is installed,
and every frame comes with its own timestamp, size and colours. An ffmpeg process would hide all three behind a filter
graph: that one is built anew, and counts from zero, as soon as the picture size of a stream changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from starflow.data.ffmpeg import VideoError

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 27
"""Pixels of the largest picture that is decoded, 16384 x 8192: a header of a few bytes may ask for any size."""

MICROSECONDS = 1_000_000
"""Times are whole microseconds, as in ffmpeg."""

# A frame that is shown for longer than an hour is taken for damage: at 30 frames a second one such gap is 108,000
# copies of a frame, and a wrong bit in a timestamp may make it a century.
_MAX_GAP = 3600 * MICROSECONDS

# Formats whose clock may be set anew in the middle (broadcasts, recordings joined byte by byte). ffmpeg's own program
# takes a step of more than 10 s forward for such a jump.
_CLOCK_JUMPS = frozenset({"live_flv", "mpeg", "mpegts", "ogg", "wtv"})
_JUMP_AHEAD = 10 * MICROSECONDS
_JUMP_BACK = MICROSECONDS

# A program stream states one timestamp for all frames that begin in a packet of 2 kilobytes. Those of the others are
# guessed, wrongly where B-frames are among them, so a frame follows the last one at the frame rate unless its timestamp
# is this far from that.
_LOOSE_CLOCKS = frozenset({"mpeg"})
_LOOSE = MICROSECONDS // 4

# Formats in which ffmpeg finds a key frame by its time. The others are read from their start: those without
# timestamps (raw streams), with guessed ones, without index, and those whose key frames do not stand alone (GIF, APNG).
_SEEKABLE = frozenset({"asf", "avi", "flv", "mov", "matroska", "mpegts", "mxf"})

# The names under which ffmpeg knows the formats that hold moving pictures, one picture, or sound alone. What is not
# in this list stays closed: "tty" draws any text as a video, and play lists ("concat", "hls", "dash") name other files.
_FORMATS = (
    "3g2 3gp aac aiff apng asf asf_o av1 avi avs2 avs3 bmp_pipe cavsvideo dirac dnxhd dv evc flac flv gif h261 h263 "
    "h264 hevc ivf j2k_pipe jpeg_pipe jpegls_pipe jpegxl_anim jpegxl_pipe live_flv m4a m4v matroska mjpeg mov mp3 mp4 "
    "mj2 mpeg mpegts mpegvideo mxf nsv nut nuv obu ogg png_pipe rm swf tiff_pipe vc1 vc1test vvc w64 wav webm "
    "webp_pipe wtv yuv4mpegpipe"
)

# The brands of HEIF files that hold pictures. Cameras store them as tiles, each of which ffmpeg takes for a video.
_PICTURE_BRANDS = frozenset({"avif", "heic", "heim", "heis", "heix", "mif1", "mif2"})

# Codecs and formats in which every packet is one shown frame with a timestamp of its own, so that frames may be
# counted without decoding them (about a hundred times faster).
_COUNTED_CODECS = frozenset({"av1", "dnxhd", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "prores", "vp9"})
_COUNTED_FORMATS = frozenset({"matroska", "mov"})

# Codecs that are decoded several frames at once. With others this is rarely used by anybody: the pictures of Theora
# depended on which thread was first where two files had been joined.
_FRAME_THREADS = frozenset({"dnxhd", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "mpeg4", "prores", "vp8", "vp9"})

_HEAD_BYTES = 4096


@functools.lru_cache(maxsize=4096)
def tell_once(message: str) -> None:
    """Write a line to the log, and never the same one twice."""
    logger.warning("%s", message)


def head_of(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        VideoError: when the path leads to no file, or to one that is empty or may not be read.
    """
    try:
        if not path.is_file():
            raise VideoError(f"{path}: not a file" if path.exists() else f"{path}: no such file")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise VideoError(f"{path}: the file is empty")
    return head


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text: no control characters but those that lay text out."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut.
        if len(head) < _HEAD_BYTES or error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character >= " " or character in "\t\n\r\f\x1b" for character in text)


def _microseconds(ticks: int, time_base: Fraction) -> int:
    return round(ticks * time_base * MICROSECONDS)


class Source:
    """The first video stream of an open file; cover pictures are none.

    Args:
        path: of the file.
        threads: of the decoder; 0 lets ffmpeg choose.

    Raises:
        VideoError: when the file is missing, empty, text, a picture of tiles, too large, or holds no video.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        if _is_text(head_of(path)):
            raise VideoError(f"{path}: the file holds text, expected a video")
        self.path = path
        self._threads = threads
        self.continuous = True
        """Whether the clock ran on without a jump in what was read so far."""
        self._container, self.stream = self._open()

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # "file:" keeps ffmpeg from taking a name with a colon for a protocol.
        options = {"format_whitelist": _FORMATS.replace(" ", ","), "protocol_whitelist": "file"}
        try:
            container = av.open(
                f"file:{self.path}",
                options={"max_pixels": str(MAX_PIXELS)},
                container_options=options,
                metadata_errors="replace",
                timeout=(60.0, 60.0),
            )
        except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
            raise VideoError(f"{self.path}: not a video that ffmpeg can decode ({_reason(error)})") from error
        with contextlib.ExitStack() as closing:
            closing.callback(container.close)
            stream = self._choose(container)
            trusted = stream.codec_context.name in _FRAME_THREADS
            stream.thread_type = ThreadType.AUTO if trusted else ThreadType.SLICE
            # Each thread of the decoder holds a picture.
            large = stream.codec_context.width * stream.codec_context.height > MAX_PIXELS // 4
            stream.codec_context.thread_count = 1 if large else self._threads
            # The decoder refuses larger pictures further in.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            closing.pop_all()
        return container, stream

    def _choose(self, container: InputContainer) -> VideoStream:
        if container.metadata.get("major_brand", "").strip() in _PICTURE_BRANDS:
            raise VideoError(f"{self.path}: the file holds a picture (HEIF), expected a video")
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoError(f"{self.path}: the file has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{self.path}: not a video that ffmpeg can decode (no decoder for its codec)")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise VideoError(f"{self.path}: pictures of {width}x{height} pixels, expected at most {MAX_PIXELS} pixels")
        return stream

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @property
    def format(self) -> str:
        """First of the names that ffmpeg has for the format of the file."""
        return self._container.format.name.split(",")[0]

    @property
    def pixel_shape(self) -> Fraction:
        """Width of a stored pixel over its height."""
        return self.stream.sample_aspect_ratio or Fraction(1)

    @property
    def duration(self) -> float | None:
        """Seconds that the container states, if any."""
        duration = self._container.duration
        return None if duration is None or duration < 0 else duration / MICROSECONDS

    @functools.cached_property
    def rate(self) -> float:
        """Nominal frames per second.

        Recordings of browsers state the resolution of their clock (1000 a second) for a rate. A rate above 120 that is
        more than twice that of the first frames is no rate, and theirs is taken.
        """
        stated = self.stream.guessed_rate or self.stream.average_rate
        if stated is not None and 0 < stated <= 120:
            return float(stated)
        with Source(self.path, threads=1) as again:
            times = sorted(again._first_times(64))
        span = times[-1] - times[0] if times else 0
        measured = (len(times) - 1) * MICROSECONDS / span if span > 0 else 0.0
        if stated is not None and 0 < stated <= 2 * measured:
            return float(stated)
        return round(measured, 2) or 25.0

    def _first_times(self, count: int) -> list[int]:
        times: list[int] = []
        time_base = self.stream.time_base or Fraction(1, MICROSECONDS)
        with contextlib.suppress(av.error.FFmpegError):
            for packet in self._container.demux(self.stream):
                ticks = packet.pts if packet.pts is not None else packet.dts
                if ticks is not None:
                    times.append(_microseconds(ticks, time_base))
                if len(times) == count:
                    break
        return times

    @property
    def frame_duration(self) -> int:
        """Microseconds for which a frame is shown that does not say so."""
        return max(1, round(MICROSECONDS / self.rate))

    @property
    def _start(self) -> int:
        """Time 0 of the file, in microseconds of its clock; as in ffmpeg's program."""
        if self.format in _CLOCK_JUMPS and self.stream.start_time is not None and self.stream.time_base is not None:
            return _microseconds(self.stream.start_time, self.stream.time_base)
        return self._container.start_time or 0

    def count_packets(self) -> tuple[int, int] | None:
        """Count the frames without decoding them.

        Returns:
            their number and the time at which the last one ends, in microseconds; None where that would not be sure
            to be what a decoder gives: packets that an edit list hides, packets without timestamp, other codecs.
        """
        if self.format not in _COUNTED_FORMATS or self.stream.codec_context.name not in _COUNTED_CODECS:
            return None
        assert self.stream.time_base is not None
        begins: list[int] = []
        ends = 0
        try:
            for packet in self._container.demux(self.stream):
                if not packet.size:
                    continue
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    return None
                if not begins and not packet.is_keyframe:
                    return None
                begins.append(_microseconds(packet.pts, self.stream.time_base) - self._start)
                shown = _microseconds(packet.duration or 0, self.stream.time_base) or self.frame_duration
                ends = max(ends, begins[-1] + shown)
        except av.error.FFmpegError:
            return None
        if not begins or begins[0] != min(begins):
            return None
        gaps = np.diff(np.sort(np.array([*begins, ends])))
        return (len(begins), ends) if gaps.min() > 0 and gaps.max() <= _MAX_GAP else None

    def frames(self, start: int = 0, *, seek: bool = False) -> Iterator[tuple[int, int, VideoFrame]]:
        """Decode the stream.

        Frames that cannot be decoded are left out, with one line in the log for the file.

        Args:
            start: in microseconds; frames before it may be left out where `seek` allows that.
            seek: whether the clock is known to run on without a jump up to `start`, where that is not certain from
                the format.

        Yields:
            time, duration (both in microseconds) and picture of each frame, by rising time. The first is one that is
            shown at `start` or before, except where the stream begins later.

        Raises:
            VideoError: when no frame can be decoded, or two frames are hours apart.
        """
        for back in (1, 16) if start > MICROSECONDS and self._may_seek(seek) else ():
            place = start - back * MICROSECONDS
            if place <= 0:
                break
            frames = self._from(place)
            first = next(frames, None)
            # A key frame behind the start stands for a seek that went too far, as it does where there is no index.
            if first is not None and first[2].key_frame and first[0] <= start:
                yield first
                yield from frames
                return
            self._again()
        yield from self._decode()

    def _may_seek(self, known: bool) -> bool:
        if self.format == "avi":
            # Its packets have no time at which they are shown: only their order tells it.
            return not self.stream.codec_context.has_b_frames
        return self.format in _SEEKABLE and (known or self.format not in _CLOCK_JUMPS)

    def _again(self) -> None:
        """Open the file once more, since a decoder that has failed is in no known state."""
        self.close()
        self._container, self.stream = self._open()

    def _from(self, place: int) -> Iterator[tuple[int, int, VideoFrame]]:
        """Frames from the last key frame before a time on; none where there is no key frame to be found."""
        time_base = self.stream.time_base
        if time_base is None:
            return
        try:
            ticks = math.floor(Fraction(place + self._start, MICROSECONDS) / time_base)
            self._container.seek(ticks, stream=self.stream)
        except (OSError, OverflowError, ValueError, av.error.FFmpegError):
            return
        with contextlib.suppress(VideoError):
            frames = self._decode(told=False)
            for found in frames:
                if found[2].key_frame:
                    yield found
                    break
                if found[0] > place:
                    return
            yield from frames

    def _decode(self, *, told: bool = True) -> Iterator[tuple[int, int, VideoFrame]]:
        """Frames from where the file stands."""
        time_base = self.stream.time_base or Fraction(1, MICROSECONDS)
        jumps = self.format in _CLOCK_JUMPS
        offset, last, shown = 0, None, self.frame_duration
        lost, lost_at, problem = 0, 0, ""
        # The packets of AVI carry the time of decoding alone. Decoders put out as many frames in another order, so the
        # n-th frame is shown at the n-th of these times.
        times: deque[int] | None = deque() if self.format == "avi" else None
        for step in self._steps(times):
            if isinstance(step, str) or step.is_corrupt:
                lost, lost_at = lost + 1, lost_at if lost else last or 0
                problem = step if isinstance(step, str) else "damaged pictures"
                if times and not isinstance(step, str):
                    times.popleft()
                continue
            ticks = step.pts if times is None else times.popleft() if times else None
            if ticks is None:
                time = 0 if last is None else last + shown
            else:
                time = _microseconds(ticks, time_base) - self._start + offset
                if last is None and self._container.start_time is None:
                    # No time 0 is known: the first frame is it.
                    offset, time = -time, 0
            if last is not None and (last - time > _JUMP_BACK or (jumps and time - last > _JUMP_AHEAD)):
                offset += last + shown - time
                time = last + shown
                self.continuous = False
            if last is not None:
                following = last + shown
                loose = self.format in _LOOSE_CLOCKS and abs(time - following) < _LOOSE
                time = following if loose else max(time, last)
            if time - (last or 0) > _MAX_GAP:
                raise VideoError(
                    f"{self.path}: a gap of {(time - (last or 0)) // MICROSECONDS} s between two frames, expected at "
                    f"most {_MAX_GAP // MICROSECONDS} s"
                )
            shown = _microseconds(step.duration or 0, time_base)
            shown = shown if 0 < shown <= _MAX_GAP else self.frame_duration
            last = time
            yield time, shown, step
        if last is None:
            raise VideoError(f"{self.path}: not a video that ffmpeg can decode ({problem or 'no frames'})")
        if lost and told:
            plural = "" if lost == 1 else "s"
            tell_once(
                f"damaged: {self.path}: {lost} frame{plural} left out from {lost_at / MICROSECONDS:.2f} s on "
                f"({problem})"
            )

    def _steps(self, times: deque[int] | None) -> Iterator[VideoFrame | str]:
        """Decoded frames, and a sentence in the place of what cannot be decoded."""
        decoder = self._decoder()
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet: Packet[VideoStream] | None = next(packets, None)
            except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
                # What follows cannot be found, but the decoder still holds frames.
                yield _reason(error)
                packet = None
            if packet is not None and packet.size:
                if times is not None and packet.dts is not None:
                    times.append(packet.dts)
            else:
                packet = None
            try:
                yield from decoder.decode(packet)
            except av.error.EOFError:
                return
            except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
                yield _reason(error)
            if packet is None:
                return

    def _decoder(self) -> av.VideoCodecContext:
        """The decoder of the stream; for VP8 and VP9 with transparency that of libvpx, which alone reads it."""
        own = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") != "1" or own.name not in ("vp8", "vp9"):
            return own
        decoder = av.CodecContext.create(f"libvpx-{own.name}" if own.name == "vp9" else "libvpx", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.extradata = own.extradata
        decoder.options = {"max_pixels": str(MAX_PIXELS)}
        return decoder


def _reason(error: BaseException) -> str:
    """What ffmpeg says of an error, in a few words without the name of the file."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())[:200]
