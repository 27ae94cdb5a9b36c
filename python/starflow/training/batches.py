"""Batches: clips, captions and noise of a training step, made ahead of time.

A batch depends on the seed and the number of its step alone.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from starflow.arguments import check_config
from starflow.codecs import Codec, make_codec
from starflow.config import ConfigError, DataConfig, RunConfig, TrainConfig, require
from starflow.data import (
    WORLD_FILE,
    CaptionMode,
    Clip,
    ClipDataset,
    MovingDigits,
    VideoFolder,
    is_folder,
    kept_clip,
    plays_otherwise,
    read_batch,
    read_world,
    require_clip,
    sample_group,
    stack_clips,
)
from starflow.messages import listed, shown
from starflow.noise import draw_batch, stream
from starflow.text import STOP_WORDS, TextEncoder, caption_for, make_text_encoder, split_words
from starflow.worlds import PaddleClips

logger = logging.getLogger(__name__)


# Options that only a folder has, and their values where nothing else was asked for.
_OF_FOLDERS: dict[str, Any] = {
    "path": None,
    "mix_fps": (),
    "clips_per_file": 1,
    "cut": "random",
    "name_captions": False,
    "caption_second": False,
}


def make_dataset(config: RunConfig, split: Literal["train", "test"] = "train") -> ClipDataset:
    """The data set that a run is trained or tested on; with `train.source_prob` one of pairs.

    Args:
        config: of the run.
        split: digits: no digit image is in both. Paddle: no game is in both. Folder: its subfolder of this name where
            there is one, else the whole folder; clips are cut as `data.cut` says for "train" and evenly for "test".
            Pairs are in subfolders "target" and "source" of that.

    Raises:
        ConfigError: options that the kind of data cannot honour.
        ValueError, FileNotFoundError: the folder does not exist or holds nothing that can be read.
    """
    check_config("make_dataset", config, RunConfig)
    data, pairs = config.data, config.train.source_prob > 0
    if data.kind != "folder":
        for name, usual in _OF_FOLDERS.items():
            value = getattr(data, name)
            require(value == usual, f"data.{name}", value, f"{usual} with data.kind '{data.kind}' (or kind 'folder')")
    if data.kind == "digits":
        require(data.height == data.width, "data.width", data.width, f"the height {data.height} for digits")
        require(data.channels == 1, "data.channels", data.channels, "1 for digits")
        require(not data.mix_aspect, "data.mix_aspect", data.mix_aspect, "false for digits, which are square")
        return MovingDigits(
            frames=data.frames,
            size=data.height,
            split=split,
            pairs=pairs,
            start=data.start,
            handwritings=data.handwritings,
        )
    if data.kind == "paddle":
        require(data.height == data.width, "data.width", data.width, f"the height {data.height} for the paddle world")
        require(not data.mix_aspect, "data.mix_aspect", data.mix_aspect, "false for the paddle world, which is square")
        require(not pairs, "train.source_prob", config.train.source_prob, "0 for the paddle world, which has no pairs")
        return PaddleClips(
            frames=data.frames, size=data.height, split=split, channels=data.channels, contacts=data.contacts
        )
    if data.path is None:
        raise ConfigError("data.path is None, expected a folder of videos or images, or a tar file of them")
    _check_names(data, config.flow.frame_dim)
    folder = _part(Path(data.path), split)
    source, target = (_inside(folder, name) for name in ("source", "target"))
    require(
        not pairs or (source is not None and target is not None),
        "data.path",
        str(folder),
        "a folder with subfolders source and target (with source_prob)",
    )
    if source is not None and target is not None and not pairs:
        logger.warning("%s has subfolders source and target: files of both are clips (train.source_prob is 0)", folder)
    return VideoFolder(
        target if pairs and target is not None else folder,
        sources=source if pairs else None,
        frames=data.frames,
        height=data.height,
        width=data.width,
        # Held-out clips have one rate, so that scores of one run and another are of the same clips.
        fps=data.mix_fps if data.mix_fps and split == "train" else data.fps,
        channels=data.channels,
        clips_per_file=data.clips_per_file,
        cut=data.cut if split == "train" else "even",
        name_captions=data.name_captions,
        caption_second=data.caption_second,
        cache_bytes=int(data.cache_gb * 2**30),
        aspect_multiple=make_codec(config.codec).spatial * config.flow.patch_size if data.mix_aspect else None,
        frame_dim=config.flow.frame_dim,
    )


def tell_data(config: RunConfig, dataset: ClipDataset) -> None:
    """Tells in the log what a run leaves out of its folder of files, or lacks in it.

    Args:
        config: of the run.
        dataset: that it is trained on.
    """
    data, flow, sample = config.data, config.flow, config.sample
    rates = dataset.rates if isinstance(dataset, VideoFolder) else ()
    known = rates if data.fps is None else (data.fps,)
    if data.frames > 1 and known and all(plays_otherwise(rate, sample.fps) for rate in known):
        logger.warning(
            "clips have %s frames a second and samples are written at %g (sample.fps): they play at another speed",
            listed(f"{rate:g}" for rate in known),
            sample.fps,
        )
    if not isinstance(dataset, VideoFolder):
        return
    if dataset.folder.is_file() and any(Path(name).parts[0] == "test" for name in dataset.names):
        logger.warning(
            "%s has a folder test: its clips are trained on, too, so they are not held out (a folder with train.tar "
            "and test.tar keeps them apart)",
            dataset.folder,
        )
    if unmet := [rate for rate in data.mix_fps if rate not in rates]:
        logger.warning(
            "no clip has %s of data.mix_fps frames a second: no file in %s is that fast and long enough",
            listed(f"{rate:g}" for rate in unmet),
            dataset.folder,
        )
    bare, count = dataset.uncaptioned, dataset.files
    if flow.txt_size or flow.num_classes:
        if bare:
            logger.warning(
                "%s of the %d files in %s have no caption (such as %s): of these the model learns nothing about text",
                "all" if len(bare) == count else len(bare),
                count,
                dataset.folder,
                bare[0],
            )
        # Other collections have a caption a line.
        if several := dataset.broken_lines:
            logger.warning(
                "captions of %d of the %d files in %s have several lines (such as that of %s), and each is one "
                'caption; several of a video stand in NAME.json, {"captions": [...]}',
                len(several),
                count,
                dataset.folder,
                several[0],
            )
    elif len(bare) < count and not data.name_captions:
        logger.warning(
            "skipped: the captions of %d files in %s, the model reads none", count - len(bare), dataset.folder
        )


def check_own(config: RunConfig, dataset: ClipDataset) -> None:
    """Refuses a data set of the caller's own whose clips are not those that the model's file will tell of.

    What its first clip has and the model does not read has a line in the log, and so have a set that is made otherwise
    than the configuration says, and one whose clip is another one the second time.

    Args:
        config: of the run.
        dataset: that it is trained on, in place of what `make_dataset` makes.

    Raises:
        ConfigError: it is empty or no data set of clips, or has clips of another shape than the configuration says.
    """
    data, flow = config.data, config.flow
    if not hasattr(dataset, "item"):
        raise ConfigError(
            f"training: the data set is {shown(dataset)}, expected one with the methods of starflow.data.ClipDataset"
        )
    if not len(dataset):
        raise ConfigError("training: the data set is empty, expected at least one clip")
    clip = kept_clip(item_of(dataset, 0))
    expected = [data.frames, data.channels, data.height, data.width]
    if data.mix_aspect:
        expected[2:] = clip.pixels.shape[2:]
    if list(clip.pixels.shape) != expected:
        raise ConfigError(
            f"training: clip {clip.name} of the data set has shape {list(clip.pixels.shape)}, expected {expected} "
            "(data.frames, data.channels, data.height, data.width), which the model is sampled at"
        )
    again = item_of(dataset, 0)
    # NaN, which is told of where it is read, is no other pixel.
    if not torch.equal(again.pixels.nan_to_num(), clip.pixels.nan_to_num()) or again.caption != clip.caption:
        logger.warning(
            "clip %s of the data set is another one the second time: a run that is resumed will not see the same clips "
            "(items depend on index, epoch and seed alone)",
            clip.name,
        )
    _tell_other(data, dataset)
    unread = {
        "captions": clip.caption and not flow.txt_size and not flow.num_classes,
        "sources": clip.source is not None and not config.train.source_prob,
        "vectors of frames": clip.frame_conditions is not None and not flow.frame_dim,
    }
    for what, found in unread.items():
        if found:
            logger.warning("skipped: the %s of the data set (clip %s has such), the model reads none", what, clip.name)


def _tell_other(data: DataConfig, dataset: ClipDataset) -> None:
    """Tells what a given set of ours is made with and the configuration, which stays with the model, says otherwise."""
    if getattr(dataset, "split", "train") == "test":
        logger.warning("the data set is that of the split test: its clips are trained on, so they are not held out")
    if isinstance(dataset, VideoFolder):
        rates = set(data.mix_fps or (() if data.fps is None else (data.fps,)))
        told = {"fps": (set(dataset.fps or ()), rates)}
    else:
        options = ("start", "handwritings") if isinstance(dataset, MovingDigits) else ()
        told = {name: (getattr(dataset, name), getattr(data, name)) for name in options}
    for name, (own, configured) in told.items():
        if own != configured:
            logger.warning(
                "the data set has %s %s, and data.%s, which the model is sampled and scored by, is %s",
                name,
                shown(own),
                name,
                shown(configured),
            )


def _check_names(data: DataConfig, frame_dim: int) -> None:
    """Refuses names of actions that are not those of the folder: a key would do what another one is for."""
    if data.path is None or not frame_dim:
        return
    folder = Path(data.path).absolute()
    # That of a split is in the folder above.
    found = ((place / WORLD_FILE, read_world(place)) for place in (folder, folder.parent))
    named, told = next((each for each in found if each[1] is not None), (folder, None))
    if told is None or not told.actions:
        return
    require(
        not data.actions or data.actions == told.actions,
        "data.actions",
        data.actions,
        f"{told.actions} as in {named}, or null for these",
    )
    if not data.actions:
        logger.warning("skipped: the names of the actions in %s, data.actions is empty; null takes them", named)


def _part(folder: Path, split: Literal["train", "test"]) -> Path:
    """The subfolder of a split where there is one, else the folder; the log tells what that leaves out or mixes."""
    part, test = _inside(folder, split), _inside(folder, "test")
    if part is not None:
        splits = {place.name for place in (_inside(folder, "train"), test) if place is not None}
        others = {path.name for path in folder.iterdir() if path.name[0] != "."} - {*splits, WORLD_FILE}
        if others:
            logger.warning("skipped: %s: clips are those of %s, so not %s", folder, part, listed(sorted(others)))
        return part
    if split == "train" and test is not None:
        logger.warning(
            "%s has no subfolder train: clips of %s are trained on, too, so they are not held out",
            folder,
            test,
        )
    if split == "test":
        logger.warning("%s has no subfolder test: its clips are held out only where no training shows them", folder)
    return folder


def _inside(folder: Path, name: str) -> Path | None:
    """The subfolder of this name, or the tar file in its place; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.tar") if is_folder(path)), None)


