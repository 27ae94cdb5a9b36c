"""What the machine can do at most, and what else it does: the facts beside every figure."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from starflow_ext._load import native

# Cores that others may keep busy before a figure says so: noise of a system that does nothing else is below.
QUIET = 0.15


@functools.cache
def _program() -> tuple[tempfile.TemporaryDirectory[str], str]:
    """Compile ceilings.cpp for this processor; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    binary = str(Path(folder.name) / "ceilings")
    source = Path(__file__).with_name("ceilings.cpp")
    command = ["g++", "-O3", "-march=native", "-std=c++20", "-pthread", str(source), "-o", binary]
    subprocess.run(command, check=True)
    return folder, binary


def _measure(*arguments: int) -> dict[str, float]:
    command = [_program()[1], str(torch.get_num_threads()), *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@functools.cache
def ceilings() -> dict[str, float]:
    """Peak rates of the processor on as many threads as torch uses: FLOP/s and bytes/s.

    `bf16` are products of bfloat16 at the level that runs: below avx512_bf16 they are computed in float32.
    """
    found = _measure()
    unit = {"avx512_bf16": "bf16_registers", "amx": "bf16_tiles"}.get(native.selected_isa(), "fma")
    return {"fma": found["fma"], "bf16": found[unit], **found}


class Work(NamedTuple):
    """What a call must do at least.

    Attributes:
        read, written: bytes.
        operations: multiplications and additions; zero for an op whose ceiling is memory.
        half: whether these may be products of bfloat16.
    """

    read: int
    written: int
    operations: int = 0
    half: bool = False

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Ceiling(NamedTuple):
    """The least time that the machine leaves a call.

    Attributes:
        seconds: that time.
        what: what bounds it: "L1", "L2", "L3", "memory", or "fma" or "bf16" of the processor.
        rate: bytes or operations a second of that.
    """

    seconds: float
    what: str
    rate: float

    @property
    def text(self) -> str:
        """The ceiling as a table shows it."""
        unit = "GFLOP/s" if self.what in ("fma", "bf16") else "GB/s"
        return f"{self.rate / 1e9:.4g} {unit} ({self.what})"


class Ceilings:
    """Ceilings of calls: the rate at which this machine reads and writes as many bytes, and multiplies.

    A rate is the best of all tries, for other work makes single ones low; a call that beats its ceiling has it tried
    again.
    """

    def __init__(self) -> None:
        self.best: dict[tuple[str, int, int, int], float] = {}

    def _rate(self, what: str, read: int = 0, written: int = 0, *, again: bool) -> float:
        key = (what, read, written, torch.get_num_threads())
        if key not in self.best or again:
            found = _measure(read, written) if what == "traffic" else _measure()
            if what == "traffic":
                rates = {key: found["traffic"]}
            else:
                half = max(found["bf16_registers"], found["bf16_tiles"], found["fma"])
                rates = {("fma", *key[1:]): found["fma"], ("bf16", *key[1:]): half}
            for name, rate in rates.items():
                self.best[name] = max(rate, self.best.get(name, 0.0))
        return self.best[key]

    def _of(self, work: Work, *, again: bool) -> Ceiling:
        rate = self._rate("traffic", work.read, work.written, again=again)
        found = Ceiling(work.moved / rate, level(work.moved), rate)
        if work.operations:
            what = "bf16" if work.half else "fma"
            peak = self._rate(what, again=again and work.operations / self._rate(what, again=False) > found.seconds)
            found = max(found, Ceiling(work.operations / peak, what, peak))
        return found

    def of(self, work: Work, seconds: float) -> Ceiling:
        """The ceiling of a call that took so many seconds at best."""
        found = self._of(work, again=False)
        for _ in range(3):
            if seconds >= found.seconds:
                break
            found = self._of(work, again=True)
        return found


@functools.cache
def caches() -> tuple[tuple[str, int, bool], ...]:
    """Level, bytes and whether several cores share it, of each cache that holds data, from the inside out."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, size, level_, cpus = (
            (folder / name).read_text().strip() for name in ("type", "size", "level", "shared_cpu_list")
        )
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
            found.append((f"L{level_}", int(size[:-1]) * unit, "," in cpus or "-" in cpus))
    return tuple(found)


def level(moved: int) -> str:
    """The cache that holds so many bytes when torch's threads share them out, or "memory"."""
    for name, size, shared in caches():
        if moved <= size * (1 if shared else torch.get_num_threads()):
            return name
    return "memory"


class Times(NamedTuple):
    """Seconds, summed over cores: when something ran, by the system's count, and of that this process."""

    clock: float
    busy: float
    own: float

    @staticmethod
    def now() -> Times:
        """Read the counts of now; time that a hypervisor gave to somebody else is busy too."""
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _wait, interrupt, soft, stolen = map(int, file.readline().split()[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
        own = os.times()
        busy = (user + nice + system + interrupt + soft + stolen) / ticks
        return Times(time.perf_counter(), busy, sum(own[:4]))

    def others(self, later: Times) -> float:
        """Cores that others kept busy until `later`."""
        return max(0.0, (later.busy - self.busy) - (later.own - self.own)) / (later.clock - self.clock)


def sampled(seconds: float = 1.0) -> float:
    """Cores that others keep busy while this process sleeps."""
    begin = Times.now()
    time.sleep(seconds)
    return begin.others(Times.now())


def warning(busy: float) -> str:
    """What a reader of figures must know when others keep so many cores busy, or ""."""
    if busy < QUIET:
        return ""
    cores = os.cpu_count()
    return f"other work keeps {busy:.1f} of {cores} cores busy: single times may be two or three times too long"


def processor() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
