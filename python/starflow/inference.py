"""Inference mode inside, ordinary tensors outside.

Inference mode is torch's fastest: its tensors count no versions. They can never take part in autograd, though, which
somebody who trains on samples finds out only when a backward pass fails; so what a public call returns is copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_inference_mode(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs a function in inference mode; the tensors that it returns can take part in autograd.

    Inside a caller's own inference mode nothing is copied.

    Args:
        call: returns a tensor, or a dataclass, tuple or list of tensors and other values.
    """

    @functools.wraps(call)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            return call(*arguments, **options)
        with torch.inference_mode():
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
