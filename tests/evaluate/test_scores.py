"""Scores: what the bits are, and what they do not depend on."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from starflow import noise
from starflow.codecs import BlockTransform, make_codec
from starflow.config import RunConfig
from starflow.data import Clip, VideoError, to_frames, write_video
from starflow.evaluate import ClipScore, Reference, heat_map, noise_floor, read_clips, score
from starflow.sampling import Pipeline

Configure = Callable[..., RunConfig]
Build = Callable[[RunConfig], Pipeline]

FRAMES, SIZE = 4, 16


def clip(seed: int, frames: int = FRAMES, caption: str = "a three moving up") -> Clip:
    generator = torch.Generator().manual_seed(seed)
    return Clip(torch.rand(frames, 1, SIZE, SIZE, generator=generator) * 2 - 1, caption, f"clip{seed}")


def test_bits_are_those_of_the_density(pipeline: Pipeline) -> None:
    given = clip(0)
    (got,) = score(pipeline, [given], seed=5)
    latents = pipeline.codec.encode(given.pixels[None])
    noisy = latents + pipeline.config.train.noise_std * noise.draw([5], *latents.shape[1:], purpose="train")
    expected = -float(pipeline.flow.log_prob(noisy, pipeline.condition([given.caption])).detach())
    dimensions = FRAMES * SIZE * SIZE
    assert got.bits_per_dim == pytest.approx(expected / dimensions / math.log(2), rel=1e-5)
    assert len(got.frames) == FRAMES
    assert sum(got.frames) / FRAMES == pytest.approx(got.bits_per_dim)


def test_frames_depend_on_the_past_alone(pipeline: Pipeline) -> None:
    given = clip(1)
    (whole,), (start,) = score(pipeline, [given]), score(pipeline, [Clip(given.pixels[:2], given.caption, "start")])
    assert start.frames == pytest.approx(whole.frames[:2], abs=1e-4)


def test_a_clip_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    clips = [clip(0), clip(1), clip(2, frames=2), clip(3)]
    together = score(pipeline, clips, batch=8)
    assert [item.name for item in together] == ["clip0", "clip1", "clip2", "clip3"]
    for place, one in enumerate(clips):
        (alone,) = score(pipeline, [one], seed=place, batch=1)
        assert alone.frames == pytest.approx(together[place].frames, abs=1e-4)


def test_a_clip_is_scored_given_its_source(paired: Pipeline) -> None:
    given = replace(clip(0), source=clip(1).pixels)
    (got,) = score(paired, [given], seed=5, per_token=True)
    latents = paired.codec.encode(torch.cat([clip(1).pixels, given.pixels])[None])
    noisy = latents + paired.config.train.noise_std * noise.draw([5], *latents.shape[1:], purpose="train")
    nats = paired.flow.log_prob(noisy, paired.condition([given.caption], mode="v2v"), by="frame").detach()
    expected = (-nats[0, FRAMES:] / SIZE**2 / math.log(2)).tolist()
    assert got.frames == pytest.approx(expected, rel=1e-5)
    assert got.tokens is not None
    assert len(got.tokens) == FRAMES
    # Clips with sources and without do not share a batch.
    often = copy.copy(paired)
    often.config = replace(paired.config, train=replace(paired.config.train, source_prob=0.5))
    mixed = score(often, [given, clip(2), replace(given, source=clip(3).pixels)], seed=5)
    assert mixed[0].frames == pytest.approx(got.frames, abs=1e-4)
    assert mixed[0].bits_per_dim != pytest.approx(mixed[2].bits_per_dim, abs=1e-4)
    small = replace(given, source=given.source[..., :8])
    with pytest.raises(
        ValueError, match=r"clip0 has a source of shape \[4, 1, 16, 8\], expected \[4, 1, 16, 16\] like the clip"
    ):
        score(paired, [small])


def test_order_check(pipeline: Pipeline) -> None:
    given = clip(4)
    still = Clip(given.pixels[:1].expand(FRAMES, -1, -1, -1), given.caption, "still")
    moving, same = score(pipeline, [given, still], order_check=True)
    assert moving.shuffled is not None
    assert moving.shuffled != moving.bits_per_dim != moving.reversed
    # A clip that stands still has no order: the noise stays with its frame number.
    assert [same.shuffled, same.reversed] == pytest.approx([same.bits_per_dim] * 2, rel=1e-6)
    (backwards,) = score(pipeline, [Clip(given.pixels.flip(0), given.caption, "backwards")])
    assert moving.reversed == pytest.approx(backwards.bits_per_dim, abs=1e-5)


def test_bits_of_tokens_average_to_those_of_frames(pipeline: Pipeline) -> None:
    (got,) = score(pipeline, [clip(0)], per_token=True)
    assert got.tokens is not None
    tokens = torch.tensor(got.tokens, dtype=torch.float64)
    assert tokens.shape == (FRAMES, SIZE // 4, SIZE // 4)
    assert tokens.mean((1, 2)).tolist() == pytest.approx(got.frames)
    (without,) = score(pipeline, [clip(0)])
    assert without.frames == pytest.approx(got.frames, rel=1e-6)
    plain = replace(got, bits_per_dim=0.0, frames=(), tokens=None, first_frames=None)
    assert replace(without, bits_per_dim=0.0, frames=()) == plain


def test_noise_may_be_that_of_another_level(pipeline: Pipeline) -> None:
    given = clip(0)
    (got,) = score(pipeline, [given], noise_std=0.0)
    latents = pipeline.codec.encode(given.pixels[None])
    nats = float(pipeline.flow.log_prob(latents, pipeline.condition([given.caption])).detach())
    assert got.bits_per_dim == pytest.approx(-nats / latents.numel() / math.log(2), rel=1e-5)
    trained = pipeline.config.train.noise_std
    assert score(pipeline, [given], noise_std=trained) == score(pipeline, [given])
    with pytest.raises(ValueError, match=r"^score: noise_std is -1.0, expected a finite number >= 0$"):
        score(pipeline, [given], noise_std=-1.0)


def scored(bits: float, frames: int = 2) -> ClipScore:
    return ClipScore("clip", "", bits, tuple(bits + 0.1 * place for place in range(frames)))


def test_anomalies_are_told_in_deviations_on_either_side() -> None:
    reference = Reference([scored(bits) for bits in (1.0, 2.0, 3.0)])
    for bits, deviations, p_value in ((2.0, 0.0, 1.0), (3.5, 1.5, 0.25), (0.5, -1.5, 0.25), (2.9, 0.9, 0.75)):
        anomaly = reference.judge(scored(bits)).anomaly
        assert anomaly is not None
        assert anomaly.deviations == pytest.approx(deviations)
        assert anomaly.frames == pytest.approx((deviations, deviations))
        assert anomaly.p_value == p_value


def test_p_values_of_ordinary_clips_are_valid() -> None:
    """Among exchangeable clips at most a share a has a p-value of at most a."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for draw in torch.randn(400, 20, generator=generator).exp().tolist():
        reference = Reference([scored(bits) for bits in draw[1:]])
        anomaly = reference.judge(scored(draw[0])).anomaly
        assert anomaly is not None
        values.append(anomaly.p_value)
    for level in (0.05, 0.1, 0.3, 0.6):
        share = sum(value <= level for value in values) / len(values)
        assert share <= level + 3 * math.sqrt(level / len(values))


