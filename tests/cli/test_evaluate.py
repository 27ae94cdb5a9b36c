"""`starflow evaluate`: which clips are compared, and what is said of them."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from starflow.data import MovingDigits, to_frames, write_video
from starflow.sampling import Pipeline
from starflow.storage import save_model

from .commands import run

QUICK = ("--feature-steps", 3)


def folder_of(path: Path, files: int, frames: int) -> Path:
    path.mkdir(parents=True)
    clips = MovingDigits(frames=frames, size=16)
    for index in range(files):
        clip = clips.item(index)
        write_video(path / f"{index:02d}.mp4", to_frames(clip.pixels), 16.0)
        (path / f"{index:02d}.txt").write_text(clip.caption)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos, of which clips at seven places of each differ."""
    return folder_of(tmp_path_factory.mktemp("real") / "videos", 8, 10)


def test_clips_of_a_folder(
    model: Path,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    assert run("evaluate", model, "--data", videos, "--count", 22, *QUICK, "--seed", 3, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "sheet.png"}
    values = json.loads((out / "evaluation.json").read_text())
    assert values["made"]["made_clips"] == values["floor"]["made_clips"] == 22
    assert values["seeds"] == list(range(3, 25))
    assert values["data"] == str(videos)
    assert values["clips_together"] == 22
    # Their motion is another one at another speed.
    assert "evaluate: clips of the model have 8 frames a second, 00.mp4 has 16" in caplog.text
    assert values["made"]["frechet"] > values["floor"]["frechet"]
    said = capsys.readouterr().out
    for word in ("Fréchet, frames", "Fréchet, frame differences", "precision", "recall", "drift", "bits per dimension"):
        assert word in said
    assert f"{values['made']['frechet']:.3f}  " in said


def test_held_out_clips_of_the_model_and_drift(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--count", 33, "--second", 2, "--temperature", 0.5, *QUICK)
    assert run("evaluate", model, *options, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "Fréchet, frames 0 to 1 " in said
    assert "Fréchet, frames 2 to 3 " in said
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["options"] == {"temperature": 0.5}
    change = values["drift"][1]["frechet"] - values["drift"][0]["frechet"]
    assert f"drift: {change:+.3f} from the first second to the last" in said


def test_a_model_of_data_that_are_made_is_compared_with_a_folder(
    pipeline: Pipeline, videos: Path, tmp_path: Path
) -> None:
    data = replace(pipeline.config.data, start="anywhere", handwritings="all")
    place = tmp_path / "model.safetensors"
    save_model(place, pipeline.flow, replace(pipeline.config, data=data), pipeline.codec, pipeline.text)
    options = ("--data", videos, "--count", 22, *QUICK, "--out", tmp_path / "out")
    assert run("evaluate", place, *options) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["made"]["real_clips"] == 22


def test_the_part_test_of_a_folder_is_compared(model: Path, tmp_path: Path) -> None:
    """Files of "train" are none of those that are compared."""
    folder_of(tmp_path / "data" / "train", 1, 4)
    folder_of(tmp_path / "data" / "test", 7, 10)
    assert run("evaluate", model, "--data", tmp_path / "data", *QUICK, "--out", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Seven files with seven places each.
    assert values["made"]["made_clips"] == values["floor"]["made_clips"] == 24


def test_a_model_that_was_trained_on_a_tar_file_finds_it_again(
    pipeline: Pipeline, videos: Path, tmp_path: Path
) -> None:
    shard = tmp_path / "clips.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(videos, ".")
    data = replace(pipeline.config.data, kind="folder", path=str(shard))
    path = tmp_path / "model.safetensors"
    save_model(path, pipeline.flow, replace(pipeline.config, data=data), pipeline.codec, pipeline.text)
    assert run("evaluate", path, *QUICK, "--out", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["data"] == "the model's own"


def test_what_does_not_fit_is_told(
    model: Path, pipeline: Pipeline, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    short = folder_of(tmp_path / "short", 2, 3)
    lost = tmp_path / "lost.safetensors"
    data = replace(pipeline.config.data, kind="folder", path=str(tmp_path / "gone"))
    save_model(lost, pipeline.flow, replace(pipeline.config, data=data), pipeline.codec, pipeline.text)
    for arguments, status, message in (
        ([model, "--data", tmp_path / "no"], 2, f"--data is '{tmp_path / 'no'}', expected a folder of videos or a tar"),
        ([model, "--data", model], 2, f"--data is '{model}', expected a folder of videos or a tar file of them"),
        ([model, "--data", tmp_path / "empty"], 1, f"no readable video in {tmp_path / 'empty'}"),
        ([model, "--data", short], 1, f"no readable video in {short}"),
        ([model, "--data", videos, "--count", 29], 2, "--count is 29, expected at most 28: there are 56 clips that"),
        ([model, "--data", videos, "--count", 4], 1, "4 clips give 12 frames to the smallest comparison, expected"),
        ([model, "--frames", 2], 1, "frames is 2, expected at least 4, those of the training clips"),
        ([lost], 2, "gone, are not here, expected --data FOLDER"),
    ):
        assert run("evaluate", *arguments, *QUICK, "--out", tmp_path / "out") == status, message
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert message in said.replace("\n", " ")
        assert not (tmp_path / "out").exists()
