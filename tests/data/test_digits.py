import numpy as np
import pytest
import torch

from starflow.data import CHANGES, DIGITS, DIRECTIONS, VOCABULARY, Clip, DigitJudge, MovingDigits, to_frames, to_pixels
from starflow.data.digits import _draw, _load, _split, _spoil


@pytest.fixture(scope="module")
def judge():
    return DigitJudge()


@pytest.fixture(scope="module")
def held_out():
    dataset = MovingDigits(split="test", length=300)
    return [dataset.item(index) for index in range(300)]


def centre_of_mass(clip: Clip) -> torch.Tensor:
    light = (clip.pixels[:, 0] + 1) / 2
    axis = torch.arange(light.shape[-1]) + 0.5
    mass = light.sum(dim=(1, 2))
    return torch.stack([(light.sum(2) * axis).sum(1) / mass, (light.sum(1) * axis).sum(1) / mass], dim=1)


def test_a_clip_is_a_function_of_its_index_epoch_and_seed():
    first, second = MovingDigits().item(5, epoch=2, seed=3), MovingDigits().item(5, epoch=2, seed=3)
    assert torch.equal(first.pixels, second.pixels)
    assert first.caption == second.caption
    for other in (MovingDigits(seed=1).item(5, epoch=2, seed=3), MovingDigits().item(5, epoch=1, seed=3)):
        assert not torch.equal(first.pixels, other.pixels)


def test_pairs_are_told_by_the_change_alone():
    pairs, plain = MovingDigits(frames=6, pairs=True), MovingDigits(frames=6)
    seen = set()
    for index in range(12):
        pair, alone = pairs.item(index), plain.item(index)
        assert torch.equal(pair.source, alone.pixels)
        assert alone.source is None
        expected = {"negative": -alone.pixels, "backwards": alone.pixels.flip(0)}[pair.caption]
        assert torch.equal(pair.pixels, expected)
        seen.add(pair.caption)
    assert seen == set(CHANGES)


@pytest.mark.parametrize("frames, size", [(1, 32), (8, 32), (40, 24), (8, 64)])
def test_pixels_have_the_announced_shape_and_range(frames, size):
    clip = MovingDigits(frames=frames, size=size).item(0)
    assert clip.pixels.shape == (frames, 1, size, size)
    assert clip.pixels.dtype == torch.float32
    assert clip.pixels.min() == -1.0
    assert 0.9 < clip.pixels.max() <= 1.0
    torch.testing.assert_close(to_pixels(to_frames(clip.pixels)), clip.pixels, rtol=0, atol=1e-6)


def test_no_digit_image_is_in_both_splits():
    train, test = _split("train"), _split("test")
    assert not set(train) & set(test)
    assert 400 < len(train) + len(test) < len(_load()[1])
    assert set(_load()[1][test]) == set(range(10))


def test_the_digit_stays_inside_the_frame_and_keeps_its_mass():
    for index in range(20):
        light = (MovingDigits(frames=40).item(index).pixels + 1) / 2
        mass = light.sum(dim=(1, 2, 3))
        assert (mass - mass.mean()).abs().max() < 0.05 * mass.mean()


def test_the_caption_states_what_the_centre_of_mass_does_first(held_out):
    for clip in held_out:
        words = clip.caption.split(maxsplit=2)
        expected = torch.tensor(DIRECTIONS[words[2]])
        steps = centre_of_mass(clip).diff(dim=0)[:3]
        speed = steps.norm(dim=1)
        if words[2] == "standing still":
            assert speed.max() < 1e-3
        else:
            assert speed.min() > 0.9
            assert ((steps / speed[:, None]) @ expected).min() > 0.98, clip.caption


def test_long_clips_bounce_off_the_walls():
    dataset = MovingDigits(frames=60)
    moving = [clip for clip in map(dataset.item, range(20)) if "still" not in clip.caption]
    for clip in moving:
        centers = centre_of_mass(clip)
        assert (centers.diff(dim=0).sign().diff(dim=0).abs() > 0).any()


@pytest.mark.parametrize("start", ["middle", "anywhere"])
def test_the_motion_is_where_the_picture_shows_the_digit(start):
    dataset = MovingDigits(frames=30, size=24, start=start, length=40)
    images = torch.from_numpy(_load()[0])
    for index in range(40):
        clip, motion = dataset.item(index, epoch=1, seed=2), dataset.motion(index, epoch=1, seed=2)
        assert clip.caption.split(maxsplit=2)[1:] == [DIGITS[motion.digit], motion.direction]
        drawn = [_draw(images[which], motion.centers, 24) for which in np.flatnonzero(_load()[1] == motion.digit)]
        assert any(torch.equal(clip.pixels, picture) for picture in drawn)
        # The middle of the square is not the middle of the ink, but stays as far from it.
        apart = centre_of_mass(clip) - motion.centers
        assert (apart - apart[0]).abs().max() < 0.1


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_a_digit_that_begins_anywhere_moves_as_told_for_three_steps_and_bounces_only_at_the_walls(size):
    dataset = MovingDigits(frames=70, size=size, start="anywhere", length=60)
    begins = set()
    for index in range(60):
        motion = dataset.motion(index)
        heading = torch.tensor(DIRECTIONS[motion.direction]).sign()
        steps = motion.centers.diff(dim=0)
        torch.testing.assert_close(steps[:3], (motion.step * heading).expand(3, 2), rtol=0, atol=1e-4)
        torch.testing.assert_close(steps.abs(), (motion.step * heading).abs().expand(69, 2), rtol=0, atol=1e-4)
        assert motion.low - 1e-4 < motion.centers.min()
        assert motion.centers.max() < motion.high + 1e-4
        at_wall = ((motion.centers - motion.low).abs() < 0.5) | ((motion.centers - motion.high).abs() < 0.5)
        turns = (steps[1:] * steps[:-1]) < 0
        assert torch.equal(turns, at_wall[1:-1] & (heading != 0))
        begins.add(tuple(motion.centers[0].tolist()))
    assert len(begins) > 20


