"""Every mistake in a configuration is one sentence that names the option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from starflow import ConfigError, FlowConfig
from starflow.config import (
    DataConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    config_names,
    from_mapping,
    parse_yaml,
    to_mapping,
)

from ..flows import CASES, VIDEO

SMALL = {"in_channels": 3, "img_size": 8, "channels": 64, "layers_per_block": [1, 2]}


@pytest.mark.parametrize("name", CASES)
def test_to_yaml_and_back(name: str) -> None:
    config = FlowConfig(**CASES[name])
    text = yaml.safe_dump(to_mapping(config))
    assert from_mapping(FlowConfig, yaml.safe_load(text)) == config


def test_a_folder_of_the_same_name_hides_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    assert RunConfig.load("clips").data.kind == "folder"


@pytest.mark.parametrize("name", config_names())
def test_included_configs(name: str, tmp_path: Path) -> None:
    config = RunConfig.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(to_mapping(config)))
    assert RunConfig.load(path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chanels": 64}, "flow.chanels is not an option; did you mean 'channels'"),
        ({"zzz": 1}, "flow.zzz is not an option; known: in_channels, img_size"),
        ({"channels": "64"}, "flow.channels is '64', expected an integer"),
        ({"channels": 64.0}, "flow.channels is 64.0, expected an integer"),
        ({"channels": True}, "flow.channels is True, expected an integer"),
        ({"channels": 0}, "flow.channels is 0, expected an integer >= 1"),
        ({"img_size": 9, "patch_size": 2}, "flow.img_size is 9, expected a multiple of patch_size"),
        ({"layers_per_block": 3}, "flow.layers_per_block is 3, expected a list"),
        ({"layers_per_block": []}, r"flow.layers_per_block is \(\), expected one entry a block"),
        ({"layers_per_block": [1, -1]}, r"flow.layers_per_block is \(1, -1\), expected entries >= 0"),
        ({"layers_per_block": [1, "2"]}, "flow.layers_per_block is '2', expected an integer"),
        ({"sos": "yes"}, "flow.sos is 'yes', expected true or false"),
        ({"norm_type": "batch"}, "flow.norm_type is 'batch', expected one of 'layer_norm', 'rms_norm', 'none'"),
        ({"soft_clip": "much"}, "flow.soft_clip is 'much', expected a number"),
        ({"soft_clip": "nan"}, "flow.soft_clip is nan, expected a finite bound >= 0"),
        ({"soft_clip": -1}, "flow.soft_clip is -1.0, expected a finite bound"),
        ({"head_dim": 128}, "flow.head_dim is 128, expected at most the 64 channels"),
        ({"head_dim": 10}, "flow.head_dim is 10, expected a multiple of 4 with rope"),
        ({"head_dim": 12, "temporal_causal": 1, "seq_order": "L2R"}, "flow.head_dim is 12, expected at least 16"),
        ({"num_heads": 0}, "flow.num_heads is 0, expected an integer >= 1 or nothing"),
        ({"num_kv_heads": 0}, "flow.num_kv_heads is 0, expected an integer >= 1"),
        ({"num_heads": 3, "num_kv_heads": 2}, "flow.num_kv_heads is 2, expected a divisor of the 3 heads of block 0"),
        ({"top_block_channels": -64}, "flow.top_block_channels is -64, expected an integer >= 1"),
        ({"pt_seq_len": 0}, "flow.pt_seq_len is 0, expected an integer >= 1"),
        ({"num_classes": -1}, "flow.num_classes is -1, expected an integer >= 0"),
        ({"txt_size": 4}, "flow.txt_dim is 0, expected > 0 exactly when txt_size is"),
        ({"cond_top_only": True}, "flow.cond_top_only is True, expected txt_size > 0 with it"),
        ({"temporal_causal": 1}, "flow.seq_order is 'R2L', expected L2R for videos"),
        ({"txt_size": 4, "txt_dim": 4, "shallow_block_local": True}, "flow.shallow_block_local is True"),
        ({"txt_size": 4, "txt_dim": 4, "num_classes": 3}, "flow.num_classes is 3, expected 0 when there is text"),
        ({"local_attn_window": 3}, "flow.local_attn_window is 3, expected a number of frames >= 2, together with"),
        ({"conditional_denoiser": True}, "flow.conditional_denoiser is True, expected learnable_self_denoiser"),
        ({"nvp": False}, r"flow.use_softplus is True, expected False with nvp False \(no scale\)"),
        (
            {"temporal_causal": 3, "seq_order": "L2R", "denoiser_window": 1},
            "flow.denoiser_window is 1, expected a number of frames >= temporal_causal - 1",
        ),
    ],
)
def test_options_of_the_flow(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(FlowConfig, SMALL | changes, "flow")


def test_required_options() -> None:
    with pytest.raises(ConfigError, match=r"flow lacks img_size, layers_per_block, expected a value for each of"):
        from_mapping(FlowConfig, {"in_channels": 3, "channels": 64}, "flow")


def test_what_yaml_writes_otherwise() -> None:
    config = from_mapping(TrainConfig, yaml.safe_load("{lr: 1e-4, min_lr: 0, steps: 3}"))
    assert config.lr == 1e-4  # yaml reads 1e-4, without a dot, as text
    assert config.min_lr == 0.0
    assert isinstance(config.min_lr, float)
    assert from_mapping(FlowConfig, SMALL | {"soft_clip": 4}).soft_clip == 4.0
    config = from_mapping(FlowConfig, SMALL)
    assert config.layers_per_block == (1, 2)
    assert from_mapping(FlowConfig, SMALL | {"use_bias": 0}).use_bias is False


def test_a_list_in_python_is_a_list_in_yaml() -> None:
    config = FlowConfig(**(VIDEO | {"layers_per_block": [1, 1, 2]}))  # type: ignore[arg-type]
    assert config == FlowConfig(**VIDEO)
    assert hash(config) == hash(FlowConfig(**VIDEO))


def test_options_in_python_have_the_types_of_those_in_yaml() -> None:
    config = RunConfig.load("tiny")
    train = dataclasses.replace(config.train, lr=np.float32(0.5), steps=np.int64(7), warmup_steps=3)
    assert [type(value) for value in (train.lr, train.steps)] == [float, int]
    whole = dataclasses.replace(config, train=train)
    assert from_mapping(RunConfig, yaml.safe_load(yaml.safe_dump(to_mapping(whole)))) == whole
    for section, options, message in (
        (config.train, {"steps": 1.5}, "train.steps is 1.5, expected an integer"),
        (config.train, {"seed": True}, "train.seed is True, expected an integer"),
        (config.data, {"frames": "4"}, "data.frames is '4', expected an integer"),
        (config.sample, {"guidance": [1.0]}, "sample.guidance is [1.0], expected a number"),
        (config.flow, {"layers_per_block": 3}, "flow.layers_per_block is 3, expected a list"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            dataclasses.replace(section, **options)  # type: ignore[type-var]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlowConfig(**VIDEO).channels = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flow: [", "is not yaml"),
        ("flow:\n\tsos: true", r"is not yaml: found character that cannot start any token in line 2"),
        ("3", "is 'int', expected a mapping of options"),
        ("", "is 'NoneType', expected a mapping"),
        ("data: {}", "config lacks flow, expected a value for each of flow"),
        ("flow: 3", "config.flow is 3, expected a mapping of options"),
        ("flow: {in_channels: 3}", "config.flow lacks img_size, channels, layers_per_block"),
        ("floww: {}", "config.floww is not an option; did you mean 'flow'"),
    ],
)
def test_files_that_are_no_config(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {frames: 2}\ndata: {frames: 3}", "run.yaml has 'data' a second time in line 2, expected each key once"),
        ("train:\n  lr: 1\n  steps: 2\n  lr: 3", "has 'lr' a second time in line 4, expected each key once"),
        ("train: {steps: 010}", "has 010 in line 1, which yaml reads as a number of base 8 or 60; expected digits"),
        ("train:\n  steps: 1:30", "has 1:30 in line 2, which yaml reads as a number of base 8 or 60"),
        ("data: {fps: -1:30.5}", "has -1:30.5 in line 1, which"),
    ],
)
def test_what_yaml_would_take_for_something_else(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(path)


def test_numbers_and_merges_that_mean_what_they_say() -> None:
    text = "a: &a {x: 0, y: 1_000}\nb: {<<: *a, <<: *a, x: 0x10, y: '010', z: 0.5, u: 1.0e-3, v: 2026-11-30}"
    found = parse_yaml(text, "it")
    assert found["a"] == {"x": 0, "y": 1000}
    assert {name: found["b"][name] for name in "xyzu"} == {"x": 16, "y": "010", "z": 0.5, "u": 0.001}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, "digitz"):
        with pytest.raises(ConfigError, match=r"cannot be read: .*; expected a yaml file or one of .*digits"):
            RunConfig.load(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is not text, expected a yaml file"):
        RunConfig.load(tmp_path / "binary")


_FOLDER = {"kind": "folder"}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DataConfig, {"frames": 0}, "data.frames is 0, expected an integer >= 1"),
        (DataConfig, {"channels": 2}, "data.channels is 2, expected 1 or 3"),
        (DataConfig, {"fps": 0}, "data.fps is 0.0, expected a finite number > 0"),
        (DataConfig, {"fps": "inf"}, "data.fps is inf, expected a finite number > 0"),
        (DataConfig, {"cache_gb": -1}, "data.cache_gb is -1.0, expected a finite number >= 0"),
        (DataConfig, {"actions": ["up", "up"]}, r"data.actions is \('up', 'up'\), expected names that differ"),
        (DataConfig, {"contacts": 0.5}, "data.contacts is 0.5, expected 0 but for the paddle world"),
        (DataConfig, {"kind": "paddle", "contacts": 2.0}, "data.contacts is 2.0, expected a share from 0 to 1"),
        (DataConfig, {"mix_fps": 8}, "config.mix_fps is 8, expected a list"),
        (DataConfig, {"mix_fps": [8, 16]}, r"data.mix_fps is \(8.0, 16.0\), expected an empty list but for a folder"),
        (DataConfig, {**_FOLDER, "mix_fps": [8, 0]}, r"data.mix_fps is \(8.0, 0.0\), expected finite numbers > 0"),
        (DataConfig, {**_FOLDER, "mix_fps": [8, 8]}, r"data.mix_fps is \(8.0, 8.0\), expected numbers that differ"),
        (DataConfig, {**_FOLDER, "mix_fps": [8, 16]}, "data.fps is None, expected one of data.mix_fps, the rate of"),
        (DataConfig, {**_FOLDER, "fps": 24, "mix_fps": [8]}, "data.fps is 24.0, expected one of data.mix_fps"),
        (DataConfig, {**_FOLDER, "fps": 8, "mix_fps": [8], "frames": 1}, r"an empty list with data.frames 1 \(images"),
        (DataConfig, {"caption_fps": True}, "data.fps is None, expected a number with data.caption_fps"),
        (TrainConfig, {"batch_size": 6, "accumulate": 4}, "train.accumulate is 4, expected a divisor of"),
        (TrainConfig, {"drop_label": 1.5}, "train.drop_label is 1.5, expected a number from 0 to 1"),
        (TrainConfig, {"lr": "nan"}, "train.lr is nan, expected a finite number >= 0"),
        (TrainConfig, {"noise_std": "inf"}, "train.noise_std is inf, expected a finite number >= 0"),
        (TrainConfig, {"beta2": 1.0}, "train.beta2 is 1.0, expected a number from 0 to below 1"),
        (TrainConfig, {"grad_clip": 0, "grad_skip": 1}, "train.grad_clip is 0.0, expected > 0 together with grad_skip"),
        (SampleConfig, {"solver": "windwo:8"}, "config.sample.solver is 'windwo:8', expected \"sequential\""),
        (SampleConfig, {"fps": 0}, "sample.fps is 0.0, expected 0.01 to 100000"),
        (SampleConfig, {"guidance": "inf"}, "sample.guidance is inf, expected a number >= 0"),
    ],
)
def test_options_of_data_and_training(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(kind, values)


def test_options_of_the_published_code() -> None:
    published = SMALL | {"num_blocks": 3, "layers_per_block": [2], "num_heads": 0, "use_mm_attn": 1, "norm_type": "x"}
    config = FlowConfig.from_published(published, "starflow")
    assert config.layers_per_block == (2, 2, 2)
    assert config.num_heads is None
    assert config.norm_type == "none"
    assert not config.rope
    tarflow = FlowConfig.from_published(SMALL | {"layers_per_block": 2, "num_blocks": 4}, "tarflow")
    assert tarflow.layers_per_block == (2, 2, 2, 2)
    assert tarflow.channel_first_patches
    with pytest.raises(ConfigError, match=r"flow.num_blocks is 3, expected the 2 of layers_per_block"):
        FlowConfig.from_published(SMALL | {"num_blocks": 3}, "starflow")
    with pytest.raises(ConfigError, match=r"flow.use_pretrained_lm is set, expected unset"):
        FlowConfig.from_published(SMALL | {"use_pretrained_lm": "gemma"}, "starflow")
    with pytest.raises(ConfigError, match=r"flow.tempral_causal is not an option; did you mean 'temporal_causal'"):
        FlowConfig.from_published(SMALL | {"tempral_causal": 2}, "starflow")
