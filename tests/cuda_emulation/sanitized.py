"""What test_sanitized.py runs where AddressSanitizer is loaded. Prints "right"."""

from __future__ import annotations

import torch

from . import test_block_attention, test_block_attention_sm90
from .emulator import Kernels, emulated
from .switches import Switches


def _sanitized(switches: Switches) -> Kernels:
    """For one width of one type alone, as mutations have it."""
    return switches.kernels(None, sanitized=True)


def attention() -> None:
    """mma.sync, ldmatrix and cp.async."""
    source = test_block_attention.FORWARD
    test_block_attention.check_forward(_sanitized(test_block_attention.SWITCHES[source]))
    print("right")


def attention_sm90() -> None:
    """TMA, mbarriers and wgmma."""
    test_block_attention_sm90.check(_sanitized(test_block_attention_sm90.SWITCHES))
    print("right")


def past_own_array() -> None:
    x, out = torch.zeros(32), torch.empty(32)
    emulated("planted.cu", sanitized=True).launch(
        "reverse_cuda", 0, x=x, out=out, blocks=1, threads=32, mistake="past_own_array"
    )