def make_images(config: RunConfig) -> ClipDataset | None:
    """The set of images that steps on images take; None where they take frames of the clips.

    Raises:
        ConfigError: the option is set and no step trains on images.
        ValueError, FileNotFoundError: the folder does not exist or holds nothing that can be read.
    """
    data = config.data
    if data.images is None:
        return None
    require(config.train.image_prob > 0, "data.images", data.images, "train.image_prob > 0 with it")
    folder = Path(data.images)
    return VideoFolder(
        _part(folder, "train"),
        frames=1,
        height=data.image_height or data.height,
        width=data.image_width or data.width,
        channels=data.channels,
        name_captions=data.name_captions,
        cache_bytes=int(data.cache_gb * 2**30),
        aspect_multiple=make_codec(config.codec).spatial * config.flow.patch_size if data.mix_aspect else None,
    )


def data_of(dataset: ClipDataset, images: ClipDataset | None = None) -> dict[str, Any]:
    """What tells a folder of files from another one: how many there are, and a checksum of names, sizes, captions and
    actions; of any other set its class and its number of clips.

    Args:
        dataset: that a run is trained on.
        images: the set of images beside it.
    """
    lines = [line for part in (dataset, images) if isinstance(part, VideoFolder) for line in part.listing()]
    if not lines:
        return {"kind": type(dataset).__name__, "clips": len(dataset)}
    return {"files": len(lines), "crc32": zlib.crc32("\n".join(lines).encode("utf-8", "surrogateescape"))}


