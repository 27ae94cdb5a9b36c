"""Tensors that lie in a file and are mapped, as safetensors and `torch.load(mmap=True)` give them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

# <linux/mman.h>: reclaim these pages. What was changed in memory is kept, so any tensor may be named.
_MADV_PAGEOUT = 21


def release(tensors: Iterable[Tensor]) -> None:
    """Gives the memory of tensors that lie in a file back to the system; they stay as they are, and are read again.

    Mapped pages count as this process's memory until the system needs them, so that a copy of a large file, tensor by
    tensor, looks as large as the file. A hint: where the system has no such call it reclaims them when it is short.

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
