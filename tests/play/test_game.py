"""A game without a server: what it shows, remembers, forgets and measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from starflow.config import RunConfig
from starflow.data import Clip, to_pixels
from starflow.evaluate import surprise
from starflow.play import Game, Moment
from starflow.play import game as module
from starflow.sampling import Pipeline
from starflow.storage import shipped_names
from starflow.worlds import PaddleBall, Step, WorldError, one_hot


def moments(game: Game) -> list[Moment]:
    return [game.moment(number) for number in range(game.first, game.last + 1)]


def test_a_dream_begins_with_the_real_world(game: Game) -> None:
    begun = moments(game)
    assert len(begun) == 8
    assert begun[0].action is None
    assert all(moment.action == 0 for moment in begun[1:])
    for moment in begun:
        assert moment.real is not None
        np.testing.assert_array_equal(moment.dream, moment.real)


def test_the_real_world_obeys_the_same_keys(game: Game) -> None:
    world = PaddleBall()
    world.reset(0)
    for _ in range(7):
        world.step(0)
    for action in (1, 1, 2, 0, 1):
        moment = game.step(action)
        np.testing.assert_array_equal(moment.real, world.step(action).frame)
        assert moment.action == action
        assert moment.dream.shape == (24, 24, 1)
        assert moment.dream.dtype == np.uint8


def test_a_game_depends_on_its_seed_and_keys_alone(paddle: Pipeline) -> None:
    one, same, other = Game(paddle, seed=1), Game(paddle, seed=1), Game(paddle, seed=2)
    pictures = [np.stack([game.step(action).dream for action in (0, 1, 2)]) for game in (one, same, other)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


def test_an_action_reaches_the_dream(paddle: Pipeline) -> None:
    up, down = Game(paddle, PaddleBall), Game(paddle, PaddleBall)
    assert (up.step(1).dream != down.step(2).dream).any()


def test_an_action_reaches_the_dream_of_a_model_that_is_cleaned_as_a_whole(
    whole: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    up, down = Game(whole, PaddleBall), Game(whole, PaddleBall)
    assert (up.step(1).dream != down.step(2).dream).any()
    assert "frames are cleaned by 'none' in place of 'score', which needs whole clips" in caplog.text


def test_a_model_of_actions_whose_clips_do_not_go_on_is_refused(
    configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]
) -> None:
    pipeline = build(configure(frame_dim=3, shallow_block_local=False))
    with pytest.raises(ValueError, match=r"^play: the model reads actions and makes its clips as a whole, so that no"):
        Game(pipeline)


def test_temperature_zero_takes_the_noise_away(paddle: Pipeline) -> None:
    games = [Game(paddle, PaddleBall, seed=0) for _ in range(2)]
    games[1].temperature = 0.0
    assert (games[0].step(0).dream != games[1].step(0).dream).any()


@pytest.mark.parametrize("action", [-1, 3])
def test_actions_out_of_range_are_refused(game: Game, action: int) -> None:
    with pytest.raises(ValueError, match=rf"play: action is {action}, expected 0 to 2 \(stay, up, down\)"):
        game.step(action)


def test_a_branch_forgets_what_came_after_and_takes_the_world_along(game: Game) -> None:
    for _ in range(5):
        game.step(1)
    game.score()
    kept = game.moment(9)
    game.branch(9)
    assert game.last == 9
    assert game.moment(9) is kept
    again = game.step(2)
    assert again.number == 10
    world = PaddleBall()
    world.state = kept.state
    np.testing.assert_array_equal(again.real, world.step(2).frame)
    assert game.unscored == 1


@pytest.mark.parametrize("number", [-1, 8])
def test_moments_that_are_not_there(game: Game, number: int) -> None:
    with pytest.raises(ValueError, match=f"play: frame is {number}, expected 0 to 7"):
        game.branch(number)


def test_a_world_that_cannot_be_wound_back_is_left_behind(paddle: Pipeline) -> None:
    class Plain:
        """The world without its state."""

        name, actions, fps = "plain", PaddleBall.actions, 30.0

        def __init__(self) -> None:
            self._world = PaddleBall()
            self.reset, self.step, self.suggest = self._world.reset, self._world.step, self._world.suggest
            self.close = self._world.close

    game = Game(paddle, Plain)
    game.step(1)
    game.branch(7)
    assert not game.has_world
    assert game.step(1).real is None
    for ask in (game.follow, game.teleport):
        with pytest.raises(ValueError, match="expected a real world"):
            ask()
    game.new(3)
    assert game.has_world


class Sliding:
    """A world of one white row, whose state is one array that it writes to."""

    name, fps, actions = "sliding", 30.0, ("stay", "up", "down")

    def __init__(self) -> None:
        self.state = np.zeros(1, np.int64)

    def _frame(self) -> np.ndarray:
        frame = np.zeros((24, 24, 1), np.uint8)
        frame[int(self.state[0]) % 24] = 255
        return frame

    def reset(self, seed: int | None = None) -> np.ndarray:
        self.state[0] = 0
        return self._frame()

    def step(self, action: int) -> Step:
        self.state[0] += 1
        return Step(self._frame())

    def suggest(self, aim: float) -> None:
        return None

    def close(self) -> None:
        pass


def test_a_state_that_its_world_goes_on_in_is_gone_back_to(paddle: Pipeline) -> None:
    game = Game(paddle, Sliding)
    for _ in range(6):
        game.step()
    for _ in range(2):
        game.branch(10)
        real = game.step().real
        assert real is not None
        assert real[:, 0, 0].nonzero()[0].tolist() == [11]


def test_a_world_whose_state_cannot_be_set_is_left_behind(paddle: Pipeline) -> None:
    class Sealed(Sliding):
        def __init__(self) -> None:
            self._place = np.zeros(1, np.int64)

        @property
        def state(self) -> np.ndarray:
            return self._place

    game = Game(paddle, Sealed)
    assert game.has_world
    game.branch(3)
    assert not game.has_world
    assert game.step(1).real is None


@pytest.mark.parametrize(
    ("show", "told"),
    [
        (lambda frame: (frame / 255).astype(np.float32), r"float32 of shape \[24, 24, 1\]"),
        (lambda frame: np.zeros((30, 24, 1), np.uint8), r"uint8 of shape \[30, 24, 1\]"),
        (lambda frame: frame.repeat(3, 2), r"uint8 of shape \[24, 24, 3\]"),
        (lambda frame: frame[..., 0], r"uint8 of shape \[24, 24\]"),
        (lambda frame: None, "None"),
    ],
)
def test_a_world_that_shows_something_else_is_refused(
    whole: Pipeline, show: Callable[[np.ndarray], Any], told: str
) -> None:
    class Odd(PaddleBall):
        @property
        def frame(self) -> np.ndarray:
            return show(super().frame)

    with pytest.raises(ValueError, match=rf"^play: the world shows {told}, expected an array of uint8 \[24, 24, 1\] "):
        Game(whole, Odd)


def test_a_step_that_is_none_is_told(paddle: Pipeline) -> None:
    class Pair(PaddleBall):
        def step(self, action: int) -> Any:
            return self.frame, 0.0

    with pytest.raises(ValueError, match=r"^play: step of the world returned .*, expected a starflow.worlds.Step$"):
        Game(paddle, Pair)


def test_waking_up_goes_on_from_the_real_world(game: Game) -> None:
    for _ in range(4):
        game.step(1)
    dreamt = game.moment(10).dream
    game.follow()
    moment = game.step(1)
    assert moment.edited
    np.testing.assert_array_equal(moment.dream, moment.real)
    # What was shown stays, and what the model goes on from is the truth.
    np.testing.assert_array_equal(game.moment(10).dream, dreamt)
    np.testing.assert_array_equal(game.moment(10).past, game.moment(10).real)
    assert not game.step(1).edited


def test_a_teleport_moves_the_ball_and_edits_the_past(game: Game) -> None:
    game.step(0)
    x, y = game.moment(game.last).state.ball
    game.teleport()
    moment = game.step(0)
    left, top = moment.state.ball
    assert max(abs(left - x), abs(top - y)) >= 7
    assert moment.edited
    np.testing.assert_array_equal(moment.dream, moment.real)


def test_surprise_is_that_of_the_clip(game: Game, paddle: Pipeline) -> None:
    for action in (1, 2, 0):
        game.step(action)
    scored = game.score()
    assert [moment.number for moment in scored] == list(range(11))
    seen = moments(game)
    told = one_hot([moment.action for moment in seen], 3)
    for name, score in (("dream", "dream_score"), ("real", "real_score")):
        pixels = to_pixels(torch.from_numpy(np.stack([getattr(moment, name) for moment in seen])))
        (expected,) = surprise(paddle, [Clip(pixels, "", name, frame_conditions=told)])
        bits = torch.tensor([getattr(moment, score).bits for moment in seen], dtype=torch.float64)
        torch.testing.assert_close(bits, expected.frames, rtol=1e-4, atol=1e-2)
    assert scored[-1].dream_score is not None
    assert scored[-1].dream_score.tokens.shape == (6, 6)
    assert scored[-1].dream_score.tokens.dtype == np.float32
    assert game.score() == []


def test_surprise_that_is_asked_for_late_is_of_what_was_shown(paddle: Pipeline, pipeline: Pipeline) -> None:
    late, prompt = Game(paddle, PaddleBall), Game(paddle, PaddleBall)
    for game in (late, prompt):
        for action in (1, 1, 1):
            game.step(action)
    prompt.score()
    for game in (late, prompt):
        # What the model takes for its past is now the truth.
        game.follow()
        game.step(0)
    assert [moment.number for moment in late.score()] == list(range(12))
    prompt.score()
    bits = [[moment.dream_score.bits for moment in moments(game)] for game in (late, prompt)]  # type: ignore[union-attr]
    np.testing.assert_allclose(bits[0], bits[1], rtol=1e-5)
    assert all(abs(bits[0][n] - late.moment(n).real_score.bits) > 1.0 for n in (8, 9, 10))  # type: ignore[union-attr]
    texts = [Game(pipeline), Game(pipeline)]
    for game in texts:
        game.step()
    texts[0].score()
    for game in texts:
        game.tell("a three moving up")
        game.score()
    assert texts[1].moment(0).dream_score is not None
    assert texts[1].moment(0).dream_score.bits == texts[0].moment(0).dream_score.bits  # type: ignore[union-attr]
    texts[1].step()
    texts[1].tell("a two moving up")
    texts[1].branch(0)
    assert texts[1].score() == []


@pytest.mark.skipif("paddle" not in shipped_names(), reason="no model of the paddle world comes with the package")
def test_a_trained_model_is_surprised_by_a_teleport() -> None:
    game = Game(Pipeline.load("paddle"), lambda: PaddleBall(64, channels=3))
    ordinary, broken = [], []
    game.score()
    for frame in range(80):
        if frame % 20 == 19:
            game.teleport()
        moment = game.step(frame % 3)
        game.score()
        assert moment.real_score is not None
        # A ball that was put elsewhere shows for the frames in which the model has not seen how it flies.
        (broken if moment.edited else ordinary if frame % 20 > 8 else []).append(moment.real_score.bits)
    assert len(broken) == 4
    assert min(broken) > np.quantile(ordinary, 0.95)


def test_moments_are_scored_in_turn(paddle: Pipeline) -> None:
    at_once, game = (Game(paddle, PaddleBall, seed=1) for _ in range(2))
    assert game.scored_together == 1
    assert len(at_once.score()) == 8
    assert [moment.number for moment in game.score(3)] == [0, 1, 2]
    assert game.moment(3).dream_score is None
    assert [moment.number for moment in game.score(2)] == [3, 4]
    assert [moment.number for moment in game.score()] == [5, 6, 7]
    for number in range(8):
        found, expected = (one.moment(number).dream_score for one in (game, at_once))
        assert found is not None
        assert expected is not None
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_gap_of_forgotten_moments_begins_the_scores_anew(paddle: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOMENTS", 12)
    game, other = (Game(paddle, PaddleBall, seed=1) for _ in range(2))
    game.score(2)
    for one in (game, other):
        for _ in range(20):
            one.step(0)
    assert [moment.number for moment in game.score()] == list(range(16, 28))
    other.score()
    np.testing.assert_array_equal(game.moment(27).dream_score.tokens, other.moment(27).dream_score.tokens)


def test_moments_may_be_left_out(game: Game) -> None:
    game.skip_scores()
    assert game.unscored == 0
    game.step(0)
    assert [moment.number for moment in game.score()] == [8]


def test_what_is_remembered_is_bounded(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOMENTS", 12)
    for _ in range(10):
        game.step(0)
        game.score()
    assert (game.first, game.last) == (6, 17)
    with pytest.raises(ValueError, match="play: frame is 5, expected 6 to 17"):
        game.moment(5)
    assert game.frames(0, 17).shape == (12, 24, 49, 1)


def test_a_clip_shows_both(game: Game) -> None:
    frames = game.frames(6, 7)
    assert frames.shape == (2, 24, 49, 1)
    np.testing.assert_array_equal(frames[1, :, :24], game.moment(7).dream)
    np.testing.assert_array_equal(frames[1, :, 25:], game.moment(7).real)
    assert b"ftyp" in module.write_clip(frames, 30.0)[:32]
    with pytest.raises(ValueError, match="play: the clip has no frame"):
        game.frames(8, 7)


def test_a_world_of_other_actions_is_refused(paddle: Pipeline) -> None:
    class Two(PaddleBall):
        actions = ("stay", "up")  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"the world paddle has 2 actions \(stay, up\), expected 3 like the model"):
        Game(paddle, Two)


def test_actions_in_another_order_are_refused_and_of_other_names_told(paddle: Pipeline, caplog) -> None:
    class Mixed(PaddleBall):
        actions = ("up", "stay", "down")  # type: ignore[assignment]

    class Named(PaddleBall):
        actions = ("noop", "left", "right")  # type: ignore[assignment]

    with pytest.raises(
        ValueError, match=r"has the actions up, stay, down, expected them in the order of the model: stay, up"
    ):
        Game(paddle, Mixed)
    Game(paddle, PaddleBall)
    assert not caplog.messages
    assert Game(paddle, Named).actions == ("noop", "left", "right")
    assert caplog.messages == [
        "play: the world paddle has the actions noop, left, right, and the model learned stay, up, down: each is taken "
        "for the one in its place"
    ]


def test_a_world_may_show_every_frame_in_the_same_memory(paddle: Pipeline) -> None:
    class Buffered(PaddleBall):
        shown = np.zeros((24, 24, 1), np.uint8)

        def reset(self, seed: int | None = None) -> np.ndarray:
            self.shown[...] = super().reset(seed)
            return self.shown

        def step(self, action: int) -> Step:
            step = super().step(action)
            self.shown[...] = step.frame
            return Step(self.shown, step.reward, step.done)

    one, other = Game(paddle, PaddleBall), Game(paddle, Buffered)
    for action in (1, 2, 1):
        one.step(action)
        other.step(action)
    for plain, buffered in zip(moments(one), moments(other), strict=True):
        np.testing.assert_array_equal(plain.real, buffered.real)
        np.testing.assert_array_equal(plain.dream, buffered.dream)


def test_seeds_of_games_are_integers(game: Game) -> None:
    with pytest.raises(ValueError, match=r"^play: seed is -1, expected an integer >= 0$"):
        game.new(-1)


def test_a_world_that_fails_leaves_the_moments(paddle: Pipeline) -> None:
    class Fails(PaddleBall):
        def step(self, action: int) -> Step:
            if action == 2:
                raise WorldError("world paddle failed")
            return super().step(action)

    game = Game(paddle, Fails)
    game.step(1)
    with pytest.raises(WorldError, match="world paddle failed"):
        game.step(2)
    assert game.last == 8
    assert game.step(1).number == 9


def test_a_model_of_text_streams_and_is_told_what_happens_next(pipeline: Pipeline) -> None:
    game = Game(pipeline)
    assert game.actions == ()
    assert not game.can_teleport
    for _ in range(5):
        game.step()
    with pytest.raises(ValueError, match="prompt"):
        game.tell("an unknownword moving")
    assert game.prompt == ""
    game.tell("a three moving up")
    for _ in range(3):
        game.step()
    scored = game.score()
    assert [moment.number for moment in scored] == list(range(8))
    assert all(moment.real_score is None and moment.dream_score is not None for moment in scored)
    game.branch(2)
    assert game.step().number == 3


def test_a_branch_where_a_block_of_frames_is_not_whole(
    configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]
) -> None:
    config = configure(in_channels=32)
    game = Game(build(replace(config, codec={**config.codec, "temporal": 2})))
    for _ in range(4):
        game.step()
    for number in (2, 0):
        game.branch(number)
        assert game.step().number == number + 1


def test_a_model_without_text_refuses_a_prompt(game: Game) -> None:
    with pytest.raises(ValueError, match="the model was trained without text"):
        game.tell("a three")


def test_a_model_of_whole_clips_shows_one_after_the_other(
    configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]
) -> None:
    game = Game(build(configure(temporal_causal=0, shallow_block_local=False, cond_top_only=False)))
    pictures = np.stack([game.step().dream for _ in range(6)])
    assert (pictures[:2] != pictures[4:]).any()
    game.tell("a three moving up")
    game.step()
