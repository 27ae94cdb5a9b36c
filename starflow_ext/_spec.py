"""What each op promises, in one record that tests, benchmarks and the support table read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """Largest distance from the float64 reference: ``absolute + relative * |reference|``."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Attributes:
        label: what the call shows.
        args: positional arguments; tensors are fresh.
        kwargs: keyword arguments.
    """

    label: str
    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """One op.

    Attributes:
        name: name of the op, of its file and of its schema.
        call: the public function.
        reference: the same in plain torch, arguments in the schema's order.
        check: raises what the op raises for wrong arguments; arguments in the schema's order.
        samples: calls with data of (dtype, raw dtype) on the CPU, drawn from a generator.
        bounds: per storage dtype of the data.
        differentiable: whether first-order gradients exist.
        mutates: positions of arguments that are overwritten.
        bytes_moved: bytes that a call must move at least, for the share of the memory's bandwidth.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    check: Callable[..., None]
    samples: Callable[[torch.dtype, torch.dtype, torch.Generator], Iterator[Sample]]
    bounds: Mapping[torch.dtype, Bound]
    differentiable: bool
    mutates: tuple[int, ...]
    bytes_moved: Callable[[Sample], int]
