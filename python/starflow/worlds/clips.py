"""PaddleClips: clips of the paddle-and-ball world with the actions of their frames, made on the fly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from starflow.data import Clip, to_pixels
from starflow.messages import shown
from starflow.numeric import check_item, integer, number
from starflow.worlds.paddle import COURT, PaddleBall, draw_court, random_state, state_before_contact
from starflow.worlds.policies import Policy, PolicyName
from starflow.worlds.world import one_hot

# Frames that are played before every other clip begins, at most: positions are then those of play. The others begin in
# the state that was drawn, which is near the paddle more often than play is.
_BEFORE = 60
# Where on the paddle a ball is met, as shares of it from above, in clips with contacts: its ends, and beyond them.
_AIMS = (-0.5, 1.5)


class PaddleClips:
    """Clips of `PaddleBall`, each from any state of the game on, without captions.

    Clips depend on (seed of the set, split, index, epoch, seed) alone. The first frame of a clip has no action, since
    what that acted on is not in the clip.

    Args:
        frames: in a clip.
        size: height and width in pixels.
        split: "train" or "test"; their games differ.
        seed: of the set.
        length: items in one epoch.
        policy: how the game is played.
        channels: 1 (grey) or 3 (RGB).
        contacts: share of the clips that begin as a ball is about to reach the paddle, which is led to meet it with
            one of its ends or its middle, or to miss it; 0 to 1. Of what the rules say the paddle's ends take the most
            clips to learn, and in play a ball comes there once in 35 frames.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(
        self,
        *,
        frames: int = 12,
        size: int = COURT,
        split: Literal["train", "test"] = "train",
        seed: int = 0,
        length: int = 10000,
        policy: PolicyName = "mixed",
        channels: int = 1,
        contacts: float = 0.0,
    ) -> None:
        for name, value, least in (
            ("frames", frames, 1),
            ("size", size, COURT),
            ("seed", seed, 0),
            ("length", length, 1),
        ):
            if (whole := integer(value)) is None or whole < least:
                raise ValueError(f"PaddleClips: {name} is {shown(value)}, expected an integer of at least {least}")
        if split not in ("train", "test"):
            raise ValueError(f'PaddleClips: split is "{split}", expected "train" or "test"')
        self.frames, self.size, self.split, self.seed, self.length = frames, size, split, seed, length
        if integer(channels) not in (1, 3):
            raise ValueError(f"PaddleClips: channels is {shown(channels)}, expected 1 (grey) or 3 (RGB)")
        if (share := number(contacts)) is None or not 0.0 <= share <= 1.0:
            raise ValueError(f"PaddleClips: contacts is {shown(contacts)}, expected 0 to 1")
        self.policy: PolicyName = policy
        self.channels, self.contacts = channels, contacts

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        """Plays one clip.

        Args:
            index: from 0 to length - 1.
            epoch: each epoch shows other games.
            seed: of the run.

        Returns:
            the clip, pixels (frames, channels, size, size), actions (frames, 3).

        Raises:
            IndexError: when there is no such index.
            ValueError: when an argument is no integer from 0 on.
        """
        check_item("PaddleClips", index, self.length, epoch, seed)
        rng = np.random.default_rng([self.seed, int(self.split == "test"), index, epoch, seed])
        world = PaddleBall(self.size)
        world.state = random_state(rng)
        policy = Policy(world, self.policy, rng)
        # Nothing is drawn without contacts: such clips are those of before there were any.
        if self.contacts and rng.random() < self.contacts:
            world.state = state_before_contact(rng)
            policy = Policy(world, self.policy, rng, aim=float(rng.uniform(*_AIMS)))
        elif rng.random() < 0.5:
            for _ in range(int(rng.integers(_BEFORE + 1))):
                world.advance(policy())
        states = [world.state]
        actions: list[int | None] = [None]
        for _ in range(self.frames - 1):
            action = policy()
            world.advance(action)
            states.append(world.state)
            actions.append(action)
        pixels = to_pixels(torch.from_numpy(draw_court(states, self.size, self.channels)))
        told = one_hot(actions, len(world.actions))
        return Clip(pixels, "", f"paddle/{self.split}/{index}", frame_conditions=told)