def test_the_middle_and_typical_handwritings_are_the_default():
    usual, spelled = MovingDigits(length=5), MovingDigits(start="middle", handwritings="typical", length=5)
    for index in range(5):
        assert torch.equal(usual.item(index).pixels, spelled.item(index).pixels)
        assert torch.equal(usual.motion(index).centers[0], usual.motion(0).centers[0])


def test_all_handwritings_hold_out_what_the_typical_ones_hold_out():
    train, test = set(_split("train", "all")), set(_split("test", "all"))
    assert not train & test
    assert len(train | test) == len(_load()[1])
    assert set(_split("test")) < test
    assert set(_split("train")) < train


def test_captions_use_the_vocabulary_and_every_direction_occurs(held_out):
    words = {word for clip in held_out for word in clip.caption.split()}
    assert words == {*VOCABULARY, "a", "an", "and", "moving", "standing"}
    assert {clip.caption.split(maxsplit=2)[2] for clip in held_out} == set(DIRECTIONS)
    assert {clip.caption.split()[1] for clip in held_out} == set(DIGITS)


def test_the_judge_reads_real_held_out_clips(judge, held_out):
    score = judge.score([clip.pixels for clip in held_out], [clip.caption for clip in held_out])
    assert score["digit_accuracy"] > 0.99
    assert score["digit_every_frame"] > 0.98
    assert score["direction_accuracy"] > 0.99
    assert score["both_accuracy"] <= min(score["digit_every_frame"], score["direction_accuracy"])


def test_the_judge_reads_frames_one_by_one(judge, held_out):
    for clip in held_out[:20]:
        digit = DIGITS.index(clip.caption.split()[1])
        pixels = clip.pixels.clone()
        pixels[5] = held_out[21].pixels[5]
        pixels[2] = -1.0
        read = judge.read(pixels)
        assert torch.equal(read, torch.cat([judge.read(frame[None]) for frame in pixels]))
        assert read[2] == -1
        others = [0, 1, 3, 4, 6, 7]
        assert torch.equal(read[others], judge.read(clip.pixels)[others])
        assert judge.score([pixels], [clip.caption])["digit_every_frame"] == 0.0
        assert judge.score([pixels], [clip.caption])["digit_accuracy"] >= (read == digit).float().mean() - 1e-6


def test_the_judge_reads_all_handwritings_where_it_learned_them():
    judge, dataset = DigitJudge(24, "all"), MovingDigits(frames=1, size=24, split="test", handwritings="all")
    right = [judge.read(dataset.item(i).pixels)[0] == dataset.motion(i).digit for i in range(400)]
    assert np.mean(right) > 0.96


def test_the_judge_does_not_take_spoiled_digits_for_digits(judge, held_out):
    spoiled = _spoil(torch.cat([clip.pixels[:1] for clip in held_out]), np.random.default_rng(1))
    read = judge.read(spoiled).view(-1, 4)
    assert (read[:, 0] == -1).all()  # empty
    assert (read == -1).float().mean() > 0.9


def test_the_judge_stands_a_little_noise(judge, held_out):
    noise = 0.1 * torch.randn(300, 8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    clips = torch.stack([clip.pixels for clip in held_out]) + noise
    score = judge.score(clips, [clip.caption for clip in held_out])
    assert score["both_accuracy"] > 0.95


def test_the_judge_is_not_pleased_by_other_captions(judge, held_out):
    rolled = [held_out[index - 1].caption for index in range(len(held_out))]
    score = judge.score([clip.pixels for clip in held_out], rolled)
    assert score["digit_accuracy"] < 0.25
    assert score["direction_accuracy"] < 0.25


def test_the_judge_takes_an_empty_clip(judge):
    assert judge.direction(torch.full((8, 1, 32, 32), -1.0)) == "standing still"
    assert judge.read(torch.full((8, 1, 32, 32), -1.0)).tolist() == [-1] * 8


def test_errors_name_what_was_expected(judge):
    with pytest.raises(ValueError, match='MovingDigits: split is "both", expected "train" or "test"'):
        MovingDigits(split="both")
    with pytest.raises(ValueError, match='MovingDigits: start is "left", expected "middle" or "anywhere"'):
        MovingDigits(start="left")
    with pytest.raises(ValueError, match='MovingDigits: handwritings is "mine", expected "typical" or "all"'):
        MovingDigits(handwritings="mine")
    with pytest.raises(ValueError, match="MovingDigits: frames is 0, expected an integer of at least 1"):
        MovingDigits(frames=0)
    with pytest.raises(IndexError, match="MovingDigits: index is 7, expected 0 to 6"):
        MovingDigits(length=7).item(7)
    with pytest.raises(ValueError, match=r"pixels have shape \[8, 3, 32, 32\], expected \[frames, 1, 32, 32\]"):
        judge.read(torch.zeros(8, 3, 32, 32))
    with pytest.raises(ValueError, match='caption "a cat" is not one of MovingDigits'):
        judge.score(torch.zeros(1, 8, 1, 32, 32), ["a cat"])
    with pytest.raises(ValueError, match="got 1 clips and 0 captions"):
        judge.score(torch.zeros(1, 8, 1, 32, 32), [])
    with pytest.raises(ValueError, match="1 frames, expected at least 2"):
        judge.direction(torch.zeros(1, 1, 32, 32))


def test_every_split_holds_each_digit_about_equally_often():
    counts = np.bincount(_load()[1][_split("test")], minlength=10)
    assert counts.min() > 0.6 * counts.mean()
