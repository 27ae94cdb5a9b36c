"""Surprise is log p above the entropy of the noise, of whole clips and of frames as they come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from starflow import noise
from starflow.config import DataConfig, RunConfig
from starflow.data import Clip
from starflow.evaluate import Watcher, noise_floor, surprise
from starflow.sampling import Pipeline

Configure = Callable[..., RunConfig]
Build = Callable[[RunConfig], Pipeline]
SIGMA = 0.1


def made(configure: Configure, build: Build, **options: object) -> Pipeline:
    config = configure(
        **{
            "txt_size": 0,
            "txt_dim": 0,
            "cond_top_only": False,
            "conditional_denoiser": False,
            "frame_dim": 3,
            "attention_frames": 2,
            "temporal_causal": 1,
            "position_embed": True,
            **options,
        }
    )
    data = DataConfig(frames=4, height=16, width=16)
    return build(dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, noise_std=SIGMA)))


def clip(frames: int, seed: int = 0, dim: int = 3) -> Clip:
    g = torch.Generator().manual_seed(seed)
    told = torch.randn(frames, dim, generator=g) if dim else None
    return Clip(torch.rand(frames, 1, 16, 16, generator=g) * 2 - 1, "", f"clip {seed}", frame_conditions=told)


def test_surprise_is_the_likelihood_above_the_entropy_of_the_noise(configure: Configure, build: Build) -> None:
    pipeline = made(configure, build)
    clips = [clip(5, seed) for seed in range(3)]
    found = surprise(pipeline, clips, seed=7, batch=2)
    for row, (item, given) in enumerate(zip(found, clips, strict=True)):
        latents = pipeline.codec.encode(given.pixels[None])
        x = latents + SIGMA * noise.draw([7 + row], 5, *latents.shape[2:], purpose="train")
        nats = pipeline.flow.log_prob(x, None, given.frame_conditions[None], by="token")[0]  # type: ignore[index]
        entropy = 16 * 0.5 * math.log2(2 * math.pi * math.e * SIGMA**2)
        torch.testing.assert_close(item.tokens, -nats.double() / math.log(2) - entropy, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(item.frames, item.tokens.sum((1, 2)))
        assert item.name == given.name
    assert noise_floor(SIGMA) * 16 == pytest.approx(16 * 0.5 * math.log2(2 * math.pi * math.e * SIGMA**2))


def test_actions_matter_and_draws_are_averaged(configure: Configure, build: Build) -> None:
    pipeline = made(configure, build)
    one = clip(4)
    other = dataclasses.replace(one, frame_conditions=one.frame_conditions.flip(0))  # type: ignore[union-attr]
    first, second = surprise(pipeline, [one, other], seed=0)
    assert (first.frames - second.frames).abs().max() > 0.1
    averaged = surprise(pipeline, [one], draws=2)[0].frames
    apart = [surprise(pipeline, [one], seed=seed)[0].frames for seed in (0, 1)]
    torch.testing.assert_close(averaged, (apart[0] + apart[1]) / 2)


@pytest.mark.parametrize("dim, previous", [(3, 0), (0, 0), (3, 2), (0, 1)])
def test_a_watcher_tells_of_every_frame_what_the_whole_clip_tells(
    configure: Configure, build: Build, dim: int, previous: int
) -> None:
    """Longer than the cache, which rolls."""
    pipeline = made(configure, build, frame_dim=dim, previous_frames=previous)
    clips = [clip(23, seed, dim) for seed in (4, 5)]
    whole = surprise(pipeline, clips, seed=2)
    watcher = Watcher(pipeline, ["", ""], seeds=[2, 3])
    for frame in range(23):
        pixels = torch.stack([each.pixels[frame] for each in clips])
        told = torch.stack(
            [each.frame_conditions[frame] for each in clips if each.frame_conditions is not None] or [pixels]
        )
        got = watcher.step(pixels, told if dim else None)
        assert got.name == f"frame {frame}"
        for row in range(2):
            torch.testing.assert_close(got.frames[row], whole[row].frames[frame], atol=0.02, rtol=1e-4)
            torch.testing.assert_close(got.tokens[row], whole[row].tokens[frame], atol=0.01, rtol=1e-3)


def test_what_does_not_fit_is_refused(
    configure: Configure, build: Build, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted = made(configure, build)
    with pytest.raises(ValueError, match="surprise: draws is 0, expected an integer >= 1"):
        surprise(acted, [clip(3)], draws=0)
    with pytest.raises(ValueError, match="score: clip 0 has no actions, expected 3 numbers for each frame"):
        surprise(acted, [clip(3, dim=0)])
    with pytest.raises(ValueError, match=r"score: clip 0 has actions of shape \[3, 2\], expected \[3, 3\]"):
        surprise(acted, [clip(3, dim=2)])
    plain = made(configure, build, frame_dim=0)
    with pytest.raises(ValueError, match=r"score: clip 0 has actions, expected none .*frame_dim is 0"):
        surprise(plain, [clip(3)])
    with pytest.raises(ValueError, match=r"watcher: flow\.attention_frames is None, expected a number"):
        Watcher(pipeline)
    watcher = Watcher(acted)
    with pytest.raises(ValueError, match=r"^watcher: frame is 3, expected a tensor$"):
        watcher.step(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^watcher: condition is 'up', expected a tensor$"):
        watcher.step(torch.zeros(1, 1, 16, 16), "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="watcher: seeds has 1 entries, expected 2 like the prompts"):
        Watcher(acted, ["", ""], seeds=[1])
    watcher = Watcher(acted)
    with pytest.raises(ValueError, match=r"watcher: frame has shape \[1, 1, 8, 16\], expected \[1, 1, 16, 16\]"):
        watcher.step(torch.zeros(1, 1, 8, 16))
    with pytest.raises(ValueError, match=r"condition has shape \[1, 1, 2\], expected \[1, 1, 3\]"):
        watcher.step(torch.zeros(1, 1, 16, 16), torch.zeros(1, 2))
    joined = made(configure, build)
    monkeypatch.setattr(type(joined.codec), "pixel_frames", lambda self, frames: 4 * frames - 3)
    with pytest.raises(
        ValueError, match=r"^watcher: two latent frames of the codec are 5 frames of pixels, expected 2"
    ):
        Watcher(joined)
    monkeypatch.undo()
    config = dataclasses.replace(acted.config, train=dataclasses.replace(acted.config.train, noise_std=0.0))
    with pytest.raises(ValueError, match=r"surprise: train\.noise_std is 0, expected a model that was trained with"):
        surprise(build(config), [clip(3)])


def test_frames_that_are_probably_of_another_scale_are_told(configure: Configure, build: Build, caplog) -> None:
    pipeline = made(configure, build)
    bright = dataclasses.replace(clip(3), pixels=clip(3).pixels / 2 + 0.5)
    surprise(pipeline, [bright])
    watcher = Watcher(pipeline)
    for frame in bright.pixels:
        watcher.step(frame[None])
    first, second = caplog.messages
    assert first.startswith("surprise: no pixel of the clips is below 0")
    assert second.startswith("watcher: no pixel of the first frame is below 0")
    caplog.clear()
    surprise(pipeline, [bright], scaled=True)
    Watcher(pipeline, scaled=True).step(bright.pixels[:1])
    Watcher(pipeline).step(clip(3).pixels[:1])
    assert not caplog.messages


def test_surprise_does_not_depend_on_autocast_and_reads_what_training_did(configure: Configure, build: Build) -> None:
    blind = build(configure(txt_size=0, txt_dim=0, cond_top_only=False, conditional_denoiser=False))
    clips = [Clip(torch.rand(4, 1, 16, 16) * 2 - 1, "a three", "clip")]
    (expected,) = surprise(blind, [dataclasses.replace(clips[0], caption="")])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = surprise(blind, clips)
    assert torch.equal(got.tokens, expected.tokens)
    for options, message in (
        ({"clips": []}, r"clips is \[\], expected a list of clips"),
        ({"draws": 1.5}, "draws is 1.5, expected an integer >= 1"),
        ({"seed": -1}, "seed is -1, expected an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=f"^surprise: {message}"):
            surprise(blind, **{"clips": clips, **options})
