"""Tensors whose memory is a mapped file, as safetensors and `torch.load(mmap=True)` return them."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# <linux/mman.h>: reclaim these pages. Changed pages are kept, so the call is safe for any tensor.
_MADV_PAGEOUT = 21
# Documentation/admin-guide/mm/pagemap.rst of Linux: eight bytes for each page of this process. Bits 63 and 62: it is in
# memory, or swapped; 61: it is one of a file.
_PAGE_TABLE = Path("/proc/self/pagemap")
_HELD = np.uint64(0b11 << 62)
_OF_FILE = np.uint64(1 << 61)
_PAGES_READ = 1 << 17
# Names under which this process opens what it has open.
_DESCRIPTORS = Path("/proc/self/fd")
_LINUX = sys.platform.startswith("linux")
# Files up to so many bytes are copied into memory before tensors are mapped from them, which takes 0.4 ms a megabyte.
COPIED = 64 << 20
_COPIED_AT_ONCE = 1 << 20
# Nobody can write to the copy.
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if _LINUX else 0
# Seconds within which two writes may leave the same time: clocks of file systems step by up to 10 ms, of FAT by two
# seconds.
_CLOCK_STEP = 2.0


class ChangedFileError(RuntimeError):
    """A file whose content changed while tensors were mapped from it."""


class _State(NamedTuple):
    """What the system says of a file: its times and size, and how many names it has."""

    written: int
    size: int
    changed: int
    names: int


class MappedFile:
    """A file as it is before tensors are mapped from it, held open.

    A file that another one was renamed over goes on as it was for who has it open. One that is written in place, as by
    `cp` over it, changes the tensors, and one that is cut off ends the process that reads behind its end. So a small
    file is copied into memory, where it stays what it was; of a large one `require_same` sees what happened to it since
    the last look, but not what happens until the next one.

    Args:
        path: of the file.
        copied: bytes up to which a file is copied; None is `COPIED`.

    Attributes:
        source: what tensors are mapped from, the copy or the file that this holds open, whatever its name is by now.

    Raises:
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path, copied: int | None = None) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._stat()
        self._changed: _State | None = None
        self._look_again = _settled(self._state)
        self._read: Callable[[Path], object] | None = None
        self._content: object = None
        self._copy = _copy_of(self._descriptor) if self._state.size <= (COPIED if copied is None else copied) else None
        held = self._descriptor if self._copy is None else self._copy
        if self._copy is not None:
            weakref.finalize(self, os.close, self._copy)
        self.source = _DESCRIPTORS / str(held) if _DESCRIPTORS.exists() else path

    def expect(self, content: object, read: Callable[[Path], object]) -> None:
        """Notes what the file holds, so that new times of the same content, as by `touch`, are no change.

        Args:
            content: what tells it from any other content, such as a checksum.
            read: returns that; called with `source` whenever the times of the file moved, and raises RuntimeError,
                ValueError or OSError where it makes no sense.
        """
        self._content, self._read = content, read

    def _stat(self) -> _State:
        found = os.fstat(self._descriptor)
        return _State(found.st_mtime_ns, found.st_size, found.st_ctime_ns, found.st_nlink)

    def require_same(self, tensors: Iterable[Tensor]) -> None:
        """Raises ChangedFileError if the file was written since; without `expect` new times alone are taken for it.

        That takes a microsecond, unless the times moved, for which the file is read once.

        Args:
            tensors: that were mapped from the file; after a move to another device they are not any more.
        """
        if self._copy is not None:
            return
        now = self._stat()
        due = self._look_again is not None and time.monotonic() >= self._look_again
        if now == self._state and not due:
            return
        if now != self._changed:
            if self._is_same(now):
                self._state, self._look_again = now, _settled(now)
                return
            self._changed = now
        if self._holds(tensors):
            raise ChangedFileError(
                f"{self._path} was written to since its weights were mapped from it, expected it as it was: load it "
                "again (what replaces a file in use is written beside it and renamed, as by mv)"
            )

    def _is_same(self, now: _State) -> bool:
        """Whether a file whose times moved, or could not move for a write right after another one, holds the same."""
        before = self._state
        if now.size != before.size:
            return False
        if now.written == before.written and now.names != before.names:
            return True  # A name was removed or given, as by mv of another file over it.
        if self._read is None:
            return now == before
        try:
            return self._read(self.source) == self._content
        except (RuntimeError, ValueError, OSError):
            return False

    def _holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the memory of a tensor is the file."""
        if not _LINUX:
            return True
        name = os.readlink(f"/proc/self/fd/{self._descriptor}")
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").split(None, 5) for line in file]
        ends = [row[0].split("-") for row in rows if len(row) == 6 and row[5].replace("\\012", "\n") == name]
        ranges = [range(int(first, 16), int(end, 16)) for first, end in ends]
        return any(tensor.data_ptr() in part for tensor in tensors if tensor.is_cpu for part in ranges)


def _settled(state: _State) -> float | None:
    """When a file that was written just now is to be looked at again, whatever its times say then; None for another."""
    return time.monotonic() + _CLOCK_STEP if abs(time.time() - state.written / 1e9) < _CLOCK_STEP else None


def _copy_of(descriptor: int) -> int | None:
    """A copy of an open file in memory that stays as it is, as a descriptor; None where the system makes none.

    Tensors that are mapped from it are told from pages of this process's own like those of any file (`is_as_mapped`).
    """
    if not _LINUX or not _DESCRIPTORS.exists():
        return None
    try:
        copy = os.memfd_create("starflow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    at = 0
    try:
        while content := os.pread(descriptor, _COPIED_AT_ONCE, at):
            try:
                at += os.write(copy, content)
            except OSError:
                # Memory is short, or the process is not to write so much (RLIMIT_FSIZE counts this).
                os.close(copy)
                return None
    except OSError:
        os.close(copy)
        raise
    try:
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(copy)
        return None
    return copy


_watched: weakref.WeakKeyDictionary[nn.Module, tuple[MappedFile, ...]] = weakref.WeakKeyDictionary()


def watch(module: nn.Module, files: Sequence[MappedFile]) -> None:
    """Notes from which files tensors of a module are mapped, for `is_mapped` and `require_unchanged`."""
    _watched[module] = tuple(files)


def is_mapped(module: nn.Module) -> bool:
    """Whether a module was noted as mapped from files."""
    return module in _watched


def require_unchanged(module: nn.Module) -> None:
    """Looks at the times of the files that a module is mapped from, which takes a microsecond each.

    Raises:
        ChangedFileError: one was written to since, so that the module would compute with other weights in silence.
    """
    if torch.compiler.is_compiling():
        return
    for file in _watched.get(module, ()):
        file.require_same(itertools.chain(module.parameters(), module.buffers()))


def own_memory(module: nn.Module) -> None:
    """Copies parameters and buffers that may be mapped from a file, so that nothing written to it changes them.

    One tensor after the other, and the pages of the file go back to the system: memory holds one copy.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_cpu:
            copy = tensor.data.clone()
            release([tensor.data])
            tensor.data = copy


