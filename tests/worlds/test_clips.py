"""Clips of the ball game and how it is played: the same again, all of it seen, and actions that fit their frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from starflow.worlds import POLICIES, PaddleBall, PaddleClips, Policy, one_hot


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
        ({"frames": 0}, "PaddleClips: frames is 0, expected at least 1"),
        ({"size": 16}, "PaddleClips: size is 16, expected at least 24"),
        ({"channels": 2}, r"PaddleClips: channels is 2, expected 1 \(grey\) or 3 \(RGB\)"),
        ({"length": 0}, "PaddleClips: length is 0, expected at least 1"),
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
