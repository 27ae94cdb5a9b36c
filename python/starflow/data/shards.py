"""Tar shards: archives whose members are read where they lie, as if they were the files of a folder.

The members of a shard that have a name in common up to its suffix belong together, `KEY.mp4` with `KEY.txt` or
`KEY.json`, which is the convention of the package webdataset. That package gives members in the order of a stream, so
that a run which resumes would have to read again what it has seen; here the headers of a shard are read once, and any
member is then found by its name. Nothing is unpacked: names of members never become names of files.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, TypeAlias, cast

from starflow.data.ffmpeg import VideoError
from starflow.data.folders import find_files
from starflow.messages import listed, short

logger = logging.getLogger(__name__)

_SUFFIX = ".tar"
# What compressed archives are named, and how their content begins.
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp", ".apng", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
        ".mts", ".mxf", ".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip
"""Suffixes of members of shards that are videos; files in folders may have any name."""

_BLOCK = 512
# Bytes behind the last member in which the mark of the end is looked for: writers fill up their last record with zeros.
_TAIL = 1 << 16
_READ = 1 << 16

# Most bytes of a header; the long ones hold names and times.
_MAX_HEADER = 1 << 20

AVSEEK_SIZE = 0x10000


class Shard:
    """A tar archive and where its members lie.

    Headers are read once, in about 50 microseconds each, and kept in memory; an index in a file beside the shard would
    have to be proved to be of this shard. Hidden members are left out, as in a folder. The log has a line for each kind
    of member that is not read: links, devices, sparse files, names that are absolute, lead out of the shard or hold
    control characters, and names that a later member has again. It also has one for a shard that is damaged or ends too
    early, of which the members before that place are read.

    Args:
        path: of an archive in any of the formats of tar (ustar, pax, GNU), not compressed.

    Raises:
        VideoError: the file cannot be read, is empty, is compressed, is no tar archive, or has no members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[PurePosixPath, tuple[int, int]] = {}
        self._left_out: dict[str, list[str]] = {}
        try:
            with path.open("rb") as file:
                self._scan(file)
        except OSError as error:
            raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from error
        for kind, names in self._left_out.items():
            logger.warning("skipped: %s: %s: %s", path, listed(names, 1), kind)
        if not self._places and not self._left_out:
            raise VideoError(f"{path}: the shard has no member that can be read")

    @property
    def members(self) -> list[Member]:
        """All members that can be read, in the order of their names."""
        return [Member(self, name) for name in sorted(self._places)]

    def place(self, name: PurePosixPath) -> tuple[int, int] | None:
        """The first byte and the number of bytes of a member; None where there is none of this name."""
        return self._places.get(name)

    def _scan(self, file: BinaryIO) -> None:
        total = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if not head:
            raise VideoError(f"{self.path}: the file is empty")
        for mark, by in _COMPRESSED.items():
            if head.startswith(mark):
                raise VideoError(
                    f"{self.path}: a shard compressed by {by}, of which no member can be read alone, expected a plain "
                    "tar file (videos and pictures are compressed already)"
                )
        file.seek(0)
        end, damage = 0, ""
        try:
            # Not `tarfile.open(path)`, which would also take compressed files.
            headers = cast(BinaryIO, _Headers(file))
            with tarfile.TarFile(fileobj=headers, errors="surrogateescape") as archive:
                while (info := archive.next()) is not None:
                    if archive.offset <= end:
                        damage = f"no header of a member at byte {end}"
                        break
                    needed = info.offset_data + info.size if info.isreg() and not info.issparse() else 0
                    # The last block of a member may lack the zeros that fill it up.
                    if total < needed or total <= archive.offset - _BLOCK:
                        damage = f"it ends in the middle of {short(info.name)}, after {total - info.offset_data} bytes"
                        break
                    end = archive.offset
                    self._take(info)
        except OSError:
            raise
        # What tarfile raises for a malformed header is not documented.
        except (Exception, MemoryError) as error:
            if not end:
                raise VideoError(f"{self.path}: not a tar archive ({short(error)})") from error
            if end < total:
                damage = f"no header of a member at byte {end} ({short(error)})"
        damage = damage or self._ending(file, end)
        if damage:
            logger.warning("damaged: %s: %s; the members before that place are read", self.path, damage)

    @staticmethod
    def _ending(file: BinaryIO, end: int) -> str:
        """What is wrong behind the last member; "" for the zeros that end an archive."""
        file.seek(end)
        tail = file.read(_TAIL)
        if not any(tail):
            return "" if len(tail) >= _BLOCK else "it ends without the mark of an archive's end, so it may be cut off"
        # tarfile takes a header that is damaged for the end.
        kind = "no header of a member" if any(tail[:_BLOCK]) else "bytes behind the mark of the archive's end"
        return f"{kind} at byte {end}"

    def _take(self, info: tarfile.TarInfo) -> None:
        if info.isdir():
            return None
        name = PurePosixPath(info.name)
        if info.name.startswith("/") or ".." in name.parts or not name.name:
            return self._leave(info, "a name that leads out of the shard, expected a relative one")
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in info.name):
            return self._leave(info, "a name with control characters")
        if any(part.startswith(".") for part in name.parts):
            return None
        if info.issym() or info.islnk():
            return self._leave(info, "a link, expected a file (links within a shard are not followed)")
        if not info.isreg():
            return self._leave(info, "neither a file nor a folder")
        if info.issparse():
            return self._leave(info, "a sparse file, expected one that is stored whole")
        if name in self._places:
            self._leave(info, "a name that stands in the shard twice, of which the last is read")
        self._places[name] = info.offset_data, info.size
        return None

    def _leave(self, info: tarfile.TarInfo, why: str) -> None:
        self._left_out.setdefault(why, []).append(info.name)


