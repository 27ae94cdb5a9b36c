"""Break-even: the widest window whose call costs no more than one of a single row, measured on this machine."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from starflow.files import write_text
from starflow.solver.protocol import Timed

# A call of this many rows is past the break-even on every machine that was measured, so that arithmetic alone decides
# its time.
_MANY_ROWS = 256


_REPEATS = 5


_measured: dict[str, int] = {}


@torch.inference_mode()
def break_even(model: Timed, batch: int, first: int = 0) -> int:
    """The window at which a call stops being free: the rows whose arithmetic takes as long as a call of one row.

    A narrower window only adds calls, a wider one only arithmetic. Measured once per block, machine and number of
    threads, and kept in a file in the user's cache folder (`STARFLOW_CACHE`, else `XDG_CACHE_HOME`/starflow), since
    the window decides the last bits of a sample.

    Args:
        model: decoder of the block; its cache is overwritten from `first` on.
        batch: samples that share a call.
        first: first token that may be overwritten.

    Returns:
        Rows of a sample, at least 1, at most the tokens of a sample.
    """
    if model.tokens - first < 2:
        return 1
    key = f"{platform.machine()}-{_processor()}-{model.cost_key}"
    if key not in _measured:
        path = cache_folder() / "break_even.json"
        stored = _read_json(path)
        if key not in stored:
            stored[key] = _measure(model, batch, first)
            _write_json(path, stored)
        _measured[key] = stored[key]
    return max(1, min(_measured[key] // (batch * model.halves), model.tokens))


def _measure(model: Timed, batch: int, first: int) -> int:
    last = model.tokens - first
    many = max(2, min(_MANY_ROWS // batch, last))
    channels = model.channels
    seconds = {}
    for rows in (1, many):
        previous = torch.zeros(batch, rows, channels, dtype=torch.float32, device=model.device)
        times = []
        for _ in range(_REPEATS + 1):
            begin = time.perf_counter()
            # Reading a value back waits for the device.
            float(model.evaluate(previous, first).raw[0, 0, 0])
            times.append(time.perf_counter() - begin)
        seconds[rows] = statistics.median(times[1:])
    per_row = max((seconds[many] - seconds[1]) / (batch * (many - 1)), seconds[1] / _MANY_ROWS)
    rows = round(seconds[1] / per_row)
    # Noise of the clock must not decide between neighbouring windows: round to a power of two.
    return int(2 ** round(math.log2(max(rows, 1)))) * model.halves


def cache_folder() -> Path:
    """Where measurements of this machine are kept: `STARFLOW_CACHE`, else `XDG_CACHE_HOME`/starflow."""
    explicit = os.environ.get("STARFLOW_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _read_json(path: Path) -> dict[str, int]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    # What is not a size is measured again.
    return {k: v for k, v in stored.items() if type(v) is int and v > 0} if isinstance(stored, dict) else {}


def _write_json(path: Path, values: dict[str, int]) -> None:
    """Best effort: without a writable cache folder the measurement is repeated by the next process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=1))
    except OSError:
        pass
