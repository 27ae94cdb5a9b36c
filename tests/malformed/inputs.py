"""The kinds of file that starflow reads: how a good one is made, who uses it, and sizes that only this kind can state.

A new kind is one more entry of `INPUTS`; a new way to use a file is one more function of `worker.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from starflow.data import ffmpeg_binary


@dataclass(frozen=True)
class Input:
    """A kind of file.

    Args:
        name: of the file.
        make: writes a good one.
        uses: functions of `worker.py`, in the order in which they are tried.
        special: faults of this kind alone, the bytes of the good file to (name, bytes).
    """

    name: str
    make: Callable[[Path], None]
    uses: tuple[str, ...]
    special: Callable[[bytes], Iterable[tuple[str, bytes]]] = lambda _: ()


def _video(*options: str) -> Callable[[Path], None]:
    """1.5 seconds of moving colours, encoded with these options."""

    def make(path: Path) -> None:
        source = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=12:d=1.5"]
        command = [ffmpeg_binary(), "-v", "error", "-y", *source, *options, str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    return make


def _picture(path: Path) -> None:
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)


def _mp4(data: bytes) -> Iterable[tuple[str, bytes]]:
    """Tables of an mp4 that state too much: box, byte offset behind its name, value."""
    most = b"\xff\xff\xff\xff"
    for box, place, value in (
        ("mvhd", 12, b"\0\0\0\x01"),
        ("mvhd", 16, most),
        ("tkhd", 76, most + most),
        ("stts", 8, most),
        ("stts", 12, most),
        ("stts", 12, b"\x7f\xff\xff\xff"),
        ("stsz", 8, most),
        ("stsc", 4, most),
        ("stco", 4, most),
        ("stco", 8, most),
        ("ctts", 12, b"\x7f\xff\xff\xff"),
        ("elst", 8, most),
        ("elst", 12, b"\x7f\xff\xff\xff"),
        ("stsd", 4, most),
        ("avc1", 24, most),
        ("mdhd", 12, b"\0\0\0\0"),
        ("moov", -4, most),
        ("mdat", -4, b"\0\0\0\0"),
    ):
        found = data.find(box.encode())
        if found >= 0:
            first = found + 4 + place if place >= 0 else found + place
            yield f"{box} at {place} is {value.hex()}", data[:first] + value + data[first + len(value) :]


def _png(data: bytes) -> Iterable[tuple[str, bytes]]:
    for width, height in ((1 << 31) - 1, (1 << 31) - 1), (60_000, 60_000), (0, 5), (1, 1 << 30), (20_000, 6_000):
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        yield f"{width}x{height}", data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    # As small as a file of a few kilobytes can be and still hold all pixels that it states.
    for width, height in (1, 100_000), (100_000, 1), (12_000, 11_000):
        rows = zlib.compress((b"\0" + bytes((width + 7) // 8)) * height, 9)
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT" + rows, b"IEND")
        body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        yield f"{width}x{height} black in {len(body)} bytes", data[:8] + body


def _jpeg(data: bytes) -> Iterable[tuple[str, bytes]]:
    frame = data.index(b"\xff\xc0")
    for width, height in (65_535, 65_535), (65_535, 1), (0, 0):
        yield f"{width}x{height}", data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _gif(data: bytes) -> Iterable[tuple[str, bytes]]:
    for size in 65_535, 0, 12_000:
        yield f"screen of {size}x{size}", data[:6] + struct.pack("<HH", size, size) + data[10:]


def _caption(path: Path) -> None:
    path.write_text("a red ball rolls to the left\n")


def _texts(data: bytes) -> Iterable[tuple[str, bytes]]:
    words = data.decode()
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "utf-7"):
        yield encoding, (words + "é").encode(encoding, "replace")
    yield "ten megabytes", data * (10_000_000 // len(data))
    yield "control characters", b"\x1b[31m" + data + b"\x07\x08"
    yield "zero bytes", bytes(1000)


def _captions(path: Path) -> None:
    path.write_text(json.dumps({"captions": ["a red ball", "a blue ball"]}))


def _json(data: bytes) -> Iterable[tuple[str, bytes]]:
    for text in (
        "null", "true", "3", '"a"', "[]", "[1]", "{}", '{"caption": 3}', '{"caption": null}', '{"caption": ["a"]}',
        '{"captions": "a"}', '{"captions": []}', '{"captions": [["a"]]}', '{"captions": {"a": 1}}', '{"caption": NaN}',
    ):  # fmt: skip
        yield f"wrong type {text}", text.encode()
    yield "nested 100,000 times", b"[" * 100_000
    yield "a number of 100,000 digits", b'{"caption": ' + b"9" * 100_000 + b"}"
    yield "half of a surrogate pair", b'{"caption": "\\ud800"}'
    yield "500,000 captions", json.dumps({"captions": ["a"] * 500_000}).encode()


def _actions(path: Path) -> None:
    path.write_text("".join(f'{{"frame": {frame}, "action": {frame % 3}}}\n' for frame in range(6)))


def _lines(data: bytes) -> Iterable[tuple[str, bytes]]:
    first, _, rest = data.partition(b"\n")
    for value in ("3", "-1", "true", "1.5", '"\\u0007"', "[1, 2]", "[1, 2, 1e999]", "[1, 2, 1e300]", "{}", "9" * 400):
        yield f"action {value[:20]}", b'{"action": ' + value.encode() + b"}\n" + rest
    yield "integers of 400 digits", b'{"action": [' + b", ".join([b"9" * 400] * 3) + b"]}\n" + rest
    yield "a line nested 10,000 times", b"[" * 10_000 + b"\n" + rest
    yield "a line of a megabyte", first + b" " * (1 << 20) + b"\n" + rest
    yield "a frame of another kind", b'{"frame": {"a": "\\u001b"}, "action": 1}\n' + rest
    yield "ten megabytes", data * (10_000_000 // len(data))


def _world(path: Path) -> None:
    path.write_text(json.dumps({"world": "paddle", "actions": ["stay", "up", "down"]}))


def _shard(path: Path) -> None:
    """A tar file of two videos with captions, as the convention of webdataset has it."""
    video = path.with_name("member.mp4")
    _video(*_H264)(video)
    with tarfile.open(path, "w") as archive:
        for key in ("000", "001"):
            archive.add(video, f"{key}.mp4")
            for suffix, text in (("txt", b"a red ball"), ("json", b'{"caption": "a ball"}')):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    video.unlink()


def _tar(data: bytes) -> Iterable[tuple[str, bytes]]:
    """Fields of the header of the second member, with the right checksum, and what shards are packed in."""
    second = 512 + -(-int(data[124:135], 8) // 512) * 512
    for place, value in (
        (0, b"../../etc/passwd\0"),
        (0, b"/etc/passwd.mp4\0"),
        (0, b"\x1b[31m\n.mp4\0"),
        (0, b"\xff\xfe.mp4\0"),
        (0, bytes(100)),
        (124, b"77777777777\0"),
        (124, b"\xff" * 12),
        (124, b"\x80" + b"\0" * 3 + b"\xff" * 8),
        *((156, kind) for kind in b"1 2 3 5 7 L K S x g X V".split()),
    ):
        header = bytearray(data[second : second + 512])
        header[place : place + len(value)] = value
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
        yield f"byte {place} of a header is {value[:16]!r}", data[:second] + bytes(header) + data[second + 512 :]
    yield "compressed", gzip.compress(data)
    yield "twice", data * 2


_H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "6")
VIDEO = ("video", "folder", "score")

INPUTS = (
    Input("a.mp4", _video(*_H264), VIDEO, _mp4),
    Input("a.mkv", _video("-c:v", "libx265", "-x265-params", "log-level=error"), VIDEO),
    Input("a.webm", _video("-c:v", "libvpx-vp9", "-g", "6"), VIDEO),
    Input("a.avi", _video("-c:v", "mpeg4", "-bf", "2"), VIDEO),
    Input("a.ts", _video(*_H264), VIDEO),
    Input("a.mpg", _video("-c:v", "mpeg2video", "-r", "25"), VIDEO),
    Input("a.gif", _video(), VIDEO, _gif),
    Input("a.png", _picture, ("picture", "folder"), _png),
    Input("a.jpg", _picture, ("picture", "folder"), _jpeg),
    Input("a.tiff", _picture, ("picture",)),
    Input("a.webp", _picture, ("picture",)),
    Input("a.txt", _caption, ("captions", "folder"), _texts),
    Input("a.json", _captions, ("captions", "folder"), _json),
    Input("a.jsonl", _actions, ("actions",), _lines),
    Input("a.tar", _shard, ("folder",), _tar),
    Input("world.json", _world, ("world",), _json),
)
