"""Which implementation an op runs: the native one, or its plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from starflow_ext._check import require


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


# Dynamo traces a transform with its interpreter in place, and guards the graph on it: the answer is that of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def why_reference() -> str:
    """Say why ops run their references now, or "" where they do not."""
    if _mode.reference:
        return "starflow_ext.reference_mode() is on"
    if _transformed():
        return "a transform of torch.func or forward-mode differentiation is active"
    return ""


def in_reference_mode() -> bool:
    """Tell whether ops run their references now.

    In ``reference_mode()``; and under the transforms of torch.func and in forward mode, of which the native ops have no
    rule: torch's own operators have one for each, and nest.
    """
    return _mode.reference or _transformed()


def runs_in_torch(data: Tensor) -> bool:
    """Tell whether an op without a CUDA kernel runs its reference on this tensor."""
    return in_reference_mode() or data.is_cuda


def require_no_transform(op: str, writes: str) -> None:
    """Refuse the transforms of torch.func and forward mode for a call that overwrites its arguments."""
    if _transformed():
        require(False, op, "a transform of torch.func or forward-mode differentiation is", "active", f"none: {writes}")
