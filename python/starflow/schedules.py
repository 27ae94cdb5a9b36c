"""Schedules: which tokens are evaluated together and when they are accepted, and the text form of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from starflow.arguments import check_flag
from starflow.messages import shown
from starflow.numeric import integer, number

# Tokens of a clip and sweeps over them are counted in 31 bits.
_MOST: Final = (1 << 31) - 1


@dataclass(frozen=True)
class Sequential:
    """Token by token: exact, one call a token."""


@dataclass(frozen=True)
class Chunks:
    """The published scheme: fixed chunks, each iterated until its mean change falls under a threshold.

    Args:
        block: tokens of a chunk in the first frame; four times as many after it.
        threshold: of mean((x_new - x_old)^2) / mean(x_new^2) over the whole batch and chunk.
        max_iterations: cap of the sweeps of a chunk, without an error.
    """

    block: int = 32
    threshold: float = 1e-3
    max_iterations: int = 32

    def __post_init__(self) -> None:
        for name in ("block", "max_iterations"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        object.__setattr__(self, "threshold", _bound("threshold", self.threshold))


@dataclass(frozen=True)
class Window:
    """A sliding window of tokens, accepted one by one (see `starflow.solver.loop`).

    Args:
        size: tokens of a clip in a call, of which each frame of a frame-local block takes a share; None takes the
            break-even of a call on this machine (see `break_even`), divided by the batch and by 2 with guidance; of a
            function (see `starflow.solve`) all tokens, or a frame where it can be evaluated window by window.
        tolerance: a token counts as settled when it moves by less, in units of its scale. With 0 the result is that of
            `Sequential` for any size.
        certificate: also measure the backward error.
    """

    size: int | None = None
    tolerance: float = 0.01
    certificate: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", _count("window size", self.size))
        object.__setattr__(self, "tolerance", _bound("tolerance", self.tolerance))
        check_flag("solver", "certificate", self.certificate)


def _count(name: str, value: object) -> int:
    """A number of tokens or sweeps."""
    whole = integer(value)
    if whole is None or not 1 <= whole <= _MOST:
        raise ValueError(f"solver: {name} is {shown(value)}, expected an integer from 1 to {_MOST}")
    return whole


def _bound(name: str, value: object) -> float:
    """A limit under which something counts as settled."""
    limit = number(value)
    if limit is None or not 0.0 <= limit < math.inf:
        raise ValueError(f"solver: {name} is {shown(value)}, expected a finite number >= 0")
    return float(limit)


Schedule = Sequential | Chunks | Window


SOLVER_FORMS = '"sequential", "chunks[:block[:threshold]]" or "window[:size[:tolerance]]"'


def parse_solver(text: str, *, certificate: bool = False) -> Schedule:
    """Reads the text of a solver option.

    Args:
        text: "sequential" (token by token), "chunks[:block[:threshold]]" (the published scheme) or
            "window[:size[:tolerance]]" (the default; a size of "auto" is measured on this machine).
        certificate: also measure the backward error.

    Returns:
        The schedule of the solver.

    Raises:
        ValueError: another text, a number out of range, or a certificate of chunks.
    """
    kind, *values = text.split(":")
    if kind not in ("sequential", "chunks", "window") or len(values) > (0 if kind == "sequential" else 2):
        raise ValueError(f"solver is {text!r}, expected {SOLVER_FORMS}")
    try:
        size = int(values[0]) if values and values[0] != "auto" else None
        stop = float(values[1]) if len(values) > 1 else None
    except ValueError:
        raise ValueError(f"solver is {text!r}, expected {SOLVER_FORMS} with an integer, then a number") from None
    if stop is not None and not 0.0 <= stop < math.inf:
        raise ValueError(f"solver is {text!r}, expected a number >= 0 at the end")
    if kind == "chunks":
        if certificate:
            raise ValueError(f'solver is {text!r}, expected "window" or "sequential" together with a certificate')
        chunks = Chunks() if size is None else Chunks(block=size)
        return chunks if stop is None else replace(chunks, threshold=stop)
    if kind == "sequential":
        # A window of one at tolerance 0 is the same computation, and measures its error.
        return Window(size=1, tolerance=0.0, certificate=True) if certificate else Sequential()
    window = Window(size=size, certificate=certificate)
    return window if stop is None else replace(window, tolerance=stop)


def as_schedule(who: str, value: object) -> Schedule:
    """A schedule, or what its text says; None is `Window()`.

    Args:
        who: begins the message of an error.
        value: as a caller gave it.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        return parse_solver(value)
    if value is not None and not isinstance(value, Schedule):
        raise ValueError(f"{who}: schedule is {shown(value)}, expected a Window, Chunks or Sequential, or a text")
    return Window() if value is None else value


def solver_text(schedule: Schedule) -> str:
    """The text that `parse_solver` reads as `schedule` (up to its certificate)."""
    if isinstance(schedule, Sequential) or schedule == Window(1, 0.0, certificate=True):
        return "sequential"
    if isinstance(schedule, Chunks):
        return f"chunks:{schedule.block}:{schedule.threshold:g}"
    return f"window:{'auto' if schedule.size is None else schedule.size}:{schedule.tolerance:g}"
