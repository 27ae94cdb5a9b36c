"""Numbers of any library, such as scalars of numpy, as Python's own, which json, yaml and native code take."""

from __future__ import annotations

import numbers

__all__ = ["integer", "number"]


def integer(value: object) -> int | None:
    """The integer that a value is; None for all else, 1.0 and True among it."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def number(value: object) -> int | float | None:
    """The real number that a value is; None for all else, text and True among it."""
    if isinstance(value, numbers.Integral):
        return integer(value)
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        # A fraction beyond all floating-point numbers.
        return None
