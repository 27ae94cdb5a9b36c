"""PaddleBall: a paddle, a ball and three walls, deterministic, with a state that can be read and set.

The court is 24 by 24 units, drawn at any size of at least as many pixels. Top, bottom and right are walls; the paddle
guards the left side. The ball moves by one unit along each axis in a frame. The upper third of the paddle sends it up,
the lower third down, the middle one lets it go on as it came. A ball that is missed leaves on the left. The court is
then empty for one frame, and the next ball is served from the middle, to the right, up or down as its number tells. An
empty court is therefore always followed by a serve: a model that lost the ball finds it again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from starflow.messages import shown
from starflow.numeric import check_seed, integer
from starflow.worlds.world import Step, check_action

# Side of the court in units.
COURT = 24
_WALL = 1
_BALL = 2
_PADDLE_HEIGHT = 6
_PADDLE_LEFT, _PADDLE_RIGHT = 2, 4
_LOW, _HIGH = _WALL, COURT - _WALL
# Where a ball is that has left, just outside of the picture, and where one is served.
_GONE = -_BALL
_SERVED = COURT // 2, COURT // 2 - _BALL // 2
# Frames that a ball which is about to reach the paddle needs for it, at most.
_SOON = 9
# Brightness of ground, walls, paddle and ball by channels. The largest of three tells them apart as the grey one does.
_LEVELS = {
    1: ((0.0,), (0.4,), (0.75,), (1.0,)),
    3: ((0.02, 0.03, 0.08), (0.22, 0.28, 0.40), (0.15, 0.75, 0.60), (1.0, 0.80, 0.20)),
}


@dataclass(frozen=True)
class PaddleState:
    """All that the game depends on; whole numbers in units of the court.

    Args:
        paddle: upper edge of the paddle, 1 to 17.
        ball: left and upper edge of the ball; its left edge is -2 in the frame in which it has left.
        velocity: of the ball, (1 or -1 to the right, 1 or -1 down).
        serves: balls that were served so far.
        seed: of the serves.
    """

    paddle: int
    ball: tuple[int, int]
    velocity: tuple[int, int]
    serves: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count in (("paddle", 1), ("ball", 2), ("velocity", 2), ("serves", 1), ("seed", 1)):
            value = getattr(self, name)
            parts = value if isinstance(value, tuple | list) else (value,)
            whole = tuple(map(integer, parts))
            if None in whole or len(whole) != count:
                expected = "an integer" if count == 1 else "two integers"
                raise ValueError(f"PaddleState: {name} is {shown(value)}, expected {expected}")
            object.__setattr__(self, name, whole[0] if count == 1 else whole)
        x, y = self.ball
        known = (
            (
                "paddle",
                self.paddle,
                _LOW <= self.paddle <= _HIGH - _PADDLE_HEIGHT,
                f"{_LOW} to {_HIGH - _PADDLE_HEIGHT}",
            ),
            (
                "ball",
                self.ball,
                (0 <= x <= _HIGH - _BALL or x == _GONE) and _LOW <= y <= _HIGH - _BALL,
                f"({_GONE} or 0 to {_HIGH - _BALL}, {_LOW} to {_HIGH - _BALL})",
            ),
            ("velocity", self.velocity, {*map(abs, self.velocity)} == {1}, "1 or -1 along each axis"),
        )
        for name, value, fits, expected in known:
            if not fits:
                raise ValueError(f"PaddleState: {name} is {value}, expected {expected}")


def serve(seed: int, serves: int, paddle: int) -> PaddleState:
    """The state in which ball number `serves` (from 1) of a game is served."""
    down = 1 if np.random.default_rng([seed, serves]).random() < 0.5 else -1
    return PaddleState(paddle, _SERVED, (1, down), serves, seed)


def advance(state: PaddleState, action: int) -> tuple[PaddleState, float]:
    """The state one frame later, and the reward: 1 where the paddle met the ball, -1 where the ball was lost."""
    paddle = min(max(state.paddle + (0, -1, 1)[action], _LOW), _HIGH - _PADDLE_HEIGHT)
    (x, y), (right, down) = state.ball, state.velocity
    reward = 0.0
    if x == _GONE:
        return serve(state.seed, state.serves + 1, paddle), reward
    if x == _HIGH - _BALL and right > 0:
        right = -1
    elif x == _PADDLE_RIGHT and right < 0 and paddle - _BALL < y < paddle + _PADDLE_HEIGHT:
        right, reward = 1, 1.0
        middle = y + _BALL / 2 - paddle
        down = -1 if middle < _PADDLE_HEIGHT / 3 else 1 if middle > 2 * _PADDLE_HEIGHT / 3 else down
    if not _LOW <= y + down <= _HIGH - _BALL:
        down = -down
    if x + right < 0:
        return replace(state, paddle=paddle, ball=(_GONE, y)), -1.0
    return replace(state, paddle=paddle, ball=(x + right, y + down), velocity=(right, down)), reward


def draw_court(states: Sequence[PaddleState], size: int = COURT, channels: int = 1) -> np.ndarray:
    """Pictures of states, uint8 (states, size, size, channels); an edge that divides a pixel covers its share of it."""
    levels = np.repeat(_empty_court(size, channels), len(states), 0)
    paddle = np.array([state.paddle for state in states])
    x, y = np.array([state.ball for state in states]).T
    _, _, bat, ball = _LEVELS[channels]
    left = np.full(len(states), _PADDLE_LEFT)
    _paint(levels, bat, left, paddle, _PADDLE_RIGHT - _PADDLE_LEFT, _PADDLE_HEIGHT)
    _paint(levels, ball, x, y, _BALL, _BALL)
    pictures: np.ndarray = np.rint(levels * 255.0).astype(np.uint8)
    return pictures


@functools.cache
def _empty_court(size: int, channels: int) -> np.ndarray:
    """Levels (1, size, size, channels) of ground and walls."""
    ground, wall, _, _ = _LEVELS[channels]
    levels = np.tile(np.array(ground), (1, size, size, 1))
    for left, top, width, height in ((_HIGH, 0, _WALL, COURT), (0, 0, COURT, _WALL), (0, _HIGH, COURT, _WALL)):
        _paint(levels, wall, np.array([left]), np.array([top]), width, height)
    return levels


def _paint(
    levels: np.ndarray, colour: Sequence[float], left: np.ndarray, top: np.ndarray, width: int, height: int
) -> None:
    """Paints a box of `colour` on each picture of `levels` (states, size, size, channels), in place."""
    size = levels.shape[1]
    columns, rows = _cover(left, width, size), _cover(top, height, size)
    for picture, across, down in zip(levels, columns, rows, strict=True):
        # Only what the box covers: most of a picture is ground.
        xs, ys = across.nonzero()[0], down.nonzero()[0]
        if len(xs):
            part = picture[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
            part += (down[ys, None] * across[xs])[..., None] * (colour - part)


def _cover(begin: np.ndarray, length: int, size: int) -> np.ndarray:
    """Share of each of `size` pixels that lies between `begin` and `begin + length` units, (states, size)."""
    scale = size / COURT
    low, high = (begin * scale)[:, None], ((begin + length) * scale)[:, None]
    pixels = np.arange(size)
    share: np.ndarray = np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0.0, 1.0)
    return share


class PaddleBall:
    """The game as a world: it holds a state, and actions change it.

    Args:
        size: height and width of its frames, at least 24.
        seed: of the serves.
        channels: 1 (grey) or 3 (RGB) of its frames.

    Attributes:
        state: may be read and set, to move the ball elsewhere for example.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from dataclasses import replace
        >>> from starflow.worlds import PaddleBall
        >>> world = PaddleBall(seed=1)
        >>> world.step(1).frame.shape
        (24, 24, 1)
        >>> world.state = replace(world.state, ball=(12, 3))
    """

    name = "paddle"
    actions = ("stay", "up", "down")
    fps = 30.0

    def __init__(self, size: int = COURT, seed: int = 0, channels: int = 1) -> None:
        if (side := integer(size)) is None or side < COURT:
            raise ValueError(f"PaddleBall: size is {shown(size)}, expected an integer of at least {COURT}")
        check_seed("PaddleBall", seed)
        if channels not in _LEVELS:
            raise ValueError(f"PaddleBall: channels is {channels}, expected 1 (grey) or 3 (RGB)")
        self.size, self.channels = size, channels
        self.state = serve(seed, 1, (COURT - _PADDLE_HEIGHT) // 2)

    @property
    def frame(self) -> np.ndarray:
        """The picture of the state, uint8 (size, size, channels)."""
        (picture,) = draw_court([self.state], self.size, self.channels)
        return np.asarray(picture)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Begins a game; without a seed that of the next one.

        Raises:
            ValueError: a seed that is no integer from 0 on.
        """
        if seed is not None:
            check_seed("PaddleBall", seed)
        self.state = serve(self.state.seed + 1 if seed is None else seed, 1, (COURT - _PADDLE_HEIGHT) // 2)
        return self.frame

    def step(self, action: int) -> Step:
        """Does an action for one frame; a game never ends.

        Raises:
            ValueError: an action that is not 0 (stay), 1 (up) or 2 (down).
        """
        reward = self.advance(action)
        return Step(self.frame, reward)

    def advance(self, action: int) -> float:
        """As `step` without a picture; returns the reward."""
        check_action(self.name, action, len(self.actions))
        self.state, reward = advance(self.state, int(action))
        return reward

    def teleport(self, rng: np.random.Generator) -> None:
        """Puts the ball elsewhere, at least a third of the court away; it flies on as before."""
        x, y = self.state.ball
        far = [
            (left, top)
            for left in range(_PADDLE_RIGHT + _BALL, _HIGH - _BALL)
            for top in range(_LOW, _HIGH - _BALL + 1)
            if max(abs(left - x), abs(top - y)) >= COURT // 3
        ]
        left, top = far[int(rng.integers(len(far)))]
        self.state = replace(self.state, ball=(left, top))

    def suggest(self, aim: float = 0.5) -> int:
        """The action of somebody who follows the ball, to meet it at a share `aim` of the paddle from above."""
        wanted = self.state.ball[1] + _BALL / 2 - aim * _PADDLE_HEIGHT
        apart = wanted - self.state.paddle
        return 0 if abs(apart) < 1 else 1 if apart < 0 else 2

    def close(self) -> None:
        """Nothing is held."""


def random_state(rng: np.random.Generator) -> PaddleState:
    """Any state of the game, for clips that begin anywhere; one in twenty shows an empty court."""
    right, down = (1 if rng.random() < 0.5 else -1 for _ in range(2))
    # Half of the positions are near the paddle, where most is decided.
    far = _HIGH - _BALL if rng.random() < 0.5 else COURT // 2
    x, y = int(rng.integers(0, far + 1)), int(rng.integers(_LOW, _HIGH - _BALL + 1))
    paddle = int(rng.integers(_LOW, _HIGH - _PADDLE_HEIGHT + 1))
    if rng.random() < 0.05:
        x = _GONE
    return PaddleState(paddle, (x, y), (right, down), 1, int(rng.integers(1 << 31)))


def state_before_contact(rng: np.random.Generator) -> PaddleState:
    """A state one to nine frames before the ball reaches the column of the paddle, the paddle near where it will be."""
    x, y = _PADDLE_RIGHT + int(rng.integers(1, _SOON + 1)), int(rng.integers(_LOW, _HIGH - _BALL + 1))
    state = PaddleState(_LOW, (x, y), (-1, 1 if rng.random() < 0.5 else -1), 1, int(rng.integers(1 << 31)))
    reached = state
    while reached.ball[0] > _PADDLE_RIGHT:
        reached, _ = advance(reached, 0)
    above = int(rng.integers(-_BALL - 1, _PADDLE_HEIGHT + 2))
    return replace(state, paddle=min(max(reached.ball[1] - above, _LOW), _HIGH - _PADDLE_HEIGHT))
