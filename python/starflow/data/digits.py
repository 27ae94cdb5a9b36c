"""A captioned video set that needs no download: handwritten digits that move and bounce.

The 8x8 digits of scikit-learn (UCI optical recognition of handwritten digits) are drawn at a little over half of the
frame, anti-aliased, on a black ground. `DigitJudge` reads digit and direction back from a
clip, so that a sample can be scored against its caption. With a change named in place of a description it is a set of
pairs, for flows that make one clip of another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from starflow.arguments import check_flag, check_texts
from starflow.data.clips import Clip
from starflow.messages import shown
from starflow.numeric import check_item, integer

__all__ = ["CHANGES", "DIGITS", "DIRECTIONS", "VOCABULARY", "DigitJudge", "Motion", "MovingDigits"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_DIAGONAL = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "moving up": (-1.0, 0.0),
    "moving down": (1.0, 0.0),
    "moving left": (0.0, -1.0),
    "moving right": (0.0, 1.0),
    "moving up and left": (-_DIAGONAL, -_DIAGONAL),
    "moving up and right": (-_DIAGONAL, _DIAGONAL),
    "moving down and left": (_DIAGONAL, -_DIAGONAL),
    "moving down and right": (_DIAGONAL, _DIAGONAL),
    "standing still": (0.0, 0.0),
}
"""What a caption says about the motion, and the unit vector (down, right) that it stands for."""

VOCABULARY = (*DIGITS, "up", "down", "left", "right", "still")
"""The words of the captions that carry meaning, for `starflow.text.WordEncoder`."""

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": torch.neg,
    "backwards": lambda pixels: pixels.flip(0),
}
"""What the caption of a pair says, and what it makes of the source (frames, 1, height, width)."""

Start = Literal["middle", "anywhere"]
Handwritings = Literal["typical", "all"]

# The digit takes 7/12 of the frame, starts in the middle (by default) and moves by whole pixels (one a frame in frames
# below 48), so that a frame is the one before it, moved a little, to the last bit: that much a small flow learns in
# minutes, while leaps of a whole patch, or any position at the start, take it far longer.
_GLYPH = 7 / 12
# Of each digit's images, the share nearest to their mean: those that most people would read at once.
_TYPICAL = 0.4
# The caption states the initial direction, and the judge reads the first steps; no clip bounces before that.
_JUDGED = 3


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) in [0, 1] and their digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.float32) / 16.0, bunch.target.astype(np.int64)


@functools.cache
def _split(name: str, handwritings: Handwritings = "typical") -> np.ndarray:
    """Indices of the digit images of a split.

    Every fifth of the typical images of each digit is held out, and every fifth of the others: what is held out of the
    typical ones is held out of all.
    """
    images, labels = _load()
    pixels = images.reshape(len(images), -1)
    train: list[int] = []
    held_out: list[int] = []
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        far = ((pixels[mine] - pixels[mine].mean(0)) ** 2).sum(1)
        typical = np.sort(mine[np.argsort(far)[: int(_TYPICAL * len(mine))]])
        for part in (typical,) if handwritings == "typical" else (typical, np.setdiff1d(mine, typical)):
            held_out.extend(part[4::5])
            train.extend(np.setdiff1d(part, part[4::5]))
    return np.array(held_out if name == "test" else train)


def _draw(image: torch.Tensor, centers: torch.Tensor, size: int) -> torch.Tensor:
    """Draw one 8x8 digit at each of several centers, as (frames, 1, size, size) in [-1, 1].

    Pixel (i, j) covers [i, i + 1) x [j, j + 1). Cubic interpolation of the 8x8 levels followed by a steeper contrast
    gives strokes with an edge of about one pixel; interpolation alone looks like a blur at this size.
    """
    glyph = _GLYPH * size
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    relative = (axis[None, :, None] - centers.T[:, None, :]) * (2.0 / glyph)  # (2, size, frames)
    rows = relative[0].T[:, :, None].expand(-1, size, size)
    columns = relative[1].T[:, None, :].expand(-1, size, size)
    grid = torch.stack([columns, rows], dim=-1)
    source = image.expand(len(centers), 1, 8, 8)
    levels = F.grid_sample(source, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    levels = ((levels - 0.25) * 2.0).clamp(0.0, 1.0)
    levels = levels * levels * (3.0 - 2.0 * levels)
    # 8-bit levels, like the frames of a file: a likelihood in bits per dimension means a discrete picture.
    return (levels * 255.0).round() / 127.5 - 1.0


def _caption(digit: str, direction: str) -> str:
    article = "an" if digit == "eight" else "a"
    return f"{article} {digit} {direction}"


def _bounce(path: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflect positions at both walls."""
    span = high - low
    phase = np.mod(path - low, 2.0 * span)
    return low + span - np.abs(phase - span)