def is_as_mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody has written to the memory of tensors since it was mapped from files, as far as the system tells.

    A page of a private mapping that is written to becomes this process's own, whoever writes and by what means. The
    table of pages says so in a 500th of the bytes: 0.2 us a page in memory or not, where a page that was given back
    (`release`) takes 5 us to be read again.

    Args:
        tensors: dense.

    Returns:
        False too where a tensor is not mapped, is on another device, or the system has no such table.
    """
    try:
        with _PAGE_TABLE.open("rb", buffering=0) as table:
            for first, end in _pages_of(tensors):
                table.seek(8 * first)
                entries = np.frombuffer(table.read(8 * (end - first)), np.uint64)
                if len(entries) < end - first or bool((((entries & _HELD) != 0) & ((entries & _OF_FILE) == 0)).any()):
                    return False
    except (OSError, ValueError):
        return False
    return True


def _pages_of(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """First pages and ends of the memory of tensors, neighbours together and at most `_PAGES_READ` at a time.

    Raises:
        ValueError: one is not on the CPU.
    """
    spans: list[list[int]] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if not tensor.is_cpu:
            raise ValueError("mapped: a tensor is on another device")
        first = tensor.data_ptr() // mmap.PAGESIZE
        end = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
        if spans and first <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([first, end])
    for first, end in spans:
        for start in range(first, end, _PAGES_READ):
            yield start, min(start + _PAGES_READ, end)


def release(tensors: Iterable[Tensor]) -> None:
    """Gives the memory of mapped tensors back to the system; their values stay, and are read from the file again.

    Pages of a mapped file count as memory of this process until the system needs them, so a process that copies a large
    file tensor by tensor looks as large as the file. The call is a hint: a system that does not know it reclaims the
    pages by itself when memory is short.

    Args:
        tensors: on the CPU, dense.
    """
    if not _LINUX:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)
