"""The learning-rate schedule of the published recipe."""

from __future__ import annotations

import math


def cosine_lr(step: int, *, warmup: int, total: int, peak: float, floor: float) -> float:
    """Linear warm-up, then a cosine to the floor.

    Args:
        step: scheduler steps taken; 0 before the first update.
        warmup: steps of warm-up, from min(floor, 1e-6) to `peak`.
        total: steps of the whole run; the floor is held after it.
        peak, floor: learning rates.

    Returns:
        The learning rate of the next update.
    """
    if step <= warmup:
        begin = min(floor, 1e-6)
        return begin + (peak - begin) * (step / warmup if warmup else 1.0)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
