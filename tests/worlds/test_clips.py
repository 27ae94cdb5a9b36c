"""Clips of the ball game and how it is played: the same again, all of it seen, and actions that fit their frames."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from starflow.worlds import POLICIES, PaddleBall, PaddleClips, PaddleState, Policy, draw_court, one_hot


def paddle_of(frame: torch.Tensor) -> int | None:
    """Upper edge of the paddle in pixels (1, 24, 24); None where the ball is in front of it."""
    levels = (frame[0, 1:-1, 2:4] + 1) / 2
    if (levels > 0.9).any():
        return None
    return int((levels > 0.5).any(1).nonzero().min()) + 1


def test_actions_lead_to_the_frames_that_they_stand_at() -> None:
    dataset, seen = PaddleClips(frames=12), 0
    for index in range(40):
        clip = dataset.item(index)
        assert clip.pixels.shape == (12, 1, 24, 24)
        assert clip.frame_conditions is not None
        assert clip.frame_conditions[0].isnan().all()
        places = [paddle_of(frame) for frame in clip.pixels]
        for frame in range(1, 12):
            before, after = places[frame - 1 : frame + 1]
            if before is not None and after is not None:
                step = (0, -1, 1)[int(clip.frame_conditions[frame].argmax())]
                assert after == min(max(before + step, 1), 17)
                seen += step != 0
    assert seen > 100


def test_a_clip_depends_on_its_numbers_alone() -> None:
    one, other = PaddleClips(frames=4), PaddleClips(frames=4)
    first = one.item(3, epoch=1, seed=2)
    other.item(0)
    assert torch.equal(other.item(3, epoch=1, seed=2).pixels, first.pixels)
    others = [one.item(4, epoch=1, seed=2), one.item(3, epoch=2, seed=2), one.item(3, epoch=1, seed=3)]
    others.append(PaddleClips(frames=4, split="test").item(3, epoch=1, seed=2))
    assert all(not torch.equal(each.pixels, first.pixels) for each in others)


def test_clips_with_contacts_show_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[PaddleState]] = []

    def draw(states: Sequence[PaddleState], *size: int) -> np.ndarray:
        shown.append(list(states))
        return draw_court(states, *size)

    monkeypatch.setattr("starflow.worlds.clips.draw_court", draw)
    clips = PaddleClips(frames=12, contacts=1.0)
    for index in range(200):
        clips.item(index)
    # Where the ball is below the paddle's upper edge as it reaches its column: from -1 to 5 it is met.
    met = [
        then.ball[1] - after.paddle
        for states in shown
        for then, after in pairwise(states)
        if then.ball[0] == 4 and then.velocity[0] < 0
    ]
    assert len(met) >= 200
    near_ends = sum(-3 <= place <= 0 or 4 <= place <= 7 for place in met)
    assert near_ends > 0.4 * len(met)
    assert sum(-1 <= place <= 5 for place in met) > 0.5 * len(met)
    # Without contacts clips are those that they were before there were any.
    usual, begun = PaddleClips(frames=2), PaddleClips(frames=2, contacts=1.0)
    assert torch.equal(PaddleClips(frames=2, contacts=0.0).item(5).pixels, usual.item(5).pixels)
    assert not torch.equal(begun.item(5).pixels, usual.item(5).pixels)


def test_a_paddle_that_is_led_meets_the_ball_where_it_should() -> None:
    places: dict[float, list[int]] = {}
    for aim in (0.0, 0.5, 1.4):
        world = PaddleBall(seed=3)
        policy = Policy(world, "random", np.random.default_rng(0), aim=aim)
        for _ in range(3000):
            before = world.state
            world.step(policy())
            if before.ball[0] == 4 and before.velocity[0] < 0:
                places.setdefault(aim, []).append(before.ball[1] - world.state.paddle)
    low, middle, high = (float(np.median(found)) for found in places.values())
    # A ball at share `aim` of the paddle has its upper edge 6 aim - 1 units below that of the paddle; slips delay it.
    assert abs(low + 1) <= 1.5
    assert abs(middle - 2) <= 1.5
    assert low < middle < high
    hits = [np.mean([-1 <= place <= 5 for place in found]) for found in places.values()]
    assert hits[1] == max(hits)


def test_clips_show_hits_misses_and_every_action() -> None:
    world = PaddleBall(seed=1)
    for kind in POLICIES:
        policy = Policy(world, kind, np.random.default_rng(0))  # type: ignore[arg-type]
        actions = [policy() for _ in range(10)]
        rewards = []
        for _ in range(4000):
            actions.append(policy())
            rewards.append(world.advance(actions[-1]))
        assert set(actions) == {0, 1, 2}
        assert rewards.count(1.0) > 20
        assert rewards.count(-1.0) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "PaddleClips: frames is 0, expected an integer of at least 1"),
        ({"size": 16}, "PaddleClips: size is 16, expected an integer of at least 24"),
        ({"channels": 2}, r"PaddleClips: channels is 2, expected 1 \(grey\) or 3 \(RGB\)"),
        ({"contacts": 1.5}, "PaddleClips: contacts is 1.5, expected 0 to 1"),
        ({"length": 2.5}, "PaddleClips: length is 2.5, expected an integer of at least 1"),
        ({"contacts": "1"}, "PaddleClips: contacts is '1', expected 0 to 1"),
        ({"length": 0}, "PaddleClips: length is 0, expected an integer of at least 1"),
        ({"split": "valid"}, 'PaddleClips: split is "valid", expected "train" or "test"'),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaddleClips(**options)
    with pytest.raises(IndexError, match="PaddleClips: index is 9, expected 0 to 8"):
        PaddleClips(length=9).item(9)
    with pytest.raises(ValueError, match="policy: kind is 'best', expected one of 'random', 'mixed'"):
        Policy(PaddleBall(), "best", np.random.default_rng(0))  # type: ignore[arg-type]


def test_one_hot() -> None:
    told = one_hot([None, 2, 0], 3)
    assert told[0].isnan().all()
    assert torch.equal(told[1:], torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert one_hot([], 3).shape == (0, 3)
    with pytest.raises(ValueError, match="frame 1 has the action 3, expected an integer from 0 to 2"):
        one_hot([0, 3], 3)