@pytest.mark.parametrize(
    ("ordinary", "judged", "message"),
    [
        ([], None, "reference: 0 clips of none latent frames, expected at least 2 of one length"),
        ([scored(1.0)], None, "reference: 1 clips of 2 latent frames"),
        ([scored(1.0), scored(2.0, 3)], None, "reference: 2 clips of 2, 3 latent frames"),
        ([scored(1.0), scored(1.0)], None, "reference: all clips have the same bits"),
        (
            [scored(1.0), scored(2.0)],
            scored(1.0, 4),
            "reference: clip has 4 latent frames, expected 2 as the reference",
        ),
    ],
)
def test_references_that_say_nothing(ordinary: list[ClipScore], judged: ClipScore | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Reference(ordinary).judge(judged or scored(1.0))


def test_heat_map_shows_every_token_under_its_frame(pipeline: Pipeline) -> None:
    clips = [clip(0), clip(1, frames=2)]
    scores = score(pipeline, clips, per_token=True)
    figure = heat_map(clips, scores)
    axes = figure.axes[: 4 * FRAMES]
    for row, item in enumerate(scores):
        assert axes[2 * row * FRAMES].texts[0].get_text() == f"{item.name}: {item.bits_per_dim:.3f}"
        assert item.tokens is not None
        for frame in range(FRAMES):
            upper, lower = axes[2 * row * FRAMES + frame], axes[(2 * row + 1) * FRAMES + frame]
            if frame >= len(item.frames):
                assert not upper.images
                assert not lower.images
                continue
            expected = to_frames(clips[row].pixels)[frame].squeeze(-1).numpy()
            assert (upper.images[0].get_array() == expected).all()
            assert (lower.images[0].get_array() == np.array(item.tokens[frame])).all()
    with pytest.raises(ValueError, match=r"^heat_map: 2 clips and 1 scores, expected one score with tokens"):
        heat_map(clips, scores[:1])
    with pytest.raises(ValueError, match=r"expected one score with tokens \(per_token\) of each$"):
        heat_map(clips[:1], score(pipeline, clips[:1]))


def test_a_heat_map_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r"^a heat map needs the package matplotlib: pip install 'starflow-ext\[plots\]'$"
    with pytest.raises(ImportError, match=message):
        heat_map([], [])


def test_a_flow_without_text_sees_no_caption(
    configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]
) -> None:
    plain = build(configure(txt_size=0, txt_dim=0, cond_top_only=False, conditional_denoiser=False))
    (told,), (untold,) = score(plain, [clip(0)]), score(plain, [clip(0, caption="")])
    assert told == untold