def open_text(config: RunConfig) -> str:
    """The option of `text` that is left open for `with_vocabulary` to fill; "" where there is none."""
    option = {"words": "vocabulary", "classes": "names"}.get(config.text.get("kind", ""), "")
    return option if config.text.get(option, ()) is None else ""


def with_vocabulary(config: RunConfig, dataset: ClipDataset, images: ClipDataset | None = None) -> RunConfig:
    """The configuration with the words or the names of the data's captions, where it leaves them open.

    `text: {kind: words, vocabulary: null}` is filled with every word of the captions, and the longest number of words
    in one; `text: {kind: classes, names: null}` with the captions themselves. Both are in alphabetical order.
    `flow.txt_size` and `flow.txt_dim` follow. Any other text is left alone.

    Args:
        config: of the run.
        dataset: that it is trained on.
        images: the set of images beside it.

    Raises:
        ConfigError: the captions of the data are not known beforehand, or all are empty.
    """
    text, train = config.text, config.train
    option = open_text(config)
    if not option:
        return config
    if not isinstance(dataset, VideoFolder):
        raise ConfigError(f"text.{option} is None, expected a list (only a folder of videos can be searched)")
    chances: dict[CaptionMode, float] = {
        "extend": train.drop_image,
        "last": train.last_frame_prob,
        "v2v": train.source_prob,
    }
    kinds: list[tuple[CaptionMode | None, bool]] = [(None, False)]
    kinds += [(mode, False) for mode, chance in chances.items() if chance]
    stills: list[tuple[CaptionMode | None, bool]] = [(None, True)] if train.image_prob else []
    parts = [(dataset, [*kinds, *stills])] if images is None else [(dataset, kinds), (images, stills)]
    captions = [
        caption_for(config, caption, size=size, mode=mode, image=image, rate=rate)
        for part, told in parts
        if isinstance(part, VideoFolder)
        for caption in part.captions
        for mode, image in told
        for size in part.sizes
        for rate in config.data.mix_fps or (None,)
    ]
    if option == "names":
        filled, size = sorted({caption.strip() for caption in captions} - {""}), 1
        text = {**text, "names": filled, "num_classes": len(filled)}
    else:
        words = [split_words(caption, text.get("stop_words", STOP_WORDS)) for caption in captions]
        filled, size = sorted({word for found in words for word in found}), max(map(len, words))
        text = {**text, "vocabulary": filled, "size": size}
    require(bool(filled), f"text.{option}", None, "captions that are not empty in the folder, or data.name_captions")
    return replace(config, text=text, flow=replace(config.flow, txt_size=size, txt_dim=len(filled)))