@dataclass(frozen=True)
class Motion:
    """What is true of a clip of `MovingDigits`.

    Args:
        digit: 0 to 9.
        direction: of the first steps, a key of `DIRECTIONS`.
        centers: (frames, 2) middle of the digit's square in pixels, down and right; pixel i covers [i, i + 1).
        step: pixels that a moving digit moves along each of its axes in a frame.
        low, high: least and greatest coordinate of a center; there the digit turns round.
    """

    digit: int
    direction: str
    centers: torch.Tensor
    step: int
    low: float
    high: float


class MovingDigits:
    """Captioned clips of one handwritten digit that moves in a straight line and bounces off the walls.

    A caption is such as "a three moving up and left" or "a seven standing still"; it states the initial direction,
    which holds for the first steps of every clip. With `pairs` a clip is another one changed, its source, and the
    caption is the name of the change alone, such as "negative": what is seen and how it moves, only the source tells.
    Clips depend on (seed of the set, split, index, epoch, seed) alone.

    Args:
        frames: in a clip.
        size: height and width in pixels.
        split: "train" or "test"; no digit image is in both.
        seed: of the set.
        length: items in one epoch.
        pairs: clips have a source.
        start: where clips begin: in the "middle" of the picture, or "anywhere" from which the digit goes at least
            three steps before it bounces, as if cut from a motion without end.
        handwritings: the "typical" 40 % of the images of each digit, nearest to their mean, or "all".

    Raises:
        ValueError: when an argument is out of range.

    Reference: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the digit images).
    """

    def __init__(
        self,
        *,
        frames: int = 8,
        size: int = 32,
        split: Literal["train", "test"] = "train",
        seed: int = 0,
        length: int = 10000,
        pairs: bool = False,
        start: Start = "middle",
        handwritings: Handwritings = "typical",
    ) -> None:
        for name, value, least in (("frames", frames, 1), ("size", size, 16), ("seed", seed, 0), ("length", length, 1)):
            if (whole := integer(value)) is None or whole < least:
                raise ValueError(f"MovingDigits: {name} is {shown(value)}, expected an integer of at least {least}")
        check_flag("MovingDigits", "pairs", pairs)
        for option, text, known in (
            ("split", split, ("train", "test")),
            ("start", start, ("middle", "anywhere")),
            ("handwritings", handwritings, ("typical", "all")),
        ):
            if text not in known:
                raise ValueError(f'MovingDigits: {option} is "{text}", expected "{known[0]}" or "{known[1]}"')
        self.frames = frames
        self.size = size
        self.channels = 1
        self.split = split
        self.seed = seed
        self.length = length
        self.pairs = pairs
        self.start = start
        self.handwritings = handwritings

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        """Make one clip.

        Args:
            index: from 0 to length - 1.
            epoch: each epoch shows other digits, positions and directions.
            seed: of the run.

        Returns:
            the clip, pixels (frames, 1, size, size), and its source like it where there are pairs.

        Raises:
            IndexError: when there is no such index.
            ValueError: when an argument is no integer from 0 on.
        """
        rng, image, motion = self._scene(index, epoch, seed)
        clip, name = _draw(image, motion.centers, self.size), f"digits/{self.split}/{index}"
        if self.pairs:
            change = str(rng.choice(list(CHANGES)))
            return Clip(CHANGES[change](clip), change, name, source=clip)
        return Clip(clip, _caption(DIGITS[motion.digit], motion.direction), name)

    def motion(self, index: int, *, epoch: int = 0, seed: int = 0) -> Motion:
        """What is true of the clip that `item` makes of the same arguments (of its source, where there are pairs).

        Raises:
            IndexError: when there is no such index.
            ValueError: when an argument is no integer from 0 on.
        """
        return self._scene(index, epoch, seed)[2]

    def _scene(self, index: int, epoch: int, seed: int) -> tuple[np.random.Generator, torch.Tensor, Motion]:
        """The generator of a clip after its draws, its digit image and its motion."""
        check_item("MovingDigits", index, self.length, epoch, seed)
        rng = np.random.default_rng([self.seed, int(self.split == "test"), index, epoch, seed])
        images, labels = (torch.from_numpy(held) for held in _load())
        which = int(rng.choice(_split(self.split, self.handwritings)))
        direction = str(rng.choice(list(DIRECTIONS)))
        low = self.size * _GLYPH / 2.0
        pixels = max(self.size // 24, 1)
        places = int((self.size - 2.0 * low) // pixels)
        heading = np.sign(DIRECTIONS[direction]).astype(int)
        place = np.array([places // 2, places // 2])
        if self.start == "anywhere":
            # The bounce comes after the steps that the caption speaks of.
            place = rng.integers(np.where(heading < 0, _JUDGED, 0), np.where(heading > 0, places - _JUDGED, places) + 1)
        begin, high, step = low + pixels * place, low + pixels * places, pixels * heading
        path = begin + step * np.arange(self.frames)[:, None]
        centers = torch.from_numpy(_bounce(path, low, high).astype(np.float32))
        return rng, images[which], Motion(int(labels[which]), direction, centers, pixels, low, high)


def _center(weights: torch.Tensor) -> torch.Tensor:
    """Centre of mass (down, right) of each frame: (frames, height, width) -> (frames, 2); NaN for an empty frame."""
    height, width = weights.shape[1:]
    rows = torch.arange(height, dtype=torch.float32) + 0.5
    columns = torch.arange(width, dtype=torch.float32) + 0.5
    mass = weights.sum(dim=(1, 2))
    down = (weights.sum(dim=2) * rows).sum(dim=1) / mass
    right = (weights.sum(dim=1) * columns).sum(dim=1) / mass
    return torch.stack([down, right], dim=1)


def _spoil(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """What no reader should take for a digit, one of each frame (frames, 1, size, size).

    In turn: no ink at all; half of the digit, cut off at its middle; quarters of it swapped; two digits in one.
    """
    out = frames.clone()
    size = frames.shape[-1]
    for row, frame in enumerate(out[:, 0]):
        kind = row % 4
        down, right = (int(c) for c in _center((frames[row] + 1.0) / 2.0)[0])
        if kind == 0:
            frame.fill_(-1.0)
        elif kind == 1:
            half = (frame[:down], frame[down:], frame[:, :right], frame[:, right:])[int(rng.integers(4))]
            half.fill_(-1.0)
        elif kind == 2:
            frame.copy_(frame.roll((size // 2 - down, size // 2 - right), (0, 1)))
            rows, columns = (slice(size // 2 - 8 * size // 24, size // 2 + 8 * size // 24),) * 2
            square = frame[rows, columns]
            square.copy_(square.roll(len(square) // 2, int(rng.integers(2))))
        else:
            other = frames[int(rng.integers(len(frames))), 0]
            frame.copy_(torch.maximum(frame, other.roll((int(rng.integers(2, 5)), int(rng.integers(2, 5))), (0, 1))))
    return out


class DigitJudge:
    """Reads digits and directions from clips, to score samples against their captions.

    The digit: each frame by itself, aligned by its centre of mass, goes to a support vector machine that is trained on
    rendered digits of the train split, and on spoiled ones, when the judge is made (a few seconds). Nothing is averaged
    over frames: a clip whose digit frays in its last frame is not read by its first ones. The direction: the slope of
    the centre of mass over the first steps.

    Args:
        size: height and width of the clips.
        handwritings: that it has learned to read, as of `MovingDigits`.
    """

    def __init__(self, size: int = 32, handwritings: Handwritings = "typical") -> None:
        from sklearn.svm import SVC

        self.size = size
        loaded, labels = _load()
        images = torch.from_numpy(loaded)
        rng = np.random.default_rng(0)
        indices = np.repeat(_split("train", handwritings), 2)
        centers = torch.from_numpy((size / 2.0 + rng.uniform(-1.0, 1.0, (len(indices), 2))).astype(np.float32))
        drawn = [_draw(images[i], center[None], size) for i, center in zip(indices, centers, strict=True)]
        frames = torch.cat(drawn)
        spoiled = _spoil(frames[torch.from_numpy(rng.permutation(len(frames)))], rng)
        features = self.features(torch.cat([frames, spoiled]))
        targets = np.concatenate([labels[indices], np.full(len(spoiled), -1)])
        self._classifier = SVC(C=10.0, gamma="scale").fit(features, targets)

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        """Read the digit of each frame.

        Args:
            pixels: a clip (frames, 1, size, size) in [-1, 1].

        Returns:
            (frames,) int64: 0 to 9, and -1 for what is no digit.

        Raises:
            ValueError: when the clip has another shape.
        """
        return torch.from_numpy(self._classifier.predict(self.features(pixels)).astype(np.int64))

    def direction(self, pixels: torch.Tensor) -> str:
        """Read the initial direction.

        Args:
            pixels: a clip (frames, 1, size, size) in [-1, 1], at least two frames.

        Returns:
            a key of `DIRECTIONS`: "standing still" below half of the slowest speed of `MovingDigits`, else the
            nearest of the eight.

        Raises:
            ValueError: when the clip has another shape.
        """
        if len(pixels) < 2:
            raise ValueError(f"DigitJudge: pixels have {len(pixels)} frames, expected at least 2 to see a direction")
        centers = _center(self._weights(pixels[: _JUDGED + 1]))
        time = torch.arange(len(centers), dtype=torch.float32)
        time -= time.mean()
        velocity = (time[:, None] * centers).sum(dim=0) / (time * time).sum()
        speed = float(velocity.norm())
        if not speed >= 0.5 * (self.size // 24):
            return "standing still"
        return max(DIRECTIONS, key=lambda name: float(velocity @ torch.tensor(DIRECTIONS[name])))

    def score(self, clips: Sequence[torch.Tensor] | torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Compare clips with their captions.

        Args:
            clips: (frames, 1, size, size) each, or one tensor with a batch axis in front.
            captions: as `MovingDigits` writes them, one for each clip.

        Returns:
            shares of the clips: "digit_every_frame", whose every frame shows the digit asked for, "direction_accuracy",
            and "both_accuracy"; and "digit_accuracy", the share of all frames.

        Raises:
            ValueError: when the numbers differ, or a caption is not one of `MovingDigits`.
        """
        check_texts("DigitJudge", "captions", captions)
        if len(clips) != len(captions) or not captions:
            raise ValueError(f"DigitJudge: got {len(clips)} clips and {len(captions)} captions, expected as many, >= 1")
        right = np.zeros((len(captions), 3))
        for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
            _, digit, direction = [*caption.split(maxsplit=2), "", "", ""][:3]
            if digit not in DIGITS or direction not in DIRECTIONS:
                raise ValueError(
                    f'DigitJudge: caption "{caption}" is not one of MovingDigits, '
                    'expected such as "a three moving up and left"'
                )
            shown = self.read(clip) == DIGITS.index(digit)
            right[row] = bool(shown.all()), self.direction(clip) == direction, float(shown.float().mean())
        return {
            "digit_every_frame": float(right[:, 0].mean()),
            "direction_accuracy": float(right[:, 1].mean()),
            "both_accuracy": float(right[:, :2].prod(axis=1).mean()),
            "digit_accuracy": float(right[:, 2].mean()),
        }

    def _weights(self, pixels: torch.Tensor) -> torch.Tensor:
        expected = (1, self.size, self.size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"DigitJudge: pixels have shape {list(pixels.shape)}, expected [frames, 1, {self.size}, {self.size}]"
            )
        # A sample carries a little noise on its ground; below this floor it must not pull on the centre of mass.
        levels = pixels[:, 0].detach().to("cpu", torch.float32).add(1.0).mul(0.5)
        return (levels - 0.25).clamp(0.0, 0.75) / 0.75

    def features(self, pixels: torch.Tensor) -> np.ndarray:
        """What the classifier reads of each frame: the digit, moved to the middle and enlarged to 12 x 12 levels.

        Args:
            pixels: (frames, 1, size, size) in [-1, 1].

        Returns:
            (frames, 144) float32.

        Raises:
            ValueError: when the frames have another shape.
        """
        weights = self._weights(pixels)
        centers = torch.nan_to_num(_center(weights), nan=self.size / 2.0)
        window = 12
        glyph = _GLYPH * self.size * 1.1
        offsets = ((torch.arange(window) + 0.5) / window - 0.5) * glyph
        rows = (centers[:, 0, None] + offsets) * (2.0 / self.size) - 1.0
        columns = (centers[:, 1, None] + offsets) * (2.0 / self.size) - 1.0
        grid = torch.stack(
            [columns[:, None, :].expand(-1, window, -1), rows[:, :, None].expand(-1, -1, window)], dim=-1
        )
        aligned = F.grid_sample(weights[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        features: np.ndarray = aligned.flatten(1).numpy()
        return features
