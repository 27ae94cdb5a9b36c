"""Schedules and their text form: there and back, and the sentence for what is neither."""

from __future__ import annotations

import pytest

from starflow import Chunks, Sequential, Window
from starflow.solver import parse_solver, solver_text


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("sequential", Sequential()),
        ("chunks", Chunks()),
        ("chunks:8", Chunks(block=8)),
        ("chunks:8:1e-5", Chunks(block=8, threshold=1e-5)),
        ("window", Window()),
        ("window:auto:0.1", Window(tolerance=0.1)),
        ("window:16", Window(size=16)),
        ("window:16:0", Window(size=16, tolerance=0.0)),
    ],
)
def test_solver_text(text: str, schedule: object) -> None:
    assert parse_solver(text) == schedule
    assert parse_solver(solver_text(parse_solver(text))) == schedule


@pytest.mark.parametrize(
    "text, message",
    [
        ("windows", "solver is 'windows', expected \"sequential\""),
        ("sequential:3", "solver is 'sequential:3', expected"),
        ("window:x", "an integer, then a number"),
        ("window:8:0.1:2", "solver is 'window:8:0.1:2'"),
        ("window:8:nan", "a number >= 0"),
        ("window:8:-1", "a number >= 0"),
        ("window:0", "window size is 0"),
        ("window:99999999999", "window size is 99999999999, expected an integer from 1 to 2147483647"),
        ("chunks:0", "block is 0"),
    ],
)
def test_wrong_solver_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="solver") as caught:
        parse_solver(text)
    assert message in str(caught.value)


def test_certificate_of_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match='expected "window" or "sequential"'):
        parse_solver("chunks", certificate=True)
