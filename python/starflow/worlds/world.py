"""PlayableWorld: what an environment has to answer so that it can be recorded, learned and played."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from starflow.arguments import check_text, check_texts
from starflow.data import action_vector
from starflow.messages import shown
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


def check_world(who: str, world: Any) -> None:
    """Refuses what is no world, which a caller's own may turn out to be in the midst of a game.

    Args:
        who: function, for the message.
        world: of the caller.

    Raises:
        ValueError: it lacks a method, or its actions have no names that tell them apart.
    """
    lacks = [name for name in ("name", "fps", "actions") if not hasattr(world, name)]
    lacks += [name for name in ("reset", "step", "suggest", "close") if not callable(getattr(world, name, None))]
    if lacks:
        raise ValueError(
            f"{who}: world is {shown(world)}, which has no {', '.join(lacks)}, expected a starflow.worlds.PlayableWorld"
        )
    check_text(who, "world.name", world.name)
    check_texts(who, "world.actions", world.actions)
    if not world.actions or len(set(world.actions)) < len(world.actions):
        raise ValueError(f"{who}: world.actions is {shown(world.actions)}, expected at least one name, each once")


def check_step(who: str, step: Any) -> Step:
    """What a world's `step` returned.

    Raises:
        ValueError: it is no `Step`, or one that is done or not in other words than True and False.
    """
    if not isinstance(step, Step):
        raise ValueError(f"{who}: step of the world returned {shown(step)}, expected a starflow.worlds.Step")
    # A text such as "no" would end every episode.
    if not isinstance(step.done, bool | np.bool_):
        raise ValueError(f"{who}: done of a step of the world is {shown(step.done)}, expected True or False")
    return step


def check_picture(who: str, frame: Any, shape: Sequence[int] | None = None) -> np.ndarray:
    """What a world shows, as a copy: a world may show every frame in the same memory.

    Args:
        who: function, for the message.
        frame: of the world.
        shape: expected height, width and channels; None for any.

    Returns:
        uint8 (height, width, channels), of one channel or three.

    Raises:
        ValueError: it is something else.
    """
    fits = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and 0 not in frame.shape
    fits = fits and frame.shape[2] in (1, 3)
    if not fits or (shape is not None and list(frame.shape) != list(shape)):
        what = f"{frame.dtype} of shape {list(frame.shape)}" if isinstance(frame, np.ndarray) else shown(frame)
        expected = "(height, width, 1 or 3)" if shape is None else f"{list(shape)} (height, width, channels)"
        raise ValueError(f"{who}: the world shows {what}, expected an array of uint8 {expected}")
    return np.array(frame)
