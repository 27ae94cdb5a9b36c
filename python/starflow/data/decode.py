"""The frames of a video file with the time at which each is shown, decoded by ffmpeg's libraries (package av).

The decoder runs in this process. The libraries come with the package av, so a file gives the same frames on every
machine, whichever ffmpeg is installed there, and each frame arrives with its own timestamp, size and colours. The
program ffmpeg hides these behind a filter graph, which it rebuilds, with its clock back at zero, whenever the picture
size of a stream changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
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
from starflow.data.shards import Member, Place, Window

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 27
"""The most pixels of a picture that is decoded, 16384 x 8192. A header of a few bytes can ask for any size."""

MICROSECONDS = 1_000_000
"""Microseconds in a second; times in this module are whole microseconds, as in ffmpeg."""

# A longer gap between two frames is treated as damage. One wrong bit in a timestamp can make a gap of a century, and at
# 30 frames per second an hour already takes 108,000 copies of a frame.
_MAX_GAP = 3600 * MICROSECONDS

# Formats whose clock may restart in the middle of a file (broadcasts, recordings joined byte by byte). The program
# ffmpeg treats a step forward of more than 10 s as such a restart, and so does this module.
_CLOCK_JUMPS = frozenset({"live_flv", "mpeg", "mpegts", "ogg", "wtv"})
_JUMP_AHEAD = 10 * MICROSECONDS
_JUMP_BACK = MICROSECONDS

# An MPEG program stream has one timestamp for all frames that begin in the same packet of 2 kilobytes. ffmpeg guesses
# the timestamps of the other frames, wrongly where there are B-frames. So each frame is placed one frame duration after
# the previous one, unless its timestamp is at least this far away from that place.
_LOOSE_CLOCKS = frozenset({"mpeg"})
_LOOSE = MICROSECONDS // 4

# Formats in which ffmpeg can find a key frame by its time. Files of other formats are read from their beginning: raw
# streams have no timestamps, those of program streams are guessed, and the key frames of GIF and APNG depend on the
# frames before them.
_SEEKABLE = frozenset({"asf", "avi", "flv", "mov", "matroska", "mpegts", "mxf"})

# ffmpeg's names of the formats that may be opened: those of videos, pictures and sound. Two kinds are left out for a
# reason: "tty" draws any text file as a video, and play lists ("concat", "hls", "dash") open other files.
_FORMATS = (
    "3g2 3gp aac aiff apng asf asf_o av1 avi avs2 avs3 bmp_pipe cavsvideo dirac dnxhd dv evc flac flv gif h261 h263 "
    "h264 hevc ivf j2k_pipe jpeg_pipe jpegls_pipe jpegxl_anim jpegxl_pipe live_flv m4a m4v matroska mjpeg mov mp3 mp4 "
    "mj2 mpeg mpegts mpegvideo mxf nsv nut nuv obu ogg png_pipe rm swf tiff_pipe vc1 vc1test vvc w64 wav webm "
    "webp_pipe wtv yuv4mpegpipe"
)

# Brands of HEIF files that hold pictures. Cameras store a picture as tiles, and ffmpeg presents each tile as a video.
_PICTURE_BRANDS = frozenset({"avif", "heic", "heim", "heis", "heix", "mif1", "mif2"})

# Codecs and formats in which every packet holds exactly one frame that is shown, with its timestamp. Their frames are
# counted without decoding them.
_COUNTED_CODECS = frozenset({"av1", "dnxhd", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "prores", "vp9"})
_COUNTED_FORMATS = frozenset({"matroska", "mov"})

# Codecs for which the decoder works on several frames at once. For other codecs this way of decoding is little used and
# was seen to fail: frames of a Theora stream of two parts came out differently from run to run.
_FRAME_THREADS = frozenset({"dnxhd", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "mpeg4", "prores", "vp8", "vp9"})

_HEAD_BYTES = 4096


@functools.lru_cache(maxsize=4096)
def tell_once(message: str) -> None:
    """Write a warning to the log, unless the same text has been written before."""
    logger.warning("%s", message)


def head_of(path: Place) -> bytes:
    """Read the first bytes of a file.

    Raises:
        VideoError: when the path leads to no regular file, or the file is empty or cannot be read.
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
    """Whether the first bytes of a file are text, that is UTF without control characters other than those of layout."""
    if head.startswith(b"YUV4MPEG2"):
        # The header of this format is text, and the pixels after it may look like text.
        return False
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The end of what was read may cut a character into two.
        if len(head) < _HEAD_BYTES or error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character >= " " or character in "\t\n\r\f\x1b" for character in text)