def test_noise_floor_is_the_entropy_of_the_noise() -> None:
    sigma = 0.1
    draws = sigma * noise.draw([0], 1, 1, 256, 256)
    density = -torch.distributions.Normal(0.0, sigma).log_prob(draws).mean() / math.log(2)
    assert float(density) == pytest.approx(noise_floor(sigma), abs=0.02)
    assert noise_floor(0.0) == -math.inf


def test_bits_of_pixels_count_the_constant_of_a_codec_that_stretches(pipeline: Pipeline) -> None:
    codec = make_codec({**pipeline.config.codec, "equalize": True})
    stretched = Pipeline(pipeline.flow, pipeline.config, codec, pipeline.text)
    given = clip(0)
    latents = codec.encode(given.pixels[None])
    noisy = latents + pipeline.config.train.noise_std * noise.draw([0], *latents.shape[1:], purpose="train")
    nats = float(pipeline.flow.log_prob(noisy, pipeline.condition([given.caption])).detach()) / latents.numel()
    constant = codec.log_det_per_dimension
    assert constant is not None
    assert score(stretched, [given])[0].bits_per_dim == pytest.approx(-(nats + constant) / math.log(2), rel=1e-5)
    assert noise_floor(0.1, constant) == pytest.approx(noise_floor(0.1) - constant / math.log(2))
    assert noise_floor(0.1, None) == noise_floor(0.1)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "clips is empty"),
        ([clip(0, caption="a cat")], 'score: clip0: prompt: WordEncoder: "cat"'),
        ([Clip(torch.zeros(FRAMES, 1, 18, SIZE), "", "tall")], "score: tall: .*multiple of 4"),
        ([clip(0), Clip(torch.full((FRAMES, 1, SIZE, SIZE), math.nan), "", "broken")], "score: broken holds values"),
    ],
)
def test_errors_name_the_clip(pipeline: Pipeline, given: list[Clip], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(pipeline, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": [torch.zeros(4, 1, 16, 16)]}, r"clips is \[tensor.*\], expected a list of clips"),
        ({"clips": iter([])}, "clips is <list_iterator.*>, expected a list of clips"),
        ({"seed": 1.5}, "seed is 1.5, expected an integer >= 0"),
        ({"seed": -1}, "seed is -1, expected an integer >= 0"),
        ({"batch": 1.5}, "batch is 1.5, expected at least 1"),
        ({"noise_std": True}, "noise_std is True, expected a finite number >= 0"),
    ],
)
def test_arguments_of_another_type_are_refused(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^score: {message}"):
        score(pipeline, **{"clips": [clip(0)], **options})


def test_a_density_that_is_not_finite_is_told(pipeline: Pipeline, configure: Configure, build: Build) -> None:
    with pytest.raises(ValueError, match=r"score: the density of .* is not finite, .* \(noise_std is 1e\+30\)"):
        score(pipeline, [clip(0)], noise_std=1e30)
    broken = build(configure())
    with torch.no_grad():
        next(iter(broken.flow.parameters())).fill_(math.nan)
    with pytest.raises(ValueError, match="is not finite, expected finite weights"):
        score(broken, [clip(0)])


def test_clips_are_cut_from_files_and_folders(pipeline: Pipeline, tmp_path: Path) -> None:
    frames = to_frames(clip(0, frames=10).pixels)
    path = tmp_path / "a.mp4"
    write_video(path, frames, 8.0)
    (tmp_path / "a.txt").write_text("a three moving up\n")
    (tmp_path / "b.mp4").write_bytes(b"not a video")
    (folder,) = read_clips(pipeline, [tmp_path])
    assert folder.caption == "a three moving up"
    first, last = read_clips(pipeline, [path], clips_per_file=2)
    assert (first.name, last.name, first.caption) == ("a.mp4@0", "a.mp4@6", "a three moving up")
    (middle,) = read_clips(pipeline, [path], caption="an eight")
    assert torch.equal(middle.pixels, folder.pixels)
    assert middle.caption == "an eight"
    assert read_clips(pipeline, [path], frames=10)[0].pixels.shape[0] == 10


def test_clips_of_one_name_in_two_folders_are_told_apart(pipeline: Pipeline, tmp_path: Path) -> None:
    frames = torch.zeros(FRAMES, SIZE, SIZE, 1, dtype=torch.uint8)
    for folder, names in (("one", ("a.mp4", "b.mp4")), ("two", ("a.mp4",))):
        (tmp_path / folder).mkdir()
        for name in names:
            write_video(tmp_path / folder / name, frames, 8.0)
    one, two = tmp_path / "one", tmp_path / "two"
    both = [f"{one}/a.mp4@0", "b.mp4@0", f"{two}/a.mp4@0"]
    assert [clip.name for clip in read_clips(pipeline, [one, two])] == both
    files = [one / "a.mp4", one / "b.mp4", two / "a.mp4"]
    assert [clip.name for clip in read_clips(pipeline, files)] == both
    assert [clip.name for clip in read_clips(pipeline, files[:2])] == ["a.mp4@0", "b.mp4@0"]


def test_clips_of_another_size_or_rate_than_those_of_training_are_told(
    pipeline: Pipeline, tmp_path: Path, caplog
) -> None:
    pixels = torch.full((FRAMES, 1, 2 * SIZE, SIZE), -0.5)
    score(pipeline, [Clip(pixels, "", "a"), Clip(pixels[:, :, :SIZE], "", "b")])
    assert caplog.messages == [
        f"score: clips have {2 * SIZE}x{SIZE} pixels, and the model was trained on {SIZE}x{SIZE} alone: how likely "
        "others are it never learned"
    ]
    caplog.clear()
    for name, rate in (("fast", 30.0), ("usual", 8.0)):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(FRAMES, SIZE, SIZE, 1, dtype=torch.uint8), rate)
    line = "score: clips of the model have 8 frames a second, {}fast.mp4 has 30: they play at another speed"
    read_clips(pipeline, tmp_path)
    read_clips(pipeline, [tmp_path / "fast.mp4", tmp_path / "usual.mp4"])
    assert caplog.messages == [line.format(""), line.format(f"{tmp_path}/")]


