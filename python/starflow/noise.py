"""Random numbers by position: what is drawn for a sample, a frame or a training step depends on nothing else.

Every stream is a counter-based generator whose key and counter spell out what it is for, so nothing has to be carried
from one draw to the next: a sample does not depend on its batch, a clip not on its length, and a resumed run sees the
noise that the killed one would have seen.

Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from starflow.messages import shown
from starflow.numeric import integer

Purpose = Literal["sample", "train", "posterior", "drop", "choose"]

# The last word of the counter: streams for different purposes never meet. Never renumber, it would change every seed.
_PURPOSES: dict[Purpose, int] = {"sample": 0, "train": 1, "posterior": 2, "drop": 3, "choose": 4}


def stream(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """A generator of its own for one position.

    Args:
        seed: 0 to 2^63 - 1.
        purpose: what is drawn.
        position: up to three non-negative numbers, such as step and row.

    Raises:
        ValueError: a seed out of range.
    """
    whole = integer(seed)
    if whole is None or not 0 <= whole < 1 << 63:
        raise ValueError(f"noise: seed is {shown(seed)}, expected an integer from 0 to 2^63 - 1")
    first, second, third = (*position, 0, 0, 0)[:3]
    # The lowest word of the counter counts the numbers drawn.
    key = np.array([whole, first], dtype=np.uint64)
    counter = np.array([0, second, third, _PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw(
    seeds: Sequence[int],
    frames: int,
    channels: int,
    height: int,
    width: int,
    *,
    first: int = 0,
    purpose: Purpose = "sample",
) -> Tensor:
    """Standard normal noise of clips; a frame depends on the seed of its sample and its own number alone.

    Args:
        seeds: of each sample, 0 to 2^63 - 1.
        frames, channels, height, width: of the clips, in latent positions.
        first: number of the first frame, to continue a clip.
        purpose: "sample" for the noise that a flow decodes; the others are independent of it.

    Returns:
        float32 (samples, frames, channels, height, width).

    Raises:
        ValueError: a seed out of range.

    Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    out = np.empty((len(seeds), frames, channels, height, width), dtype=np.float32)
    for sample, seed in enumerate(seeds):
        for frame in range(frames):
            stream(seed, purpose, first + frame).standard_normal(dtype=np.float32, out=out[sample, frame])
    return torch.from_numpy(out)


def draw_batch(seed: int, step: int, shape: Sequence[int], *, first: int = 0, purpose: Purpose = "train") -> Tensor:
    """Standard normal noise of a training batch; a row depends on the seed, the step and its own number alone.

    Args:
        seed: of the run, 0 to 2^63 - 1.
        step: of training.
        shape: of the batch, rows first.
        first: number of the first row, for a part of the batch.
        purpose: "train" for the noise on latents, "posterior" for that of a codec.

    Returns:
        float32 of this shape.

    Raises:
        ValueError: a seed out of range.
    """
    out = np.empty(tuple(shape), dtype=np.float32)
    for row in range(len(out)):
        stream(seed, purpose, step, first + row).standard_normal(dtype=np.float32, out=out[row])
    return torch.from_numpy(out)
