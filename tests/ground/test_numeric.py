"""Numbers of any library as Python's own."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from starflow.numeric import check_item, integer, number


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


def test_items_of_data_sets_are_asked_for_by_integers() -> None:
    check_item("Set", np.int64(2), 3, 0, 5)
    for place, epoch, seed, error in (
        (-1, 0, 0, "index is -1, expected 0 to 2"),
        (3, 0, 0, "index is 3, expected 0 to 2"),
        (1.0, 0, 0, "index is 1.0, expected an integer"),
        (0, -1, 0, "epoch is -1, expected an integer >= 0"),
        (0, 0, -1, "seed is -1, expected an integer >= 0"),
        (0, 0, 1.5, "seed is 1.5, expected an integer >= 0"),
    ):
        with pytest.raises((IndexError, ValueError), match=f"^Set: {error}$"):
            check_item("Set", place, 3, epoch, seed)
