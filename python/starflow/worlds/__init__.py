"""What answers an action? Worlds that a flow learns to dream: a built-in ball game, gymnasium, and their recordings."""

from starflow.worlds.clips import PaddleClips
from starflow.worlds.gymnasium import GymnasiumWorld
from starflow.worlds.open import open_world
from starflow.worlds.paddle import COURT, PaddleBall, PaddleState, draw_court
from starflow.worlds.policies import POLICIES, Policy, PolicyName
from starflow.worlds.record import CLIP_FRAMES, Recorded, record
from starflow.worlds.world import (
    PlayableWorld,
    Step,
    WorldError,
    check_picture,
    check_step,
    check_world,
    one_hot,
)

__all__ = [
    "CLIP_FRAMES",
    "COURT",
    "POLICIES",
    "GymnasiumWorld",
    "PaddleBall",
    "PaddleClips",
    "PaddleState",
    "PlayableWorld",
    "Policy",
    "PolicyName",
    "Recorded",
    "Step",
    "WorldError",
    "check_picture",
    "check_step",
    "check_world",
    "draw_court",
    "one_hot",
    "open_world",
    "record",
]
