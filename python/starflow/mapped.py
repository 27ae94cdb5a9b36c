"""Tensors whose memory is a mapped file, as safetensors and `torch.load(mmap=True)` return them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

# <linux/mman.h>: reclaim these pages. Changed pages are kept, so the call is safe for any tensor.
_MADV_PAGEOUT = 21
# Documentation/admin-guide/mm/pagemap.rst of Linux: eight bytes for each page of this process. Bits 63 and 62: it is in
# memory, or swapped; 61: it is one of a file.
_PAGE_TABLE = Path("/proc/self/pagemap")
_HELD = np.uint64(0b11 << 62)
_OF_FILE = np.uint64(1 << 61)
_PAGES_READ = 1 << 17


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
