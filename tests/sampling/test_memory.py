"""A stream without end in the memory of one window: `STARFLOW_STREAM=3000` makes so many frames, a few by default."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from starflow.sampling import Pipeline

FRAMES = int(os.environ.get("STARFLOW_STREAM", "96"))
MOST = 1 << 20
LOOKS = 24


def _resident() -> int:
    """Bytes of this process that are its own, what is mapped from files left out."""
    gc.collect()
    pages, shared = (int(field) for field in Path("/proc/self/statm").read_text().split()[1:3])
    return (pages - shared) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_long_stream_takes_no_more_memory(pipeline: Pipeline) -> None:
    session = pipeline.session("a three moving up", seed=1, denoise="learned")
    seen = []
    for frames in session.extend():
        made = frames.first + frames.pixels.shape[1]
        if made % (FRAMES // LOOKS) == 0:
            seen.append(_resident())
        if made >= FRAMES:
            break
    # What is kept of each frame shows in the smallest of several looks; the first are those of a process that warms up.
    part = len(seen) // 4
    assert part == LOOKS // 4
    assert min(seen[-part:]) - min(seen[part : 2 * part]) < MOST
