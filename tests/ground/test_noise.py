"""Noise by position: a number depends on what it is for and on nothing else."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from starflow.noise import draw, draw_batch


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together = draw([3, 7, 2**63 - 1], 2, 3, 4, 5)
    assert together.shape == (3, 2, 3, 4, 5)
    assert together.dtype == torch.float32
    for row, seed in enumerate([3, 7, 2**63 - 1]):
        assert torch.equal(draw([seed], 2, 3, 4, 5)[0], together[row])


def test_a_frame_does_not_depend_on_the_length_of_the_clip() -> None:
    long = draw([5], 6, 2, 3, 3)
    assert torch.equal(draw([5], 2, 2, 3, 3), long[:, :2])
    assert torch.equal(draw([5], 3, 2, 3, 3, first=3), long[:, 3:])


def test_a_training_row_does_not_depend_on_the_batch() -> None:
    batch = draw_batch(0, 9, (4, 2, 3))
    assert torch.equal(draw_batch(0, 9, (2, 2, 3)), batch[:2])


def test_all_streams_differ() -> None:
    shape = (2, 64)
    drawn = [draw_batch(seed, step, shape)[row] for seed in (0, 1) for step in (0, 1) for row in (0, 1)]
    drawn += [draw_batch(0, 0, shape, purpose="posterior")[0]]
    drawn += list(draw([0, 1], 2, 1, 8, 8).flatten(2).flatten(0, 1))
    for one, other in itertools.combinations(drawn, 2):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.6
        assert not torch.equal(one, other)


def test_numbers_are_standard_normal() -> None:
    values = draw(range(8), 4, 8, 32, 32).double().flatten()
    count = values.numel()
    # Five standard errors of each moment.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert float((values**power).mean()) == pytest.approx(moment, abs=5 * (variance / count) ** 0.5)


def test_these_numbers_are_part_of_the_promise() -> None:
    expected = torch.tensor([0.059911, 0.01556])
    torch.testing.assert_close(draw([0], 1, 1, 1, 2).flatten(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1"])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    message = f"noise: seed is {seed!r}, expected an integer from 0 to 2^63 - 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        draw([seed], 1, 1, 1, 1)  # type: ignore[list-item]
