"""Devices: what a caller names, as torch's own, or one sentence on why it cannot be had."""

from __future__ import annotations

import torch

from starflow.messages import shown

__all__ = ["as_device"]


def as_device(device: object) -> torch.device:
    """The device that is named, where this machine has it.

    Args:
        device: such as "cpu" or "cuda:1", or torch's own.

    Raises:
        ValueError: no such device here.
    """
    count = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None or (found.type != "cpu" and str(found) not in known):
        lacks = "" if count else f" (torch {torch.__version__} sees no CUDA device)"
        raise ValueError(f"device is {shown(device)}, expected {' or '.join(known)}{lacks}")
    return found