def test_a_path_that_is_given_twice_is_read_once(pipeline: Pipeline, tmp_path: Path, caplog) -> None:
    frames = torch.zeros(FRAMES, SIZE, SIZE, 1, dtype=torch.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 8.0)
    inside, again = tmp_path / "b.mp4", tmp_path / ".." / tmp_path.name
    assert len(read_clips(pipeline, str(tmp_path))) == 2
    for name, value in (("frames", 0), ("frames", 2.5), ("clips_per_file", 0), ("clips_per_file", True)):
        with pytest.raises(ValueError, match=f"^read_clips: {name} is {value}, expected an integer >= 1$"):
            read_clips(pipeline, inside, **{name: value})  # type: ignore[arg-type]
    clips = read_clips(pipeline, [inside, tmp_path, again])
    assert [clip.name for clip in clips] == ["a.mp4@0", "b.mp4@0"]
    assert caplog.messages == [
        f"{again} is given twice and read once",
        f"{inside} is in {tmp_path}, which is given too, and is read once",
    ]


def test_names_are_captions_where_they_were_in_training(pipeline: Pipeline, tmp_path: Path) -> None:
    write_video(tmp_path / "an_eight.mp4", to_frames(clip(0).pixels), 8.0)
    paths = (tmp_path, tmp_path / "an_eight.mp4")
    assert [read_clips(pipeline, [path])[0].caption for path in paths] == ["", ""]
    data = replace(pipeline.config.data, name_captions=True)
    told = Pipeline(pipeline.flow, replace(pipeline.config, data=data), pipeline.codec, pipeline.text)
    assert [read_clips(told, [path])[0].caption for path in paths] == ["an eight", "an eight"]


