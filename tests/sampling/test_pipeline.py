"""The sampling pipeline: what depends on what, given beginnings, options and their errors."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starflow import Chunks, Sequential, Window, decode, noise
from starflow.codecs import make_codec
from starflow.config import RunConfig, TrainConfig
from starflow.data import VideoError, enlarge, probe, to_frames, to_pixels, write_video
from starflow.model import Guidance
from starflow.sampling import Pipeline, SampleOptions
from starflow.sampling.cleaning import score_denoise
from starflow.sampling.options import option_help
from starflow.solver import NotFiniteError, parse_solver
from starflow.text import make_text_encoder

PROMPT = "a three moving up"
# As in tests/pipelines.py.
FRAMES, SIZE = 4, 16

Configure = Callable[..., RunConfig]
Build = Callable[[RunConfig], Pipeline]


def test_same_seed_same_bits(pipeline: Pipeline) -> None:
    first, second = (pipeline.sample([PROMPT, ""], seed=3, guidance=1.0) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert not torch.equal(first.pixels, pipeline.sample([PROMPT, ""], seed=5, guidance=1.0).pixels)


def test_what_comes_out_can_be_trained_on(pipeline: Pipeline) -> None:
    """Tensors of inference mode can take no part in autograd."""
    still = torch.zeros(1, SIZE, SIZE)
    made = pipeline.sample(PROMPT, image=still)
    session = pipeline.session(PROMPT, image=still)
    beginning, frames = session.beginning, next(session.extend(session.planned, last=True))
    encoded = pipeline.session("").encode(made.pixels)
    decoded = decode(pipeline.flow, encoded, pipeline.condition([PROMPT]))
    assert beginning is not None
    kinds = [*decoded.latents, decoded.x, encoded]
    kinds += [getattr(part, name) for part in (made, beginning, frames) for name in ("pixels", "latents", "noisy")]
    assert not any(tensor.is_inference() for tensor in kinds)
    weight = torch.ones((), requires_grad=True)
    sum((tensor * weight).square().sum() for tensor in kinds).backward()
    assert weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(pipeline.sample(PROMPT, image=still).pixels, made.pixels)


def test_a_clip_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    prompts = [PROMPT, "an eight standing still", ""]
    together = pipeline.sample(prompts, seed=7, guidance=1.0, solver="window")
    assert together.seeds == (7, 8, 9)
    for row, prompt in enumerate(prompts):
        alone = pipeline.sample(prompt, seed=7 + row, guidance=1.0, solver="window")
        assert alone.report.solver == together.report.solver
        torch.testing.assert_close(alone.pixels[0], together.pixels[row], atol=1e-3, rtol=0)


def test_seeds_one_by_one(pipeline: Pipeline) -> None:
    swapped = pipeline.sample(["", ""], seeds=[4, 3])
    plain = pipeline.sample(["", ""], seed=3)
    torch.testing.assert_close(swapped.pixels, plain.pixels.flip(0), atol=1e-3, rtol=0)


def test_report(pipeline: Pipeline) -> None:
    sampled = pipeline.sample(PROMPT, solver="window:4", certificate=True, guidance=1.0)
    report = sampled.report
    assert sampled.pixels.shape == (1, FRAMES, 1, SIZE, SIZE)
    assert float(sampled.pixels.abs().max()) <= 1.0
    assert report.solver == "window:4:0.01"
    assert report.window == 4
    assert [block.block for block in report.blocks] == [2, 1, 0]
    assert report.backward_error is not None
    assert 0.0 <= report.backward_error < 0.1
    assert report.to_mapping()["blocks"][0]["sweeps"] == report.sweeps > 0


def test_sequential_certificate_is_rounding(pipeline: Pipeline) -> None:
    exact = pipeline.sample(PROMPT, solver="sequential", certificate=True)
    assert exact.report.solver == "sequential"
    assert exact.report.backward_error is not None
    assert exact.report.backward_error < 1e-4
    torch.testing.assert_close(pipeline.sample(PROMPT, solver="sequential").pixels, exact.pixels, atol=1e-5, rtol=0)


def test_noisy_latents_decode_the_noise(pipeline: Pipeline) -> None:
    sampled = pipeline.sample(PROMPT, solver="sequential")
    z = pipeline.flow.encode(sampled.noisy, pipeline.condition([PROMPT])).z
    expected = noise.draw([0], *sampled.noisy.shape[1:])
    torch.testing.assert_close(z, expected, atol=1e-3, rtol=0)


def test_temperature_scales_the_noise(configure: Configure, build: Build) -> None:
    config = configure()
    cool = dataclasses.replace(config, sample=dataclasses.replace(config.sample, temperature=0.5))
    own, asked = build(cool).sample(PROMPT, seed=2), build(config).sample(PROMPT, seed=2, temperature=0.5)
    assert torch.equal(own.pixels, asked.pixels)
    assert (own.report.temperature, asked.report.temperature) == (0.5, 0.5)
    flow, y = build(config).flow, build(config).condition([PROMPT])
    drawn = noise.draw([2], *asked.noisy.shape[1:], purpose="sample")
    with torch.no_grad():
        back = flow.encode(asked.noisy, y).z
    assert float((back - 0.5 * drawn).abs().max()) < 0.1


def test_given_image_comes_back(pipeline: Pipeline) -> None:
    picture = torch.rand(1, SIZE, SIZE) * 2 - 1
    sampled = pipeline.sample([PROMPT, ""], image=picture)
    assert sampled.given == 1
    assert torch.equal(sampled.pixels[:, 0], picture.expand(2, -1, -1, -1))
    free = pipeline.sample([PROMPT, ""])
    assert not torch.allclose(free.pixels[:, 1], sampled.pixels[:, 1], atol=1e-3)


def test_video_is_continued_from_its_end(pipeline: Pipeline, tmp_path: Path) -> None:
    frames = to_frames(torch.rand(6, 1, SIZE, SIZE) * 2 - 1)
    path = tmp_path / "start.mp4"
    write_video(path, frames.expand(-1, -1, -1, 3).contiguous(), 8.0, lossless=True)
    sampled = pipeline.sample(PROMPT, video=path, given=2)
    assert sampled.given == 2
    torch.testing.assert_close(sampled.pixels[0, :2], to_pixels(frames[-2:]), atol=2 / 255, rtol=0)
    same = pipeline.sample(PROMPT, video=to_pixels(frames), given=2)
    torch.testing.assert_close(same.pixels, sampled.pixels, atol=0.1, rtol=0)
    assert pipeline.sample(PROMPT, video=path).given == FRAMES // 2


def test_a_picture_that_is_probably_of_another_scale_is_told(pipeline: Pipeline, caplog) -> None:
    def messages(image: torch.Tensor) -> list[str]:
        caplog.clear()
        pipeline.session("", image=image)
        return caplog.messages

    bright = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    (told,) = messages(bright)
    assert told.startswith("sample: no pixel of image is below 0, the middle of [-1, 1]; pixels in [0, 1] are doubled")
    assert not messages(2 * bright - 1)
    for name in ("prefill", "encode"):
        begun = pipeline.session("")
        caplog.clear()
        getattr(begun, name)(bright[None, None])
        (told,) = caplog.messages
        assert told.startswith("session: no pixel of frames is below 0, the middle of [-1, 1]")
        caplog.clear()
        getattr(pipeline.session(""), name)(bright[None, None], scaled=True)
        assert not caplog.messages
    with pytest.raises(ValueError, match="pixels go from 0 to 7"):
        pipeline.session("", image=torch.arange(8.0).repeat(1, 16, 2))


def test_image_file_is_resized_and_cropped(pipeline: Pipeline, tmp_path: Path) -> None:
    from PIL import Image

    frames = to_frames(torch.rand(1, 1, SIZE, SIZE) * 2 - 1)
    path = tmp_path / "first.png"
    Image.fromarray(enlarge(frames, 3)[0, :, :, 0].numpy()).save(path)
    sampled = pipeline.sample(PROMPT, image=path)
    assert sampled.pixels.shape[-2:] == (SIZE, SIZE)
    assert float((sampled.pixels[0, 0] - to_pixels(frames)[0]).abs().mean()) < 0.2


@pytest.mark.parametrize("frames", [FRAMES, FRAMES + 3])
def test_a_clip_is_edited_by_its_noise(pipeline: Pipeline, tmp_path: Path, frames: int) -> None:
    """Under its own text it comes back, also past the window; under another one it does not."""
    clip = torch.rand(frames + 1, 1, SIZE, SIZE) * 2 - 1
    exact = {"frames": frames, "solver": "window:8:0"}
    same = pipeline.sample(PROMPT, edit=clip, edit_prompt=PROMPT, **exact)
    noisy = pipeline.codec.encode(clip[None, :frames])
    noisy = noisy + pipeline.config.train.noise_std * noise.draw([0], *noisy.shape[1:], purpose="train")
    torch.testing.assert_close(same.noisy, noisy, atol=2e-3, rtol=2e-3)
    assert same.report.guidance == 0.0
    other = pipeline.sample("an eight standing still", edit=clip, edit_prompt=PROMPT, **exact)
    assert float((other.noisy - noisy).abs().max()) > 0.05
    assert not torch.equal(other.pixels, pipeline.sample("an eight standing still", frames=frames).pixels)
    path = tmp_path / "clip.mp4"
    write_video(path, to_frames(clip).expand(-1, -1, -1, 3).contiguous(), 8.0, lossless=True)
    read = pipeline.sample("an eight standing still", edit=path, edit_prompt=PROMPT, **exact)
    torch.testing.assert_close(read.noisy, other.noisy, atol=0.1, rtol=0.1)
    assert pipeline.sample(PROMPT, edit=path).pixels.shape[1] == FRAMES


def test_a_frame_to_end_with_is_seen_and_not_shown(configure: Configure, build: Build) -> None:
    config = configure()
    words = {**config.text, "vocabulary": [*config.text["vocabulary"][:-1], "last"]}
    config = dataclasses.replace(
        config, text=words, train=dataclasses.replace(config.train, last_frame_prob=0.5), data=config.data
    )
    pipeline = build(config)
    first, last, other = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
    sampled = pipeline.sample(PROMPT, image=first, last_image=last)
    assert sampled.captions == (f"(last) {PROMPT}",)
    assert sampled.pixels.shape == (1, FRAMES, 1, SIZE, SIZE)
    assert torch.equal(sampled.pixels[:, 0], first[None])
    assert not torch.equal(pipeline.sample(PROMPT, image=first, last_image=other).pixels, sampled.pixels)
    # It is what a flow makes of a clip whose first two frames are these.
    text = pipeline.condition([PROMPT], mode="last")
    clean = pipeline.codec.encode(torch.stack([last, first])[None])
    prefix = clean + config.train.noise_std * noise.draw([0], *clean.shape[1:], purpose="train")
    z = noise.draw([0], FRAMES + 1, *clean.shape[2:])
    decoded = decode(pipeline.flow, z, text, prefix=prefix, schedule=parse_solver(config.sample.solver))
    assert torch.equal(sampled.noisy, decoded.x[:, 1:])
    alone = pipeline.sample(PROMPT, last_image=last, frames=FRAMES + 3)
    assert (alone.pixels.shape[1], alone.given) == (FRAMES + 3, 0)
    # In every window: the last frames too depend on it.
    changed = pipeline.sample(PROMPT, last_image=other, frames=FRAMES + 3)
    assert not torch.allclose(alone.noisy[:, -1], changed.noisy[:, -1], atol=1e-3)


def test_denoisers(pipeline: Pipeline) -> None:
    noisy = pipeline.sample(PROMPT, denoise="none")
    assert noisy.report.denoised == "none"
    assert torch.equal(noisy.noisy, noisy.latents)
    learned, score = pipeline.sample(PROMPT), pipeline.sample(PROMPT, denoise="score")
    assert (learned.report.denoised, score.report.denoised) == ("learned", "score")
    assert torch.equal(learned.noisy, score.noisy)
    assert not torch.equal(learned.latents, score.latents)


def test_the_published_denoising_is_one_pass_over_a_window(configure: Configure, build: Build) -> None:
    clips = build(configure(denoiser_window=1))
    noisy = clips.sample(PROMPT, denoise="none").latents
    denoiser, text = clips.flow.denoiser, clips.condition([PROMPT])
    assert denoiser is not None
    step = clips.config.train.noise_std
    with torch.inference_mode():
        expected = denoiser.denoise(noisy, text, step=step)
    made = clips.sample(PROMPT, denoise="published")
    torch.testing.assert_close(made.latents, expected, rtol=0, atol=1e-6)
    assert made.report.denoised == "published"
    # A longer clip takes windows of the training length, which see the cleaned frames of the one before.
    long = clips.sample(PROMPT, frames=9, denoise="none").latents
    expected = long.clone()
    with torch.inference_mode():
        for begin, kept in ((0, 0), (3, 1), (6, 1)):
            cleaned = denoiser.denoise(expected[:, begin : begin + 4], text, step=step)
            expected[:, begin + kept : begin + 4] = cleaned[:, kept:]
    made = clips.sample(PROMPT, frames=9, denoise="published")
    torch.testing.assert_close(made.latents, expected, rtol=0, atol=1e-6)
    wide = build(configure(denoiser_window=4))
    assert wide.sample(PROMPT, denoise="published").latents.isfinite().all()
    with pytest.raises(
        ValueError, match=r"denoise is 'published' and the denoiser looks back 4 frames .*the 4 of a win"
    ):
        wide.sample(PROMPT, frames=9, denoise="published")


def test_attention_temperature_and_guidance_of_the_deep_block_are_those_of_decode(
    configure: Configure, build: Build
) -> None:
    plain = build(configure(cond_top_only=False, shallow_block_local=False))
    options = {"seed": 3, "denoise": "none", "guidance": 2.0}
    z = noise.draw((3,), FRAMES, 16, 4, 4)
    y, null = plain.condition([PROMPT]), plain.condition([""])
    found = []
    for top in (False, True):
        for temperature in (1.0, 1.5):
            made = plain.sample(PROMPT, guide_top=top, attn_temp=temperature, **options).noisy
            guide = Guidance(2.0, all_blocks=not top)
            expected = decode(
                plain.flow, z, y, null=null, guidance=guide, schedule=Window(size=8), temperature=temperature
            )
            torch.testing.assert_close(made, expected.x, rtol=0, atol=1e-5)
            found.append(made)
    assert all(not torch.allclose(one, other) for one, other in itertools.combinations(found, 2))


def test_another_noise_is_told_given_and_removed(configure: Configure, build: Build) -> None:
    config = configure(learnable_self_denoiser=False, conditional_denoiser=False, txt_size=6)
    words = {**config.text, "vocabulary": [*config.text["vocabulary"][:-3], "noise", "level", "200"], "size": 6}
    clips = build(replace(config, text=words, train=replace(config.train, cond_noise_level=True, noise_std=0.1)))
    assert clips.caption(PROMPT, noise_std=0.2).startswith("Noise Level 200:")
    made = clips.sample("a three", target_noise_std=0.2, frames=1)
    assert made.captions[0].startswith("Noise Level 200:")
    noisy = made.noisy
    text = clips.condition(["a three"], noise_std=0.2, image=True)
    torch.testing.assert_close(made.latents, score_denoise(clips.flow, noisy, text, 0.2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ratio", "size"), [("1:1", (16, 16)), ("16:9", (12, 20)), ("9:16", (20, 12))])
def test_a_ratio_is_a_size_of_about_the_same_area(pipeline: Pipeline, ratio: str, size: tuple[int, int]) -> None:
    made = pipeline.sample(PROMPT, aspect_ratio=ratio, frames=1)
    assert tuple(made.pixels.shape[-2:]) == size
    with pytest.raises(ValueError, match="size and aspect_ratio are given, expected one of them"):
        pipeline.sample(PROMPT, aspect_ratio=ratio, size=size)


def test_the_model_says_how_it_is_denoised(configure: Configure, build: Build) -> None:
    config = configure()
    plain = build(replace(config, sample=replace(config.sample, denoise="none")))
    assert plain.sample(PROMPT).report.denoised == "none"
    assert plain.sample(PROMPT, denoise="auto").report.denoised == "learned"


def test_a_flow_without_denoiser_takes_its_own_score(configure: Configure, build: Build) -> None:
    plain = build(configure(learnable_self_denoiser=False, conditional_denoiser=False))
    assert plain.sample(PROMPT).report.denoised == "score"
    with pytest.raises(ValueError, match="no learned denoiser"):
        plain.sample(PROMPT, denoise="learned")


def test_sampling_leaves_the_flow_trainable(pipeline: Pipeline) -> None:
    sampled = pipeline.sample(PROMPT)
    x = sampled.noisy.clone().requires_grad_()
    pipeline.flow.nll(x, pipeline.condition([PROMPT])).sum().backward()
    assert x.grad is not None


def test_size_and_length_are_free(pipeline: Pipeline) -> None:
    sampled = pipeline.sample(PROMPT, frames=FRAMES + 2, size=(20, 12))
    assert sampled.pixels.shape == (1, FRAMES + 2, 1, 20, 12)
    assert pipeline.sample(PROMPT, frames=1).pixels.shape == (1, 1, 1, SIZE, SIZE)


def test_frames_do_not_depend_on_the_length(pipeline: Pipeline) -> None:
    short, long = (pipeline.sample(PROMPT, frames=frames, denoise="none") for frames in (2, 4))
    torch.testing.assert_close(short.noisy, long.noisy[:, :2], atol=0.05, rtol=0)


def test_captions_are_those_of_training(configure: Configure) -> None:
    config = configure()
    told = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, caption_fps=True, fps=12.0),
        train=TrainConfig(noise_std=0.5, cond_noise_level=True),
    )
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.config = told
    assert pipeline.caption("waves") == "Noise Level 500:\nA video with 12 fps:\nwaves\n"
    assert pipeline.caption("", fps=8.0) == "Noise Level 500:\nA video with 8 fps:\n\n"
    assert pipeline.caption("waves", image=True) == "Noise Level 500:\nAn image:\nwaves\n"
    pipeline.config = config
    assert pipeline.caption("waves") == "waves"


def test_unconditional_flow(configure: Configure, build: Build) -> None:
    plain = build(configure(txt_size=0, txt_dim=0, cond_top_only=False, conditional_denoiser=False, top_order="raster"))
    assert plain.sample("").pixels.shape[1] == FRAMES
    with pytest.raises(ValueError, match='prompt is "waves", expected ""'):
        plain.sample("waves")
    with pytest.raises(ValueError, match="guidance is 2, expected 0"):
        plain.sample("", guidance=2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 0}, "sample: frames is 0, expected an integer >= 1"),
        ({"window_frames": 0}, "sample: window_frames is 0, expected an integer >= 1"),
        ({"size": (18, 16)}, "sample: size is 18x16, expected multiples of 4"),
        ({"size": (16,)}, r"sample: size is \(16,\), expected a height and a width"),
        ({"size": (16, 0)}, r"sample: size is \(16, 0\), expected integers >= 1"),
        ({"seed": -1}, "seed is -1, expected an integer >= 0"),
        ({"seeds": [1, 2]}, "seeds has 2 entries, expected 1"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a number >= 0"),
        ({"temperature": math.nan}, "temperature is nan, expected a number >= 0"),
        ({"guidance": -1.0}, "sample: guidance is -1.0, expected a number >= 0"),
        ({"given": 2}, "sample: given is 2, expected video together with it"),
        ({"image": torch.zeros(1, 8, 8)}, r"image has shape .* expected 1 clips"),
        ({"image": "nowhere.png"}, "image is 'nowhere.png', which does not exist"),
        ({"video": "nowhere.mp4"}, "video is 'nowhere.mp4', which does not exist"),
        ({"video": torch.zeros(3, 1, 16, 16), "given": 4}, "given is 4, expected at most the 3 frames of video"),
        ({"video": torch.zeros(4, 1, 16, 16), "given": 4}, "frames is 4, expected more than the 4 frames"),
        (
            {"image": torch.zeros(1, 16, 16), "video": torch.zeros(2, 1, 16, 16)},
            "image and video are given, expected one",
        ),
        ({"solver": "windows"}, "solver is 'windows', expected"),
        ({"precision": "int7"}, "sample: precision is 'int7', expected one of 'float32', "),
        ({"image": torch.full((1, 16, 16), float("nan"))}, "not finite"),
        ({"denoise": "magic"}, "sample: denoise is 'magic', expected one of 'auto', 'learned', 'published', 'score'"),
        ({"last_image": torch.zeros(1, 16, 16)}, "expected a model that was trained to arrive at a frame"),
        (
            {"edit": torch.zeros(4, 1, 16, 16), "image": torch.zeros(1, 16, 16)},
            "sample: image and edit are given, expected one of them",
        ),
        ({"edit": torch.zeros(3, 1, 16, 16), "frames": 4}, "frames is 4, expected at most the 3 frames of edit"),
        ({"edit": torch.zeros(0, 1, 16, 16)}, "edit gives 0 frames, which the codec cannot hold"),
        ({"edit": "nowhere.mp4"}, "edit is 'nowhere.mp4', which does not exist"),
        (
            {"video": torch.zeros(7, 1, 16, 16), "given": 5, "frames": 9},
            "5 latent frames are given, expected at most 4",
        ),
        ({"look_ahead": 2}, "look_ahead is 2, expected 0 to 1"),
        ({"renew": "false"}, "sample: renew is 'false', expected bool"),
        ({"certificate": 1}, "sample: certificate is 1, expected bool"),
        ({"solver": 3}, "sample: solver is 3, expected str, Sequential, Chunks, Window"),
        ({"image": [1, 2]}, r"sample: image is \[1, 2\], expected str, Path, Tensor"),
        ({"video": b"a.mp4"}, "sample: video is b'a.mp4', expected str, Path, Tensor"),
        ({"edit_prompt": 3}, "sample: edit_prompt is 3, expected str"),
        ({"seeds": [1.5]}, r"sample: seeds is \[1\.5\], expected integers >= 0"),
        ({"seeds": ["1"]}, r"sample: seeds is \['1'\], expected integers >= 0"),
        ({"seeds": [True]}, r"sample: seeds is \[True\], expected integers >= 0"),
        ({"size": 16}, "sample: size is 16, expected integers >= 1"),
        ({"guidance": [1.0]}, r"sample: guidance is \[1\.0\], expected a number >= 0"),
        ({"frames": 10**400}, "sample: frames is an integer of 1329 bits, expected at most"),
        ({"seeds": {1}}, r"sample: seeds is \{1\}, expected integers >= 0"),
        ({"actions": 3}, "sample: actions is 3, expected str, Path, Sequence, Tensor"),
        (
            {"image": torch.zeros(1, 16, 16, dtype=torch.uint8)},
            "pixels have dtype torch.uint8, expected floating point",
        ),
        ({"guidance": 0, "guidance_frames": 3}, "guidance_frames is 3, expected guidance above 0 together with it"),
        ({"guide_top": True}, "guide_top is True, expected guidance above 0 together with it"),
        ({"seed": 5, "seeds": [1]}, "sample: seed is 5 beside seeds, expected one of them"),
        (
            {"solver": Chunks(4), "certificate": True},
            r"solver is Chunks\(.*\), expected a Window or Sequential with a certificate",
        ),
        ({"window_frames": 1}, "window_frames is 1, expected window_frames of 2 or more: a context and a new frame"),
    ],
)
def test_wrong_options(pipeline: Pipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.sample(PROMPT, **options)  # type: ignore[arg-type]


def test_a_certificate_is_measured_for_a_schedule_that_is_no_text(pipeline: Pipeline) -> None:
    error = pipeline.sample(PROMPT, solver=Sequential(), certificate=True).report.backward_error
    assert error is not None
    assert error == pipeline.sample(PROMPT, solver="sequential", certificate=True).report.backward_error


def test_sizes_and_windows_that_training_never_had_are_told(configure: Configure, build: Build, caplog) -> None:
    pipeline = build(configure())
    pipeline.sample(PROMPT, size=(SIZE, SIZE))
    assert not caplog.messages
    pipeline.sample(PROMPT, size=(2 * SIZE, SIZE))
    size = f"sample: size is {2 * SIZE}x{SIZE}, and the model was trained on {SIZE}x{SIZE} alone"
    assert caplog.messages == [size]
    trained = pipeline.codec.latent_frames(FRAMES)
    for window in (trained + 1, 3 * trained):
        caplog.clear()
        pipeline.sample(PROMPT, frames=3 * FRAMES, window_frames=window)
        assert caplog.messages == [
            f"sample: window_frames is {window}, and the deep block never saw more than {trained} latent frames in "
            "training"
        ]
    caplog.clear()
    pipeline.sample(PROMPT, frames=3 * FRAMES, window_frames=trained)
    assert not caplog.messages


@pytest.mark.parametrize("option", ["window_frames", "context_frames", "sink_frames", "renew"])
def test_options_of_windows_are_refused_where_there_are_none(configure: Configure, build: Build, option: str) -> None:
    whole = build(configure(shallow_block_local=False))
    with pytest.raises(ValueError, match=rf"sample: {option} is (1|True), expected it left out: .* no windows"):
        whole.sample(PROMPT, **{option: True if option == "renew" else 1})  # type: ignore[arg-type]


def test_what_a_model_cannot_use_is_refused(configure: Configure, build: Build, caplog) -> None:
    silent = build(configure(txt_size=0, txt_dim=0, cond_top_only=False, conditional_denoiser=False))
    with pytest.raises(ValueError, match="edit_prompt is 'a three', expected none: the model was trained without text"):
        silent.sample("", edit=-torch.ones(4, 1, SIZE, SIZE), edit_prompt="a three")
    config = configure()
    exact = build(dataclasses.replace(config, train=dataclasses.replace(config.train, noise_std=0.0)))
    assert exact.sample(PROMPT).report.denoised == "none"
    for denoise in ("learned", "score"):
        with pytest.raises(
            ValueError, match=f"denoise is '{denoise}', expected 'none': the model was trained without n"
        ):
            exact.sample(PROMPT, denoise=denoise)  # type: ignore[arg-type]
    assert not caplog.messages
    undropped = build(dataclasses.replace(config, train=dataclasses.replace(config.train, drop_label=0.0)))
    undropped.sample(PROMPT)
    assert not caplog.messages
    undropped.sample(PROMPT, guidance=2.0)
    assert caplog.messages == [
        "sample: guidance is 2, and train.drop_label was 0 in training: the flow never saw the clips that guidance "
        "leads away from"
    ]


@pytest.mark.parametrize("prompts", [None, 3, b"a three", ["a three", 3], {"a three", "a four"}, iter(["a three"])])
def test_prompts_that_are_no_texts(pipeline: Pipeline, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"sample: prompts is .*, expected a text or a list of texts"):
        pipeline.sample(prompts)


def test_numbers_of_numpy_are_taken_in_the_precision_of_the_model(pipeline: Pipeline) -> None:
    picture = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    narrow, wide = (pipeline.sample(PROMPT, image=kind).pixels for kind in (picture, picture.double()))
    assert wide.dtype == torch.float32
    assert torch.equal(narrow, wide)
    noise = torch.randn(1, 2, 16, 4, 4)
    made = [list(pipeline.session(PROMPT).extend(kind, last=True)) for kind in (noise, noise.double())]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one.pixels, other.pixels)
    with pytest.raises(ValueError, match=r"session: noise has dtype torch\.int32, expected a floating-point one"):
        pipeline.session(PROMPT).extend(noise.int())


def test_scalars_of_numpy_are_numbers(pipeline: Pipeline, tmp_path: Path) -> None:
    given = {"seed": np.int64(3), "frames": np.int32(FRAMES), "guidance": np.float32(0.5), "attn_temp": np.float64(1.5)}
    options = SampleOptions(**given, size=(np.int64(16), np.int64(16)))  # type: ignore[arg-type]
    plain = SampleOptions(seed=3, frames=FRAMES, guidance=0.5, attn_temp=1.5, size=(16, 16))
    assert json.dumps(options.to_mapping()) == json.dumps(plain.to_mapping())
    frames = to_frames(pipeline.sample(PROMPT, options).pixels[0])
    assert torch.equal(frames, to_frames(pipeline.sample(PROMPT, plain).pixels[0]))
    assert pipeline.sample(PROMPT, seeds=[np.int64(3)]).seeds == (3,)
    assert enlarge(frames, np.int64(2)).shape[1] == 32  # type: ignore[arg-type]
    write_video(tmp_path / "a.mp4", frames, np.float32(8))  # type: ignore[arg-type]
    assert probe(tmp_path / "a.mp4").fps == 8.0
    made = list(pipeline.session(PROMPT).extend(np.int64(1), last=True))  # type: ignore[arg-type]
    assert sum(part.pixels.shape[1] for part in made) == pipeline.codec.pixel_frames(1)


def test_samples_do_not_depend_on_what_torch_makes_by_default(pipeline: Pipeline, build: Build) -> None:
    expected = pipeline.sample(PROMPT).pixels
    fresh = build(pipeline.config)
    with torch.device("meta"):
        assert torch.equal(fresh.sample(PROMPT).pixels, expected)
    torch.set_default_dtype(torch.float64)
    try:
        made = fresh.sample(PROMPT).pixels
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)


def test_an_option_that_does_not_exist(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"^sample: options is 4, expected SampleOptions, or each option by its name$"):
        pipeline.sample(PROMPT, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^sample: guidence is no option; did you mean guidance\?$"):
        pipeline.sample(PROMPT, guidence=2.0)


def test_options_are_declared_once() -> None:
    """Signatures, documentation and json follow from the fields of `SampleOptions`."""
    names = [option.name for option in dataclasses.fields(SampleOptions)]
    for method in (Pipeline.sample, Pipeline.session):
        keywords = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [keyword.name for keyword in keywords] == names
    assert list(option_help()) == names
    assert SampleOptions().to_mapping() == {}
    given = SampleOptions(image=torch.zeros(1, 4, 4), video=None, solver=Window(8, 0.5))
    assert given.to_mapping() == {"image": "tensor [1, 4, 4]", "solver": "window:8:0.5"}


def test_wrong_prompts(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match='prompt: WordEncoder: "cat" in "a cat" is not a known word'):
        pipeline.sample("a cat")
    with pytest.raises(ValueError, match="4 known words, expected at most 3"):
        pipeline.sample("three up left up")
    with pytest.raises(ValueError, match="prompts is empty"):
        pipeline.sample([])


def test_a_beginning_needs_a_causal_flow(configure: Configure, build: Build) -> None:
    clip = build(
        configure(temporal_causal=0, shallow_block_local=False, top_order="raster", learnable_self_denoiser=True)
    )
    with pytest.raises(ValueError, match="runs forward in time"):
        clip.sample(PROMPT, image=torch.zeros(1, SIZE, SIZE))


def test_codec_that_cannot_hold_the_given_frames(configure: Configure, build: Build) -> None:
    config = configure(in_channels=32)
    pair = build(dataclasses.replace(config, codec={"kind": "haar", "patch": 4, "temporal": 2, "channels": 1}))
    with pytest.raises(ValueError, match="image gives 1 frames, which the codec cannot hold"):
        pair.sample(PROMPT, image=torch.zeros(1, SIZE, SIZE))
    with pytest.raises(ValueError, match="frames is 3, expected a positive multiple of 2"):
        pair.sample(PROMPT, frames=3)
    assert pair.sample(PROMPT, video=torch.zeros(3, 1, SIZE, SIZE), frames=6).given == 2


def test_weights_that_are_not_finite(configure: Configure, build: Build) -> None:
    broken = build(configure())
    with torch.no_grad():
        next(broken.flow.blocks[-1].parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="not finite"):
        broken.sample(PROMPT)


def test_parts_that_do_not_fit(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="text is None, expected a text encoder"):
        Pipeline(pipeline.flow, pipeline.config, pipeline.codec, None)


def test_a_source_is_seen_and_not_shown(paired: Pipeline, tmp_path: Path) -> None:
    source, other = torch.rand(2, FRAMES, 1, SIZE, SIZE) * 2 - 1
    sampled = paired.sample(PROMPT, source=source)
    assert sampled.captions == (f"(v2v) {PROMPT}",)
    assert (sampled.given, sampled.pixels.shape) == (0, (1, FRAMES, 1, SIZE, SIZE))
    assert not torch.allclose(paired.sample(PROMPT, source=other).noisy, sampled.noisy, atol=1e-3)
    # It is what a flow makes of a clip that begins with the source.
    text = paired.condition([PROMPT], mode="v2v")
    clean = paired.codec.encode(source[None])
    prefix = clean + paired.config.train.noise_std * noise.draw([0], *clean.shape[1:], purpose="train")
    z = noise.draw([0], 2 * FRAMES, *clean.shape[2:])
    decoded = decode(paired.flow, z, text, prefix=prefix, schedule=parse_solver(paired.config.sample.solver))
    assert torch.equal(sampled.noisy, decoded.x[:, FRAMES:])
    # The clip may begin with a given frame, and end before the source does.
    first = torch.rand(1, SIZE, SIZE) * 2 - 1
    begun = paired.sample(PROMPT, source=source, image=first, frames=FRAMES - 1)
    assert (begun.given, begun.pixels.shape[1]) == (1, FRAMES - 1)
    assert torch.equal(begun.pixels[0, 0], first)
    # Frame by frame the same; of one's own for each clip.
    session = paired.session(PROMPT, source=source)
    frames = torch.cat([frames.noisy for frames in session.extend(FRAMES, last=True)], 1)
    assert torch.equal(frames, sampled.noisy)
    both = paired.sample([PROMPT] * 2, seeds=[0, 0], source=torch.stack([source, other]))
    torch.testing.assert_close(both.noisy[:1], sampled.noisy, atol=1e-4, rtol=1e-4)
    path = tmp_path / "source.mp4"
    write_video(path, to_frames(source).expand(-1, -1, -1, 3).contiguous(), 8.0, lossless=True)
    read = paired.sample(PROMPT, source=path)
    torch.testing.assert_close(read.noisy, sampled.noisy, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": torch.zeros(FRAMES + 1, 1, SIZE, SIZE)},
            f"sample: source has {FRAMES + 1} frames, expected {FRAMES} like the sources of training",
        ),
        (
            {"source": torch.zeros(FRAMES - 1, 1, SIZE, SIZE)},
            f"sample: source has {FRAMES - 1} frames, expected {FRAMES} like the sources of training",
        ),
        (
            {"source": torch.zeros(FRAMES, 1, SIZE, SIZE + 4)},
            rf"sample: source has shape \[1, {FRAMES}, 1, {SIZE}, {SIZE + 4}\], expected 1 clips of "
            rf"\[1, {SIZE}, {SIZE}\] frames",
        ),
        (
            {"source": torch.zeros(FRAMES, 1, SIZE, SIZE), "frames": FRAMES + 1},
            f"sample: frames is {FRAMES + 1}, expected at most {FRAMES} with a source, as in the pairs of training",
        ),
        (
            {"source": torch.zeros(FRAMES, 1, SIZE, SIZE), "window_frames": 3},
            "sample: window_frames is given beside source, expected one of them",
        ),
        (
            {"source": torch.zeros(FRAMES, 1, SIZE, SIZE), "edit": torch.zeros(FRAMES, 1, SIZE, SIZE)},
            "sample: edit is given, expected no last_image or source beside it",
        ),
        ({"source": "nowhere.mp4"}, "sample: source is 'nowhere.mp4', which does not exist, expected a video file"),
        (
            {"source": torch.full((FRAMES, 1, SIZE, SIZE), math.nan)},
            r"sample: source holds values that are not finite, expected numbers in \[-1, 1\]",
        ),
    ],
)
def test_sources_that_do_not_fit(paired: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, VideoError), match=f"^{message}$"):
        paired.sample(PROMPT, **options)


def test_a_source_needs_a_model_of_pairs(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"source is given, expected a model that was trained to make one clip of"):
        pipeline.sample(PROMPT, source=torch.zeros(FRAMES, 1, SIZE, SIZE))


def test_parts_of_another_model_are_refused(pipeline: Pipeline) -> None:
    config, text = pipeline.config, pipeline.config.text
    backwards = make_text_encoder({**text, "vocabulary": text["vocabulary"][::-1]})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"codec": make_codec({"kind": "haar", "patch": 4, "channels": 1})}, "codec.kind is 'haar', expected 'dct'"),
        ({"text": backwards}, r"text.vocabulary is \['.*expected \['zero', 'one'.* as in the configuration"),
        ({"text": make_text_encoder({**text, "size": 2})}, "text.size is 2, expected 3"),
        (
            {"config": replace(config, flow=replace(config.flow, soft_clip=2.0))},
            "flow.soft_clip is 4.0 in the flow and 2.0 in the configuration",
        ),
    ]
    parts = {"flow": pipeline.flow, "config": config, "codec": pipeline.codec, "text": pipeline.text}
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"^pipeline: {message}"):
            Pipeline(**{**parts, **change})


def test_hooks_that_are_not_called_are_told(pipeline: Pipeline, caplog) -> None:
    usual = pipeline.sample(PROMPT).pixels
    layer = next(module for module in pipeline.flow.modules() if isinstance(module, torch.nn.Linear))
    hook = layer.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    try:
        assert torch.equal(pipeline.sample(PROMPT).pixels, usual)
        (told,) = caplog.messages
        assert told.startswith("sample: forward hooks of modules inside of the flow are not called (blocks.0.")
    finally:
        hook.remove()


def test_a_noise_level_that_nothing_reads_is_told(pipeline: Pipeline, caplog) -> None:
    pipeline.sample(PROMPT, target_noise_std=0.2, denoise="score")
    pipeline.sample(PROMPT, target_noise_std=0.2, image=-torch.ones(1, SIZE, SIZE))
    assert not caplog.messages
    pipeline.sample(PROMPT, target_noise_std=0.2)
    (told,) = caplog.messages
    assert told.startswith("sample: target_noise_std is 0.2 and nothing reads it: captions tell no noise, no frames")


def test_samples_do_not_depend_on_autocast(pipeline: Pipeline, build: Build) -> None:
    image = -torch.ones(1, SIZE, SIZE)
    expected = [pipeline.sample(PROMPT, denoise=how, image=image).pixels for how in ("learned", "score")]
    for dtype in (torch.bfloat16, torch.float16):
        fresh = build(pipeline.config)
        with torch.autocast("cpu", dtype):
            made = [fresh.sample(PROMPT, denoise=how, image=image).pixels for how in ("learned", "score")]
            session = fresh.session("a five", image=image)
            session.change(PROMPT)
            made.append(torch.cat([image[None, None], *(part.pixels for part in session.extend(3, last=True))], 1))
        for got, usual in zip(made, [*expected, expected[0]], strict=True):
            assert torch.equal(got, usual)


def test_loading_does_not_depend_on_modes(model: Path, pipeline: Pipeline) -> None:
    expected = pipeline.sample(PROMPT).pixels
    with torch.device("meta"):
        assert torch.equal(Pipeline.load(model).sample(PROMPT).pixels, expected)
    with torch.inference_mode():
        loaded = Pipeline.load(model)
    assert not any(parameter.is_inference() for parameter in loaded.flow.parameters())


@pytest.mark.parametrize("device", ["gpu", "", "mps", "meta", None, 0, "cuda:99"])
def test_devices_that_are_not_here_are_told(model: Path, device: Any) -> None:
    with pytest.raises(ValueError, match=r"^device is .*, expected cpu"):
        Pipeline.load(model, device=device)


def test_options_that_nothing_reads_are_told(pipeline: Pipeline, build: Build, caplog) -> None:
    def told(prompt: str = PROMPT, **options: Any) -> str:
        caplog.clear()
        pipeline.sample(prompt, **options)
        return " ".join(caplog.messages)

    assert told("", guidance=2.0) == "sample: guidance is 2 and every prompt is empty: it leads to nothing"
    assert told(guidance=2.0) == ""
    assert told("", guidance=0.0) == ""
    one = "given and the clip fits into one window, so that nothing reads"
    assert told(renew=True) == f"sample: renew is {one} it"
    assert told(sink_frames=1, context_frames=2) == f"sample: context_frames, sink_frames are {one} them"
    assert told(frames=9, renew=True, sink_frames=1) == ""
    rate = "sample: fps is 24, and captions of the model tell no rate: its clips move as at 8 frames a second"
    assert told(fps=24.0) == rate
    assert told(fps=8.0) == told(fps=24.0, frames=1) == ""
    caplog.clear()
    pipeline.session(PROMPT, target_noise_std=0.2)
    (line,) = caplog.messages
    assert line.startswith("sample: target_noise_std is 0.2 and nothing reads it")


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("image_prob", "clips of more than one frame"),
        ("drop_image", "whole clips, from their first frame on"),
        ("last_frame_prob", "clips without the frame that they end with"),
    ],
)
def test_clips_that_training_never_showed_are_told(pipeline: Pipeline, caplog, option: str, what: str) -> None:
    train = replace(pipeline.config.train, **{option: 1.0})
    never = Pipeline(pipeline.flow, replace(pipeline.config, train=train), pipeline.codec, pipeline.text)
    never.sample(PROMPT)
    (line,) = caplog.messages
    assert line.startswith(f"sample: the model was never trained on {what}")
    assert line.endswith(f"(train.{option} was 1)")
    caplog.clear()
    never.sample(PROMPT, frames=1)
    assert not caplog.messages
