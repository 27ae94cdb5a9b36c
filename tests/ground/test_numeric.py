"""Numbers of any library as Python's own."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from starflow.numeric import integer, number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_are_integers_and_numbers(value: object) -> None:
    assert (integer(value), number(value)) == (3, 3)
    assert type(integer(value)) is type(number(value)) is int


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_are_no_integers(value: object) -> None:
    assert (integer(value), number(value)) == (None, 0.5)
    assert type(number(value)) is float


@pytest.mark.parametrize(
    "value",
    [True, np.True_, "1", b"1", None, 1j, [1], np.array([1]), torch.tensor(1), Decimal(1), Fraction(10**400)],
)
def test_all_else_is_none(value: object) -> None:
    assert integer(value) is number(value) is None
