"""Clips, the data sets that hold them, and the deterministic order in which training draws them.

A data set has ``len(dataset)`` and ``dataset.item(index, epoch=..., seed=...)``. An item depends on these three numbers
and on nothing else, and a batch depends on ``(seed, step)`` alone, so a resumed run sees the same data.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from starflow.config import ConfigError
from starflow.data.actions import ACTION_SUFFIX, WORLD_FILE, actions_beside, of_clip, read_actions
from starflow.data.captions import aspect_size, nearest_aspect
from starflow.data.ffmpeg import VideoError
from starflow.data.pictures import IMAGE_SUFFIXES, image_size, is_contact_sheet, read_image
from starflow.data.read import VideoInfo, frames_at, probe, read_video
from starflow.data.shards import VIDEO_SUFFIXES, Place, find_places, is_folder, size_of
from starflow.data.sidecars import SIDECAR_SUFFIXES, Sidecars, caption_at, captions_of, composed
from starflow.messages import listed, shown
from starflow.numeric import check_item, integer, number

__all__ = [
    "Clip",
    "ClipDataset",
    "VideoFolder",
    "actions_of",
    "read_batch",
    "sample_batch",
    "sample_group",
    "sample_indices",
    "stack_clips",
    "to_frames",
    "to_pixels",
]

logger = logging.getLogger(__name__)

# Videos beside which a gif of the same name shows the same.
_WHOLE = VIDEO_SUFFIXES - {".gif"}
# A file of 23.976 frames a second is one of 24.
_SAME_RATE = 1.01


@dataclass(frozen=True)
class Clip:
    """One clip with its caption.

    Args:
        pixels: float32 of shape (frames, channels, height, width), in [-1, 1]. An image is one frame.
        caption: what the clip shows; "" where it is not known.
        name: where the clip comes from, for logs and error messages.
        source: in a data set of pairs, pixels of the clip that this one is derived from, of the same shape.
        frame_conditions: a vector for each frame, float32 (frames, frame_dim), such as the action that led to it in
            one-hot form; NaN for a frame without. None for a clip without.
        fps: frames a second at which the clip was cut, where that was drawn for it; None where all clips of the data
            set are cut alike.
    """

    pixels: torch.Tensor
    caption: str
    name: str
    source: torch.Tensor | None = None
    frame_conditions: torch.Tensor | None = None
    fps: float | None = None


def require_clip(what: str, value: object) -> None:
    """Raises ConfigError unless a value is a clip with pixels and a caption, which `Clip` itself does not look at.

    Args:
        what: begins the message, such as "training: item 3 of the data set".
        value: of a data set or a list of the caller's own.
    """
    if not isinstance(value, Clip) or not isinstance(value.pixels, torch.Tensor) or not isinstance(value.caption, str):
        raise ConfigError(
            f"{what} is {shown(value)}, expected a starflow.data.Clip whose pixels are a tensor and whose caption is a "
            "text"
        )
    for name in ("source", "frame_conditions"):
        other = getattr(value, name)
        if other is not None and not isinstance(other, torch.Tensor):
            raise ConfigError(f"{what}, {value.name}, has the {name} {shown(other)}, expected a tensor or None")


def read_batch(clips: Iterable[Clip], count: int) -> tuple[torch.Tensor, list[Clip]]:
    """Stack clips as they are read: a data set may read the next one into the same buffer, and pixels are copied once.

    Args:
        clips: so many, at least one, of one shape and dtype; what they hold is copied before the next one is asked for.
        count: of the clips.

    Returns:
        pixels (batch, frames, channels, height, width), and the clips, whose pixels are its rows.

    Raises:
        ValueError: when there is no clip, or when two differ in shape or dtype.
    """
    pixels: torch.Tensor | None = None
    kept: list[Clip] = []
    for clip in clips:
        if pixels is None:
            pixels = clip.pixels.new_empty(count, *clip.pixels.shape)
        _require_like("read_batch", clip, kept[0] if kept else clip)
        pixels[len(kept)] = clip.pixels
        kept.append(kept_clip(clip, pixels[len(kept)]))
    if pixels is None:
        raise ValueError("read_batch: clips is empty, expected at least one clip")
    return pixels[: len(kept)], kept


def _require_like(who: str, clip: Clip, first: Clip) -> None:
    own, other = ((list(each.pixels.shape), each.pixels.dtype) for each in (clip, first))
    if own[0] != other[0]:
        raise ValueError(f"{who}: {clip.name} has shape {own[0]}, expected {other[0]} like {first.name}")
    if own[1] != other[1]:
        raise ValueError(f"{who}: {clip.name} has dtype {own[1]}, expected {other[1]} like {first.name}")


def kept_clip(clip: Clip, pixels: torch.Tensor | None = None) -> Clip:
    """The clip with tensors of its own: a data set may read the next one into the same buffer.

    Args:
        clip: just read.
        pixels: a copy of its pixels; None makes one.
    """
    source, told = (None if some is None else some.clone() for some in (clip.source, clip.frame_conditions))
    own = clip.pixels.clone() if pixels is None else pixels
    return replace(clip, pixels=own, source=source, frame_conditions=told)


class ClipDataset(Protocol):
    """What the trainer needs of a data set."""

    def __len__(self) -> int: ...

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        """Read one clip; it depends on the arguments alone."""


# A rate that is above a file's by this factor shows frames of it repeatedly; 30 and 29.97 are the same.
_FASTER = 1.05
# Difference of the logarithms of the shapes of a clip and its source that is more than rounding of their sides.
_SKEWED = 0.05

# Pixels from 0 beyond this are of 0 to 255.
_FAR = 2.0


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Turn stored frames into model pixels.

    Args:
        frames: uint8 of shape (frames, height, width, channels).

    Returns:
        float32 of shape (frames, channels, height, width); 0 becomes -1 and 255 becomes 1.

    Raises:
        ValueError: when the frames are of another dtype or shape, such as floating point, or with channels in front.
    """
    if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8:
        kind = str(frames.dtype) if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise ValueError(f"to_pixels: frames are {kind}, expected a tensor of torch.uint8, from 0 to 255")
    if frames.ndim < 3 or frames.shape[-1] not in (1, 3):
        raise ValueError(f"to_pixels: frames have shape {list(frames.shape)}, expected [frames, height, width, 1 or 3]")
    return frames.movedim(-1, -3).to(torch.float32).div(127.5).sub(1.0).contiguous()


