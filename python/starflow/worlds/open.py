"""open_world: a world by its name."""

from __future__ import annotations

from starflow.messages import shown
from starflow.worlds.gymnasium import GymnasiumWorld
from starflow.worlds.paddle import PaddleBall
from starflow.worlds.world import PlayableWorld, WorldError

# Side of the frames where none is asked for.
_SIDE = 64


def open_world(name: str, *, size: tuple[int, int] | None = None, channels: int | None = None) -> PlayableWorld:
    """Opens a world.

    Args:
        name: "paddle", or that of an environment of gymnasium, such as "ALE/Pong-v5".
        size: height and width of its frames; by default 64x64.
        channels: 1 (grey) or 3 (RGB); by default 3.

    Raises:
        WorldError: there is no such world, or it cannot be made.
        ImportError: the world needs the extra `worlds`.
        ValueError: a size or channels that the world does not have.
    """
    if size is not None and not (isinstance(size, tuple | list) and len(size) == 2):
        raise ValueError(f"world {name}: size is {shown(size)}, expected height and width")
    height, width = size or (_SIDE, _SIDE)
    if name == PaddleBall.name:
        if height != width:
            raise ValueError(f"world paddle: size is {height}x{width}, expected a square")
        return PaddleBall(height, channels=3 if channels is None else channels)
    if not name or name.strip() != name:
        raise WorldError(f"world {name!r} is unknown, expected 'paddle' or the name of a gymnasium environment")
    return GymnasiumWorld(name, height=height, width=width, channels=3 if channels is None else channels)
