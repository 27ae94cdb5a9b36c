"""Files that come back as they were written, or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from starflow.model import Flow
from starflow.storage import (
    CheckpointError,
    latest_state,
    load_flow,
    load_model,
    load_state,
    read_header,
    save_model,
    save_state,
)
from starflow.storage.tensors import write_tensors
from starflow.training import make_parts

from ..tools import full_disk


@pytest.fixture
def saved(tiny, tmp_path: Path) -> tuple[Flow, Path]:
    """A flow with random weights, and its file."""
    torch.manual_seed(0)
    config = tiny()
    flow = Flow(config.flow)
    with torch.no_grad():
        for tensor in flow.state_dict().values():
            tensor.normal_()
    save_model(tmp_path / "model.safetensors", flow, config, *make_parts(config), about={"weights": "average"})
    return flow, tmp_path / "model.safetensors"


def rewrite(path: Path, change) -> None:
    """Writes the file again with changed tensors and metadata, and a checksum of its own."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)


def test_a_model_comes_back_whole(tiny, saved) -> None:
    flow, path = saved
    for source in (path, path.parent):
        loaded = load_model(source)
        assert not loaded.flow.training
        state = loaded.flow.state_dict()
        assert state.keys() == flow.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in flow.state_dict().items())
        assert all(parameter.requires_grad for parameter in loaded.flow.parameters())
        assert (loaded.config.flow, loaded.config.train) == (tiny().flow, tiny().train)
        codec, text = make_parts(tiny())
        assert (loaded.codec.to_config(), loaded.text.to_config()) == (codec.to_config(), text.to_config())
    assert read_header(path).about == {"weights": "average"}


def test_names_and_shapes_that_do_not_match_are_all_listed(saved) -> None:
    _, path = saved

    def change(tensors, metadata) -> None:
        tensors["extra"] = torch.zeros(1)
        del tensors["prior_variance"]
        tensors["blocks.0.guess"] = torch.zeros(3)

    rewrite(path, change)
    message = (
        "tensors do not match its config; missing: prior_variance; unexpected: extra; "
        "of another shape: blocks.0.guess [3] (expected [32])"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved, keep: int) -> None:
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated, damaged or not safetensors"):
        load_model(path)


def test_one_wrong_bit_is_found(saved) -> None:
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its tensors do not have the checksum of its header"):
        load_model(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unopened(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="is a pickle, expected safetensors"):
        load_model(tmp_path)


def test_what_is_not_ours_is_refused(tmp_path: Path, saved) -> None:
    _, path = saved
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is safetensors of another program, expected format starflow-1"):
        load_flow(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="nowhere does not exist, expected a model file or the folder of a run"):
        load_flow(tmp_path / "nowhere")
    rewrite(path, lambda tensors, metadata: metadata.pop("config"))
    with pytest.raises(CheckpointError, match="has no config in its header"):
        load_flow(path)


def test_an_unknown_option_in_the_header_is_named(saved) -> None:
    _, path = saved

    def change(tensors, metadata) -> None:
        config = json.loads(metadata["config"])
        config["flow"]["chanels"] = 3
        metadata["config"] = json.dumps(config)

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"config.flow.chanels is not an option; did you mean 'channels'\?"):
        load_flow(path)


def test_a_full_disk_leaves_the_old_model(tiny, saved) -> None:
    _, path = saved
    content = path.read_bytes()
    message = r"cannot be written: .*; what was there before is left as it was"
    with pytest.raises(CheckpointError, match=message), full_disk(20_000):
        save_model(path, Flow(tiny().flow), tiny(), *make_parts(tiny()))
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    save_state(tmp_path, 1, {"a": torch.ones(10)}, {"step": 1})
    with pytest.raises(CheckpointError, match="step-00000002 cannot be written"), full_disk(20_000):
        save_state(tmp_path, 2, {"a": torch.ones(10000)}, {"step": 2})
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    back = torch.zeros(10)
    about = load_state(latest_state(tmp_path), {"a": back})
    assert (about, float(back.sum())) == ({"step": 1}, 10.0)


def test_the_last_two_states_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    assert latest_state(tmp_path) is None
    (tmp_path / "checkpoints" / ".step-00000099.0a1b2c3d.partial").mkdir(parents=True)
    assert latest_state(tmp_path) is None
    for step in (1, 2, 3, 10):
        save_state(tmp_path, step, {"a": torch.tensor(step)}, {})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000010"]
    assert latest_state(tmp_path).name == "step-00000010"


def test_bfloat16_and_scalars_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).bfloat16().T, "b": torch.tensor(2.5), "c": torch.zeros(0, 3)}
    back = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load_state(save_state(tmp_path, 0, tensors, {}), back)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_another_autoencoder_than_the_trained_one_is_refused(tiny, tmp_path: Path, monkeypatch) -> None:
    from starflow import checkpoints

    torch.manual_seed(0)
    config = tiny()
    codec, text = make_parts(config)
    monkeypatch.setattr(codec, "to_config", lambda: {"kind": "dct", "folder": str(tmp_path)})
    monkeypatch.setattr(checkpoints, "make_codec", lambda options: codec)
    statistics = tmp_path / "config.json"
    statistics.write_text('{"mean": [1.0], "_version": "1"}')
    save_model(tmp_path / "model.safetensors", Flow(config.flow), config, codec, text)
    statistics.write_text('{"_version": "2", "mean": [1.0]}')
    load_model(tmp_path)
    statistics.write_text('{"mean": [1.5], "_version": "2"}')
    with pytest.raises(CheckpointError, match=r"config.json of the codec in its folder is another than the one"):
        load_model(tmp_path)
