"""Files that come back as they were written, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from starflow import Pipeline, decode
from starflow.mapped import ChangedFileError, require_unchanged
from starflow.model import Flow
from starflow.storage import (
    CheckpointError,
    check_parts,
    fingerprints,
    latest_state,
    load_flow,
    load_model,
    load_state,
    model_files,
    read_header,
    read_state,
    save_model,
    save_state,
    write_model,
)
from starflow.storage.tensors import check_tensors, sums_of, write_tensors
from starflow.training import make_parts, train

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


@pytest.mark.parametrize("one", [False, True], ids=["all of it", "one number"])
def test_a_model_file_that_is_written_in_place_ends_what_uses_it(
    tiny, saved, tmp_path: Path, monkeypatch, one: bool
) -> None:
    """As by `cp` of another model over it: its weights are mapped, and would change in the midst of a session."""
    flow, path = saved
    monkeypatch.setattr("starflow.mapped.COPIED", 0)
    loaded = load_model(path)
    copy = deepcopy(loaded.flow)
    pipeline = Pipeline(loaded.flow, loaded.config, loaded.codec, loaded.text)
    frames = torch.zeros(1, *pipeline._latent_shape(2, None))
    session = pipeline.session("")
    with torch.no_grad():
        if one:
            next(flow.parameters()).flatten()[-1].add_(1.0)
        else:
            next(flow.parameters()).add_(1.0)
    save_model(tmp_path / "other.safetensors", flow, loaded.config, loaded.codec, loaded.text)
    shutil.copyfile(tmp_path / "other.safetensors", path)
    y = pipeline.condition([""])
    for use in (
        lambda: pipeline.sample(""),
        lambda: session.step(),
        lambda: loaded.flow.log_prob(frames, y),
        lambda: decode(loaded.flow, frames, y),
    ):
        with pytest.raises(ChangedFileError, match=r"model.safetensors was written to since its weights were mapped"):
            use()
    # Weights that are not mapped any more do not change.
    copy.log_prob(frames, y)
    loaded.flow.load_state_dict({name: tensor.clone() for name, tensor in copy.state_dict().items()}, assign=True)
    assert torch.equal(loaded.flow.log_prob(frames, y), copy.log_prob(frames, y))


def test_a_model_file_that_was_touched_is_the_same(saved, monkeypatch) -> None:
    """Its sums are those that were compared when it was loaded."""
    _, path = saved
    monkeypatch.setattr("starflow.mapped.COPIED", 0)
    flow, _ = load_flow(path)
    assert check_tensors(path) == sums_of(path, path)
    os.utime(path, (1, 1))
    require_unchanged(flow)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x3f\x80\x00\x00")
    with pytest.raises(ChangedFileError):
        require_unchanged(flow)


@pytest.mark.parametrize("by", ["save_model", "folder", "train", "save_pretrained"])
def test_whatever_writes_models_leaves_a_mapped_one_as_it_was(
    tiny, saved, tmp_path: Path, monkeypatch, by: str
) -> None:
    """It is replaced by rename: a file that is cut off while it is read ends the process that mapped it."""
    flow, _ = saved
    config = tiny(steps=1)
    parts = make_parts(config)
    run = tmp_path / "run"
    source = Pipeline(flow, config, *parts)
    path = run if by in ("folder", "save_pretrained") else run / "model.safetensors"

    def write(flow: Flow) -> None:
        if by == "save_pretrained":
            Pipeline(flow, config, *parts).save_pretrained(run)
        elif by == "folder":  # as `convert` writes one, or a file
            write_model(path, flow.state_dict(), config, {}, file_bytes=20_000)
        elif by == "train":
            train(config, run, quiet=True)
        else:
            save_model(path, flow, config, *parts)

    write(flow)
    files = {file: file.stat().st_ino for file in model_files(path)}
    monkeypatch.setattr("starflow.mapped.COPIED", 0)
    loaded, _ = load_flow(path)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with torch.no_grad():
        for tensor in source.flow.state_dict().values():
            tensor.add_(1.0)
    config = tiny(steps=2) if by == "train" else config
    write(source.flow)
    assert all(file.stat().st_ino != number for file, number in files.items())
    require_unchanged(loaded)
    again, _ = load_flow(path)
    assert any(not torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system keeps no copies of files in memory")
def test_a_small_model_file_may_be_written_over_or_cut_off(saved) -> None:
    flow, path = saved
    loaded, _ = load_flow(path)
    os.truncate(path, 100)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in flow.state_dict().items())
    with pytest.raises(CheckpointError, match=r"is truncated, damaged or not safetensors"):
        load_flow(path)


def test_a_configuration_of_another_flow_is_not_written_beside_weights(tiny, saved, tmp_path: Path) -> None:
    flow, _ = saved
    config = replace(tiny(), flow=replace(tiny().flow, soft_clip=9.0))
    codec, text = make_parts(config)
    other = tmp_path / "other.safetensors"
    with pytest.raises(
        ValueError, match=r"^save_model: flow.soft_clip is 9.0 in the configuration, expected \S+ as in"
    ):
        save_model(other, flow, config, codec, text)
    with pytest.raises(ValueError, match=r"^write_model: about\['step'\] is 3, expected a text$"):
        save_model(other, flow, tiny(), codec, text, about={"step": 3})  # type: ignore[dict-item]
    assert not other.exists()


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
    from starflow.storage import models

    torch.manual_seed(0)
    config = tiny()
    codec, text = make_parts(config)
    monkeypatch.setattr(codec, "to_config", lambda: {"kind": "dct", "folder": str(tmp_path)})
    monkeypatch.setattr(models, "make_codec", lambda options: codec)
    statistics = tmp_path / "config.json"
    statistics.write_text('{"mean": [1.0], "_version": "1"}')
    save_model(tmp_path / "model.safetensors", Flow(config.flow), config, codec, text)
    statistics.write_text('{"_version": "2", "mean": [1.0]}')
    load_model(tmp_path)
    statistics.write_text('{"mean": [1.5], "_version": "2"}')
    with pytest.raises(CheckpointError, match=r"config.json of the autoencoder in its folder is another than the one"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [100, (1 << 24) + 100, 1 << 25])
def test_other_weights_of_the_same_size_have_another_fingerprint(tiny, tmp_path: Path, size: int) -> None:
    config = replace(tiny(), codec={"kind": "dct", "folder": str(tmp_path)})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(size))
    (tmp_path / "README.md").write_text("one")
    first = fingerprints(config)
    assert list(first) == ["codec_weights_sha256"]
    os.utime(weights, (0, 0))
    (tmp_path / "README.md").write_text("two")
    assert fingerprints(config) == first
    # The last byte, and one in a place of each eighth: whatever of large weights is tuned is most of them.
    for places in ([size - 1], range(1, size, max(1, size // 8))):
        content = bytearray(size)
        for place in places:
            content[place : place + (1 << 16)] = b"x" * len(content[place : place + (1 << 16)])
        weights.write_bytes(content)
        assert fingerprints(config) != first


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    ],
)
def test_another_tokenizer_has_another_fingerprint(tiny, tmp_path: Path, caplog, name: str) -> None:
    config = replace(tiny(), text={"kind": "t5", "folder": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    file = tmp_path / name
    file.write_text('{"lower": true, "name_or_path": "here", "vocab": {"a": 1}}')
    first = fingerprints(config)
    assert list(first) == ["text_weights_sha256", "text_tokens_sha256"]
    check_parts("checkpoint", first, config)
    (tmp_path / "README.txt").write_text("notes")
    if file.suffix == ".json":
        # Written again by another program, from elsewhere.
        file.write_text('{"vocab": {"a": 1}, "_from": "x", "name_or_path": "there", "lower": true}')
    assert fingerprints(config) == first
    assert not caplog.records
    file.write_text('{"lower": false, "name_or_path": "here", "vocab": {"a": 1}}')
    assert fingerprints(config)["text_weights_sha256"] == first["text_weights_sha256"]
    check_parts("checkpoint", first, config)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"checkpoint: the files of the tokenizer of the text encoder in {tmp_path} are others than those that the "
        "model was trained with"
    )
    file.unlink()
    # A model of an earlier version tells nothing of it.
    check_parts("checkpoint", {"text_weights_sha256": first["text_weights_sha256"]}, config)
    assert len(caplog.records) == 1


def test_every_bit_of_a_header_is_under_a_checksum(saved) -> None:
    """Whatever bit of length, header or padding is flipped, no model comes out that is another one in silence."""
    _, path = saved
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for place in [*range(8), *range(8, 8 + length, 31), content.index(b"soft_clip") + 12, length, length + 7]:
        for bit in (0, 5):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"damaged|another program"):
                read_header(path)
    path.write_bytes(content)
    read_header(path)


def test_a_file_is_what_the_library_writes_but_for_the_order_of_the_metadata(saved, tmp_path: Path) -> None:
    flow, path = saved
    with safe_open(path, framework="pt") as file:
        save_file(flow.state_dict(), tmp_path / "library.safetensors", file.metadata())
    ours, theirs = (file.read_bytes() for file in (path, tmp_path / "library.safetensors"))
    assert len(ours) == len(theirs)
    (length,) = struct.unpack("<Q", ours[:8])
    headers = [json.loads(content[8 : 8 + length]) for content in (ours, theirs)]
    assert headers[0] == headers[1]
    assert list(headers[0]) == list(headers[1])
    assert ours[8 + length :] == theirs[8 + length :]


def test_two_writes_of_one_model_are_the_same_bytes(tiny, saved, tmp_path: Path) -> None:
    flow, path = saved
    again = tmp_path / "again.safetensors"
    save_model(again, flow, tiny(), *make_parts(tiny()), about={"weights": "average"})
    assert again.read_bytes() == path.read_bytes()


def old_format(path: Path) -> None:
    """Writes a model as the first version of the format had it: one checksum, of the tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]["header_crc32"]
    header["__metadata__"]["format"] = "starflow-1"
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


