"""Tensors whose memory is a mapped file, as safetensors and `torch.load(mmap=True)` return them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

# <linux/mman.h>: reclaim these pages. Changed pages are kept, so the call is safe for any tensor.
_MADV_PAGEOUT = 21


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
