"""Numbers of any library, such as scalars of numpy, as Python's own, which json, yaml and native code take."""

from __future__ import annotations

import numbers

from starflow.messages import shown

__all__ = ["check_item", "check_seed", "integer", "number"]


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


def check_item(who: str, index: object, length: int, epoch: object, seed: object) -> None:
    """Holds the arguments of an item of a data set to what they are.

    Args:
        who: begins the message, such as the name of the set's class.
        index, epoch, seed: as of `starflow.data.ClipDataset.item`.
        length: items of an epoch.

    Raises:
        IndexError: the index is out of range.
        ValueError: an argument is no integer, or below 0.
    """
    place = integer(index)
    if place is None:
        raise ValueError(f"{who}: index is {shown(index)}, expected an integer")
    if not 0 <= place < length:
        raise IndexError(f"{who}: index is {place}, expected 0 to {length - 1}")
    check_seed(who, epoch, "epoch")
    check_seed(who, seed)


def check_seed(who: str, seed: object, name: str = "seed") -> None:
    """Raises ValueError unless a seed is an integer from 0 on."""
    whole = integer(seed)
    if whole is None or whole < 0:
        raise ValueError(f"{who}: {name} is {shown(seed)}, expected an integer >= 0")
