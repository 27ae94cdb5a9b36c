"""What is read back from clips of a model: the state of the game, the digit, and distances in frozen features.

Every measure is a list with a number for each clip, so that intervals can be drawn over clips, or a distance of sets.
"""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from study import HERE, config_of_kind
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from starflow.data import DIGITS, Clip, ClipDataset, DigitJudge
from starflow.evaluate import FrameFeatures, drift, fidelity, frame_differences
from starflow.storage import saving
from starflow.training.batches import make_dataset

# Frames that clips are given, and that are made behind them: ten times the length of training clips.
GIVEN, LONG = 4, 156
# Clips of a measure.
CLIPS = 32
# Frames of a second, of which the first is held against the last.
SECOND = 30
# Frames in which the ball is followed, and pixels of 24 that it may be off.
FOLLOWED, NEAR = 30, 2
# Of Freeway: the rows that each lane's cars are in, the columns that chickens walk in, the contrast from which on there
# is a car on the road, and the columns that a car may be off.
LANES = ((4, 5), (7,), (9, 10), (11, 12), (14,), (16, 17), (19,), (21, 22), (24,), (26, 27))
CHICKENS = ((8, 10), (21, 23))
CONTRAST = 0.2
OFF = 1.0
# Real clips that features are trained on, and that made ones are held against.
REAL = 256

_read: Callable[[Tensor], Any] = runpy.run_path(str(HERE.parents[1] / "examples" / "plan_in_a_dream.py"))["read"]


@dataclass(frozen=True)
class Held:
    """Clips that no training has seen.

    Args:
        pixels: (clips, frames, channels, height, width), the given frames first.
        captions: of the clips.
        told: vectors of all frames, or None.
    """

    pixels: Tensor
    captions: list[str]
    told: Tensor | None

    def until(self, frames: int) -> Held:
        """Their first frames alone."""
        return replace(self, pixels=self.pixels[:, :frames], told=None if self.told is None else self.told[:, :frames])

    def one(self, index: int) -> Held:
        """One of them alone."""
        only = slice(index, index + 1)
        return Held(self.pixels[only], self.captions[only], None if self.told is None else self.told[only])

    @property
    def given(self) -> Tensor:
        """The first frames."""
        return self.pixels[:, :GIVEN]

    @property
    def truth(self) -> Tensor:
        """What follows them."""
        return self.pixels[:, GIVEN:]


def _dataset(kind: str, frames: int, split: Literal["train", "test"]) -> ClipDataset:
    config = config_of_kind(kind)
    # A recording that is held out has files as long as the longest clips: from each one.
    per_file = 1 if split == "test" else config.data.clips_per_file
    return make_dataset(replace(config, data=replace(config.data, frames=frames, clips_per_file=per_file)), split)


def _stack(clips: list[Clip]) -> Held:
    told = [clip.frame_conditions for clip in clips if clip.frame_conditions is not None]
    return Held(
        torch.stack([clip.pixels for clip in clips]),
        [clip.caption for clip in clips],
        torch.stack(told) if told else None,
    )


@functools.cache
def held_out(kind: str, frames: int = GIVEN + LONG, first: int = 0) -> Held:
    """Clips of the test split; tuning takes others than the study."""
    data = _dataset(kind, frames, "test")
    return _stack([data.item(first + index) for index in range(CLIPS)])


@functools.cache
def features(kind: str, folder: Path) -> tuple[FrameFeatures, FrameFeatures, Tensor]:
    """Features of frames and of motion, fitted to real training clips, and the real clips that are compared with.

    The networks are kept in the folder.
    """
    data = _dataset(kind, SECOND, "train")
    compared = _stack([data.item(REAL + index) for index in range(REAL)]).pixels
    channels, size = compared.shape[2], (compared.shape[3], compared.shape[4])
    path = folder / f"features-{kind}.pt"
    if not path.exists():
        real = _stack([data.item(index) for index in range(REAL)]).pixels
        fitted = [FrameFeatures.fit(frames) for frames in (real.flatten(0, 1), frame_differences(real))]
        with saving(path, "features") as temporary:
            torch.save([network.state_dict() for network in fitted], temporary)
    networks = FrameFeatures(channels, size), FrameFeatures(channels, size)
    for network, state in zip(networks, torch.load(path, weights_only=True), strict=True):
        network.load_state_dict(state)
    return *networks, compared


@functools.cache
def judge() -> DigitJudge:
    """The reader of digits."""
    data = config_of_kind("digits").data
    return DigitJudge(data.height, data.handwritings)


def _means(right: Tensor) -> list[float]:
    return [round(float(share), 4) for share in right.float().mean(1)]


