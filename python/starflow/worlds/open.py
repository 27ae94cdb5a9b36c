"""open_world: a world by its name."""

from __future__ import annotations

from starflow.worlds.gymnasium import GymnasiumWorld
from starflow.worlds.paddle import COURT, PaddleBall
from starflow.worlds.world import PlayableWorld, WorldError

# Side of the frames of worlds that have none of their own.
_SIDE = 64


def open_world(name: str, *, size: tuple[int, int] | None = None, channels: int | None = None) -> PlayableWorld:
    """Opens a world.

    Args:
        name: "paddle", or that of an environment of gymnasium, such as "ALE/Pong-v5".
        size: height and width of its frames; by default 24x24 of the paddle world, else 64x64.
        channels: 1 (grey) or 3 (RGB); by default 1 of the paddle world, else 3.

    Raises:
        WorldError: there is no such world, or it cannot be made.
        ImportError: the world needs the extra `worlds`.
        ValueError: a size or channels that the world does not have.
    """
    if name == PaddleBall.name:
        height, width = size or (COURT, COURT)
        if height != width:
            raise ValueError(f"world paddle: size is {height}x{width}, expected a square")
        if channels not in (None, 1):
            raise ValueError(f"world paddle: channels is {channels}, expected 1 (the court is grey)")
        return PaddleBall(height)
    if not name or name.strip() != name:
        raise WorldError(f"world {name!r} is unknown, expected 'paddle' or the name of a gymnasium environment")
    height, width = size or (_SIDE, _SIDE)
    return GymnasiumWorld(name, height=height, width=width, channels=channels or 3)