def test_actions_and_frames_at_another_rate_are_refused(configure: Configure, build: Build, tmp_path: Path) -> None:
    pipeline = build(configure(frame_dim=3))
    write_video(tmp_path / "a.mp4", to_frames(clip(0, frames=10).pixels), 8.0)
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"action": {number % 3}}}' for number in range(10)))
    (cut,) = read_clips(pipeline, [tmp_path / "a.mp4"])
    assert cut.frame_conditions is not None
    assert cut.frame_conditions[1:].argmax(1).tolist() == [1, 2, 0]
    data = replace(pipeline.config.data, fps=4.0)
    slow = Pipeline(pipeline.flow, replace(pipeline.config, data=data), pipeline.codec, pipeline.text)
    for path in (tmp_path, tmp_path / "a.mp4"):
        with pytest.raises(ValueError, match=r"a\.mp4 has actions and 8 frames a second, expected fps None or as many"):
            read_clips(slow, [path])


def test_files_that_cannot_be_scored(pipeline: Pipeline, tmp_path: Path) -> None:
    short = tmp_path / "short.mp4"
    write_video(short, to_frames(clip(0, frames=2).pixels), 8.0)
    with pytest.raises(VideoError, match=r"short\.mp4: 2 frames at 8 frames per second, expected at least 4"):
        read_clips(pipeline, [short])
    with pytest.raises(VideoError, match=r"no\.mp4: no such file"):
        read_clips(pipeline, [tmp_path / "no.mp4"])
    with pytest.raises(VideoError, match=r"x\.png: an image is one frame"):
        read_clips(pipeline, [tmp_path / "x.png"])


def test_clips_that_are_probably_of_another_scale_are_told(pipeline: Pipeline, caplog) -> None:
    usual, bright = clip(0), replace(clip(1), pixels=clip(1).pixels / 2 + 0.5)
    score(pipeline, [bright, usual])
    score(pipeline, [bright], scaled=True)
    assert not caplog.messages
    score(pipeline, [bright])
    (told,) = caplog.messages
    assert told.startswith("score: no pixel of the clips is below 0, the middle of [-1, 1]; pixels in [0, 1]")


def test_sources_are_those_that_the_flow_was_trained_on(pipeline: Pipeline, paired: Pipeline) -> None:
    alone, source = clip(0), clip(1).pixels
    with pytest.raises(
        ValueError, match=r"score: clip0 has a source, expected none: the model was not trained on pairs"
    ):
        score(pipeline, [replace(alone, source=source)])
    with pytest.raises(
        ValueError, match=r"score: clip0 has no source, expected one: the model was trained on clips beh"
    ):
        score(paired, [alone])
    with pytest.raises(
        ValueError, match=r"score: clip0 has a source of shape \[2, 1, 16, 16\], expected \[4, 1, 16, 16\]"
    ):
        score(paired, [replace(alone, source=source[:2])])
    with pytest.raises(
        ValueError, match=r"score: clip0 has shape \[1, 16, 16\], expected \(frames, channels, height, wi"
    ):
        score(pipeline, [replace(alone, pixels=alone.pixels[0])])


def test_a_reference_is_of_one_noise(pipeline: Pipeline) -> None:
    clips = [clip(seed) for seed in range(4)]
    usual, (loud, *_) = score(pipeline, clips), score(pipeline, clips, noise_std=0.5)
    assert (usual[0].noise_std, loud.noise_std) == (pipeline.config.train.noise_std, 0.5)
    with pytest.raises(ValueError, match=r"reference: clip0 is scored at the noise 0.5, expected 0.1 as the reference"):
        Reference(usual).judge(loud)
    with pytest.raises(ValueError, match=r"reference: clips are scored at the noise 0.1, 0.5, expected one"):
        Reference([*usual, loud])


def test_a_heat_map_is_of_the_clips_that_were_scored(pipeline: Pipeline) -> None:
    pytest.importorskip("matplotlib")
    scores = score(pipeline, [clip(0), clip(1)], per_token=True)
    with pytest.raises(ValueError, match=r"heat_map: a score is of clip0, expected one of each clip, in the order"):
        heat_map([clip(1), clip(0)], scores)