def _microseconds(ticks: int, time_base: Fraction) -> int:
    return round(ticks * time_base * MICROSECONDS)


class Source:
    """An open file and its first video stream. A cover picture does not count as a video stream.

    Args:
        path: of the file, or a member of a shard.
        threads: number of threads of the decoder; 0 lets ffmpeg choose.

    Raises:
        VideoError: when the file is missing or empty, holds text or a HEIF picture, has pictures of more than
            `MAX_PIXELS`, or has no video stream that can be decoded.
    """

    def __init__(self, path: Place, *, threads: int = 0) -> None:
        if _is_text(head_of(path)):
            raise VideoError(f"{path}: the file holds text, expected a video")
        self.path = path
        self._threads = threads
        self.continuous = True
        """Whether the clock of the file has not jumped in the part that was decoded so far."""
        self._container, self.stream = self._open()

    def _open(self) -> tuple[InputContainer, VideoStream]:
        options = {"format_whitelist": _FORMATS.replace(" ", ","), "protocol_whitelist": "file"}
        with contextlib.ExitStack() as closing:
            try:
                # "file:" keeps ffmpeg from taking a name with a colon for a protocol.
                file: str | Window = f"file:{self.path}"
                if isinstance(self.path, Member):
                    # By its name ffmpeg guesses the format of a raw stream, as of a file.
                    file = closing.enter_context(self.path.window())
                container = av.open(
                    file,
                    "r",
                    options={"max_pixels": str(MAX_PIXELS)},
                    container_options=options,
                    metadata_errors="replace",
                    timeout=(60.0, 60.0),
                )
            except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
                raise VideoError(f"{self.path}: not a video that ffmpeg can decode ({reason_of(error)})") from error
            closing.callback(container.close)
            stream = self._choose(container)
            trusted = stream.codec_context.name in _FRAME_THREADS
            stream.thread_type = ThreadType.AUTO if trusted else ThreadType.SLICE
            # Each thread of the decoder holds a picture of its own.
            large = stream.codec_context.width * stream.codec_context.height > MAX_PIXELS // 4
            stream.codec_context.thread_count = 1 if large else self._threads
            # The size may also grow in the middle of the stream, where the decoder checks it.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            self._closing = closing.pop_all()
        return container, stream

    def _choose(self, container: InputContainer) -> VideoStream:
        if container.metadata.get("major_brand", "").strip() in _PICTURE_BRANDS:
            raise VideoError(f"{self.path}: the file holds a picture (HEIF), expected a video")
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoError(f"{self.path}: the file has no video stream")
        stream = streams[0]
        if len(streams) > 1:
            tell_once(f"{self.path}: {len(streams)} video streams in one file, the first is read")
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
        self._closing.close()

    @property
    def format(self) -> str:
        """The first of ffmpeg's names of the file's format."""
        return self._container.format.name.split(",")[0]

    @property
    def pixel_shape(self) -> Fraction:
        """Width of a stored pixel divided by its height."""
        return self.stream.sample_aspect_ratio or Fraction(1)

    @property
    def duration(self) -> float | None:
        """Duration in seconds that the container states; None where it states none."""
        duration = self._container.duration
        return None if duration is None or duration < 0 else duration / MICROSECONDS

    @functools.cached_property
    def rate(self) -> float:
        """Nominal frames per second.

        Browsers write the resolution of their clock, 1000 per second, in the place of the rate, and of a GIF whose
        delays differ ffmpeg tells that of its clock, 100 per second. Where the stated rate is above 120, or of a GIF,
        and more than twice the rate of the first 64 frames, the latter is returned.
        """
        stated = self.stream.guessed_rate or self.stream.average_rate
        gif = self.format == "gif"
        if stated is not None and 0 < stated <= 120 and not gif:
            return float(stated)
        with Source(self.path, threads=1) as again:
            times = sorted(again._first_times(64))
        span = times[-1] - times[0] if times else 0
        measured = (len(times) - 1) * MICROSECONDS / span if span > 0 else 0.0
        # A whole number, where rounding to hundredths of a second may be all that differs.
        if gif and abs(measured - round(measured)) * span <= measured * MICROSECONDS / 100:
            measured = float(round(measured))
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
    def clock(self) -> int:
        """Microseconds in which the file counts, where times are rounded to so many that frames move; otherwise 0.

        A GIF counts hundredths of a second: at 8 frames a second, frame 1 begins at 0.13 s in place of 0.125 s.
        """
        return MICROSECONDS // 100 if self.format == "gif" else 0

    @property
    def frame_duration(self) -> int:
        """Microseconds for which a frame is shown, where the frame itself does not state it."""
        return max(1, round(MICROSECONDS / self.rate))

    @property
    def _start(self) -> int:
        """Reading of the file's clock at time 0, in microseconds, by the rule of the program ffmpeg."""
        if self.format in _CLOCK_JUMPS and self.stream.start_time is not None and self.stream.time_base is not None:
            return _microseconds(self.stream.start_time, self.stream.time_base)
        return self._container.start_time or 0

    def count_packets(self) -> tuple[int, int] | None:
        """Count the frames without decoding them.

        Returns:
            the number of frames, and the time in microseconds at which the last one ends. None where a decoder might
            give other frames: an edit list hides packets, a packet has no timestamp, or the codec or the format is not
            one whose packets are frames.
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
        """Decode the stream, from its beginning or from a key frame before `start`.

        A frame that cannot be decoded is left out, and the log tells so.

        Args:
            start: in microseconds. Frames that end before it are not needed.
            seek: whether the clock is known not to jump before `start`. It matters only for formats whose clock may
                jump; their files are otherwise decoded from the beginning.

        Yields:
            time and duration of each frame, both in microseconds, and the frame; the times never decrease. The first
            frame begins at `start` or earlier, unless the stream itself begins later.

        Raises:
            VideoError: when no frame can be decoded, or a gap between two frames is longer than an hour.
        """
        for back in (1, 16) if start > MICROSECONDS and self._may_seek(seek) else ():
            place = start - back * MICROSECONDS
            if place <= 0:
                break
            frames = self._from(place)
            first = next(frames, None)
            # Without an index ffmpeg may land behind the wanted place.
            if first is not None and first[2].key_frame and first[0] <= start:
                yield first
                yield from frames
                return
            self._again()
        yield from self._decode()

    def _may_seek(self, known: bool) -> bool:
        if self.format == "avi":
            # See `_decode`: with B-frames the times depend on all packets before.
            return not self.stream.codec_context.has_b_frames
        return self.format in _SEEKABLE and (known or self.format not in _CLOCK_JUMPS)

    def _again(self) -> None:
        """Open the file once more: the state of a decoder after an error is unknown."""
        self.close()
        self._container, self.stream = self._open()

    def _from(self, place: int) -> Iterator[tuple[int, int, VideoFrame]]:
        """Frames from the last key frame before `place` on; none where no key frame is found."""
        time_base = self.stream.time_base
        if time_base is None:
            return
        try:
            ticks = math.floor(Fraction(place + self._start, MICROSECONDS) / time_base)
            self._container.seek(ticks, stream=self.stream)
        except (OSError, OverflowError, ValueError, av.error.FFmpegError):
            return
        frames = self._decode(sought=True)
        found = None
        with contextlib.suppress(VideoError):
            found = next(frames, None)
            # Frames in front of the key frame may depend on others that were skipped.
            while found is not None and not found[2].key_frame and found[0] <= place:
                found = next(frames, None)
        if found is not None and found[2].key_frame:
            yield found
            yield from frames

    def _decode(self, *, sought: bool = False) -> Iterator[tuple[int, int, VideoFrame]]:
        """Frames with their times from the current place in the file on, which is its beginning unless `sought`."""
        time_base = self.stream.time_base or Fraction(1, MICROSECONDS)
        jumps = self.format in _CLOCK_JUMPS
        offset, last, shown = 0, None, self.frame_duration
        problem = ""
        # Packets of AVI state when they are decoded, not when they are shown. A decoder gives one frame for each
        # packet, in the order of showing, so the n-th frame is shown at the n-th of these times.
        times: deque[int] | None = deque() if self.format == "avi" else None
        for step in self._steps(times):
            if isinstance(step, str) or step.is_corrupt:
                problem = step if isinstance(step, str) else "damaged pictures"
                # Behind a seek the first frames lack others that they depend on.
                if last is not None or not sought:
                    tell_once(f"damaged: {self.path}: frames that cannot be decoded are left out ({problem})")
                if times and not isinstance(step, str):
                    times.popleft()
                continue
            ticks = step.pts if times is None else times.popleft() if times else None
            if ticks is None:
                time = 0 if last is None else last + shown
            else:
                time = _microseconds(ticks, time_base) - self._start + offset
                if last is None and self._container.start_time is None:
                    # The file does not state its time 0, so the first frame defines it.
                    offset, time = -time, 0
            if last is not None and (last - time > _JUMP_BACK or (jumps and time - last > _JUMP_AHEAD)):
                offset += last + shown - time
                time = last + shown
                self.continuous = False
            if last is not None:
                following = last + shown
                loose = self.format in _LOOSE_CLOCKS and abs(time - following) < _LOOSE
                time = following if loose else max(time, last)
            gap = time - last if last is not None else 0 if sought else time
            if gap > _MAX_GAP:
                raise VideoError(
                    f"{self.path}: a gap of {gap // MICROSECONDS} s before a frame, expected at most "
                    f"{_MAX_GAP // MICROSECONDS} s"
                )
            shown = _microseconds(step.duration or 0, time_base)
            shown = shown if 0 < shown <= _MAX_GAP else self.frame_duration
            last = time
            yield time, shown, step
        if last is None:
            raise VideoError(f"{self.path}: not a video that ffmpeg can decode ({problem or 'no frames'})")

    def _steps(self, times: deque[int] | None) -> Iterator[VideoFrame | str]:
        """Decoded frames in the order of showing, and for each failure of the decoder its reason as a string.

        Args:
            times: receives the decoding time of every packet that is read, where it is given.
        """
        decoder = self._decoder()
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet: Packet[VideoStream] | None = next(packets, None)
            except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
                # The rest of the file cannot be read, but the decoder still holds frames.
                yield reason_of(error)
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
                yield reason_of(error)
            if packet is None:
                return

    def _decoder(self) -> av.VideoCodecContext:
        """The stream's own decoder, or libvpx for VP8 and VP9 with transparency, which ffmpeg's own decoders ignore."""
        own = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") != "1" or own.name not in ("vp8", "vp9"):
            return own
        decoder = av.CodecContext.create(f"libvpx-{own.name}" if own.name == "vp9" else "libvpx", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.extradata = own.extradata
        decoder.options = {"max_pixels": str(MAX_PIXELS)}
        return decoder


def reason_of(error: BaseException) -> str:
    """The words of ffmpeg for an error, without the name of the file."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())[:200]