def with_world(config: RunConfig) -> RunConfig:
    """The configuration with the actions and the world of the folder's `world.json`, where `data.actions` is null.

    `flow.frame_dim` follows: as many as there are actions. Any other configuration is left alone.

    Raises:
        ConfigError: the folder tells no actions.
        ValueError: its `world.json` is damaged.
    """
    data = config.data
    if data.actions is not None:
        return config
    if data.path is None:
        raise ConfigError("data.path is None, expected a folder that `starflow record` wrote")
    told = read_world(Path(data.path))
    if told is None or not told.actions:
        raise ConfigError(
            f"data.actions is None, expected a list, or the names of actions in {Path(data.path) / WORLD_FILE}, which "
            f"{'does not exist' if told is None else 'names none'}"
        )
    return replace(
        config,
        data=replace(data, actions=told.actions, world=told.world),
        flow=replace(config.flow, frame_dim=len(told.actions)),
    )


def make_parts(config: RunConfig) -> tuple[Codec, TextEncoder | None]:
    """Codec and text encoder of a run, after checking that everything fits together.

    Raises:
        ConfigError: options of different parts that contradict each other.
        ValueError: an option of the codec or the text encoder that is wrong.
    """
    check_config("make_parts", config, RunConfig)
    flow, data = config.flow, config.data
    codec = make_codec(config.codec)
    text = make_text_encoder(config.text) if config.text else None
    require(
        flow.in_channels == codec.latent_channels,
        "flow.in_channels",
        flow.in_channels,
        f"the {codec.latent_channels} latent channels of the codec",
    )
    require(data.channels == codec.channels, "data.channels", data.channels, f"the {codec.channels} of the codec")
    multiple = codec.spatial * flow.patch_size
    for name in ("height", "width"):
        side = getattr(data, name)
        require(side % multiple == 0, f"data.{name}", side, f"a multiple of {multiple} (codec times patch)")
    codec.latent_frames(data.frames)
    require(
        flow.frame_dim == 0 or codec.temporal == 1,
        "flow.frame_dim",
        flow.frame_dim,
        f"0 with a codec of {codec.temporal} pixel frames in a latent one (a vector belongs to one frame)",
    )
    actions = data.actions
    require(actions is not None, "data.actions", None, "a list (see `with_world`)")
    require(
        not actions or len(actions) == flow.frame_dim,
        "flow.frame_dim",
        flow.frame_dim,
        f"{len(actions or ())}, the number of data.actions",
    )
    reads = flow.txt_size > 0 or flow.num_classes > 0
    require(reads == (text is not None), "text", config.text, "a text encoder exactly when flow reads text or classes")
    if text is not None and flow.num_classes:
        require(text.dim == flow.num_classes, "flow.num_classes", flow.num_classes, f"the {text.dim} of the encoder")
    elif text is not None:
        require(text.dim == flow.txt_dim, "flow.txt_dim", flow.txt_dim, f"the width {text.dim} of the text encoder")
        require(text.size <= flow.txt_size, "flow.txt_size", flow.txt_size, f"at least the {text.size} of the encoder")
    _check_rates(config.train)
    _check_sampling(config)
    return codec, text


