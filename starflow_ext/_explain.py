"""Which variant of an op would run, and why the others would not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._check import require
from starflow_ext._load import native
from starflow_ext._mode import in_reference_mode


@dataclass(frozen=True)
class Explanation:
    """What would run a call.

    Attributes:
        op: name of the op.
        runs: the variant that would run.
        refused: every other variant, with the reason.
    """

    op: str
    runs: str
    refused: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} runs as {self.runs}"]
        lines += [f"  not {variant}: {reason}" for variant, reason in self.refused.items()]
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which variant of an op would run for these arguments; nothing is computed.

    Args:
        op: name of an op of ``starflow_ext.ops``.
        args: the op's positional arguments.
        kwargs: the op's keyword arguments.

    Returns:
        The variant that would run, and for each other one why it would not.

    Raises:
        RuntimeError: if there is no such op, or for arguments that the op itself would refuse.

    Example:
        >>> import torch, starflow_ext
        >>> record = starflow_ext.explain("affine_inverse", torch.zeros(2, 3), torch.zeros(2, 6))
        >>> record.op, record.runs in {"scalar", "avx2", "avx512"}
        ('affine_inverse', True)
    """
    require(op in ops.__all__, "explain", "op is", f'"{op}"', f"one of {', '.join(ops.__all__)}")
    bound = inspect.signature(getattr(ops, op)).bind(*args, **kwargs)
    bound.apply_defaults()
    spec = ops.SPECS.get(op)
    if spec is None:
        return Explanation(op, "torch", {"native": "this op has no native kernel yet"})
    values = tuple(bound.arguments.values())
    spec.check(*values)
    device = next(value.device for value in values if isinstance(value, Tensor))
    runs, refused = _choose(device)
    return Explanation(op, runs, refused)


def _choose(device: torch.device) -> tuple[str, dict[str, str]]:
    selected = native.selected_isa()
    built_with_cuda = bool(native.build_info()["cuda"])
    levels: Mapping[str, str] = native.isa_levels()
    refused: dict[str, str] = {}
    if in_reference_mode():
        runs = "torch"
        refused = dict.fromkeys(("cuda", *levels), "starflow_ext.reference_mode() is on")
    elif device.type == "cuda":
        require(built_with_cuda, "explain", "data is on", device, "cpu: this build has no CUDA kernels")
        runs = "cuda"
        refused = dict.fromkeys(levels, f"data is on {device}")
    else:
        require(device.type == "cpu", "explain", "data is on", device, "cpu or cuda")
        runs = selected
        refused["cuda"] = "data is on cpu" if built_with_cuda else "this build has no CUDA kernels"
        order = list(levels)
        for level, reason in levels.items():
            if level != selected:
                above = order.index(level) > order.index(selected)
                refused[level] = reason or (f"{selected} is asked for" if above else f"{selected} is faster")
    if runs != "torch":
        refused["torch"] = "starflow_ext.reference_mode() is off"
    return runs, refused


def support_table() -> str:
    """Write what each op takes as a Markdown table, from the records that its tests read."""
    levels = ", ".join(native.isa_levels())
    lines = [
        "| op | data | CPU | CUDA | gradient | largest error in float32 |",
        "|---|---|---|---|---|---|",
    ]
    for name in ops.__all__:
        spec = ops.SPECS.get(name)
        if spec is None:
            lines.append(f"| `{name}` | floating | plain torch | plain torch | torch's own | |")
            continue
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in spec.bounds)
        relative, absolute = spec.bounds[torch.float32]
        gradient = "first order" if spec.differentiable else "no"
        lines.append(
            f"| `{name}` | {dtypes} | {levels} | sm_80 and later | {gradient} | {relative:g} relative + {absolute:g} |"
        )
    return "\n".join(lines)