def test_files_of_the_first_version_still_load(tiny, saved, tmp_path: Path) -> None:
    flow, path = saved
    old_format(path)
    assert torch.equal(load_flow(path)[0].prior_variance, flow.prior_variance)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its tensors do not have the checksum of its header"):
        load_flow(path)
    state = save_state(tmp_path, 3, {"a": torch.ones(4)}, {"step": 3})
    inner = json.loads((state / "state.json").read_text())["state"]
    (state / "state.json").write_text(json.dumps(inner))
    assert load_state(state, {"a": torch.zeros(4)}) == {"step": 3}


def test_every_bit_of_a_states_counters_is_under_a_checksum(tmp_path: Path) -> None:
    state = save_state(tmp_path, 3, {"a": torch.ones(4)}, {"step": 3, "updates": 2, "config": {"lr": 0.1}})
    file = state / "state.json"
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged.*"):
            read_state(state)


def test_a_shard_that_nobody_wrote_is_not_read(tmp_path: Path) -> None:
    state = save_state(tmp_path, 3, {"a": torch.ones(4)}, {"step": 3})
    save_file({"a": torch.zeros(4)}, state / "shard-00001-model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors missing or without the checksum"):
        load_state(state, {"a": torch.zeros(4)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tiny, saved, value: float) -> None:
    flow, path = saved
    content = path.read_bytes()
    name = "blocks.0.conditioner.proj_in.weight"
    with torch.no_grad():
        flow.state_dict()[name][0, 0] = value
    message = re.escape(f"tensor {name} holds values that are not finite, expected finite weights")
    with pytest.raises(CheckpointError, match=message):
        save_model(path, flow, tiny(), *make_parts(tiny()))
    assert path.read_bytes() == content
    # As another program would write it.
    with safe_open(path, framework="pt") as file:
        about = {**file.metadata(), "format": "starflow-1"}
        order = sorted((-tensor.element_size(), key) for key, tensor in flow.state_dict().items())
    value_sum = 0
    for _, key in order:
        value_sum = zlib.crc32(flow.state_dict()[key].numpy().tobytes(), value_sum)
    save_file(flow.state_dict(), path, {**about, "crc32": str(value_sum)})
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_integers_in_place_of_weights_are_refused(saved) -> None:
    _, path = saved

    def change(tensors, metadata) -> None:
        tensors["prior_variance"] = tensors["prior_variance"].to(torch.int64)

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"of another dtype: prior_variance I64 \(expected F32 or BF16"):
        load_flow(path)


