"""Models on the Hugging Face hub, without a connection: the files that it would get, and a cache as it fills it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from starflow import Flow, Pipeline
from starflow.storage import CheckpointError, convert, hub, published_state
from starflow.training import make_parts

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pipeline(tiny) -> Pipeline:
    torch.manual_seed(0)
    config = tiny()
    flow = Flow(config.flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Pipeline(flow, config, *make_parts(config))


def cached(folder: Path, cache: Path, name: str) -> None:
    """Puts a folder where huggingface_hub keeps what it downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def same(one: Pipeline, other: Pipeline) -> None:
    for part in ("flow", "data", "train", "sample"):
        assert getattr(one.config, part) == getattr(other.config, part)
    assert torch.equal(one.sample("a three moving up", seed=3).pixels, other.sample("a three moving up", seed=3).pixels)


def test_a_folder_goes_there_and_back(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["flow"]["channels"] == 32
    same(pipeline, Pipeline.from_pretrained(tmp_path / "mine"))
    same(pipeline, Pipeline.from_pretrained(tmp_path / "mine" / "model.safetensors"))
    (tmp_path / "mine" / "README.md").write_text("my card")
    pipeline.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my card"


def test_the_model_of_a_run_is_not_replaced(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="is the folder of a training run, whose model would be lost"):
        pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_what_is_pushed_comes_back_by_its_name(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Repository:
        repo_id = "owner/mine"

    def upload(_: object, *, repo_id: str, folder_path: Path, **options: object) -> str:
        assert options["commit_message"] == "first"
        cached(folder_path, tmp_path / "cache", repo_id)
        return "the commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    pipeline.about = {"licence": "research use only", "weights": "published"}
    with caplog.at_level(logging.WARNING, "starflow"):
        assert pipeline.push_to_hub("owner/mine", commit_message="first") == "the commit"
    assert "research use only" in caplog.text
    back = Pipeline.from_pretrained("owner/mine", cache_dir=tmp_path / "cache", local_files_only=True)
    same(pipeline, back)
    assert back.about == pipeline.about
    (card,) = (tmp_path / "cache").rglob("README.md")
    assert "license: other" in card.read_text()
    assert "Licence: research use only." in card.read_text()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/none is no path here and cannot be had from the hub"):
        Pipeline.from_pretrained("owner/none", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match="a/b/c does not exist, expected a model file, a folder, or an id"):
        Pipeline.from_pretrained("a/b/c")


def test_a_repository_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Other"]}')
    cached(tmp_path / "other", tmp_path / "cache", "owner/other")
    with pytest.raises(CheckpointError, match=r"model.safetensors does not exist, expected a model file or the folder"):
        Pipeline.from_pretrained("owner/other", cache_dir=tmp_path / "cache", local_files_only=True)


def test_without_the_library_one_sentence_says_what_to_install(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "mine")
    hub._mixin.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"needs the package huggingface_hub: pip install 'starflow-ext\[hub\]'"
    for call in (
        lambda: Pipeline.from_pretrained("owner/mine"),
        lambda: pipeline.save_pretrained(tmp_path / "other"),
        lambda: pipeline.push_to_hub("owner/mine"),
    ):
        with pytest.raises(ImportError, match=message):
            call()
    same(pipeline, Pipeline.from_pretrained(tmp_path / "mine"))


def test_weights_that_are_kept_as_integers_stay_so(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save(published_state(pipeline.flow), tmp_path / "published.pth")
    convert(tmp_path / "published.pth", pipeline.config, tmp_path / "small", dtype="int8")
    small = Pipeline.load(tmp_path / "small")
    small.save_pretrained(tmp_path / "mine")
    back = Pipeline.from_pretrained(tmp_path / "mine")
    assert back.about["licence"] == small.about["licence"]
    expected, found = small.flow.state_dict(), back.flow.state_dict()
    assert expected.keys() == found.keys()
    assert torch.int8 in {tensor.dtype for tensor in found.values()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
