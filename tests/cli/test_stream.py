"""`starflow sample --stream`: the frames of a sample, in a file that plays whatever ends the command."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starflow.config import RunConfig
from starflow.data import VideoWriter, enlarge, probe, read_video, to_frames, write_video
from starflow.sampling import Pipeline
from starflow.storage import save_model

from ..tools import full_disk
from .commands import run, start

PROMPT = "a three moving up"


def test_a_stream_is_the_sample(
    model: Path, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--seed", 4, "--frames", 9, "--stream", "--lossless", "--scale", 8]
    assert run("sample", model, PROMPT, "", *options, "--out", out) == 0
    names = ("000-a-three-moving-up-seed4", "001-seed5")
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("mp4", "json")}
    expected = pipeline.sample([PROMPT, ""], seed=4, frames=9)
    for name, clip in zip(names, expected.pixels, strict=True):
        path = out / f"{name}.mp4"
        assert (probe(path, count=True).frames, probe(path).fps) == (9, 8.0)
        # Lossless, but for the rounding of ffmpeg's colour conversion on the way back.
        got, wanted = read_video(path, channels=1).int(), enlarge(to_frames(clip), 8).int()
        assert int((got - wanted).abs().max()) <= 1
    said = json.loads((out / f"{names[0]}.json").read_text())
    assert (said["frames"], said["seed"], said["prompt"], said["clips_together"]) == (9, 4, PROMPT, 2)
    assert said["sweeps"] == expected.report.sweeps
    assert said["frames_per_second"] > 0
    assert "frames/s, the first after" in capsys.readouterr().out


def test_a_stream_goes_on_from_a_beginning(model: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    start = to_frames(torch.rand(3, 1, 16, 16) * 2 - 1)
    write_video(tmp_path / "start.mp4", start, 8.0, lossless=True)
    options = ["--video", tmp_path / "start.mp4", "--given", 2, "--frames", 6, "--stream", "--lossless", "--scale", 1]
    assert run("sample", model, *options, "--out", tmp_path / "out") == 0
    got = read_video(tmp_path / "out" / "000-seed0.mp4", channels=1)
    assert len(got) == 6
    assert int((got[:2].int() - start[1:].int()).abs().max()) <= 2
    said = json.loads((tmp_path / "out" / "000-seed0.json").read_text())
    assert said["given_frames"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_command_leaves_a_file_that_plays(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    process = start("sample", model, "--stream", "--frames", 1_000_000, "--out", out)
    deadline = time.monotonic() + 120
    while not (files := list(out.glob("*.mp4"))) or files[0].stat().st_size < 20_000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    # It plays while it grows.
    before = probe(files[0], count=True).frames
    assert before is not None
    assert before > 1
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert "starflow: error: interrupted; what was made before plays" in said
    while (after := probe(files[0], count=True).frames) is None or after < before:
        assert time.monotonic() < deadline
    assert read_video(files[0]).shape[1:] == (128, 128, 3)


def test_an_encoder_that_is_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = (torch.rand(1000, 32, 32, 1) * 255).to(torch.uint8)

    def write() -> None:
        with VideoWriter(path, fps=8, height=32, width=32, channels=1, growing=True) as writer:
            writer.write(frames[:20])
            while not path.exists() or path.stat().st_size < 10_000:
                time.sleep(0.01)
            assert writer._encoder is not None
            writer._encoder._process.kill()
            writer.write(frames)

    with pytest.raises(OSError, match=r"ffmpeg could not write .*; what was written before plays"):
        write()
    assert read_video(path).shape[1:] == (32, 32, 3)


def test_a_full_disk_ends_a_stream_with_one_error(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with full_disk(20_000):
        assert run("sample", model, "--stream", "--frames", 100_000, "--denoise", "none", "--out", out) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("starflow: error: ")]
    assert len(said) == 1
    assert "ffmpeg could not write" in said[0]
    assert "what was written before plays" in said[0]
    (path,) = out.iterdir()
    assert path.stat().st_size <= 20_000
    assert len(read_video(path)) > 1


def test_a_stream_that_fails_before_its_first_frame_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr("starflow.sampling.Session.extend", fail)
    assert run("sample", model, "--stream", "--out", out) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", 3, "--batch", 2], "--batch is 2, expected at least 3"),
        (["--look-ahead", 2], "look_ahead is 2, expected 0 to 1"),
        (["--window-frames", 3, "--context-frames", 3], "context_frames is 3, expected 1 to 2"),
        (["--denoise", "score"], "the denoiser is score, which needs the whole clip"),
        (["--frames", 0], "'0' is given, expected an integer >= 1"),
    ],
)
def test_options_that_do_not_stream(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    assert run("sample", model, "--stream", *options, "--out", tmp_path / "out") != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_clip_is_edited(model: Path, pipeline: Pipeline, tmp_path: Path, stream: list[str]) -> None:
    clip = to_frames(torch.rand(5, 1, 16, 16) * 2 - 1)
    path = tmp_path / "clip.mp4"
    write_video(path, clip, 8.0, lossless=True)
    out = tmp_path / "out"
    options = ["--edit", path, "--edit-prompt", PROMPT, "--frames", 5, "--lossless", "--scale", 1]
    assert run("sample", model, "an eight standing still", *options, *stream, "--out", out) == 0
    (made,) = out.glob("*.mp4")
    expected = pipeline.sample("an eight standing still", edit=path, edit_prompt=PROMPT, frames=5).pixels[0]
    assert int((read_video(made, channels=1).int() - to_frames(expected).int()).abs().max()) <= 1
    said = json.loads(made.with_suffix(".json").read_text())
    assert (said["options"]["edit"], said["guidance"], said["frames"]) == (str(path), 0.0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edit-prompt", PROMPT], "expected edit together with it"),
        (["--edit", "a.mp4", "--image", "b.png"], "image and edit are given, expected one of them"),
        (["--edit", "nowhere.mp4"], "edit is 'nowhere.mp4', which does not exist"),
        (["--last-image", "nowhere.png"], "expected a model that was trained to arrive at a frame"),
    ],
)
def test_edits_that_do_not_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("sample", model, *options, "--out", tmp_path / "out") != 0
    assert message in capsys.readouterr().err


def test_prompts_change_while_frames_come(pipeline: Pipeline) -> None:
    made = pipeline.session([PROMPT, ""], seed=1, guidance=1.0)
    frames = made.extend()
    before = [next(frames).noisy for _ in range(3)]
    made.change("an eight standing still")
    after = [next(frames).noisy for _ in range(5)]
    plain = pipeline.session([PROMPT, ""], seed=1, guidance=1.0).extend()
    expected = [next(plain).noisy for _ in range(8)]
    # The denoiser had already looked at the next frame, which keeps the old prompt.
    assert torch.equal(torch.cat([*before, after[0]], 1), torch.cat(expected[:4], 1))
    assert not torch.allclose(torch.cat(after[1:], 1), torch.cat(expected[4:], 1), atol=1e-2)
    with pytest.raises(ValueError, match="text has 3 prompts, expected 2 like the clips"):
        made.change([PROMPT] * 3)
    with pytest.raises(ValueError, match='prompt: WordEncoder: "cat"'):
        made.change("a cat")


def test_images_do_not_slide(configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]) -> None:
    still = build(configure(shallow_block_local=False))
    with pytest.raises(
        ValueError, match="window_frames is 3, expected it left out: the model's shallow blocks look over time"
    ):
        still.sample(PROMPT, window_frames=3)
    assert still.sample(PROMPT, frames=6).pixels.shape[1] == 6


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_clip_is_made_of_a_source(paired: Pipeline, tmp_path: Path, stream: list[str]) -> None:
    model, source, out = tmp_path / "model.safetensors", tmp_path / "source.mp4", tmp_path / "out"
    save_model(model, paired.flow, paired.config, paired.codec, paired.text)
    write_video(source, to_frames(torch.rand(4, 1, 16, 16) * 2 - 1), 8.0, lossless=True)
    assert run("sample", model, PROMPT, "--source", source, "--lossless", "--scale", 8, *stream, "--out", out) == 0
    (made,) = out.glob("*.mp4")
    expected = enlarge(to_frames(paired.sample(PROMPT, source=source).pixels[0]), 8)
    assert int((read_video(made, channels=1).int() - expected.int()).abs().max()) <= 1
    said = json.loads(made.with_suffix(".json").read_text())
    assert (said["options"]["source"], said["caption"], said["given_frames"]) == (str(source), f"(v2v) {PROMPT}", 0)


def test_a_source_of_another_length_is_told(
    paired: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, source = tmp_path / "model.safetensors", tmp_path / "source.mp4"
    save_model(model, paired.flow, paired.config, paired.codec, paired.text)
    write_video(source, to_frames(torch.zeros(9, 1, 16, 16)), 8.0)
    assert run("sample", model, PROMPT, "--source", source, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        "starflow: error: sample: source has 9 frames at 8 a second, expected 4 like the sources of training\n"
    )
    assert not (tmp_path / "out").exists()
