"""Clips that are made of other clips: what a flow trained on pairs is shown, and that it learns to look."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.config import ConfigError, RunConfig
from starflow.data import CHANGES, Clip, write_video
from starflow.evaluate import score
from starflow.sampling import Pipeline
from starflow.training import Batches, Trainer, make_dataset, make_parts, train
from starflow.training.batches import with_vocabulary

WORDS = {"kind": "words", "size": 2, "vocabulary": ["v2v", *CHANGES]}


class Tones:
    """Pairs of the smallest kind: clips of one shade of grey, and their negative."""

    def __len__(self) -> int:
        return 1000

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        shade = torch.rand(1, generator=torch.Generator().manual_seed(1000 * epoch + index)) * 2 - 1
        source = shade.expand(2, 1, 8, 8)
        return Clip(-source, "negative", f"tones/{index}", source)


@pytest.fixture
def paired(tiny):
    return tiny(
        flow={"txt_dim": 3, "txt_size": 2, "img_size": 2},
        data={"frames": 2},
        text=WORDS,
        source_prob=1.0,
        drop_label=0.0,
    )


def test_a_source_stands_before_its_clip(paired: RunConfig) -> None:
    config = replace(paired, train=replace(paired.train, source_prob=0.5))
    codec, text = make_parts(config)
    batches = Batches(config, make_dataset(config), codec)
    trainer = Trainer(config, codec, text, torch.device("cpu"))
    seen = set()
    for step in range(8):
        batch = batches.make(step)
        x, y = trainer._inputs(batch)
        alone = batch.reference is None
        shown = batch.pixels if alone else torch.cat([batch.reference, batch.pixels], 1)
        assert torch.equal(x, codec.encode(shown) + 0.1 * batch.noise)
        assert x.shape[1] == (2 if alone else 4)
        assert all(caption.startswith("(v2v) ") != alone for caption in batch.captions)
        assert y is not None
        assert bool((y[:, 0, 0] == 1).all()) != alone
        if not alone:
            for caption, source, pixels in zip(batch.captions, batch.reference, batch.pixels, strict=True):
                assert torch.equal(CHANGES[caption.split()[1]](source), pixels)
        seen.add(alone)
    assert seen == {True, False}
    # What else a seed chooses does not depend on it.
    never = Batches(replace(config, train=replace(config.train, source_prob=0.0)), make_dataset(config), codec)
    assert all(torch.equal(never.make(step).pixels, batches.make(step).pixels) for step in range(4))


def test_data_without_sources_is_named(paired: RunConfig, tmp_path: Path) -> None:
    class Alone(Tones):
        def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
            return replace(super().item(index, epoch=epoch, seed=seed), source=None)

    config = replace(paired, data=replace(paired.data, height=8, width=8))
    with pytest.raises(ConfigError, match=r"clip tones/\d+ has no source, expected one with train.source_prob above 0"):
        train(config, tmp_path, quiet=True, dataset=Alone())


def test_samples_while_training_are_of_sources(paired: RunConfig, tmp_path: Path) -> None:
    train(replace(paired, train=replace(paired.train, steps=1, sample_every=1)), tmp_path, quiet=True)
    with Image.open(tmp_path / "samples" / "step-00000001.png") as sheet:
        # Two frames of the source and two of what was made of it.
        assert sheet.width >= 4 * 16
    with pytest.raises(ValueError, match=r"source is None, expected a video: .* \(train.source_prob is 1\)"):
        Pipeline.load(tmp_path).sample("negative")


def test_a_clip_follows_its_source(paired: RunConfig, tmp_path: Path) -> None:
    config = replace(
        paired,
        data=replace(paired.data, height=8, width=8),
        train=replace(paired.train, steps=250, batch_size=16, lr=5e-3, denoiser_every=5, ema=0.95),
    )
    data = Tones()
    train(config, tmp_path, quiet=True, dataset=data)
    pipeline = Pipeline.load(tmp_path)
    clips = [data.item(index, epoch=99) for index in range(16)]
    sources = torch.stack([clip.source for clip in clips if clip.source is not None])
    made = pipeline.sample([clip.caption for clip in clips], source=sources)
    assert made.captions[0] == "(v2v) negative"
    assert (made.given, made.pixels.shape) == (0, sources.shape)
    # Its mean is the negative of that of its own source, and not of another's.
    shades = -sources.mean((1, 2, 3, 4))
    own, other = ((made.pixels.mean((1, 2, 3, 4)) - wanted).abs().mean() for wanted in (shades, shades.roll(1)))
    assert own < 0.5 * other
    # The density says the same: a clip is less likely behind the source of another.
    strange = [replace(clip, source=other.source) for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)]
    bits, more = (sum(item.bits_per_dim for item in score(pipeline, given)) / 16 for given in (clips, strange))
    assert bits + 0.05 < more


def test_words_are_taken_from_a_folder_of_pairs(tmp_path: Path) -> None:
    for place in ("source", "target"):
        (tmp_path / place).mkdir()
        write_video(tmp_path / place / "red car.mp4", torch.zeros(16, 48, 48, 3, dtype=torch.uint8), 8.0)
    config = RunConfig.load("clips")
    config = replace(
        config,
        data=replace(config.data, path=str(tmp_path), caption_second=False),
        text={"kind": "words", "vocabulary": None},
        train=replace(config.train, source_prob=0.5),
    )
    filled = with_vocabulary(config, make_dataset(config))
    assert filled.text["vocabulary"] == ["car", "red", "v2v"]
    assert (filled.text["size"], filled.flow.txt_size, filled.flow.txt_dim) == (3, 3, 3)
    (tmp_path / "target").rename(tmp_path / "targets")
    with pytest.raises(ConfigError, match=r"data.path is '.*', expected a folder with subfolders source and target"):
        make_dataset(config)
