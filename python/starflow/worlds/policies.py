"""Policies: how a world is played while it is recorded."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from starflow.worlds.world import PlayableWorld, check_action

PolicyName = Literal["random", "mixed"]
POLICIES = get_args(PolicyName)

# Longest time that a key is held, and that "mixed" plays in one way, in frames.
_HELD = 12
_WAY = 48
# Share of the keys that play well, by the ways in which they do: "led" is that of a paddle that is led.
_WELL = {"play": 0.95, "led": 0.75}


class Policy:
    """Chooses actions, deterministic under its generator.

    Args:
        world: that is played.
        kind: "random" holds one key after another for 1 to 12 frames; "mixed" also taps keys, leaves them alone and,
            in a world that suggests actions, plays well, each for a while.
        rng: of its choices.
        aim: leads the paddle throughout to meet the ball at this share of itself from above, one key in four at random;
            below 0 and above 1 it grazes or misses. None plays as `kind` says.

    Raises:
        ValueError: a kind that is none of these; in a call, an action that the world suggests and does not have.
    """

    def __init__(
        self, world: PlayableWorld, kind: PolicyName, rng: np.random.Generator, aim: float | None = None
    ) -> None:
        if kind not in POLICIES:
            raise ValueError(f"policy: kind is {kind!r}, expected one of {', '.join(map(repr, POLICIES))}")
        self._world, self._kind, self._rng = world, kind, rng
        self._way, self._way_left = "hold", 0
        self._action, self._held = 0, 0
        self._aim = 0.5
        if aim is not None:
            self._way, self._aim = "led", aim

    def __call__(self) -> int:
        """The next action."""
        if self._kind == "mixed" and self._way != "led":
            self._choose_way()
        if self._way in _WELL:
            suggested = self._world.suggest(self._aim)
            # A slip now and then shows what a wrong key does near the ball.
            if suggested is not None and self._rng.random() < _WELL[self._way]:
                check_action(self._world.name, suggested, len(self._world.actions))
                return int(suggested)
        if self._held == 0:
            self._held = 1 if self._way == "tap" else int(self._rng.integers(1, _HELD + 1))
            self._action = 0 if self._way == "leave" else int(self._rng.integers(len(self._world.actions)))
        self._held -= 1
        return self._action

    def _choose_way(self) -> None:
        """Another way of playing, where the time of the last one is over."""
        self._way_left -= 1
        if self._way_left >= 0:
            return
        self._way_left = int(self._rng.integers(1, _WAY + 1))
        self._way = str(self._rng.choice(["play", "hold", "tap", "leave"], p=[0.45, 0.3, 0.15, 0.1]))
        self._aim, self._held = float(self._rng.random()), 0
