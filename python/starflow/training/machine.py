"""What a training step asks of the machine: memory that stays, and the dtype of its products."""

from __future__ import annotations

import ctypes
import sys

import torch

from starflow_ext._load import native

# Options of glibc's mallopt (malloc.h), and what they are set to: tensors of up to a gibibyte come from memory that the
# process keeps, of which it gives back what lies free beyond two gibibytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_FREE = 1 << 30, (1 << 31) - 1


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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has an instruction for products of bfloat16; elsewhere they are no faster than of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    levels = native.isa_levels()
    return any(levels.get(level, "not built") == "" for level in ("avx512_bf16", "amx"))
