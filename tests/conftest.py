"""For every test: the checkout, what was built, and its tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as those of the tests are faster on one thread, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
