"""GymnasiumWorld: an environment of gymnasium with a few actions, seen as pictures of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from starflow.extras import import_extra
from starflow.worlds.world import Step, WorldError, check_action


class GymnasiumWorld:
    """An environment whose actions are discrete, by its name, such as "ALE/Pong-v5".

    Frames are what the environment renders, scaled to height x width. Its episodes end when it says so, or when its
    limit of time is reached.

    Args:
        name: that gymnasium knows.
        height, width: of the frames.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ImportError: gymnasium is not installed.
        WorldError: gymnasium does not know the name or cannot make it, or its actions are not discrete.

    Reference: Towers et al., Gymnasium: A Standard Interface for Reinforcement Learning Environments (2024); Bellemare
    et al., The Arcade Learning Environment (2013).
    """

    def __init__(self, name: str, *, height: int, width: int, channels: int = 3) -> None:
        for option, value in (("height", height), ("width", width)):
            if value < 1:
                raise ValueError(f"GymnasiumWorld: {option} is {value}, expected at least 1")
        if channels not in (1, 3):
            raise ValueError(f"GymnasiumWorld: channels is {channels}, expected 1 (grey) or 3 (RGB)")
        self.name, self.height, self.width, self.channels = name, height, width, channels
        gymnasium = import_extra("gymnasium", purpose=f"the world {name}", extra="worlds")
        if name.startswith("ALE/"):
            gymnasium.register_envs(import_extra("ale_py", purpose=f"the world {name}", extra="worlds"))
        try:
            self._environment = gymnasium.make(name, render_mode="rgb_array")
        except Exception as error:
            raise WorldError(
                f"world {name} cannot be made: {_reason(error)}; expected a name that gymnasium knows"
            ) from (error)
        space = self._environment.action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            self.close()
            raise WorldError(f"world {name} has the actions {space}, expected Discrete ones (a number of each)")
        self._first = int(space.start)
        self._actions = self._names(int(space.n))
        self._steps = 0

    def _names(self, count: int) -> tuple[str, ...]:
        meanings = getattr(self._environment.unwrapped, "get_action_meanings", None)
        names = [] if meanings is None else [str(name).lower() for name in meanings()]
        return tuple(names) if len(names) == count else tuple(map(str, range(count)))

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions, or their numbers where the environment names none."""
        return self._actions

    @property
    def fps(self) -> float:
        """Frames a second that the environment is shown at; 30 where it does not tell."""
        return float(self._environment.metadata.get("render_fps") or 30)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Begins an episode.

        Raises:
            WorldError: the environment failed.
        """
        self._steps = 0
        self._called(lambda: self._environment.reset(seed=seed))
        return self._frame()

    def step(self, action: int) -> Step:
        """Does an action for one frame.

        Raises:
            ValueError: an action that the world does not have.
            WorldError: the environment failed; names the frame of the episode.
        """
        check_action(self.name, action, len(self._actions))
        self._steps += 1
        _, reward, ended, cut, _ = self._called(lambda: self._environment.step(self._first + int(action)))
        return Step(self._frame(), float(reward), bool(ended or cut))

    def suggest(self, aim: float) -> int | None:
        """None: nobody knows how to play."""
        return None

    def close(self) -> None:
        """Frees the environment."""
        self._environment.close()

    def _frame(self) -> np.ndarray:
        pixels = self._called(self._environment.render)
        picture = np.asarray(pixels)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise WorldError(
                f"world {self.name} renders {picture.dtype} of shape {list(picture.shape)}, expected uint8 (height, "
                "width, 3)"
            )
        image = Image.fromarray(picture).convert("L" if self.channels == 1 else "RGB")
        scaled = np.asarray(image.resize((self.width, self.height), Image.Resampling.BOX))
        return scaled.reshape(self.height, self.width, self.channels)

    def _called(self, call: Any) -> Any:
        """What an environment answers; whatever it raises becomes one error that names the world."""
        try:
            return call()
        except Exception as error:
            raise WorldError(f"world {self.name} failed at frame {self._steps}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