def test_files_are_cut_as_in_training(configure: Configure, build: Build, tmp_path: Path, caplog) -> None:
    """A wide file of a model of many aspect ratios keeps its own, and a clip that a file gives twice counts once."""
    config = configure()
    mixed = build(replace(config, data=replace(config.data, mix_aspect=True)))
    write_video(tmp_path / "wide.mp4", torch.zeros(5, 24, 48, 1, dtype=torch.uint8), 8)
    usual = build(config)
    for paths in ([tmp_path / "wide.mp4"], [tmp_path]):
        assert [one.pixels.shape[-2:] for one in read_clips(mixed, paths)] == [(12, 20)]
        caplog.clear()
        clips = read_clips(usual, paths, clips_per_file=4)
        assert [one.pixels.shape[-2:] for one in clips] == [(16, 16)] * 2
        assert [one.name for one in clips] == ["wide.mp4@0", "wide.mp4@1"]
        assert caplog.messages == [f"{paths[0]}: of 4 clips 2 are different, the others are left out"]
    Image.new("L", (48, 24)).save(tmp_path / "wide.png")
    (picture,) = read_clips(mixed, [tmp_path / "wide.png"], frames=1)
    assert picture.pixels.shape == (1, 1, 12, 20)


def test_scores_do_not_depend_on_autocast(configure: Configure, build: Build) -> None:
    config = configure()
    expected = score(build(config), [clip(0)])
    with torch.autocast("cpu", torch.bfloat16):
        assert score(build(config), [clip(0)]) == expected


def test_what_scores_leave_out_is_told(pipeline: Pipeline, caplog) -> None:
    still = [clip(0, frames=1), clip(1)]
    first, second = score(pipeline, still, order_check=True)
    assert (first.shuffled, second.shuffled is None) == (None, False)
    assert caplog.messages == ["score: 1 of 2 clips are one frame, which has no order to check"]
    caplog.clear()
    score(pipeline, [clip(0)], fps=30.0)
    assert caplog.messages == ["score: fps is 30 and nothing reads it: captions of the model tell no rate"]
    caplog.clear()
    score(pipeline, [clip(0, frames=FRAMES + 1)])
    (line,) = caplog.messages
    assert line.startswith(f"score: clips have up to {FRAMES + 1} frames, and the model was trained on {FRAMES}")


@pytest.mark.parametrize("wrong", [{"pixels": np.zeros((4, 1, 16, 16))}, {"caption": None}])
def test_clips_are_tensors_and_texts(pipeline: Pipeline, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^score: a clip is Clip.*, expected a starflow.data.Clip whose pixels are a"):
        score(pipeline, [replace(clip(0), **wrong)])


class FoursAfterOne(BlockTransform):
    """Joins frames like the Wan autoencoders, whose clips have 1, 5, 9 ... of them: one alone, and then fours."""

    def encode(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        return super().encode(pixels[:, ::4], noise=noise)

    def pixel_frames(self, latent_frames: int) -> int:
        return 4 * latent_frames - 3


@pytest.mark.parametrize(
    ("codec", "begins"),
    [
        (BlockTransform(channels=1), (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        (BlockTransform(channels=1, temporal=3), (0, 3, 6)),
        (FoursAfterOne(channels=1), (0, 1, 5)),
    ],
)
def test_a_heat_map_shows_the_first_frame_that_a_latent_one_joins(
    configure: Configure, build: Build, codec: BlockTransform, begins: tuple[int, ...]
) -> None:
    config = configure(in_channels=codec.latent_channels)
    data = replace(config.data, frames=9)
    built = build(replace(config, data=data, codec=codec.to_config()))
    pipeline = Pipeline(built.flow, built.config, codec, built.text)
    given = clip(0, frames=9)
    scores = score(pipeline, [given], per_token=True)
    assert scores[0].first_frames == begins
    shown = to_frames(given.pixels).squeeze(-1).numpy()
    places = heat_map([given], scores).axes[: len(begins)]
    assert all((place.images[0].get_array() == shown[begin]).all() for place, begin in zip(places, begins, strict=True))


def test_titles_of_a_heat_map_are_one_of_each_clip(pipeline: Pipeline) -> None:
    clips = [Clip(torch.rand(4, 1, 16, 16) * 2 - 1, "", name) for name in "ab"]
    scores = score(pipeline, clips, per_token=True)
    with pytest.raises(ValueError, match=r"^heat_map: 2 clips and 1 titles, expected one of each$"):
        heat_map(clips, scores, ["one"])
