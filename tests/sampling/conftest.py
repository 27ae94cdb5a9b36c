from __future__ import annotations

import pytest
import torch

from ..pipelines import build, configure, model, paired, pipeline

__all__ = ["build", "configure", "model", "paired", "pipeline"]


@pytest.fixture(autouse=True, scope="module")
def settled(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
