"""Files and folders that appear under their name whole or not at all: written beside it, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = ["InUseError", "remove_leftovers", "replacing", "sole", "standing", "write_text"]

logger = logging.getLogger(__name__)

# Temporary names: hidden, with the machine and the process that write there, another one each time. "former" is what
# stood under a name where the file system cannot exchange two names at once. Earlier versions told no process.
_MARKED = re.compile(
    r"\.(?P<stem>.*)\.(?:(?P<machine>[0-9a-f]{8})-(?P<process>[0-9a-f]{1,8})-)?[0-9a-f]{8}"
    r"\.(?P<kind>partial|former)(?P<suffix>\.[^.]*)?",
    re.DOTALL,
)
# Folders of devices and of open files, whose names lead to what a shell gave a process, a plain file or not.
_SPECIAL = re.compile(r"/dev|/dev/fd|/proc/[^/]+/fd")
# Bytes of a file name on every file system of Linux.
_NAME_MAX = 255
# Seconds after which what another machine left is taken for abandoned: nothing is written there for so long.
_ABANDONED = 86400.0
# <fcntl.h> and <linux/fs.h>
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# Folders in which this process has looked for what killed ones left.
_swept: set[str] = set()


class InUseError(RuntimeError):
    """A folder that another process works in."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well and is removed when it does not.

    Everything is on the disk before the name changes, and the new name is on the disk before this returns. At every
    moment either the old or the new one stands under the name, whole; of a folder on a file system that cannot
    exchange two names at once it may for a moment be in `standing` instead. A link to a file is written through, and
    who may read and write stays as it was. The temporary name is hidden, has the suffix of `target`, and is another one
    each time, so that two processes may write the same file. Only a process that is killed leaves it behind; the next
    one that writes into the folder removes it.

    Args:
        target: file or folder, in a folder that exists; the block makes the one or the other at the temporary path.

    Raises:
        FileNotFoundError: the folder of `target` does not exist.
        OSError: something cannot be written, or `target` is a device or a pipe; it is left as it was.
    """
    special = _SPECIAL.fullmatch(os.path.realpath(target.parent)) or (target.exists() and not _is_plain(target))
    if target.is_symlink() and not target.is_dir() and not special:
        # The file that the link leads to is replaced, as by any program that opens the name and writes.
        target = Path(os.path.realpath(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: folder {target.parent} does not exist")
    # A file would take the place of the device or the pipe, for every program of the machine.
    if special or _SPECIAL.fullmatch(os.path.realpath(target.parent)):
        raise OSError(errno.EINVAL, "a device or a pipe, expected a file", str(target))
    _sweep_once(target.parent)
    temporary = _marked(target, "partial")
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _sync(path)
        with suppress(FileNotFoundError):
            # A file that others may not read stays one.
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        if temporary.is_dir() and os.path.lexists(target):
            # A folder cannot be renamed over another one that is not empty.
            if not _exchange(temporary, target):
                _take_turns(temporary, target)
        else:
            os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        # A full disk names no file, and the hidden one is of no use to anybody.
        plain = error.errno is not None and error.strerror == os.strerror(error.errno)
        if plain and error.filename in (None, str(temporary), temporary):
            error.filename = str(target)
        raise
    finally:
        try:
            _remove(temporary)
        except OSError as error:
            # What matters is done, or has an error of its own.
            logger.warning("%s cannot be removed: %s", temporary, error.strerror)


def _is_plain(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def write_text(target: Path, text: str) -> None:
    """Writes a file of UTF-8 text whole or not at all (see `replacing`)."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def standing(path: Path) -> Path:
    """`path`, or where its last content is if a process was killed while it put another folder in its place."""
    if not os.path.lexists(path):
        found = (
            entry
            for entry, mark in _leftovers(path.parent)
            if mark["kind"] == "former" and mark["stem"] + (mark["suffix"] or "") == path.name
        )
        path = max(found, key=lambda former: former.stat().st_mtime, default=path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of `replacing` in `folder`, which no other process may be writing to."""
    for path, mark in _leftovers(folder):
        _settle(path, mark)


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone; the lock goes with the process, however it ends, and is no file.

    Args:
        folder: that exists.

    Raises:
        InUseError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"folder {folder} is in use by another run, expected one that no running process writes to (wait for "
                "it to end, or choose another folder)"
            ) from None
        except OSError as error:
            logger.warning("folder %s cannot be locked (%s): see that no other run uses it", folder, error.strerror)
        try:
            yield
        finally:
            # Not left to the end of the descriptor, which a process that was forked may hold open.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _marked(target: Path, kind: str) -> Path:
    mark = f".{_machine()}-{os.getpid():x}-{secrets.token_hex(4)}.{kind}{target.suffix}"
    stem = target.stem
    while len(os.fsencode(f".{stem}{mark}")) > _NAME_MAX and len(stem) > 1:
        stem = stem[:-1]
    return target.with_name(f".{stem}{mark}")


@cache
def _machine() -> str:
    """What tells this machine, or this container, from others that see the same folder.

    The number of a process means nothing elsewhere, nor after the machine was started again.
    """
    told = [socket.gethostname()]
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        told.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(' '.join(told).encode()):08x}"


def _leftovers(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    try:
        with os.scandir(folder) as entries:
            found = [(folder / entry.name, _MARKED.fullmatch(entry.name)) for entry in entries if entry.name[0] == "."]
    except OSError:
        return []
    return [(path, mark) for path, mark in found if mark is not None]


def _sweep_once(folder: Path) -> None:
    """Removes what killed processes left in a folder that others may be writing to, once in the life of a process."""
    place = os.path.realpath(folder)
    if place in _swept:
        return
    _swept.add(place)
    for path, mark in _leftovers(folder):
        if _abandoned(path, mark):
            _settle(path, mark)


def _abandoned(path: Path, mark: re.Match[str]) -> bool:
    """Whether the process that wrote there is gone."""
    if mark["machine"] == _machine():
        try:
            os.kill(int(mark["process"], 16), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass
        return False
    try:
        times = [entry.stat().st_mtime for entry in ([path, *path.iterdir()] if path.is_dir() else [path])]
    except OSError:
        return False  # It went while it was looked at, so somebody works there.
    return time.time() - max(times) > _ABANDONED


def _settle(path: Path, mark: re.Match[str]) -> None:
    """Removes what a killed process left, or puts it back where it was if nothing took its place."""
    target = path.with_name(mark["stem"] + (mark["suffix"] or ""))
    if mark["kind"] == "former" and not os.path.lexists(target):
        os.rename(path, target)
    else:
        _remove(path)


def _exchange(first: Path, second: Path) -> bool:
    """Gives two paths each other's names, at once for everybody who looks; False where the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = ctypes.c_char_p(os.fsencode(first)), ctypes.c_char_p(os.fsencode(second))
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _take_turns(temporary: Path, target: Path) -> None:
    """Puts a folder in the place of another, which has a hidden name in between (see `standing`)."""
    former = _marked(target, "former")
    os.rename(target, former)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(former, target)
        raise
    _sync(target.parent)
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
