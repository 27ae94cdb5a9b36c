"""Which variant of an op would run, and why the others would not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from starflow_ext import ops
from starflow_ext._check import require
from starflow_ext._load import native
from starflow_ext._mode import why_reference
from starflow_ext._spec import tensors


@dataclass(frozen=True)
class Explanation:
    """Which variant and kernel would run a call.

    Attributes:
        op: name of the op.
        runs: the variant that would run.
        refused: every other variant, with the reason.
        kernel: for an op with several CUDA kernels, the one that would run, and why; else "".
    """

    op: str
    runs: str
    refused: Mapping[str, str]
    kernel: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op} runs as {self.runs}" + (f": {self.kernel}" if self.kernel else "")]
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

    Examples:
        >>> import torch, starflow_ext
        >>> record = starflow_ext.explain("affine_inverse", torch.zeros(2, 3), torch.zeros(2, 6))
        >>> record.op, record.runs in {"scalar", "avx2", "avx512"}
        ('affine_inverse', True)
    """
    require(op in ops.__all__, "explain", "op is", f'"{op}"', f"one of {', '.join(ops.__all__)}")
    spec = ops.SPECS.get(op)
    if spec is None:
        given = inspect.signature(getattr(ops, op)).bind(*args, **kwargs).arguments
        return Explanation(op, *_choose(ops.LOOPS[op], given["weights"].device, lambda variant: ""))
    arguments = spec.arguments(*args, **kwargs)
    spec.check(**arguments)
    device = tensors(tuple(arguments.values()))[0].device
    runs, refused = _choose(spec.variants, device, partial(spec.refuses, **arguments))
    kernel = spec.kernel(**arguments) if spec.kernel is not None and runs == "cuda" else ""
    return Explanation(op, runs, refused, kernel)


def _choose(
    variants: tuple[str, ...], device: torch.device, refuses: Callable[[str], str]
) -> tuple[str, dict[str, str]]:
    require(device.type in ("cpu", "cuda"), "explain", "data is on", device, "cpu or cuda")
    with_cuda = bool(native.build_info()["cuda"])
    selected = native.selected_isa()
    order = list(native.isa_levels())
    forced = why_reference()
    refused: dict[str, str] = {}
    candidates = []  # in rising order of level: the last candidate runs
    for variant, missing in {"cuda": "", **native.isa_levels()}.items():
        reason = missing
        if forced:
            reason = forced
        elif variant not in variants:
            reason = f"this op has no {'CUDA kernel' if variant == 'cuda' else f'{variant} variant'} yet"
        elif (variant == "cuda") != (device.type == "cuda"):
            reason = f"data is on {device}" if with_cuda or variant != "cuda" else "this build has no CUDA kernels"
        elif variant == "cuda":
            require(with_cuda, "explain", "data is on", device, "cpu: this build has no CUDA kernels")
        elif not reason and order.index(variant) > order.index(selected):
            reason = f"{selected} is asked for"
        reason = reason or refuses(variant)
        if reason:
            refused[variant] = reason
        else:
            candidates.append(variant)
    if not candidates:
        return "torch", refused
    runs = candidates[-1]
    refused |= dict.fromkeys(candidates[:-1], f"{runs} is faster")
    why = "starflow_ext.reference_mode() is off"
    return runs, {name: refused[name] for name in ("cuda", *order) if name != runs} | {"torch": why}


def support_table() -> str:
    """Write what each op takes as a Markdown table, from the records that its tests read."""
    lines = [
        "| op | data | CPU | CUDA | gradient | largest error in float32 |",
        "|---|---|---|---|---|---|",
    ]
    for name in ops.__all__:
        spec = ops.SPECS.get(name)
        if spec is None:
            levels, cuda = _places(ops.LOOPS[name])
            lines.append(
                f"| `{name}` | float32 | {levels} | {cuda} | no | by storage, see tests/ops/test_jacobi_sweep.py |"
            )
            continue
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(d[0] for d in spec.dtypes))
        levels, cuda = _places(spec.variants)
        gradient = "first order" if spec.differentiable else "no"
        relative, absolute = spec.bounds[torch.float32]
        lines.append(f"| `{name}` | {dtypes} | {levels} | {cuda} | {gradient} | {relative:g} relative + {absolute:g} |")
    return "\n".join(lines)


def _places(variants: tuple[str, ...]) -> tuple[str, str]:
    """Write the CPU levels of an op, and whether a kernel or the reference runs on CUDA."""
    levels = ", ".join(variant for variant in variants if variant != "cuda")
    return levels, "sm_80 and later" if "cuda" in variants else "plain torch"