def test_a_message_is_short_however_many_names_differ(saved) -> None:
    _, path = saved

    def change(tensors, metadata) -> None:
        tensors.update({f"extra.{'x' * 5000}.{number}": torch.zeros(1) for number in range(100)})

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"unexpected: extra\.x+ .* and 96 more") as caught:
        load_flow(path)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "[1]"}, "it is list, expected a mapping of options"),
        ({"config": "3"}, "it is int, expected a mapping of options"),
        ({"config": "[" * 100_000}, "config in the header cannot be used"),
        ({"config": "9" * 6000}, "config in the header cannot be used"),
        ({"codec": 3}, "config.codec is 3, expected a mapping"),
        ({"codec": {"kind": []}}, "codec: kind is [], expected one of dct"),
        ({"codec": {"kind": "dct", "patch": [4]}}, "BlockTransform: patch is [4], expected an integer of at least 1"),
        ({"text": {"kind": "words", "vocabulary": 3}}, "vocabulary"),
        ({"flow": {"layers_per_block": [10**12]}}, "expected at most 10000 layers and blocks together"),
        ({"flow": {"layers_per_block": [100, 100]}}, "flow.layers_per_block asks for more than the"),
        (
            {"flow": {"channels": 2**60}},
            "config in the header cannot be used: flow.channels is 1152921504606846976, expected at most",
        ),
        ({"flow": {"in_channels": 10**30}}, "config in the header cannot be used"),
    ],
)
def test_a_header_of_wrong_types_or_absurd_sizes_is_refused(saved, change: dict, message: str) -> None:
    _, path = saved

    def apply(tensors, metadata) -> None:
        config = json.loads(metadata["config"])
        for section, options in change.items():
            merged = isinstance(options, dict) and section == "flow"
            config[section] = {**config["flow"], **options} if merged else options
        metadata["config"] = change.get("config") or json.dumps(config)

    rewrite(path, apply)
    with pytest.raises((CheckpointError, ValueError), match=re.escape(message)):
        load_model(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of files are bytes on Linux")
def test_a_model_in_a_folder_whose_name_is_not_utf8(saved, tmp_path: Path) -> None:
    flow, path = saved
    folder = tmp_path / os.fsdecode(b"\xf6")
    folder.mkdir()
    shutil.copy(path, folder / "model.safetensors")
    assert read_header(folder) == read_header(path)
    state = load_flow(folder)[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in flow.state_dict().items())
