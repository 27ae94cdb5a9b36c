"""Timing of calls that compete: they take turns, so that a change of the machine meets all of them."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def interleaved(
    *calls: Callable[[], Any],
    rounds: int = 9,
    least: float = 0.02,
    of: Callable[[Sequence[float]], float] = statistics.median,
) -> list[float]:
    """Seconds of calls that take turns.

    Args:
        calls: what is timed.
        rounds: turns of each.
        least: seconds of a turn; a shorter call is repeated within it.
        of: what stands for a call: the median of its turns, or `min`, which other work on the machine moves least.

    Returns:
        Seconds of each call.
    """
    repeats = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, round(least / max(time.perf_counter() - begin, 1e-7))))
    times: list[list[float]] = [[] for _ in calls]
    # As timeit does: a call should not pay for the garbage of another one.
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, count, taken in zip(calls, repeats, times, strict=True):
                begin = time.perf_counter()
                for _ in range(count):
                    call()
                taken.append((time.perf_counter() - begin) / count)
    finally:
        gc.enable()
    return [of(taken) for taken in times]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and with it the ops, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
