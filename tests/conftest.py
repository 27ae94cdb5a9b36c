"""For every test: the checkout, what was built, and its tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from starflow_ext._load import library_path

from .tools import run_tool


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def library() -> Path:
    return library_path()


@pytest.fixture(scope="session")
def tool() -> Callable[..., list[str]]:
    return run_tool