def distances(kind: str, made: Tensor, folder: Path) -> dict[str, float]:
    """Of the first and the last second: Fréchet distances to real frames; of the first also of motion, and overlaps."""
    frames, motion, real = features(kind, folder)
    begun = fidelity(made[:, :SECOND], real, frames, motion)
    spans = drift(made, real, frames, second=SECOND)
    return {
        "frechet": begun.frechet,
        "frechet_motion": float("nan") if begun.frechet_motion is None else begun.frechet_motion,
        "precision": begun.precision,
        "recall": begun.recall,
        "frechet_last": spans[-1].frechet if len(spans) > 1 else float("nan"),
    }


def paddle(made: Tensor, held: Held) -> dict[str, list[float]]:
    """Frames (of each clip) that show what the true game shows under the same keys.

    `ball` is of clips whose ball is there throughout the frames in which it is followed; others have NaN.
    """
    seen, truth = _read(made), _read(held.truth[:, : made.shape[1]])
    right = (seen.paddle - truth.paddle).abs() <= 1
    last = slice(-SECOND, None)
    there = (truth.balls[:, :FOLLOWED] == 1).all(1)
    near = ((seen.x - truth.x).abs() <= NEAR) & ((seen.y - truth.y).abs() <= NEAR) & (seen.balls > 0)
    follow = near[:, :FOLLOWED].float().mean(1)
    out = {"paddle": _means(right[:, :SECOND]), "ball": [round(float(f), 4) for f in follow.where(there, torch.nan)]}
    # A dream has balls of its own once one was missed, so that what it shows is a game is told by their number alone.
    out["one_ball"] = _means(seen.balls[:, :SECOND] == 1)
    if made.shape[1] == LONG:
        out["paddle_last"] = _means(right[:, last])
        out["one_ball_last"] = _means(seen.balls[:, last] == 1)
    return out


@functools.cache
def _road() -> Tensor:
    """The picture without cars (channels, height, width): the median of training frames."""
    data = _dataset("freeway", 1, "train")
    return _stack([data.item(index) for index in range(REAL)]).pixels.flatten(0, 1).median(0).values


def _cars(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Column of the car of each lane, and what it stands out from the road by, both (..., lanes).

    Args:
        pixels: (..., channels, height, width).
    """
    apart = (pixels - _road()).abs().amax(-3)
    lanes = torch.stack([apart[..., list(rows), :].amax(-2) for rows in LANES], -2)
    most, column = lanes.max(-1)
    places = torch.arange(lanes.shape[-1])
    near = lanes.where((places - column[..., None]).abs() <= 2, 0.0)
    return (near * places).sum(-1) / near.sum(-1).clamp(min=1e-6), most


def freeway(made: Tensor, held: Held) -> dict[str, list[float]]:
    """The share of cars that are where those of the true game are, and the peak signal to noise in dB, of each clip.

    Cars go whatever is done, so their way is known; of the chicken three keys in four are heeded, so no model can be
    right about it for long. A car counts where it is whole in the picture and not behind a chicken.
    """
    truth = held.truth[:, : made.shape[1]]
    (place, contrast), (true_place, true_contrast) = _cars(made), _cars(truth)
    counts = (true_contrast > CONTRAST) & (true_place > OFF) & (true_place < made.shape[-1] - 1 - OFF)
    for first, last in CHICKENS:
        counts &= (true_place < first - OFF) | (true_place > last + OFF)
    right = counts & (contrast > CONTRAST) & ((place - true_place).abs() <= OFF)

    def cars(span: slice) -> list[float]:
        return [round(float(each), 4) for each in right[:, span].sum((1, 2)) / counts[:, span].sum((1, 2))]

    def psnr(span: slice) -> list[float]:
        pairs = zip(made[:, span], truth[:, span], strict=True)
        return [float(peak_signal_noise_ratio(clip, true, data_range=2.0)) for clip, true in pairs]

    first, last = slice(SECOND), slice(-SECOND, None)
    out = {"cars": cars(first), "psnr": psnr(first)}
    if made.shape[1] == LONG:
        out |= {"cars_last": cars(last), "psnr_last": psnr(last)}
    return out


def digits(made: Tensor, captions: list[str]) -> dict[str, list[float]]:
    """Of each clip: whether its first 12 frames all show the digit asked for, the share that does, and its way."""
    asked = [DIGITS.index(caption.split()[1]) for caption in captions]
    read = torch.stack([judge().read(clip) for clip in made])
    right = read == torch.tensor(asked)[:, None]
    out = {
        "digit": [float(clip.all()) for clip in right[:, :12]],
        "digit_frames": _means(right[:, :12]),
        "direction": [
            float(judge().direction(clip[:12]) == caption.split(" ", 2)[2])
            for clip, caption in zip(made, captions, strict=True)
        ],
    }
    if made.shape[1] >= LONG:
        out["digit_last"] = _means(right[:, -SECOND:])
    return out
