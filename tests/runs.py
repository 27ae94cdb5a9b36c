"""Fixture: the smallest run that has every part. A wing's conftest imports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from starflow.config import RunConfig

Tiny = Callable[..., RunConfig]


@pytest.fixture
def tiny() -> Tiny:
    """Makes the packaged config `tiny` with other training options; `flow` and `data` take theirs as a dict."""

    def make(
        flow: dict[str, Any] | None = None, data: dict[str, Any] | None = None, text: Any = None, **train: Any
    ) -> RunConfig:
        config = RunConfig.load("tiny")
        return dataclasses.replace(
            config,
            flow=dataclasses.replace(config.flow, **(flow or {})),
            data=dataclasses.replace(config.data, **(data or {})),
            text=config.text if text is None else text,
            train=dataclasses.replace(config.train, **{"steps": 6, "batch_size": 4, **train}),
        )

    return make