class _Headers:
    """An open shard for tarfile, which reads a header of any size that it is told into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read a header or a part of it."""
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


@dataclass(frozen=True)
class Member:
    """A file in a shard, with those methods of a `pathlib.Path` that readers of files need.

    Args:
        shard: in which it lies.
        inner: its name there.
    """

    shard: Shard
    inner: PurePosixPath

    @property
    def path(self) -> PurePath:
        """The name of the shard and in it that of the member, as if the shard were a folder."""
        return self.shard.path / self.inner

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name without folders."""
        return self.inner.name

    @property
    def stem(self) -> str:
        """Name without folders and suffix."""
        return self.inner.stem

    @property
    def suffix(self) -> str:
        """Last suffix of the name, with its dot."""
        return self.inner.suffix

    @property
    def parent(self) -> PurePath:
        """The folder of the name."""
        return self.path.parent

    def relative_to(self, folder: Path) -> PurePath:
        """The name seen from a folder, or from the shard itself."""
        return self.path.relative_to(folder)

    def with_suffix(self, suffix: str) -> Member:
        """The member of the same name with another suffix, whether it exists or not."""
        return Member(self.shard, self.inner.with_suffix(suffix))

    def exists(self) -> bool:
        """Whether the shard has a member of this name."""
        return self.shard.place(self.inner) is not None

    is_file = exists

    def open(self, mode: str = "rb", buffering: int = _READ) -> io.BufferedReader:
        """Open the member for reading bytes; the shard is opened once more for it.

        Raises:
            OSError: the shard has no such member, or cannot be opened any more.
        """
        assert mode == "rb", mode
        return io.BufferedReader(self.window(), buffering)

    def window(self) -> Window:
        """Open the member for reading bytes without a buffer, as decoders of ffmpeg want it; see `open`."""
        first, size = self.found()
        return Window(self.shard.path.open("rb", buffering=0), first, size, str(self))

    def found(self) -> tuple[int, int]:
        """The first byte of the member and the number of its bytes.

        Raises:
            FileNotFoundError: the shard has no such member.
        """
        place = self.shard.place(self.inner)
        if place is None:
            raise FileNotFoundError(f"no member {self.inner} in {self.shard.path}")
        return place


Place: TypeAlias = Path | Member
"""A file, or one in a shard."""


def place_of(path: str | os.PathLike[str] | Member) -> Place:
    """A path as a `Path`, and a member as it is."""
    return path if isinstance(path, Member) else Path(path)


class Window(io.RawIOBase):
    """A part of an open file as a file of its own, which closes the other one with it.

    It has no file descriptor: decoders that ask for one would read the whole shard. A seek from `AVSEEK_SIZE` gives the
    size, which is how ffmpeg asks for it.
    """

    def __init__(self, file: io.FileIO, first: int, size: int, name: str) -> None:
        super().__init__()
        self._file, self._first, self._size, self._at = file, first, size, 0
        self.name = name

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place in the part."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the part, which may lie behind its end."""
        if whence == AVSEEK_SIZE:
            return self._size
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}.get(whence)
        if base is None or base + offset < 0:
            raise OSError(f"seek to {offset} from {whence} in a file of {self._size} bytes")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read what fits, at most to the end of the part."""
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._first + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def is_shard(path: Path) -> bool:
    """Whether a path leads to a file that is named as a tar archive, compressed or not."""
    try:
        return path.name.lower().endswith((_SUFFIX, *_COMPRESSED_SUFFIXES)) and path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder, or to a tar file, which counts as one."""
    return path.is_dir() or is_shard(path)


def find_places(folder: Path, suffixes: frozenset[str]) -> list[Place]:
    """Find the files below a folder (see `find_files`), and in the place of each shard its members.

    A shard that cannot be read has a line in the log, and so have members of other kinds than the wanted ones.

    Args:
        folder: to search, or a shard.
        suffixes: of members that are wanted, in small letters; webdataset tells by them what a member is.

    Raises:
        VideoError: `folder` itself is a shard that cannot be read.
    """
    if is_shard(folder):
        return list(_wanted(Shard(folder), suffixes))
    places: list[Place] = []
    for path in find_files(folder):
        if not is_shard(path):
            places.append(path)
            continue
        try:
            places += _wanted(Shard(path), suffixes)
        except VideoError as error:
            logger.warning("skipped: %s", error)
    return places


def _wanted(shard: Shard, suffixes: frozenset[str]) -> list[Member]:
    members = shard.members
    others = Counter(member.suffix.lower() for member in members if member.suffix.lower() not in suffixes)
    if others:
        kinds = (f"{count} of {suffix or 'no suffix'}" for suffix, count in sorted(others.items()))
        logger.warning("skipped: %s: members of other kinds: %s", shard.path, listed(kinds))
    return [member for member in members if member.suffix.lower() in suffixes]


def size_of(place: Place) -> int:
    """Bytes of a file or a member.

    Raises:
        OSError: there is no such file.
    """
    return place.stat().st_size if isinstance(place, Path) else place.found()[1]
