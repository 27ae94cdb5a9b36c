"""Stamp: whether tensors still hold what they held when something was made from them, such as packed weights.

Address and version counter do not tell: torch's fused optimisers, writes through ``.data``, numpy or a mapped file
change values without counting a version. What is in memory does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from starflow_ext._load import native

# Lines of 64 bytes that a glance at a tensor reads: they take some 2 us, a product with one row of 768 x 3072 300 us.
_GLANCE: Final = 256
# Odd, for `_on_device`: 2^64 / golden ratio, and the square of it.
_FACTORS: Final = (0x9E3779B97F4A7C15 - (1 << 64), 0xF1BBCDCBFA53E0A9 - (1 << 64))
_CHUNK: Final = 1 << 24
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN: Final = (Tensor, torch.nn.Parameter)
_is_transformed: Final[Callable[[Tensor], bool]] = torch._C._functorch.is_functorch_wrapped_tensor

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def fingerprint(tensors: Sequence[Tensor]) -> int | None:
    """What tensors hold, as a number of 64 bits: of other contents another one, up to chance.

    Args:
        tensors: strided; what lies on one device in one process is comparable with itself later.

    Returns:
        The number; None where there is nothing to read, as of meta and fake tensors.
    """
    here: list[tuple[int, int]] = []
    elsewhere: list[Tensor] = []
    copies: list[Tensor] = []  # They live until their memory is read.
    for tensor in tensors:
        if not is_readable(tensor):
            return None
        dense = tensor
        if not tensor.is_contiguous():
            dense = tensor.detach().contiguous()
            copies.append(dense)
        if dense.is_cpu:
            here.append((dense.data_ptr(), dense.nbytes))
        else:
            elsewhere.append(dense)
    value: int = native.fingerprint(here, 0)
    for tensor in elsewhere:
        value = hash((value, str(tensor.device), _on_device(tensor)))
    return value


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor is memory that can be read: not fake, of another class, or a transform's (vmap, grad)."""
    return type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda) and not _is_transformed(tensor)


@torch.no_grad()
def _on_device(tensor: Tensor) -> int:
    """The sum of the words of a contiguous tensor, each times a number of its place, modulo 2^64."""
    words = tensor.flatten().view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + len(part), device=tensor.device) * _FACTORS[0]
        total += (part * ((place ^ (place >> 29)) * _FACTORS[1] | 1)).sum()
    return int(total)


class Stamp:
    """What a tensor held when this was made; the tensor itself is not kept."""

    def __init__(self, tensor: Tensor) -> None:
        self._content = fingerprint([tensor])
        self._seen = _glance(tensor)

    def holds(self, tensor: Tensor, *, exact: bool = False) -> bool:
        """Whether the tensor holds what it held.

        A glance at it comes first: its version, a few lines of its values, and whether an optimiser made a step since.
        Only what looks another at a glance is read whole, or all of it where ``exact`` is True: without it a write to
        few values that counts no version can be missed.
        """
        seen = _glance(tensor)
        if seen == self._seen and not exact:
            return True
        if seen[:3] != self._seen[:3]:
            return False
        content = fingerprint([tensor])
        if content != self._content or (content is None and seen != self._seen):
            return False
        self._seen = seen
        return True


def _glance(tensor: Tensor) -> tuple[Any, ...]:
    """What is quick to see of a tensor: dtype, shape and device first, which must stay."""
    version = None if tensor.is_inference() else tensor._version
    lines = None
    if tensor.is_cpu and is_readable(tensor) and tensor.is_contiguous():
        lines = native.fingerprint([(tensor.data_ptr(), tensor.nbytes)], _GLANCE)
    return tensor.dtype, tensor.shape, tensor.device, version, _steps, lines
