"""Arguments of public calls that are of another type than they should be, told in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from starflow.messages import shown

__all__ = ["check_call", "check_config", "check_flag", "check_mapping", "check_tensor", "check_text", "check_texts"]


def check_config(who: str, value: object, kind: type[object]) -> None:
    """Raises ValueError unless a value is a configuration of a kind, such as `RunConfig`.

    Args:
        who: begins the message, such as the name of the function.
        value: what was given as `config`.
        kind: a class of `starflow.config`.
    """
    if not isinstance(value, kind):
        raise ValueError(
            f"{who}: config is a {type(value).__name__}, expected a {kind.__name__} "
            "(starflow.config.from_mapping makes one of a mapping)"
        )


def check_mapping(who: str, value: object) -> None:
    """Raises ValueError unless the options of a part, a codec or a text encoder, are a mapping by name."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{who}: config is {shown(value)}, expected a mapping of its options such as {{'kind': ...}}")


def check_call(who: str, name: str, value: object, *, optional: bool = True) -> None:
    """Raises ValueError unless a value can be called, or with `optional` is None: before hours of work, not after."""
    if not callable(value) and not (optional and value is None):
        raise ValueError(f"{who}: {name} is {shown(value)}, expected a function{' or None' if optional else ''}")


def check_flag(who: str, name: str, value: object) -> None:
    """Raises ValueError unless a value is True or False: "no" would be yes."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{who}: {name} is {shown(value)}, expected True or False")


def check_text(who: str, name: str, value: object) -> None:
    """Raises ValueError unless a value is a text."""
    if not isinstance(value, str):
        raise ValueError(f"{who}: {name} is {shown(value)}, expected a text")


def check_texts(who: str, name: str, values: object) -> None:
    """Raises ValueError unless a value is a sequence of texts; one text, whose letters would be read, is none.

    A set has no order, and a generator is empty the second time.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{who}: {name} is {shown(values)}, expected a list of texts")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{who}: {name}[{index}] is {shown(value)}, expected a text")


def check_tensor(who: str, name: str, value: object) -> None:
    """Raises ValueError unless a value is a tensor; arrays of numpy have other methods under the same names."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{who}: {name} is a {type(value).__name__}, expected a tensor (torch.as_tensor)")
