"""User errors in one form: the op, the argument, what was given and what was expected."""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

# Dtypes of the tensors that kernels take.
FLOATING: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, op: str, argument: str, got: object, *expected: object) -> None:
    """Raise the one sentence that the native library raises for the same mistake.

    Args:
        condition: what must hold.
        op: name of the op.
        argument: name of the argument at fault, with the property that is wrong ("shift has shape").
        got: what was given; turned into text only if it is shown, as torch.compile can write no shape that it keeps
            open.
        expected: what would have been right, in parts that are joined by spaces.

    Raises:
        RuntimeError: if ``condition`` is false; the type that torch's own ops raise.
    """
    if not condition:
        raise RuntimeError(f"{op}: {argument} {_text(got)}, expected {' '.join(_text(part) for part in expected)}")


class Joined(NamedTuple):
    """Parts of a message with nothing between them, put together only if it is shown."""

    parts: Sequence[object]


def _text(part: object) -> str:
    if isinstance(part, Joined):
        return "".join(_text(inner) for inner in part.parts)
    if isinstance(part, torch.dtype):
        return dtype_text(part)
    if isinstance(part, float):
        return f"{part:g}"
    return str(list(part)) if isinstance(part, torch.Size) else str(part)


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
    if tensor.dtype not in FLOATING:
        require(False, op, f"{name} has dtype", tensor.dtype, "float32, bfloat16, float16 or float64")


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a second tensor is on the device of the first."""
    require(tensor.device == like.device, op, f"{name} is on", tensor.device, like.device, f"like {like_name}")


def check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], like_name: str, like: Tensor
) -> None:
    """Check the dtype and the shape of a tensor, and that it is on the device of another one."""
    require(tensor.dtype == dtype, op, f"{name} has dtype", dtype_text(tensor.dtype), dtype_text(dtype))
    require(list(tensor.shape) == list(shape), op, f"{name} has shape", tensor.shape, list(shape))
    check_device(op, name, tensor, like_name, like)


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a second tensor has the dtype, shape and device of the first."""
    require(tensor.dtype == like.dtype, op, f"{name} has dtype", tensor.dtype, like.dtype, f"like {like_name}")
    require(tensor.shape == like.shape, op, f"{name} has shape", tensor.shape, like.shape, f"like {like_name}")
    check_device(op, name, tensor, like_name, like)


def check_own_memory(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor can be written: no two of its elements share memory."""
    own = "a tensor of its own (an expanded one cannot be written; use .clone())"
    axes = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    shared = any(stride == 0 for stride, _ in axes)
    if not any(isinstance(number, torch.SymInt) for axis in axes for number in axis):
        # From the smallest stride on: each step leads beyond what lies inside of it. A graph of open sizes leaves this
        # to the native op, since what is compared here would become a condition of the graph.
        reach = 0
        for stride, size in sorted(axes):
            shared = shared or stride <= reach
            reach += stride * (size - 1)
    require(not tensor.numel() or not shared, op, f"{name} has", "elements that share memory", own)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on the tensor's device; None without autocast and for float64."""
    device = tensor.device.type
    # The query raises for devices that autocast does not know, such as meta.
    if tensor.dtype == torch.float64 or not (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, on any device."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


# Types that stand for one of an annotation; those of traced graphs and of numpy too.
_STANDS_FOR: Final[dict[object, tuple[type, ...]]] = {
    bool: (bool, torch.SymBool),
    int: (int, torch.SymInt, numbers.Integral),
    float: (float, int, torch.SymFloat, torch.SymInt, numbers.Real),
}
_WORDS: Final[dict[type, str]] = {
    Tensor: "a tensor",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a name",
    tuple: "a tuple",
    types.NoneType: "None",
}


def _alternatives(annotation: object) -> tuple[Any, ...]:
    """The types of an annotation, as they are written."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _alternatives(part))
    if typing.get_origin(annotation) is typing.Literal:
        return (str,)
    return (typing.get_origin(annotation) or annotation,)


def types_of(function: Callable[..., Any]) -> tuple[tuple[type, ...], ...]:
    """Return the types that each parameter of a function may have, from its annotations.

    ``all(map(isinstance, arguments, types))`` tests them at a call; ``refuse_types`` finds the words.
    """
    hints = typing.get_type_hints(function)
    found = []
    for name in inspect.signature(function).parameters:
        kinds: list[type] = []
        for kind in _alternatives(hints[name]):
            kinds += _STANDS_FOR.get(kind, (kind,))
        # Abstract classes last: they take ten times as long to test, and seldom are what is given.
        found.append(tuple(sorted(dict.fromkeys(kinds), key=inspect.isabstract)))
    return tuple(found)


def refuse_types(op: str, function: Callable[..., Any], arguments: Sequence[object], prefix: str = "") -> NoReturn:
    """Say which argument of a call has a wrong type; ``function`` declares them.

    Raises:
        RuntimeError: always.
    """
    hints = typing.get_type_hints(function)
    for name, allowed, value in zip(inspect.signature(function).parameters, types_of(function), arguments, strict=True):
        if not isinstance(value, allowed):
            words = [_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in _alternatives(hints[name])]
            require(False, op, f"{prefix}{name} is", _described(value), " or ".join(words))
    raise AssertionError


def _described(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str):
        return f'"{value}"'
    return f"a {type(value).__name__}" if not isinstance(value, Tensor) else "a tensor"


def _parts_of(kind: Callable[..., Any]) -> tuple[int, tuple[str, ...]]:
    """How many parts a record must have, and the names of all."""
    parameters = inspect.signature(kind).parameters.values()
    needed = sum(parameter.default is parameter.empty for parameter in parameters)
    return needed, tuple(parameter.name for parameter in parameters)


_kept_parts_of: Final = functools.cache(_parts_of)


Record = TypeVar("Record")


def as_record(
    op: str, name: str, value: Record | tuple[Any, ...], kind: Callable[..., Record], allowed: tuple[Any, ...] = ()
) -> Record:
    """Return the named record that an op takes, of a plain tuple too; ``allowed`` are the types of a named tuple.

    Raises:
        RuntimeError: if it has too many or too few parts, or one of a wrong type.
    """
    if type(value) is tuple:
        # torch.compile looks through a cache, and warns.
        needed, parts = (_parts_of if torch.compiler.is_compiling() else _kept_parts_of)(kind)
        if not needed <= len(value) <= len(parts):
            require(False, op, f"{name} has", f"{len(value)} parts", f"({', '.join(parts)})")
        value = kind(*value)
    if allowed and not all(map(isinstance, typing.cast("tuple[Any, ...]", value), allowed)):
        refuse_types(op, kind, typing.cast("tuple[Any, ...]", value), f"{name}.")
    return typing.cast(Record, value)


def require_first_order(op: str) -> None:
    """Refuse second-order gradients, which the native gradient would silently leave out."""
    require(
        not torch.is_grad_enabled(),
        op,
        "create_graph is",
        "True",
        "False: second-order gradients exist in starflow_ext.reference_mode() only",
    )
