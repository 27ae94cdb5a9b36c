from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from starflow_ext._load import native

LEVELS = native.isa_levels()


@pytest.fixture(params=list(LEVELS))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each level that this machine has; the others are skipped with the reason."""
    level = str(request.param)
    if LEVELS[level]:
        pytest.skip(f"{level}: {LEVELS[level]}")
    native.set_isa(level)
    yield level
    native.set_isa("")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
