"""Clips of files, cut as the model of a pipeline was trained on them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from starflow.arguments import check_text
from starflow.config import RunConfig
from starflow.data import (
    IMAGE_SUFFIXES,
    Clip,
    VideoError,
    VideoFolder,
    actions_of,
    aspect_size,
    caption_at,
    captions_of,
    check_actions,
    frames_at,
    is_folder,
    nearest_aspect,
    of_clip,
    plays_otherwise,
    probe,
    read_image,
    read_video,
    to_pixels,
)
from starflow.messages import listed, shown
from starflow.numeric import integer
from starflow.sampling import Pipeline

logger = logging.getLogger(__name__)


def read_clips(
    pipeline: Pipeline,
    paths: str | Path | Sequence[str | Path],
    *,
    frames: int | None = None,
    clips_per_file: int = 1,
    caption: str | None = None,
) -> list[Clip]:
    """Cuts clips in the size and at the rate that the flow was trained on.

    Args:
        pipeline: of the flow.
        paths: one or several of video files, images (of models that make images), folders and tar files of them. Clips
            of one name in several of them are told by their paths. In folders a file that cannot be read is skipped
            with a line in the log. Captions come from where training took them: text files beside the videos, file
            names, and the second of the cut.
        frames: of a clip, by default those of the training clips.
        clips_per_file: cut evenly from each file.
        caption: of all clips, in place of their own.

    Raises:
        ValueError, FileNotFoundError: a path that does not exist or cannot be read; the message names it.
    """
    data = pipeline.config.data
    count = data.frames if frames is None else frames
    for name, value in (("frames", count), ("clips_per_file", clips_per_file)):
        if (whole := integer(value)) is None or whole < 1:
            raise ValueError(f"read_clips: {name} is {shown(value)}, expected an integer >= 1")
    if caption is not None:
        check_text("read_clips", "caption", caption)
    clips: list[Clip] = []
    places: list[Path] = []
    for path in _once([paths] if isinstance(paths, str | Path) else paths):
        if pipeline.config.flow.frame_dim:
            check_actions(path if is_folder(path) else path.parent, data.actions)
        if is_folder(path):
            folder = VideoFolder(
                path,
                frames=count,
                height=data.height,
                width=data.width,
                fps=data.fps,
                channels=data.channels,
                clips_per_file=clips_per_file,
                cut="even",
                name_captions=data.name_captions,
                caption_second=data.caption_second,
                aspect_multiple=_multiple(pipeline) if data.mix_aspect else None,
                frame_dim=pipeline.config.flow.frame_dim,
            )
            tell_rates("score", pipeline.config, folder.rates_of_files)
            found = [folder.item(index) for index in range(len(folder))]
        else:
            found = _cut(path, count, clips_per_file, pipeline)
        # Of a file that is hardly longer than a clip several begin at one frame.
        once = {(clip.name, clip.caption): clip for clip in found}
        if len(once) < len(found):
            logger.warning("%s: of %d clips %d are different, the others are left out", path, len(found), len(once))
        clips += once.values()
        places += [path if is_folder(path) else path.parent] * len(once)
    clips = _told_apart(clips, places)
    return clips if caption is None else [replace(clip, caption=caption) for clip in clips]


def tell_rates(who: str, config: RunConfig, rates: Mapping[str, float]) -> None:
    """Tells of files at other rates than the clips of a model that was not trained at a rate by name (`data.fps`).

    Args:
        who: function or command, for the message.
        config: of the model.
        rates: frames a second by names of files.
    """
    data, usual = config.data, config.sample.fps
    # A folder that was trained on has rates of its own.
    if data.kind == "folder" or data.fps is not None:
        return
    other = [f"{name} has {rate:g}" for name, rate in rates.items() if rate and plays_otherwise(rate, usual)]
    if other:
        logger.warning(
            "%s: clips of the model have %g frames a second, %s: they play at another speed", who, usual, listed(other)
        )


def _told_apart(clips: Sequence[Clip], places: Sequence[Path]) -> list[Clip]:
    """The clips, of which those of one name in several places have the place in front of it."""
    found: dict[str, set[Path]] = {}
    for clip, place in zip(clips, places, strict=True):
        found.setdefault(clip.name, set()).add(place)
    return [
        replace(clip, name=str(place / clip.name)) if len(found[clip.name]) > 1 else clip
        for clip, place in zip(clips, places, strict=True)
    ]


def _once(paths: Sequence[str | Path]) -> list[Path]:
    """The paths without those that others lead to as well; these have a line in the log."""
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | Path) for path in paths):
        raise ValueError(f"score: paths is {shown(paths)}, expected a path or a list of paths")
    if not all(str(path).strip() for path in paths):
        raise ValueError("score: a path is empty, expected a video or a folder of videos")
    known: dict[Path, Path] = {}
    for path in map(Path, paths):
        whole = Path(os.path.realpath(path))
        if whole in known:
            logger.warning("%s is given twice and read once", path)
        known.setdefault(whole, path)
    found = []
    for whole, path in known.items():
        if (folder := next((known[other] for other in whole.parents if other in known), None)) is not None:
            logger.warning("%s is in %s, which is given too, and is read once", path, folder)
        else:
            found.append(path)
    return found


def _multiple(pipeline: Pipeline) -> int:
    """What the sides of clips are multiples of."""
    return pipeline.codec.spatial * pipeline.flow.config.patch_size


def _size(pipeline: Pipeline, height: int, width: int) -> tuple[int, int]:
    """Height and width of the clips of a file of this size, as training cut them."""
    data = pipeline.config.data
    if not data.mix_aspect:
        return data.height, data.width
    side = round(math.sqrt(data.height * data.width))
    return aspect_size(side, nearest_aspect(height, width), _multiple(pipeline))


def _cut(path: Path, frames: int, clips_per_file: int, pipeline: Pipeline) -> list[Clip]:
    """Clips of one file, from its first possible start to its last."""
    data = pipeline.config.data
    caption = captions_of(path, by_name=data.name_captions)[0]
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if frames > 1:
            raise VideoError(f"{path}: an image is one frame, expected a video of at least {frames}")
        high, wide = data.height, data.width
        if data.mix_aspect:
            high, wide = _size(pipeline, *read_image(path, channels=1).shape[1:3])
        picture = read_image(path, height=high, width=wide, channels=data.channels)
        return [Clip(to_pixels(picture), caption, path.name)]
    info = probe(path, count=True)
    fps = data.fps or info.fps
    tell_rates("score", pipeline.config, {str(path): fps})
    high, wide = _size(pipeline, info.height, info.width)
    told = None
    if dim := pipeline.config.flow.frame_dim:
        told = actions_of(path, info, fps, dim)
    last = frames_at(info, fps) - frames
    if last < 0:
        raise VideoError(f"{path}: {last + frames} frames at {fps:g} frames per second, expected at least {frames}")
    spots = [last // 2] if clips_per_file == 1 else np.linspace(0, last, clips_per_file).round().astype(int).tolist()
    return [
        Clip(
            to_pixels(
                read_video(
                    path,
                    frames=frames,
                    fps=fps,
                    start=spot / fps,
                    info=info,
                    height=high,
                    width=wide,
                    channels=data.channels,
                )
            ),
            caption_at(caption, spot / fps) if data.caption_second else caption,
            f"{path.name}@{spot}",
            frame_conditions=None if told is None else of_clip(told, spot, frames),
        )
        for spot in spots
    ]
