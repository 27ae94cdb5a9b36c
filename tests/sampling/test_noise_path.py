"""The way of a sample's noise through Python, from where it is drawn to the native solve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from starflow import noise
from starflow.sampling import Pipeline
from starflow_ext import ops

MOST = 9


class Noise(torch.Tensor):
    """Noise, and whatever is made of it by torch's functions."""


@contextmanager
def modules_entered() -> Iterator[list[str]]:
    """Modules of starflow, in order, whose functions are called with `Noise` as an argument or return it."""
    found: list[str] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("starflow.") and name not in found and event in ("call", "return"):
            seen = [*frame.f_locals.values(), argument] if event == "return" else list(frame.f_locals.values())
            if any(isinstance(value, Noise) for value in seen):
                found.append(name)

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_noise_passes_few_modules(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = noise.draw

    class SolvedError(Exception):
        """The noise has arrived."""

    def solve(*_: object, **__: object) -> None:
        raise SolvedError

    monkeypatch.setattr(noise, "draw", lambda *args, **how: draw(*args, **how).as_subclass(Noise))
    monkeypatch.setattr(ops, "jacobi_solve", solve)
    with modules_entered() as found, pytest.raises(SolvedError):
        pipeline.sample("a three moving up", solver="window:8:0.01")
    assert found[0] == "starflow.sampling.session"
    assert found[-1] == "starflow.solver.native"
    assert len(found) + 1 <= MOST, found
