"""Which implementation an op runs: the native one, or its plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class _Mode:
    reference = False


_mode = _Mode()


@contextmanager
def reference_mode() -> Iterator[None]:
    """Run every op of ``starflow_ext.ops`` by its plain-torch reference.

    Works as a context manager and as a decorator, nests, and holds for the whole process: an op called by another
    thread meanwhile runs its reference too. For debugging and for tests of parity, not for speed.
    """
    before = _mode.reference
    _mode.reference = True
    try:
        yield
    finally:
        _mode.reference = before


def in_reference_mode() -> bool:
    """Tell whether ops run their references now."""
    return _mode.reference


def runs_in_torch(data: Tensor) -> bool:
    """Tell whether an op without a CUDA kernel runs its reference on this tensor."""
    return _mode.reference or data.is_cuda
