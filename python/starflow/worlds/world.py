"""PlayableWorld: what an environment has to answer so that it can be recorded, learned and played."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from starflow.data import action_vector
from starflow.numeric import integer


class WorldError(RuntimeError):
    """A world cannot be made, or failed while it was played."""


@dataclass(frozen=True, eq=False)
class Step:
    """What follows an action.

    Args:
        frame: picture after it, uint8 (height, width, channels).
        reward: of the action.
        done: whether the episode ended; the next frame comes from `PlayableWorld.reset`.
    """

    frame: np.ndarray
    reward: float = 0.0
    done: bool = False


class PlayableWorld(Protocol):
    """An environment with a few actions, whose frames are pictures of one size."""

    @property
    def name(self) -> str:
        """By which `open_world` opens it."""

    @property
    def fps(self) -> float:
        """Frames a second that it is shown at."""

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions; an action is an index of these."""

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Begins an episode; returns its first frame, uint8 (height, width, channels). None goes on drawing."""

    def step(self, action: int) -> Step:
        """Does an action for one frame."""

    def suggest(self, aim: float) -> int | None:
        """An action of somebody who plays well and may `aim` (0 to 1); None for a world that knows none."""

    def close(self) -> None:
        """Frees what the world holds."""


def one_hot(actions: Sequence[int | None], count: int) -> Tensor:
    """Actions as vectors of frames, float32 (frames, count); NaN where there is none.

    Args:
        actions: of each frame, the one that led to it.
        count: of actions that the world has.

    Raises:
        ValueError: an action that is no integer from 0 to count - 1.
    """
    vectors = [action_vector(action, count, f"frame {frame}") for frame, action in enumerate(actions)]
    return torch.stack(vectors) if vectors else torch.empty(0, count)


def check_action(world: str, action: Any, count: int) -> None:
    """Raises ValueError unless `action` is one of the `count` actions of a world."""
    chosen = integer(action)
    if chosen is None or not 0 <= chosen < count:
        raise ValueError(f"world {world}: action is {action!r}, expected an integer from 0 to {count - 1}")
