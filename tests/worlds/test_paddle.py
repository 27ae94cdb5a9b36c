"""The ball game: its rules, and that its pictures show its state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from starflow.worlds import COURT, PaddleBall, PaddleState, draw_court

STAY, UP, DOWN = range(3)


def at(x: int, y: int, right: int, down: int, paddle: int = 9) -> PaddleBall:
    world = PaddleBall()
    world.state = PaddleState(paddle, (x, y), (right, down))
    return world


def test_a_game_is_the_same_again() -> None:
    actions = np.random.default_rng(0).integers(3, size=300)
    games = []
    for _ in range(2):
        world = PaddleBall(seed=5)
        games.append([world.step(int(action)) for action in actions])
    for one, other in zip(*games, strict=True):
        assert (one.frame == other.frame).all()
        assert one.reward == other.reward
        assert not one.done
    assert {step.reward for step in games[0]} >= {0.0, -1.0}


def test_a_state_that_is_set_is_gone_on_from() -> None:
    world = PaddleBall(seed=3)
    world.advance(DOWN)
    kept = world.state
    after = [world.step(UP).frame for _ in range(60)]
    world.state = kept
    assert all((world.step(UP).frame == frame).all() for frame in after)
    world.state = replace(world.state, ball=(12, 3))
    assert (world.frame[3:5, 12:14] == 255).all()


def test_reset_begins_another_game_or_the_one_that_is_asked_for() -> None:
    world = PaddleBall()
    first = world.reset(7)
    assert not (world.reset() == first).all() or world.state.seed == 8
    assert (world.reset(7) == first).all()


@pytest.mark.parametrize(("action", "paddle"), [(STAY, 9), (UP, 8), (DOWN, 10)])
def test_keys_move_the_paddle(action: int, paddle: int) -> None:
    world = at(12, 12, 1, 1)
    world.advance(action)
    assert world.state.paddle == paddle
    for _ in range(30):
        world.advance(action)
    assert world.state.paddle == {STAY: 9, UP: 1, DOWN: COURT - 1 - 6}[action]


def test_the_ball_bounces_off_three_walls() -> None:
    world = at(12, 20, 1, 1)
    path = []
    for _ in range(12):
        world.advance(STAY)
        path.append(world.state.ball)
    assert path == [
        (13, 21), (14, 20), (15, 19), (16, 18), (17, 17), (18, 16),
        (19, 15), (20, 14), (21, 13), (20, 12), (19, 11), (18, 10),
    ]  # fmt: skip
    world = at(12, 2, 1, -1)
    for expected in ((13, 1), (14, 2), (15, 3)):
        world.advance(STAY)
        assert world.state.ball == expected


@pytest.mark.parametrize("came", [1, -1])
@pytest.mark.parametrize(("y", "goes"), [(8, -1), (9, -1), (10, 0), (11, 0), (12, 0), (13, 1), (14, 1)])
def test_the_paddle_sends_the_ball_up_on_or_down(y: int, goes: int, came: int) -> None:
    world = at(4, y, -1, came)
    assert world.advance(STAY) == 1.0
    assert world.state.velocity == (1, goes or came)
    assert world.state.ball == (5, y + (goes or came))


def test_a_missed_ball_leaves_an_empty_court_and_is_served_again() -> None:
    world = at(4, 18, -1, -1, paddle=1)
    rewards = [world.advance(STAY) for _ in range(5)]
    assert rewards == [0.0, 0.0, 0.0, 0.0, -1.0]
    assert world.state.ball[0] == -2
    assert (world.frame[1:-1, 4:-1] == 0).all()
    directions = set()
    for serves in range(2, 42):
        assert world.advance(DOWN) == 0.0
        assert world.state.ball == (12, 11)
        assert world.state.serves == serves
        directions.add(world.state.velocity)
        world.state = replace(world.state, ball=(0, 5), velocity=(-1, 1))
        assert world.advance(STAY) == -1.0
    assert directions == {(1, 1), (1, -1)}


@pytest.mark.parametrize("aim", [0.1, 0.5, 0.9])
def test_who_follows_the_ball_never_misses_it(aim: float) -> None:
    world = PaddleBall(seed=2)
    rewards = [world.advance(world.suggest(aim)) for _ in range(3000)]
    assert min(rewards) == 0.0
    assert sum(rewards) > 60


def test_pictures_show_the_state_at_any_size() -> None:
    states = [PaddleState(5, (12, 7), (1, 1)), PaddleState(14, (21, 21), (1, 1))]
    for size in (24, 48, 64, 31):
        frames = draw_court(states, size)
        assert frames.shape == (2, size, size, 1)
        assert frames.dtype == np.uint8
        scale = size / COURT
        for state, frame in zip(states, frames[..., 0] / 255.0, strict=True):
            ball = np.where(frame > 0.8, frame, 0.0)
            if size % COURT == 0:
                assert ball.sum() == (2 * scale) ** 2
            rows, columns = ball.sum(1), ball.sum(0)
            middle = [(axis * (np.arange(size) + 0.5)).sum() / axis.sum() / scale for axis in (columns, rows)]
            np.testing.assert_allclose(middle, np.add(state.ball, 1), atol=0.3)
            # Twelve units of paddle, at three quarters of the brightness of the ball.
            inside = frame[int(scale) + 1 : int(23 * scale), : int(4.5 * scale)]
            assert abs(inside.sum() / scale**2 - 0.75 * 12) < 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paddle": 0}, r"PaddleState: paddle is 0, expected 1 to 17"),
        ({"ball": (22, 3)}, r"PaddleState: ball is \(22, 3\), expected \(-2 or 0 to 21, 1 to 21\)"),
        ({"ball": (-1, 3)}, r"PaddleState: ball is \(-1, 3\)"),
        ({"ball": (3, 0)}, r"PaddleState: ball is \(3, 0\)"),
        ({"velocity": (0, 1)}, r"PaddleState: velocity is \(0, 1\), expected 1 or -1"),
    ],
)
def test_states_that_do_not_exist_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PaddleBall().state, **changes)


@pytest.mark.parametrize("action", [3, -1, True, 0.5, "up", None])
def test_actions_that_do_not_exist_are_refused(action: Any) -> None:
    with pytest.raises(ValueError, match=r"world paddle: action is .*, expected an integer from 0 to 2"):
        PaddleBall().step(action)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="PaddleBall: size is 23, expected an integer of at least 24"):
        PaddleBall(23)
    with pytest.raises(ValueError, match="PaddleBall: seed is -1, expected an integer >= 0"):
        PaddleBall(seed=-1)
    with pytest.raises(ValueError, match=r"PaddleBall: channels is 2, expected 1 \(grey\) or 3 \(RGB\)"):
        PaddleBall(channels=2)


def test_colours_tell_the_same_as_levels_of_grey() -> None:
    """The brightest channel of each colour is about the grey level of what it shows."""
    states = [PaddleState(5, (12, 7), (1, 1)), PaddleState(14, (-2, 21), (-1, 1))]
    colour, grey = draw_court(states, 48, 3), draw_court(states, 48)
    assert colour.shape == (2, 48, 48, 3)
    brightest = colour.max(-1, keepdims=True).astype(int)
    assert np.abs(brightest - grey)[grey > 0].max() <= 1
    assert brightest[grey == 0].max() == round(0.08 * 255)
    assert (PaddleBall(48, channels=3).frame[0, 0] == colour[0, 0, 0]).all()


@pytest.mark.parametrize(
    "change",
    [{"ball": (12.5, 3)}, {"ball": (12,)}, {"ball": 12}, {"paddle": 9.5}, {"velocity": (1.0, 1)}, {"seed": 1.5}],
)
def test_states_are_whole_numbers(change: dict[str, Any]) -> None:
    # A ball between two units never is where the paddle meets it.
    with pytest.raises(ValueError, match=r"^PaddleState: \w+ is .*, expected (an integer|two integers)$"):
        replace(PaddleBall().state, **change)


def test_seeds_are_integers() -> None:
    for make in (lambda: PaddleBall(seed=1.5), lambda: PaddleBall().reset(-1), lambda: PaddleBall(24.5)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^PaddleBall: \w+ is .*, expected an integer"):
            make()
