"""What answers an action? Worlds that a flow learns to dream: a built-in ball game, and how they are played."""

from starflow.worlds.clips import PaddleClips
from starflow.worlds.paddle import COURT, PaddleBall, PaddleState, draw_court
from starflow.worlds.policies import POLICIES, Policy
from starflow.worlds.world import PlayableWorld, Step, one_hot

__all__ = [
    "COURT",
    "POLICIES",
    "PaddleBall",
    "PaddleClips",
    "PaddleState",
    "PlayableWorld",
    "Policy",
    "Step",
    "draw_court",
    "one_hot",
]
