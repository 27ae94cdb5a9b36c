"""Models that come with the package: each is whole, the one of its card, and does what the card says."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from starflow import Pipeline
from starflow.config import RunConfig, config_names, to_mapping
from starflow.data import DIGITS, DIRECTIONS, DigitJudge
from starflow.storage import CheckpointError, load_model, shipped_card, shipped_names
from starflow.storage import shipped as module

NAMES = shipped_names()


def test_there_are_shipped_models() -> None:
    assert "digits" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_tells_of_its_weights(name: str) -> None:
    card, file = shipped_card(name), module.MODELS / f"{name}.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card.sha256
    assert file.stat().st_size <= 8 << 20
    assert card.figures
    assert card.limits
    assert card.recipe in config_names()
    assert f"--config {card.recipe}" in card.command


@pytest.mark.parametrize("name", NAMES)
def test_a_model_was_trained_by_its_recipe(name: str) -> None:
    made = load_model(name)
    recipe = RunConfig.load(shipped_card(name).recipe)
    # A recipe leaves the dtype to the machine; a model of before it did says which one that was.
    assert recipe.train.precision == "auto"
    assert made.config.train.precision in ("auto", "bfloat16")
    recipe = replace(recipe, train=replace(recipe.train, precision=made.config.train.precision))
    for part in ("flow", "data", "train", "sample"):
        assert to_mapping(getattr(made.config, part)) == to_mapping(getattr(recipe, part)), part
    assert made.about["holds_frames"] == str(shipped_card(name).holds_frames)


def test_the_digits_are_what_was_asked_for() -> None:
    """A few clips and wide bounds: what is measured with many stands on the card."""
    pipeline = Pipeline.load("digits")
    prompts = [
        f"{'an' if digit == 'eight' else 'a'} {digit} {direction}"
        for digit, direction in zip(DIGITS, (*DIRECTIONS, "moving up"), strict=True)
    ]
    judged = DigitJudge(24).score(pipeline.sample(prompts, seed=3).pixels, prompts)
    assert judged["digit_every_frame"] >= 0.7
    assert judged["direction_accuracy"] >= 0.8


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped models that may be damaged."""
    folder = tmp_path / "models"
    shutil.copytree(module.MODELS, folder)
    monkeypatch.setattr(module, "MODELS", folder)
    return folder


def test_a_damaged_file_is_told(models: Path) -> None:
    file = models / "digits.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or of another model than its card"):
        Pipeline.load("digits")


def test_a_missing_file_is_told(models: Path) -> None:
    (models / "digits.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"digits.safetensors of the shipped model digits does not exist; expected"
    ):
        Pipeline.load("digits")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "card of the shipped model digits cannot be used: config .*digits.yaml"),
        ("- a", "it is list, expected a mapping"),
        ("{sha256: a}", "config lacks about"),
    ],
)
def test_a_damaged_card_is_told(models: Path, content: str, message: str) -> None:
    (models / "digits.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        shipped_card("digits")


def test_a_card_of_another_model_is_told(models: Path) -> None:
    values = yaml.safe_load((models / "digits.yaml").read_text())
    (models / "digits.yaml").write_text(yaml.safe_dump({**values, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="is damaged or of another model than its card"):
        load_model("digits")


def test_a_namesake_in_the_working_directory_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(
        CheckpointError, match=r"is both a model that comes with the package \(.*\) and .*; expected ./"
    ):
        Pipeline.load("digits")
    with pytest.raises(CheckpointError, match=r"digits/model.safetensors does not exist"):
        Pipeline.load("./digits")
    with pytest.raises(CheckpointError, match=r"digits/model.safetensors does not exist"):
        Pipeline.load(Path("digits"))
    (tmp_path / "digits").rmdir()
    assert Pipeline.load("digits").about["holds_frames"]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"or a model that comes with the package: .*digits"):
        Pipeline.load("digit")
    with pytest.raises(CheckpointError, match="model 'digit' does not come with the package, expected one of"):
        shipped_card("digit")


def test_more_frames_than_the_card_tells_of_are_made_and_told(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline.load("digits")
    pipeline.about = {"holds_frames": "1"}
    pipeline.sample("a one moving up", frames=2)
    assert "sample: frames is 2, and what the model's card tells was seen up to 1" in caplog.text
