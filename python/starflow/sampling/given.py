"""Pictures and videos that a clip begins with, refers to or ends with, as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starflow.codecs import Codec, tell_scale
from starflow.config import RunConfig
from starflow.data import (
    ACTION_SUFFIX,
    VideoError,
    action_vector,
    check_actions,
    frames_at,
    probe,
    read_actions,
    read_image,
    read_video,
    to_pixels,
)
from starflow.messages import shown
from starflow.sampling.options import Actions

# Frames of one action that no clip has.
_ACTIONS = 10_000_000


@dataclass(frozen=True)
class GivenReader:
    """Reads given pictures and videos for clips of one size.

    Args:
        codec: codec of the model.
        clips: number of clips that are made.
        size: height and width in pixels.
        fps: frames a second that a video is read at; None for its own.
        training_frames: pixel frames of the training clips.
        forward: whether the model runs forward in time, so that clips can go on from what is given.
        device: device that the pixels go to.
    """

    codec: Codec
    clips: int
    size: tuple[int, int]
    fps: float | None
    training_frames: int
    forward: bool
    device: torch.device

    def picture(self, name: str, source: str | Path | Tensor) -> Tensor:
        """A picture as the one frame of every clip.

        Args:
            name: of the option.
            source: a file, or a tensor ([clips,] channels, height, width) in [-1, 1].

        Returns:
            (clips, 1, channels, height, width).

        Raises:
            ValueError: a tensor of another shape, or a model that cannot go on from frames.
            VideoError: a file that cannot be read.
        """
        self._check_forward(name)
        if isinstance(source, Tensor):
            tell_scale(f"sample: no pixel of {name}", [source])
            if source.dim() < 3:
                raise ValueError(
                    f"sample: {name} has shape {list(source.shape)}, expected ([clips,] channels, height, width)"
                )
            return self._checked(name, source.unsqueeze(-4))
        if not Path(source).is_file():
            raise VideoError(f"sample: {name} is {str(source)!r}, {_lack(source)}, expected a picture")
        height, width = self.size
        return self._checked(
            name, to_pixels(read_image(source, height=height, width=width, channels=self.codec.channels))
        )

    def video(
        self, name: str, source: str | Path | Tensor, most: int | None, *, exactly: bool = False, end: bool = True
    ) -> Tensor:
        """The last or first frames of a video, for every clip.

        Args:
            name: of the option.
            source: a file, or a tensor ([clips,] frames, channels, height, width) in [-1, 1].
            most: frames that are taken at most; None takes as many as the training clips have.
            exactly: refuses a video that has fewer than `most`.
            end: takes the last frames in place of the first.

        Returns:
            (clips, frames, channels, height, width).

        Raises:
            ValueError: too few frames, a tensor of another shape, or a model that cannot go on from frames.
            VideoError: a file that cannot be read.
        """
        self._check_forward(name)
        most = self.training_frames if most is None else most
        at = ""
        if isinstance(source, Tensor):
            tell_scale(f"sample: no pixel of {name}", [source])
            found, what = source.shape[-4] if source.dim() > 3 else 0, name
        else:
            if not Path(source).is_file():
                raise VideoError(f"sample: {name} is {str(source)!r}, {_lack(source)}, expected a video file")
            info, what = probe(source, count=True), str(source)
            rate = info.fps if self.fps is None else self.fps
            found, at = frames_at(info, rate), f" at {rate:g} a second"
        if name == "source" and found != most:
            raise ValueError(f"sample: source has {found} frames{at}, expected {most} like the sources of training")
        if found < most and exactly:
            option = "given" if end else "frames"
            raise ValueError(f"sample: {option} is {most}, expected at most the {found} frames of {what}")
        count = min(most, found)
        first = found - count if end else 0
        if isinstance(source, Tensor):
            return self._checked(name, source[..., first : first + count, :, :, :])
        height, width = self.size
        frames = read_video(
            source,
            frames=count,
            fps=rate,
            start=first / rate,
            info=info,
            height=height,
            width=width,
            channels=self.codec.channels,
        )
        return self._checked(name, to_pixels(frames))

    def actions(self, source: Actions, config: RunConfig) -> Tensor:
        """The actions of frames as vectors, for every clip.

        Args:
            source: a file, a text, numbers or vectors (see `SampleOptions.actions`).
            config: of the run, which has the names of actions.

        Returns:
            (clips, frames, frame_dim), NaN where there is none.

        Raises:
            ValueError: a model without actions, or actions that do not fit; the message names them.
        """
        dim = config.flow.frame_dim
        if not dim:
            raise ValueError(
                "sample: actions are given, expected a model that was trained with them (flow.frame_dim > 0)"
            )
        if isinstance(source, Tensor):
            vectors = source
        elif isinstance(source, str | Path) and Path(source).suffix == ACTION_SUFFIX:
            check_actions(Path(source).parent, config.data.actions)
            vectors = read_actions(Path(source), dim)
        else:
            numbers = _numbers(source, config.data.actions or ()) if isinstance(source, str | Path) else source
            told = [action_vector(action, dim, f"frame {frame}") for frame, action in enumerate(numbers)]
            vectors = torch.stack(told) if told else torch.empty(0, dim, dtype=torch.float32)
        vectors = vectors.expand(self.clips, *vectors.shape) if vectors.dim() == 2 else vectors
        if vectors.dim() != 3 or vectors.shape[0] != self.clips or vectors.shape[2] != dim or not vectors.shape[1]:
            raise ValueError(
                f"sample: actions has shape {list(vectors.shape)}, expected ({self.clips} clips, at least 1 frame, "
                f"{dim})"
            )
        return vectors.to(self.device)

    def _check_forward(self, name: str) -> None:
        if not self.forward:
            raise ValueError(
                f"sample: {name} is given, expected a model that runs forward in time (temporal_causal > 0)"
            )

    def _checked(self, name: str, pixels: Tensor) -> Tensor:
        """Checks given pixels and repeats them for every clip."""
        if pixels.dim() == 4:
            pixels = pixels.expand(self.clips, *pixels.shape)
        expected = (self.codec.channels, *self.size)
        if pixels.dim() != 5 or pixels.shape[0] != self.clips or tuple(pixels.shape[2:]) != expected:
            raise ValueError(
                f"sample: {name} has shape {list(pixels.shape)}, expected {self.clips} clips of {list(expected)} frames"
            )
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"sample: {name} holds values that are not finite, expected numbers in [-1, 1]")
        try:
            self.codec.latent_frames(pixels.shape[1])
        except ValueError as error:
            raise ValueError(
                f"sample: {name} gives {pixels.shape[1]} frames, which the codec cannot hold: {error}"
            ) from None
        # Integers are left to the codec, which refuses them.
        return pixels.to(self.device, torch.float32 if pixels.is_floating_point() else None)


def _lack(path: str | Path) -> str:
    """What is wrong with a path that leads to no file."""
    return "which is no file" if Path(path).exists() else "which does not exist"


def _numbers(text: str | Path, names: Sequence[str]) -> list[int]:
    """The actions of a text such as "up:12,stay"."""
    found: list[int] = []
    for part in str(text).split(","):
        name, colon, count = part.strip().partition(":")
        if name not in names or (colon and not (count.isdecimal() and count.strip("0"))):
            known = ", ".join(names) if names else "none, as the actions of this model have no names"
            raise ValueError(
                f"sample: actions has {shown(part.strip())}, expected a file that ends in {ACTION_SUFFIX}, or names "
                f"with their numbers of frames, such as NAME:12 (names: {known})"
            )
        if len(count.lstrip("0")) >= len(str(_ACTIONS)):
            raise ValueError(f"sample: actions has {shown(part.strip())}, expected less than {_ACTIONS} frames")
        found += [names.index(name)] * int(count or 1)
    return found
