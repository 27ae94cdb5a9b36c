from __future__ import annotations

import pytest

from ..runs import tiny

__all__ = ["tiny"]


@pytest.fixture(autouse=True, scope="module")
def settled(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""
