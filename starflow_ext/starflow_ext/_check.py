"""User errors in one form: the op, the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# Dtypes of the tensors that kernels take.
FLOATING: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, op: str, argument: str, got: object, expected: object) -> None:
    """Raise the one sentence that the native library raises for the same mistake.

    Args:
        condition: what must hold.
        op: name of the op.
        argument: name of the argument at fault, with the property that is wrong ("shift has shape").
        got: what was given.
        expected: what would have been right.

    Raises:
        RuntimeError: if ``condition`` is false; the type that torch's own ops raise.
    """
    if not condition:
        raise RuntimeError(f"{op}: {argument} {got}, expected {expected}")


def shape_text(shape: torch.Size | list[int]) -> str:
    """Write a shape as ``[2, 7]``."""
    return str(list(shape))


def dtype_text(dtype: torch.dtype) -> str:
    """Write a dtype as ``float32``."""
    return str(dtype).removeprefix("torch.")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays; every other storage dtype is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor has one of the dtypes that kernels take."""
    known = "float32, bfloat16, float16 or float64"
    require(tensor.dtype in FLOATING, op, f"{name} has dtype", dtype_text(tensor.dtype), known)


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a second tensor is on the device of the first."""
    require(tensor.device == like.device, op, f"{name} is on", tensor.device, f"{like.device} like {like_name}")


def check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], like_name: str, like: Tensor
) -> None:
    """Check the dtype and the shape of a tensor, and that it is on the device of another one."""
    require(tensor.dtype == dtype, op, f"{name} has dtype", dtype_text(tensor.dtype), dtype_text(dtype))
    require(list(tensor.shape) == list(shape), op, f"{name} has shape", shape_text(tensor.shape), list(shape))
    check_device(op, name, tensor, like_name, like)


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a second tensor has the dtype, shape and device of the first."""
    got, expected = dtype_text(tensor.dtype), dtype_text(like.dtype)
    require(got == expected, op, f"{name} has dtype", got, f"{expected} like {like_name}")
    shape = shape_text(like.shape)
    require(tensor.shape == like.shape, op, f"{name} has shape", shape_text(tensor.shape), f"{shape} like {like_name}")
    check_device(op, name, tensor, like_name, like)


def check_own_memory(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor can be written: no two of its elements share memory."""
    own = "a tensor of its own (an expanded one cannot be written; use .clone())"
    shared = any(stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    require(not shared, op, f"{name} has", "elements that share memory", own)


def require_first_order(op: str) -> None:
    """Refuse second-order gradients, which the native gradient would silently leave out."""
    require(
        not torch.is_grad_enabled(),
        op,
        "create_graph is",
        "True",
        "False: second-order gradients exist in starflow_ext.reference_mode() only",
    )
