"""Modes of torch: what is computed does not depend on those that a caller happens to be in.

Autocast rounds to half types whatever is computed inside of it, and a default dtype or device takes hold of every
tensor that names none. A caller means his own modules by them; samples, scores and trained weights would change by a
per cent without a word. So public calls leave autocast, and those that make weights all of these modes.

Inference mode inside, ordinary tensors outside.

Inference mode is torch's fastest: its tensors count no versions. They can never take part in autograd, though, which
somebody who trains on samples finds out only when a backward pass fails; so what a public call returns is copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leaves the caller's autocast for the block; as a decorator for the function."""
    with ExitStack() as left:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                left.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """Torch as in a new process: no autocast, gradients, float32 and the CPU as defaults. For what makes weights.

    The default dtype is one for all threads of a process, so it is touched only where it is another one.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as left:
        left.enter_context(without_autocast())
        left.enter_context(torch.inference_mode(False))
        left.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            left.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            left.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def in_inference_mode(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs a function in inference mode and without autocast; the tensors that it returns can take part in autograd.

    Inside a caller's own inference mode nothing is copied.

    Args:
        call: returns a tensor, or a dataclass, tuple or list of tensors and other values.
    """

    @functools.wraps(call)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with without_autocast():
                return call(*arguments, **options)
        with without_autocast(), torch.inference_mode():
            result = call(*arguments, **options)
        return _ordinary(result)

    return run


def _ordinary(value: Result) -> Result:
    made: object = value
    if isinstance(value, Tensor):
        made = value.clone() if value.is_inference() else value
    elif isinstance(value, tuple | list):
        made = type(value)(_ordinary(item) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: _ordinary(item) for name, item in old.items()}
        if any(new[name] is not item for name, item in old.items()):
            made = dataclasses.replace(value, **new)
    return made  # type: ignore[return-value]
