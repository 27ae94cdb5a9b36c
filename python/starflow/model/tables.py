"""Tables that are kept for the process: positions, orders. What is kept never depends on who asked first.

A tensor is made as torch's mode says: of the class of a tracer, without memory under `FakeTensorMode` or the device
meta, on the default device. One that is kept for all later callers must be made outside of all that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")


def kept_tables(most: int) -> Callable[[Callable[Arguments, Table]], Callable[Arguments, Table]]:
    """Keeps the last results of a function that makes tensors from plain values.

    They are made on the CPU, and outside inference mode, so that they can take part in autograd. A call that is traced,
    or under a mode that takes no ordinary tensors, gets tensors of its own, which are not kept.

    Args:
        most: results that are kept. The function names the dtype of everything it makes, and its results are shared:
            nobody may write to them.
    """

    def keep(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
        @functools.lru_cache(maxsize=most)
        def kept(*arguments: Arguments.args, **options: Arguments.kwargs) -> Table:
            with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
                return make(*arguments, **options)

        @functools.wraps(make)
        def table(*arguments: Arguments.args, **options: Arguments.kwargs) -> Table:
            if torch.compiler.is_compiling() or not _takes_ordinary_tensors():
                return make(*arguments, **options)
            return kept(*arguments, **options)  # type: ignore[arg-type]

        return table

    return keep


def _takes_ordinary_tensors() -> bool:
    modes = _get_current_dispatch_mode_stack()
    return all(isinstance(mode, FakeTensorMode) and mode.allow_non_fake_inputs for mode in modes)