def to_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Turn model pixels into frames that can be stored or shown; the inverse of `to_pixels`.

    Args:
        pixels: float of shape (..., channels, height, width); values outside [-1, 1] are clamped.

    Returns:
        uint8 of shape (..., height, width, channels).

    Raises:
        ValueError: when a value is not finite, or the pixels are of another dtype, layout or scale.
    """
    if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
        kind = str(pixels.dtype) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"to_frames: pixels are {kind}, expected a tensor of floating-point numbers in [-1, 1]")
    if pixels.ndim < 3 or pixels.shape[-3] not in (1, 3):
        raise ValueError(f"to_frames: pixels have shape {list(pixels.shape)}, expected [..., 1 or 3, height, width]")
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("to_frames: pixels hold values that are not finite (NaN or infinite), expected finite numbers")
    # What a flow puts out overshoots to both sides; from 0 far upwards are those of 0 to 255.
    if pixels.numel() and float(pixels.min()) >= 0.0 and (most := float(pixels.max())) > _FAR:
        raise ValueError(
            f"to_frames: pixels go from {float(pixels.min()):.4g} to {most:.4g}, expected [-1, 1] (those of 0 to 255 "
            "are divided by 127.5, less 1)"
        )
    levels = pixels.detach().to("cpu", torch.float32).clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()


def stack_clips(clips: Sequence[Clip]) -> tuple[torch.Tensor, list[str]]:
    """Stack clips of one shape into a batch.

    Args:
        clips: at least one clip, all of the same shape.

    Returns:
        pixels (batch, frames, channels, height, width) and the captions.

    Raises:
        ValueError: when there is no clip, or when two differ in shape or dtype.
    """
    if not clips:
        raise ValueError("stack_clips: clips is empty, expected at least one clip")
    for clip in clips:
        _require_like("stack_clips", clip, clips[0])
    return torch.stack([clip.pixels for clip in clips]), [clip.caption for clip in clips]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    order: np.ndarray = np.random.default_rng([seed, epoch]).permutation(length)
    return order


def sample_indices(seed: int, step: int, batch: int, length: int) -> list[tuple[int, int]]:
    """Say which items make up the batch of a training step.

    Each epoch is another permutation of the whole data set. The steps go through the epochs without a gap, so a batch
    may begin in one epoch and end in another. The result depends on the arguments alone, so a run resumes from the
    number of its step.

    Args:
        seed: of the run, not negative.
        step: counted from 0.
        batch: number of items of a step, over all processes.
        length: of the data set.

    Returns:
        `batch` pairs (index, epoch), the arguments of `ClipDataset.item`.

    Raises:
        ValueError: when an argument is out of range.
    """
    for name, value, least in (("seed", seed, 0), ("step", step, 0), ("batch", batch, 1), ("length", length, 1)):
        if (whole := integer(value)) is None or whole < least:
            raise ValueError(f"sample_indices: {name} is {shown(value)}, expected an integer of at least {least}")
    pairs = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, length)
        pairs.append((int(_permutation(seed, epoch, length)[offset]), epoch))
    return pairs


def sample_group(seed: int, step: int, batch: int, groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Say which items make up the batch of a training step where a batch may only hold items of one group.

    In each epoch the items of every group are permuted and cut into batches; the last batch of a group is filled up
    from the beginning of the group. The batches of all groups then come in a random order. With one group this is
    `sample_indices`.

    Args:
        seed, step, batch: as for `sample_indices`.
        groups: indices of the items of each group; no group is empty.

    Returns:
        `batch` pairs (index, epoch), all of one group. An item that occurs twice in an epoch gets two epoch numbers, so
        that it is not cut in the same way.
    """
    if len(groups) == 1:
        return [(groups[0][index], epoch) for index, epoch in sample_indices(seed, step, batch, len(groups[0]))]
    slots = [(group, part) for group, items in enumerate(groups) for part in range(-(-len(items) // batch))]
    epoch, place = divmod(step, len(slots))
    group, part = slots[int(_permutation(seed, epoch, len(slots))[place])]
    items = groups[group]
    order = np.random.default_rng([seed, epoch, group]).permutation(len(items))
    pairs = []
    for position in range(part * batch, (part + 1) * batch):
        again, offset = divmod(position, len(items))
        pairs.append((items[int(order[offset])], epoch * (batch + 1) + again))
    return pairs


def sample_batch(dataset: ClipDataset, seed: int, step: int, batch: int) -> tuple[torch.Tensor, list[str]]:
    """Draw the batch of a training step.

    Args:
        dataset: any data set of clips of one shape.
        seed: of the run.
        step: counted from 0.
        batch: number of clips.

    Returns:
        pixels (batch, frames, channels, height, width) in [-1, 1], and the captions.
    """
    pairs = sample_indices(seed, step, batch, len(dataset))
    pixels, clips = read_batch((dataset.item(index, epoch=epoch, seed=seed) for index, epoch in pairs), len(pairs))
    return pixels, [clip.caption for clip in clips]


@dataclass(frozen=True)
class _Rate:
    """A frame rate at which a file is cut.

    Args:
        fps: frames per second; 0 for an image.
        available: number of frames of the file at this rate; in a pair, of the shorter of the two files.
    """

    fps: float
    available: int


@dataclass(frozen=True)
class _File:
    """One readable file.

    Args:
        path: of the file.
        name: the path relative to the folder.
        rates: at which clips are cut, at least one.
        captions: of which each clip draws one.
        info: of a video; None for an image.
        size: (height, width) of its clips.
        source: in a pair, the file of the sources of these clips.
        actions: vectors of all frames, or None.
    """

    path: Place
    name: str
    rates: tuple[_Rate, ...]
    captions: tuple[str, ...]
    info: VideoInfo | None
    size: tuple[int, int]
    source: _File | None = None
    actions: torch.Tensor | None = None


class VideoFolder:
    """Clips cut from a folder of video files of any format and size, with captions from the files beside them.

    All files below the folder are clips, except hidden files and captions; links to files and folders are followed.
    The captions of `NAME.mp4` are in `NAME.txt` (one caption) or `NAME.json` (`{"caption": "..."}`, or
    `{"captions": [...]}`, of which each item draws one); see `Sidecars` for other spellings of the name. A file without
    captions has the caption "". Images are clips of one frame and are read only when `frames` is 1.

    A gif beside a video of the same name is the same clip and is skipped.

    The log has one line for each file that is skipped because it is missing, empty, corrupt, too short, or holds text
    or no video; for each folder that cannot be read; and for captions that belong to no clip.

    Frames are scaled to cover height x width, cropped in the middle, and chosen by timestamp as in `read_video`.
    Decoded files are kept in memory as uint8 up to `cache_bytes`; a file larger than that is read clip by clip.

    A tar file counts as a folder of its members (see `starflow.data.shards`): `KEY.mp4` in it with its captions in
    `KEY.txt` or `KEY.json`. Those members are clips whose suffix is one of `VIDEO_SUFFIXES` or `IMAGE_SUFFIXES`.

    With `frame_dim` each video has its actions in `NAME.jsonl` (see `read_actions`), and is read at its own rate, so
    that frames and lines keep together. The first frame of a clip has none, since what it acted on is not in the clip.

    With `sources` the clips come in pairs: the source of a clip of `folder/sub/NAME.mp4` is cut from
    `sources/sub/NAME.*`, from the same second on, at the same rate and in the same size. A file without source is
    skipped with one line in the log.

    Args:
        folder: with the files, searched with all its subfolders, or a tar file.
        sources: folder with the sources of the clips; None for clips without sources.
        frames: number of frames of a clip.
        height, width: of a clip.
        fps: frames per second of the clips, or None for each file's own nominal rate. Of several, each clip draws one
            from (seed, epoch, index), among those at which its file has enough frames and that are not above the rate
            of the file itself (within 1 %): no frame is shown twice. `Clip.fps` tells it.
        channels: 3 for RGB, 1 for grey.
        clips_per_file: number of items that each file gives in one epoch.
        cut: where clips begin. "random" draws the beginning from (seed, epoch, index); "even" spreads the clips of a
            file from its first frame to its last, in every epoch the same but for a frame rate that is drawn.
        name_captions: whether the caption of a file without captions consists of the words of its name.
        caption_second: whether the second of the file at which the clip begins stands at the end of its caption, as a
            whole number (not for images).
        cache_bytes: memory for decoded files.
        aspect_multiple: with a number, clips have the one of `ASPECT_RATIOS` that is nearest to the shape of their
            file, about the area of height x width, and sides that are multiples of this number. With None all clips
            are height x width.
        frame_dim: width of the vectors of frames; 0 leaves actions alone.

    Raises:
        ValueError: when an argument is out of range, a caption file is malformed, or no file is readable.
        FileNotFoundError: when the folder does not exist.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frames: int,
        height: int,
        width: int,
        fps: float | Sequence[float] | None = None,
        channels: int = 3,
        clips_per_file: int = 1,
        cut: Literal["random", "even"] = "random",
        name_captions: bool = False,
        caption_second: bool = False,
        cache_bytes: int = 1 << 30,
        aspect_multiple: int | None = None,
        sources: str | Path | None = None,
        frame_dim: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.sources = None if sources is None else Path(sources)
        for place in (self.folder, self.sources):
            if place is not None and not is_folder(place):
                if place.exists():
                    raise ValueError(
                        f"VideoFolder: {place} is a file, expected a folder of videos or a tar file of them"
                    )
                raise FileNotFoundError(f"VideoFolder: folder {place} does not exist")
        # Files are opened when they are read, whatever the working directory is then.
        self.folder = self.folder.absolute()
        self.sources = None if self.sources is None else self.sources.absolute()

        def whole(name: str, value: object, least: int) -> int:
            found = integer(value)
            if found is None or found < least:
                raise ValueError(f"VideoFolder: {name} is {shown(value)}, expected an integer of at least {least}")
            return found

        if integer(channels) not in (1, 3):
            raise ValueError(f"VideoFolder: channels is {shown(channels)}, expected 1 (grey) or 3 (RGB)")
        if cut not in ("random", "even"):
            raise ValueError(f'VideoFolder: cut is "{cut}", expected "random" or "even"')
        self.frames = whole("frames", frames, 1)
        self.height = whole("height", height, 1)
        self.width = whole("width", width, 1)
        self.fps = None if fps is None else _rates(fps)
        self.channels = whole("channels", channels, 1)
        self.clips_per_file = whole("clips_per_file", clips_per_file, 1)
        self.cut = cut
        self.name_captions = name_captions
        self.caption_second = caption_second
        self.cache_bytes = whole("cache_bytes", cache_bytes, 0)
        self.aspect_multiple = None if aspect_multiple is None else whole("aspect_multiple", aspect_multiple, 1)
        self.frame_dim = whole("frame_dim", frame_dim, 0)
        # A source may be of two clips, at their rates and in their sizes.
        self._cache: OrderedDict[tuple[Place, float, tuple[int, int]], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._broken: set[Place] = set()
        self._captions: dict[Place, tuple[str, ...]] = {}
        self._pairs: dict[str, Place] = {}  # sources by their names without suffix
        self._files = self._scan()

    def __len__(self) -> int:
        return len(self._files) * self.clips_per_file

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process, such as a worker that reads ahead, decodes for itself.
        return {name: value for name, value in vars(self).items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _cache=OrderedDict(), _lock=threading.Lock())

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that clips can have, file by file, each once."""
        found: dict[str, None] = {}
        for file in self._files:
            for caption in file.captions:
                if self.caption_second and file.info is not None:
                    ends = ((rate.available - self.frames) / rate.fps for rate in file.rates)
                    last = math.floor(max(ends) + 1e-6)
                    found |= dict.fromkeys(caption_at(caption, second) for second in range(last + 1))
                else:
                    found[caption] = None
        return tuple(found)

    @property
    def files(self) -> int:
        """Number of files that clips are cut from."""
        return len(self._files)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of these files within the folder."""
        return tuple(file.name for file in self._files)

    @property
    def rates(self) -> tuple[float, ...]:
        """All frames a second that clips are cut at, each once; 0 of images."""
        return tuple(dict.fromkeys(rate.fps for file in self._files for rate in file.rates))

    @property
    def rates_of_files(self) -> dict[str, float]:
        """The first frame rate that clips of each file are cut at, by `names`; 0 of images."""
        return {file.name: file.rates[0].fps for file in self._files}

    @property
    def uncaptioned(self) -> tuple[str, ...]:
        """Names of the files all of whose captions are empty."""
        return tuple(file.name for file in self._files if not any(file.captions))

    @property
    def broken_lines(self) -> tuple[str, ...]:
        """Names of the files that have a caption of several lines."""
        return tuple(file.name for file in self._files if any("\n" in caption for caption in file.captions))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All (height, width) that clips can have."""
        return tuple(dict.fromkeys(file.size for file in self._files))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the items, grouped by the size of their clips in the order of `sizes`."""
        found: dict[tuple[int, int], list[int]] = {size: [] for size in self.sizes}
        for index in range(len(self)):
            found[self._files[index // self.clips_per_file].size].append(index)
        return tuple(tuple(items) for items in found.values())

    def listing(self) -> list[str]:
        """A line for each file that clips are cut from: its name, its bytes, its captions and a checksum of actions."""
        files = [part for file in self._files for part in (file, file.source) if part is not None]
        return [f"{file.name} {size_of(file.path)} {file.captions}{_checksum(file.actions)}" for file in files]

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        """Read one clip.

        Where a file turns out to be damaged further in, the log tells so once, and the clip comes from the next file
        with clips of the same size.

        Args:
            index: from 0 to len - 1.
            epoch: with `cut` "random" each epoch cuts the clips at other places.
            seed: of the run.

        Returns:
            the clip, pixels (frames, channels, height, width).

        Raises:
            IndexError: when the index is out of range.
            ValueError: when no file can be read any more, or an argument is no integer from 0 on.
        """
        check_item("VideoFolder", index, len(self), epoch, seed)
        first, part = divmod(index, self.clips_per_file)
        for offset in range(len(self._files)):
            file = self._files[(first + offset) % len(self._files)]
            if file.path in self._broken or file.size != self._files[first].size:
                continue
            # Anew for each file: a run that resumes has yet to find out which ones are damaged.
            rng = np.random.default_rng([seed, epoch, index])
            rate = file.rates[int(rng.integers(len(file.rates)))] if len(file.rates) > 1 else file.rates[0]
            last = rate.available - self.frames
            if self.cut == "random":
                start = int(rng.integers(last + 1))
            elif self.clips_per_file == 1:
                start = last // 2
            else:
                start = round(last * part / (self.clips_per_file - 1))
            caption = file.captions[int(rng.integers(len(file.captions)))]
            try:
                pixels = to_pixels(self._read(file, rate, start))
                source = None if file.source is None else to_pixels(self._read(file.source, rate, start))
            except VideoError as error:
                self._broken.add(file.path)
                logger.warning("skipped: %s", error)
                continue
            told = None if file.actions is None else of_clip(file.actions, start, self.frames)
            if self.caption_second and rate.fps:
                caption = caption_at(caption, start / rate.fps)
            drawn = rate.fps if rate.fps and self.fps is not None and len(self.fps) > 1 else None
            return Clip(pixels, caption, f"{file.name}@{start}", source, told, drawn)
        raise ValueError(f"VideoFolder: none of the files in {self.folder} can be read any more, expected at least one")

    def _scan(self) -> list[_File]:
        sidecars = Sidecars()
        paths, ignored = [], 0
        lines: list[Place] = []
        for path in sidecars.take_from([path for path in self._places(self.folder) if path.name != WORLD_FILE]):
            if path.suffix.lower() == ACTION_SUFFIX:
                lines.append(path)
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES and self.frames > 1:
                ignored += 1
                sidecars.of(path)
                continue
            paths.append(path)
            self._captions[path] = captions_of(path, by_name=self.name_captions, beside=sidecars)
        if self.sources is not None:
            # Without suffix: a clip and its source may be stored in different formats.
            for path in Sidecars().take_from(self._places(self.sources)):
                first = self._pairs.setdefault(_pair_name(path, self.sources), path)
                if first is not path:
                    logger.warning("skipped: %s: %s is the source of the same clips", path, first)
        files = []
        # Threads are enough, since decoders release the lock of the interpreter.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for file in pool.map(self._try_open, paths):
                if isinstance(file, VideoError):
                    logger.warning("skipped: %s", file)
                else:
                    files.append(file)
        lonely = sorted(map(str, set(lines) - set(map(actions_beside, paths))))
        if len(lines) > len(lonely) and not self.frame_dim:
            logger.warning(
                "skipped: the actions of %d videos in %s, the model reads none", len(lines) - len(lonely), self.folder
            )
        if lonely:
            logger.warning("skipped: %s: actions without a video of this name", listed(lonely))
        self._tell(files, paths)
        if ignored:
            logger.warning("skipped: %d images in %s, the clips have %d frames", ignored, self.folder, self.frames)
        for line in sidecars.left_over():
            logger.warning("skipped: %s", line)
        if not files:
            what = "video" if self.sources is None else f"video with a source in {self.sources}"
            raise ValueError(f"VideoFolder: no readable {what} in {self.folder}, expected at least one (see the log)")
        return files

    def _tell(self, files: Sequence[_File], paths: Sequence[Place]) -> None:
        """Tells in the log what clips of these files show otherwise than the files do."""
        slow = [file for file in files if file.info is not None and file.rates[0].fps > _FASTER * file.info.fps]
        if slow:
            assert slow[0].info is not None
            logger.warning(
                "%d files have fewer frames a second than clips: %s has %g, clips %g; its frames are shown repeatedly",
                len(slow),
                slow[0].name,
                slow[0].info.fps,
                slow[0].rates[0].fps,
            )
        told = [file.actions for file in files if file.actions is not None and file.info is not None]
        if told and all(bool(each.isnan().all()) for each in told):
            logger.warning("no frame of %s has an action (all are null)", self.folder)
        if self.sources is None:
            return
        names = {_pair_name(path, self.folder) for path in paths}
        lonely = sorted(name for name in self._pairs if name not in names)
        if lonely:
            logger.warning("skipped: %s in %s: sources without a clip of this name", listed(lonely), self.sources)
        uneven, skewed = [], []
        for file in files:
            source = file.source
            if source is None or file.info is None or source.info is None:
                continue
            fps = file.rates[0].fps
            if frames_at(file.info, fps) != frames_at(source.info, fps):
                uneven.append(file.name)
            shapes = [info.width / info.height for info in (file.info, source.info)]
            if abs(math.log(shapes[0] / shapes[1])) > _SKEWED:
                skewed.append(file.name)
        if uneven:
            logger.warning(
                "clips and sources of different length: %s; what has no counterpart at the end is left out",
                listed(uneven),
            )
        if skewed:
            logger.warning(
                "clips and sources of different aspect ratio: %s; cut to one size they show other parts of the picture",
                listed(skewed),
            )

    @staticmethod
    def _places(folder: Path) -> list[Place]:
        wanted = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {*SIDECAR_SUFFIXES, ACTION_SUFFIX}
        places = find_places(folder, wanted)
        videos = {_pair_name(path, folder) for path in places if path.suffix.lower() in _WHOLE}
        # In fewer colours and at another rate the same clip, as `starflow sample` writes it beside the video.
        doubles = {path for path in places if path.suffix.lower() == ".gif" and _pair_name(path, folder) in videos}
        if doubles:
            logger.warning("skipped: %d gifs in %s, each beside a video of its name", len(doubles), folder)
        return [path for path in places if path not in doubles]

    def _try_open(self, path: Place) -> _File | VideoError:
        try:
            file = self._open(path, self.folder)
            if self.sources is None:
                return file
            source = self._pairs.get(_pair_name(path, self.folder))
            if source is None:
                raise VideoError(f"{path}: no file of this name in {self.sources}, expected the source of the clip")
            paired = replace(self._open(source, self.sources, file.rates), size=file.size)
            known = {rate.fps: rate.available for rate in file.rates}
            rates = tuple(_Rate(rate.fps, min(rate.available, known[rate.fps])) for rate in paired.rates)
            return replace(file, source=paired, rates=rates)
        except VideoError as error:
            return error

    def _open(self, path: Place, folder: Path, rates: Sequence[_Rate] = ()) -> _File:
        """Open a file that is cut at (some of) the given rates, or without any at those of `fps`, or at its own."""
        name, captions = str(path.relative_to(folder)), self._captions.get(path, ("",))
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if is_contact_sheet(path):
                raise VideoError(f"{path}: a contact sheet of samples, which is no picture of one")
            none = torch.full((1, self.frame_dim), torch.nan) if self.frame_dim else None
            return _File(path, name, (_Rate(0.0, 1),), captions, None, self._size(*image_size(path)), actions=none)
        info = probe(path, count=True)
        wanted = tuple(rate.fps for rate in rates) or self.fps or (info.fps,)
        if self.fps is not None and len(self.fps) > 1:
            slow = [fps for fps in wanted if fps <= info.fps * _SAME_RATE]
            if not slow:
                raise VideoError(f"{path}: {info.fps:g} frames per second, expected at least {min(wanted):g}")
            wanted = tuple(slow)
        found = [_Rate(fps, frames_at(info, fps)) for fps in wanted]
        enough = tuple(rate for rate in found if rate.available >= self.frames)
        if not enough:
            most = max(rate.available for rate in found)
            raise VideoError(f"{path}: {most} frames, expected at least {self.frames}")
        size = self._size(info.height, info.width)
        return _File(path, name, enough, captions, info, size, actions=self._actions(path, info, enough[0].fps))

    def _actions(self, path: Place, info: VideoInfo, rate: float) -> torch.Tensor | None:
        """The vectors of the frames of a video, or None where none are read."""
        if not self.frame_dim:
            return None
        return actions_of(path, info, rate, self.frame_dim)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the clips of a file."""
        if self.aspect_multiple is None:
            return self.height, self.width
        side = round(math.sqrt(self.height * self.width))
        return aspect_size(side, nearest_aspect(height, width), self.aspect_multiple)

    def _read(self, file: _File, rate: _Rate, start: int) -> torch.Tensor:
        """Frames of a clip, uint8 (frames, height, width, channels), from frame `start` at this rate on."""
        key = (file.path, rate.fps, file.size)
        with self._lock:
            cached = self._cache.get(key)
            if cached is not None:
                self._cache.move_to_end(key)
        if cached is None:
            if rate.available * math.prod(file.size) * self.channels > self.cache_bytes:
                return self._decode(file, rate, start, self.frames)
            cached = self._decode(file, rate, 0, rate.available)
            with self._lock:
                self._cache[key] = cached
                while sum(entry.nbytes for entry in self._cache.values()) > self.cache_bytes and len(self._cache) > 1:
                    self._cache.popitem(last=False)
        return cached[start : start + self.frames]

    def _decode(self, file: _File, rate: _Rate, start: int, frames: int) -> torch.Tensor:
        size = {"height": file.size[0], "width": file.size[1], "channels": self.channels}
        if file.info is None:
            return read_image(file.path, **size)
        return read_video(file.path, frames=frames, fps=rate.fps, start=start / rate.fps, info=file.info, **size)


def _rates(fps: float | Sequence[float]) -> tuple[float, ...]:
    """The frame rates that clips are cut at."""
    told = fps if isinstance(fps, Sequence) and not isinstance(fps, str) else (fps,)
    found = tuple(float(rate) for rate in map(number, told) if rate is not None and 0.0 < rate < math.inf)
    if not found or len(set(found)) < len(told):
        raise ValueError(f"VideoFolder: fps is {shown(fps)}, expected a positive number, or several that differ")
    return found


def actions_of(path: Place, info: VideoInfo, rate: float, frame_dim: int) -> torch.Tensor:
    """The vectors of the frames of a video that is read at `rate` frames a second (see `read_actions`).

    Raises:
        ValueError: as of `read_actions`, or a rate at which other frames come out than those that have actions.
    """
    told = read_actions(actions_beside(path), frame_dim, info.frames)
    if frames_at(info, rate) != info.frames:
        raise ValueError(
            f"actions: {path} has actions and {info.fps:g} frames a second, expected fps None or as many, and not "
            f"{rate:g}: each frame has an action of its own"
        )
    return told


def _checksum(actions: torch.Tensor | None) -> str:
    return "" if actions is None else f" {zlib.crc32(actions.numpy().tobytes()):08x}"


def _pair_name(path: Place, folder: Path) -> str:
    """The path in its folder without suffix, with composed accents; a clip and its source have the same."""
    return composed(str(path.relative_to(folder).with_suffix("")))