def _check_rates(train: TrainConfig) -> None:
    """Refuses a peak below the floor, which would not be kept to: a rate of 0, meant to freeze a part, ends there.

    Nor would a loss whose weight is 0 teach anything. Models that were trained so can still be loaded.
    """
    require(
        not train.cond_noise_level or train.noise_std > 0,
        "train.noise_std",
        train.noise_std,
        "a number above 0 with train.cond_noise_level (the loss is weighted by it)",
    )
    for name in ("lr", "denoiser_lr"):
        peak = getattr(train, name)
        require(
            train.min_lr <= peak, "train.min_lr", train.min_lr, f"at most train.{name} ({peak:g}), which falls to it"
        )


def _check_sampling(config: RunConfig) -> None:
    """Refuses defaults of sampling that no sample of the model could have, before it is trained."""
    flow, sample = config.flow, config.sample
    require(
        sample.denoise not in ("learned", "published") or flow.learnable_self_denoiser,
        "sample.denoise",
        sample.denoise,
        "'score', 'auto' or 'none' without flow.learnable_self_denoiser",
    )
    require(
        sample.denoise in ("auto", "none") or config.train.noise_std > 0,
        "sample.denoise",
        sample.denoise,
        "'auto' or 'none' with train.noise_std 0",
    )
    conditional = flow.txt_size > 0 or flow.num_classes > 0 or flow.frame_dim > 0
    require(
        sample.guidance == 0 or conditional,
        "sample.guidance",
        sample.guidance,
        "0: the model reads neither text nor classes nor vectors of frames",
    )
    require(
        sample.guidance_frames is None or flow.attention_frames is not None,
        "sample.guidance_frames",
        sample.guidance_frames,
        "nothing without flow.attention_frames: where no cache rolls, all frames are guided",
    )
    require(
        sample.guidance_frames is None or sample.guidance > 0,
        "sample.guidance",
        sample.guidance,
        "a number above 0 with sample.guidance_frames",
    )


