"""What each op promises, in one record that tests, benchmarks, ``explain`` and the support table read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from starflow_ext._load import native

# Dtypes of one call: that of the data, then that of each argument whose dtype may differ (raw, weight, cache).
Dtypes = tuple[torch.dtype, ...]

# VARIANTS are those of an op whose kernels are in <op>_cpu.cpp, DOT_VARIANTS those of an op with <op>_dot.cpp.
VARIANTS: Final = (*native.kernel_levels()["cpu"], "cuda")
DOT_VARIANTS: Final = (*native.kernel_levels()["dot"], "cuda")


class Bound(NamedTuple):
    """Largest distance from the float64 reference: ``absolute + relative * |reference|``."""

    relative: float
    absolute: float


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``change`` to every tensor of an argument or result: a tensor, a (named) tuple of such, or no tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [map_tensors(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an argument or result, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return tuple(found)


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Attributes:
        label: what the call tests.
        arguments: arguments by name; those left out have their defaults. Tensors are fresh, may be absent (None) and
            may lie in tuples.
        bounds: bounds in place of the op's, for a call that asks for another precision.
    """

    label: str
    arguments: Mapping[str, Any]
    bounds: Mapping[torch.dtype, Bound] | None = None

    def map(self, change: Callable[[Tensor], Tensor], *, but: tuple[str, ...] = ()) -> Sample:
        """Return the call with every tensor changed, except those of the arguments ``but``."""
        changed = {name: value if name in but else map_tensors(change, value) for name, value in self.arguments.items()}
        return Sample(self.label, changed, self.bounds)


@dataclass(frozen=True)
class Spec:
    """One op. Arguments are those of the public function, known by their names.

    Attributes:
        name: name of the op, of its file and of its schema.
        call: the public function.
        reference: the op in plain torch; takes every argument of ``call`` by name, defaults too.
        check: raises what the op raises for wrong arguments; takes the arguments of ``reference``.
        dtypes: combinations that the op takes; one of float32 alone, and one of float64 alone for gradients.
        samples: calls on the CPU with one combination of dtypes, drawn from a generator. The first shows the op as it
            is mostly called; one is labelled "large": several grains of work, batch (at least 6) in front.
        bounds: bounds of results and gradients, by the dtype that they are stored in; dtypes without a bound are exact.
        differentiable: arguments that have first-order gradients, in calls that overwrite nothing.
        autocast: whether operands are rounded to autocast's dtype under autocast, as by torch's own op.
        mutates: arguments that are overwritten.
        shared: arguments whose tensors do not have the batch in front.
        variants: variants of the op, from ``VARIANTS`` or further CPU levels, in rising order. Without "cuda", tensors
            on a CUDA device run the reference.
        refuses: takes a variant, then every argument of ``call`` by name; returns why that variant would not take the
            call, or "".
        lower: takes every argument of ``call`` by name; returns the native operator and its arguments; by default the
            operator of the op's name and the arguments in order.
        kernel: takes every argument of ``call`` by name, on a CUDA device; returns which of several kernels would run
            and why, or "" where there is no such device.
        on_cuda: turns a call on the CPU into the same call on a CUDA device; by default it moves every tensor.
        cases: calls that the benchmarks time, by name.
        bytes_moved: bytes that a call must move at least; by default every argument and every result once.
        operations: multiplications and additions of a call, for an op whose ceiling is arithmetic.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    check: Callable[..., None]
    dtypes: tuple[Dtypes, ...]
    samples: Callable[[Dtypes, torch.Generator], Iterator[Sample]]
    bounds: Mapping[torch.dtype, Bound]
    differentiable: tuple[str, ...] = ()
    autocast: bool = False
    mutates: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    variants: tuple[str, ...] = VARIANTS
    refuses: Callable[..., str] = lambda variant, **arguments: ""
    lower: Callable[..., tuple[Any, tuple[Any, ...]]] | None = None
    kernel: Callable[..., str] | None = None
    on_cuda: Callable[[Sample], Sample] = lambda sample: sample.map(Tensor.cuda)
    cases: Mapping[str, Callable[[torch.Generator], Sample]] = field(default_factory=dict)
    bytes_moved: Callable[[Sample], int] | None = None
    operations: Callable[[Sample], int] | None = None

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return every argument of ``call`` by name, in order, with its defaults."""
        bound = inspect.signature(self.call).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def lowered(self, sample: Sample) -> tuple[Any, tuple[Any, ...]]:
        """Return the native operator of a call and its arguments."""
        arguments = self.arguments(**sample.arguments)
        if self.lower is not None:
            return self.lower(**arguments)
        return getattr(torch.ops.starflow_ext, self.name).default, tuple(arguments.values())
