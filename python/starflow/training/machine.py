"""What a training step asks of the machine: memory that stays, and the dtype of its products."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import time

import torch

from starflow_ext._load import native

# Options of glibc's mallopt (malloc.h), and what they are set to: tensors of up to a gibibyte come from memory that the
# process keeps, of which it gives back what lies free beyond two gibibytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_FREE = 1 << 30, (1 << 31) - 1

# The product that is timed: rows of a batch by the width of a layer; and the gain from which on bfloat16 is taken, as
# its rounding is not for nothing.
_ROWS, _WIDTH, _ROUNDS = 2048, 256, 5
_LEAST_GAIN = 1.15


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, from now on.

    A step takes and frees some thousand tensors of a megabyte or two. Glibc returns such to the system, which clears
    them page by page when the next one asks: 6,000 page faults and an eighth of a step of the demo in bfloat16; in
    float32 no gain was seen. The most that the process holds at a time stays what it was. Other allocators than glibc's
    are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_MMAP_THRESHOLD, _LARGEST_KEPT)
        tune(_TRIM_THRESHOLD, _MOST_FREE)


@functools.cache
def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether products are faster in bfloat16 than in float32 on a device.

    Tiles (AMX) and tensor cores are. The instruction of AVX-512 BF16 says little: with it a step of the demo takes 0.55
    of its time in float32 on a Zen 5, and torch multiplies at 0.55 of the speed of float32 on a Xeon whose tiles a
    virtual machine hides. So the product of a layer is timed once, which takes some hundredths of a second.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    levels = native.isa_levels()
    if levels.get("amx", "not built") == "":
        return True
    return levels.get("avx512_bf16", "not built") == "" and _speed_of_bfloat16() > _LEAST_GAIN


def _speed_of_bfloat16() -> float:
    """Speed of torch's product of two matrices in bfloat16, over that in float32; the best of some, in turn."""
    shapes = ((_ROWS, _WIDTH), (_WIDTH, _WIDTH))
    operands = {
        dtype: [torch.ones(shape, dtype=dtype) for shape in shapes] for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, math.inf)
    for _ in range(_ROUNDS):
        for dtype, (x, weight) in operands.items():
            begin = time.perf_counter()
            torch.mm(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return best[torch.float32] / best[torch.bfloat16]