def item_of(dataset: ClipDataset, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
    """A clip of a data set of the caller's own, which may return the next one in the same memory (see `kept_clip`).

    Raises:
        ConfigError: it is something else.
    """
    clip = dataset.item(index, epoch=epoch, seed=seed)
    require_clip(f"training: item {index} of the data set", clip)
    return clip


def source_of(clip: Clip) -> Tensor:
    """The source of a clip of a pair.

    Raises:
        ConfigError: it has none, or one of another shape.
    """
    if clip.source is None:
        raise ConfigError(f"training: clip {clip.name} has no source, expected one with train.source_prob above 0")
    if clip.source.shape != clip.pixels.shape:
        raise ConfigError(
            f"training: clip {clip.name} has a source of shape {list(clip.source.shape)}, expected "
            f"{list(clip.pixels.shape)} like the clip"
        )
    return clip.source


def conditions_of(clip: Clip, dim: int) -> Tensor:
    """The vectors of the frames of a clip, (frames, dim).

    Raises:
        ConfigError: the clip has none, or vectors of another width.
    """
    given = clip.frame_conditions
    if given is None:
        raise ConfigError(
            f"training: clip {clip.name} has no actions, expected a vector for each frame (flow.frame_dim is {dim})"
        )
    if given.shape != (len(clip.pixels), dim):
        raise ConfigError(
            f"training: clip {clip.name} has vectors of frames of shape {list(given.shape)}, expected "
            f"{[len(clip.pixels), dim]} (frames, flow.frame_dim)"
        )
    return given


@dataclass(frozen=True)
class Batch:
    """A training batch before the codec.

    Args:
        pixels: (batch, frames, channels, height, width), or (batch, channels, height, width) for images.
        captions: as the flow reads them.
        names: of the clips.
        noise: like the latents, standard normal, the reference's frames first.
        posterior: the same, for a codec with a posterior.
        extend: the first latent frame is to be dropped, after noising.
        reference: like `pixels`, what is encoded by itself and stands before the clip: its last frame or its source.
        frame_conditions: vectors of the latent frames that the flow sees, (batch, latent frames, frame_dim), NaN for
            none; None for a flow without.
    """

    pixels: Tensor
    captions: list[str]
    names: list[str]
    noise: Tensor
    posterior: Tensor | None
    extend: bool
    reference: Tensor | None = None
    frame_conditions: Tensor | None = None


def _groups_of(dataset: ClipDataset) -> tuple[tuple[int, ...], ...]:
    """Indices of the items of a set, grouped by the size of their clips."""
    return dataset.groups if isinstance(dataset, VideoFolder) else (tuple(range(len(dataset))),)


class Batches:
    """Makes the batch of any step, the next one ahead of time in a thread.

    Args:
        config: of the run.
        dataset: of clips.
        codec: fixes the shape of the noise.
        images: the set that steps on images take; None takes frames of the clips.
        rank, size: makes the `rank`-th of `size` equal parts of each batch, which are the same in any run.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: ClipDataset,
        codec: Codec,
        images: ClipDataset | None = None,
        *,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        check_config("Batches", config, RunConfig)
        self._config, self._codec, self._rank, self._size = config, codec, rank, size
        # Groups are listed once: a folder may have millions of items.
        self._clips = dataset, _groups_of(dataset)
        self._images = None if images is None else (images, _groups_of(images))
        train = config.train
        for name, count in (("batch_size", train.batch_size), ("image_batch_size", train.image_batch_size)):
            require(
                count is None or count % (size * train.accumulate) == 0,
                f"train.{name}",
                count,
                f"a multiple of {size * train.accumulate}: {size} processes times train.accumulate",
            )

    def make(self, step: int) -> Batch:
        """The batch of a step, or this part of it; depends on the seed and the step alone."""
        train, codec = self._config.train, self._codec
        choose = stream(train.seed, "choose", step)
        image = choose.random() < train.image_prob
        count = (train.image_batch_size or train.batch_size) if image else train.batch_size
        rows = slice(self._rank * count // self._size, (self._rank + 1) * count // self._size)
        images = self._images if image else None
        dataset, groups = self._clips if images is None else images
        pairs = sample_group(train.seed, step, count, groups)[rows]
        items = (item_of(dataset, index, epoch=epoch, seed=train.seed) for index, epoch in pairs)
        pixels, clips = read_batch(items, len(pairs))
        frames = codec.latent_frames(pixels.shape[1])
        extend = choose.random() < train.drop_image and not image and frames > 1
        height, width = (side // codec.spatial for side in pixels.shape[-2:])
        shape: tuple[int, ...] = (len(clips), frames, codec.latent_channels, height, width)
        if image:
            pixels = pixels[:, int(choose.integers(pixels.shape[1])) if train.image_frame == "any" else 0]
            shape = (shape[0], *shape[2:])
        mode, reference = self._reference(clips, choose) if not image and not extend else (None, None)
        if reference is not None:
            shape = (shape[0], codec.latent_frames(reference.shape[1]) + shape[1], *shape[2:])
        mode = "extend" if extend else mode
        size = (pixels.shape[-2], pixels.shape[-1])
        drop = stream(train.seed, "drop", step)
        dropped = drop.random(count)[rows] < train.drop_label
        told = self._frame_conditions(
            clips if images is None else [], shape[1] if not image else 1, extend=extend, rows=len(clips)
        )
        if told is not None:
            told[torch.from_numpy(drop.random(count)[rows] < train.drop_frame_condition)] = math.nan
        return Batch(
            pixels,
            [
                caption_for(
                    self._config, clip.caption, mode=mode, drop=bool(drop), image=image, size=size, rate=clip.fps
                )
                for clip, drop in zip(clips, dropped, strict=True)
            ],
            [clip.name for clip in clips],
            draw_batch(train.seed, step, shape, first=rows.start),
            None if codec.exact else draw_batch(train.seed, step, shape, first=rows.start, purpose="posterior"),
            extend,
            reference,
            told,
        )

    def _frame_conditions(self, clips: Sequence[Clip], frames: int, *, extend: bool, rows: int) -> Tensor | None:
        """Vectors of the latent frames of a batch of so many rows; frames without one, such as those of a reference or
        of a set of images, have NaN.
        """
        dim = self._config.flow.frame_dim
        if not dim:
            return None
        told = torch.full((rows, frames, dim), math.nan)
        for row, clip in enumerate(clips):
            given = conditions_of(clip, dim)
            # An image shows no time in which a vector could act; a reference stands before the clip.
            if frames >= len(given):
                told[row, frames - len(given) :] = given
        return told[:, 1:] if extend else told

    def _reference(
        self, clips: Sequence[Clip], choose: np.random.Generator
    ) -> tuple[CaptionMode | None, Tensor | None]:
        """The mode that captions name, and the frames that then stand before the clips; often both None."""
        train = self._config.train
        # Drawn last, and only where the option is on: other choices of a seed do not depend on these options.
        if train.last_frame_prob > 0 and choose.random() < train.last_frame_prob:
            return "last", torch.stack([clip.pixels[-1:] for clip in clips])
        if train.source_prob > 0 and choose.random() < train.source_prob:
            return "v2v", stack_clips([replace(clip, pixels=source_of(clip)) for clip in clips])[0]
        return None, None

    def run(self, first: int, end: int) -> Generator[Batch, None, None]:
        """The batches of the steps `first .. end - 1`."""
        with ThreadPoolExecutor(1, thread_name_prefix="starflow-batches") as pool:
            ahead = pool.submit(self.make, first)
            for step in range(first, end):
                batch = ahead.result()
                if step + 1 < end:
                    ahead = pool.submit(self.make, step + 1)
                yield batch
