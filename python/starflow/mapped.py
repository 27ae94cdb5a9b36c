"""Tensors whose memory is a mapped file, as safetensors and `torch.load(mmap=True)` return them."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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
# Of a file so many pieces of so many bytes are read, evenly spread, to see whether its content is what it was.
_PIECES, _PIECE = 16, 1 << 12


class ChangedFileError(RuntimeError):
    """A file whose content changed while tensors were mapped from it."""


class MappedFile:
    """A file as it is before tensors are mapped from it, held open.

    A file that another one was renamed over goes on as it was for who has it open. One that is written in place, as by
    `cp` over it, changes the tensors.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._stat()
        self._content = self._read()

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_mtime_ns, found.st_size

    def _read(self) -> bytes:
        last = max(self._state[1] - _PIECE, 0)
        places = sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)})
        return hashlib.sha256(b"".join(os.pread(self._descriptor, _PIECE, place) for place in places)).digest()

    def require_same(self, tensors: Iterable[Tensor]) -> None:
        """Raises ChangedFileError if the file was written since; a new time alone, as by `touch`, is none.

        Args:
            tensors: that were mapped from the file; after a move to another device they are not any more.
        """
        now, before = self._stat(), self._state
        if now == before:
            return
        if now[1] == before[1]:
            self._state = now
            if self._read() == self._content:
                return
            self._state = before
        if self._holds(tensors):
            raise ChangedFileError(
                f"{self._path} was written to since its weights were mapped from it, expected it as it was: load it "
                "again (what replaces a file in use is written beside it and renamed, as by mv)"
            )

    def _holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the memory of a tensor is the file."""
        if not sys.platform.startswith("linux"):
            return True
        name = os.readlink(f"/proc/self/fd/{self._descriptor}")
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").split(None, 5) for line in file]
        ends = [row[0].split("-") for row in rows if len(row) == 6 and row[5].replace("\\012", "\n") == name]
        ranges = [range(int(first, 16), int(end, 16)) for first, end in ends]
        return any(tensor.data_ptr() in part for tensor in tensors if tensor.is_cpu for part in ranges)


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
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)
