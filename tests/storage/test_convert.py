"""Published yamls and checkpoints, as far as they can be had: the golden models in the published form."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from starflow import decode
from starflow.config import ConfigError, FlowConfig, RunConfig, config_names, from_mapping, read_yaml, to_mapping
from starflow.mapped import ChangedFileError
from starflow.model import Int8Linear, to_int8
from starflow.solver import Window
from starflow.storage import CheckpointError, convert, load_flow, load_model, model_files, published_config, read_header
from starflow_ext import pack_weight

FOLDER = Path(os.environ.get("STARFLOW_GOLDENS") or Path(__file__).parents[1] / "goldens")

VIDEO = """
fsdp: 1, img_size: 640, secondary_img_size: 512, txt_size: 256, vid_size: '81:16', fps_cond: 1, channel_size: 48,
patch_size: 1, channels: 3072, top_block_channels: 4096, blocks: 6, layers_per_block: 2 2 2 2 2 24, noise_std: 0.5,
batch_size: 192, secondary_batch_size: 1536, secondary_ratio: 0.2, lr: 5e-5, min_lr: 1e-6, nvp: 1, rope: 1, adaln: 0,
sos: 1, seq_order: L2R, pt_seq_len: 32, mix_aspect: 1, use_softplus: 1, cond_top_only: 1, use_final_norm: 1,
learnable_self_denoiser: 1, conditional_denoiser: 1, denoiser_window: 10, cond_noise_level: 1, temporal_causal: 2,
shallow_block_local: 1, gradient_checkpoint: 1, vae: 'Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6', text: google/flan-t5-xl,
cfg: 2.5, drop_label: 0.1, drop_image: 0.25, grad_clip: 1, grad_skip: 1, soft_clip: 4
"""
IMAGE = """
fsdp: 1, img_size: 256, txt_size: 128, channel_size: 4, patch_size: 1, channels: 3072, blocks: 6,
layers_per_block: 2 2 2 2 2 24, noise_std: 0.3, batch_size: 1024, lr: 6.4e-05, min_lr: 1e-6, nvp: 1, rope: 1, sos: 1,
seq_order: L2R, use_softplus: 1, cond_top_only: 1, use_final_norm: 1, gradient_checkpoint: 0, cfg: 2.5,
vae: stabilityai/sd-vae-ft-ema, text: google/flan-t5-xl, drop_label: 0.1, soft_clip: 4, latent_norm_regularization: 1e-4
"""


def arguments(path: Path, options: dict[str, Any]) -> Path:
    """Writes options in the form of the published yamls."""
    path.write_text(yaml.safe_dump({"arguments": [{key: value} for key, value in options.items()]}), encoding="utf-8")
    return path


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Constructor options, weights under published names, and all tensors."""
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(FOLDER / f"{name}.safetensors")
    state = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    return about, state, tensors


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    [("starflow-v_7B_t2v_caus_480p", VIDEO, set()), ("starflow_3B_t2i_256x256", IMAGE, {"train.denoiser_lr"})],
)
def test_the_packaged_configs_are_the_published_ones(tmp_path: Path, name: str, options: str, changed: set) -> None:
    path = arguments(tmp_path / "published.yaml", yaml.safe_load("{" + options.replace("\n", " ") + "}"))
    read, packaged = (to_mapping(config) for config in (published_config(path), RunConfig.load(name)))
    differing = {
        f"{section}.{key}"
        for section in ("flow", "data", "codec", "text", "train", "sample")
        for key in packaged[section]
        if read[section][key] != packaged[section][key]
    }
    assert differing == changed | {"train.checkpoint_every"}


# Options of the published training script and of its sampling script, with values that they may have.
TRAIN = """
train_seed: 3, data: clips, logdir: logs, dataset: dummy, wds: 1, caption_column: text, secondary_dataset: null,
secondary_vid_size: null, vae_decoder_factor: 1, finetuned_vae: none, head_dim: 64, num_heads: 0, num_kv_heads: 0,
use_swiglu: 0, use_qk_norm: 0, use_post_norm: 0, use_bias: 1, norm_type: layer_norm, use_pretrained_lm: null,
use_mm_attn: 0, noise_embed_denoiser: 0, local_attn_window: 0, noise_type: gaussian, acc: 2, fp8: 0, use_8bit_adam: 0,
epochs: 10, epoch_length: 19200, last_frame_cond: 1, video_to_video: 0, resume_path: a.pth, resume_epoch: 0,
warmup_steps: 7, fsdp_text_encoder: 1, gradient_checkpoint_mlp: 1, compile: 0, loss_scaling: 1, dry_run: 0,
wandb_name: a, save_every: 2, sample_freq: 3, num_samples: 4096, sample_batch_size: 256, no_flip: 1
"""
SAMPLE = """
model_config_path: a.yaml, checkpoint_path: a.pth, save_folder: 1, caption: a cat, input_image: none,
aspect_ratio: '1:1', out_fps: 12, seed: 1, denoising_batch_size: 1, self_denoising_lr: 1, disable_learnable_denoiser: 1,
attn_temp: 1, jacobi: 1, jacobi_th: 0.005, jacobi_block_size: 64, jacobi_max_iter: 32, return_sequence: 0,
guide_top: null, vae_adapter: null, target_noise_std: null, target_length: null, context_length: 16
"""


def options_of_yaml(*texts: str) -> dict[str, Any]:
    return yaml.safe_load("{" + ", ".join(text.strip().replace("\n", " ") for text in texts) + "}")


def test_every_published_option_is_mapped_or_named(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "starflow")
    # Of a flow that was not released: then what the yaml says of sampling stands.
    options = {**options_of_yaml(VIDEO, TRAIN, SAMPLE), "soft_clip": 3, "cfg": 4}
    config = published_config(arguments(tmp_path / "a.yaml", options))
    train = config.train
    assert (train.seed, train.accumulate, train.steps, train.warmup_steps) == (3, 2, 1000, 7)
    assert (train.checkpoint_every, train.sample_every) == (200, 300)
    assert (train.last_frame_prob, train.source_prob) == (1.0, 0.0)
    assert (config.data.path, config.data.height, config.data.width) == ("clips", 640, 640)
    sample = config.sample
    assert (sample.guidance, sample.fps, sample.solver, sample.denoise) == (4.0, 12.0, "chunks:64:0.005", "score")
    (named,) = [record.getMessage() for record in caplog.records if "no counterpart" in record.getMessage()]
    for name in ("wandb_name", "dataset", "wds", "fp8", "resume_path", "target_length", "secondary_img_size"):
        assert name in named
    sequential = published_config(arguments(tmp_path / "b.yaml", {**options, "jacobi": 0, "last_frame_cond": 0}))
    assert sequential.sample.solver == "sequential"
    paired = {**options, "last_frame_cond": 0, "video_to_video": 1}
    assert published_config(arguments(tmp_path / "c.yaml", paired)).train.source_prob == 1.0


def test_a_fine_tuned_autoencoder_is_taken_or_told(tmp_path: Path, caplog) -> None:
    options = options_of_yaml(IMAGE)
    path = arguments(tmp_path / "a.yaml", {**options, "finetuned_vae": "tuned.pth"})
    assert "weights" not in published_config(path).codec
    assert "finetuned_vae is 'tuned.pth', which is no file here" in caplog.text
    (tmp_path / "tuned.pth").write_bytes(b"weights")
    config = published_config(path)
    assert config.codec["weights"] == str(tmp_path / "tuned.pth")
    assert config.sample.denoise == "none"
    given = published_config(arguments(tmp_path / "b.yaml", options), codec_weights="given.safetensors")
    assert given.codec["weights"] == "given.safetensors"


def test_the_other_autoencoder_of_wan_is_known(tmp_path: Path) -> None:
    options = {**options_of_yaml(VIDEO), "vae": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "channel_size": 16, "img_size": 320}
    config = published_config(arguments(tmp_path / "a.yaml", options))
    assert config.codec == {"kind": "wan", "folder": "Wan2.1-T2V-14B-Diffusers/vae"}
    assert (config.flow.in_channels, config.flow.img_size) == (16, 40)
    assert (config.data.height, config.data.width) == (240, 424)


def test_one_thing_under_two_names_is_refused(tmp_path: Path) -> None:
    path = arguments(tmp_path / "a.yaml", {**options_of_yaml(IMAGE), "num_blocks": 6})
    with pytest.raises(ConfigError, match="blocks and num_blocks are given, expected one of them: both name one thing"):
        published_config(path)
    path.write_text(path.read_text().replace("num_blocks", "blocks"))
    with pytest.raises(ConfigError, match=r"blocks is \[6, 6\], expected one value, it is given twice"):
        published_config(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_published_checkpoint_computes_the_golden_values(tmp_path: Path, zipped: bool) -> None:
    about, state, tensors = golden("v3_video_starflowv")
    kwargs = dict(about["kwargs"])
    torch.save(state, tmp_path / "published.pth", _use_new_zipfile_serialization=zipped)
    config = from_mapping(RunConfig, {"flow": to_mapping(FlowConfig.from_published(kwargs, "starflow"))})
    convert(tmp_path / "published.pth", config, tmp_path / "ours.safetensors")
    flow, loaded = load_flow(tmp_path / "ours.safetensors")
    assert loaded == config
    encoded = flow.encode(tensors["in.x"], tensors["in.y"])
    torch.testing.assert_close(encoded.z, tensors["out.z"], atol=1e-4, rtol=1e-4)
    about = read_header(tmp_path / "ours.safetensors").about
    assert "research use only" in about["licence"]
    assert about["source"] == "published.pth"


def test_a_checkpoint_in_float64_becomes_a_model_in_float32(tmp_path: Path) -> None:
    about, state, tensors = golden("v3_video_starflowv")
    torch.save({name: tensor.double() for name, tensor in state.items()}, tmp_path / "published.pth")
    config = from_mapping(RunConfig, {"flow": to_mapping(FlowConfig.from_published(dict(about["kwargs"]), "starflow"))})
    said: list[str] = []
    convert(tmp_path / "published.pth", config, tmp_path / "ours.safetensors", progress=said.append)
    flow, _ = load_flow(tmp_path / "ours.safetensors")
    assert {parameter.dtype for parameter in flow.parameters()} == {torch.float32}
    encoded = flow.encode(tensors["in.x"], tensors["in.y"])
    torch.testing.assert_close(encoded.z, tensors["out.z"], atol=1e-4, rtol=1e-4)
    assert any(
        line.endswith("tensors are in float64 and are written in float32, in which flows compute") for line in said
    )


def test_a_checkpoint_that_is_written_over_meanwhile_is_not_converted(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    path = tmp_path / "published.safetensors"
    save_file(state, path)
    config = from_mapping(RunConfig, {"flow": to_mapping(FlowConfig.from_published(dict(about["kwargs"]), "starflow"))})

    def tell(line: str) -> None:
        if line.startswith("writing"):
            path.write_bytes(path.read_bytes().replace(b"\x3f", b"\x3e"))

    with pytest.raises(ChangedFileError, match=r"published.safetensors was written to since its weights were mapped"):
        convert(path, config, tmp_path / "ours.safetensors", progress=tell)
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_tarflow_checkpoint_becomes_a_model_with_codec_and_classes(tmp_path: Path) -> None:
    about, state, tensors = golden("v6_tarflow_cond")
    names = {"in_channels": "channel_size", "num_blocks": "blocks"}
    options = {names.get(key, key): value for key, value in about["kwargs"].items()}
    config = published_config(arguments(tmp_path / "tar.yaml", {**options, "noise_std": 0.05}), family="tarflow")
    save_file(state, tmp_path / "published.safetensors")
    convert(tmp_path / "published.safetensors", config, tmp_path / "ours.safetensors")
    loaded = load_model(tmp_path / "ours.safetensors")
    x = tensors["in.x"]
    assert torch.equal(loaded.codec.encode(x), x)
    assert loaded.text is not None
    assert loaded.config.train.noise_std == 0.05
    # The published code keeps noise as tokens.
    noise = loaded.flow.encode(x, tensors["in.y"]).latents[-1]
    torch.testing.assert_close(noise.flatten(), tensors["out.z"].flatten(), atol=1e-4, rtol=1e-4)


def test_what_does_not_match_is_listed(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    flow = FlowConfig.from_published({**about["kwargs"], "use_final_norm": False}, "starflow")
    torch.save(state, tmp_path / "published.pth")
    message = (
        "published.pth: flow.use_final_norm is False, the checkpoint has True; tensors do not match the "
        "config; unexpected: blocks.0.final_norm.weight, blocks.1.final_norm.weight"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(tmp_path / "published.pth", RunConfig(flow), tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"channels": 96},
            "flow.channels is 96, the checkpoint has {channels}; tensors do not match the config; of another shape: ",
        ),
        ({"layers_per_block": [1, 1, 3]}, "flow.layers_per_block is (1, 1, 3), the checkpoint has {layers_per_block}"),
        ({"txt_dim": 9}, "flow.txt_dim is 9, the checkpoint has {txt_dim}"),
        ({"patch_size": 2}, "dimensions of a token is {four}, the checkpoint has {in_channels}"),
        ({"use_swiglu": True, "use_qk_norm": True}, "flow.use_swiglu is True, the checkpoint has False; flow.use_qk_"),
        ({"conditional_denoiser": False}, "flow.conditional_denoiser is False, the checkpoint has True"),
    ],
)
def test_options_that_differ_are_listed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    about, state, _ = golden("v3_video_starflowv")
    right = FlowConfig.from_published(about["kwargs"], "starflow")
    facts = {**to_mapping(right), "layers_per_block": right.layers_per_block, "four": 4 * right.in_channels}
    torch.save(state, tmp_path / "published.pth")
    wrong = FlowConfig.from_published({**about["kwargs"], **change}, "starflow")
    with pytest.raises(CheckpointError, match=re.escape(message.format(**facts))):
        convert(tmp_path / "published.pth", RunConfig(wrong), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_folder_of_files_holds_the_same_model_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    about, state, tensors = golden("v3_video_starflowv")
    torch.save(state, tmp_path / "published.pth")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    convert(tmp_path / "published.pth", config, tmp_path / "ours", dtype=dtype, file_bytes=60_000)
    files = model_files(tmp_path / "ours")
    assert len(files) > 2
    assert all(file.stat().st_size < 90_000 for file in files)
    header = read_header(tmp_path / "ours")
    assert (header.about["dtype"], header.about["source"]) == (dtype, "published.pth")
    assert "research use only" in header.about["licence"]
    flow, loaded = load_flow(tmp_path / "ours")
    assert loaded.sample.precision == ("int8" if dtype == "int8" else "float32")
    dtypes = {tensor.dtype for tensor in flow.state_dict().values()}
    assert dtypes == {torch.float32, getattr(torch, dtype)}
    bound = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1}[dtype]
    x, y = tensors["in.x"], tensors["in.y"]
    torch.testing.assert_close(flow.encode(x, y).z, tensors["out.z"], atol=bound, rtol=bound)
    # The denoiser and the native decoding read the same weights.
    precision = loaded.sample.precision
    decoded = decode(flow, flow.encode(x, y).z, y, schedule=Window(4, 0.0), precision=precision)
    assert (decoded.x - x).abs().max() < (2e-3 if dtype == "float32" else 0.1)


def test_integers_are_packed_as_they_are() -> None:
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    linear = Int8Linear(70, 40, bias=False)
    linear.weight_int8, linear.weight_scale = to_int8(weight)
    assert (linear.weight - weight).abs().max() <= 0.5001 * weight.abs().amax(1).max() / 127
    torch.testing.assert_close(pack_weight(linear.weight, "int8").unpack(), linear.weight, atol=1e-6, rtol=1e-6)


def test_a_folder_that_lacks_a_file_or_is_another_programs_is_refused(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    torch.save(state, tmp_path / "published.pth")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    ours = tmp_path / "ours"
    convert(tmp_path / "published.pth", config, ours, file_bytes=200_000)
    convert(tmp_path / "published.pth", config, ours, file_bytes=400_000)
    first = model_files(ours)[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{first.name} is damaged: its tensors do not have the checksum"):
        load_flow(ours)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} cannot be read: No such file"):
        load_flow(ours)
    index = ours / "model.safetensors.index.json"
    for text, message in (
        ("{", "is damaged, expected json of an index of a model"),
        ("{}", "is an index of another program"),
        (index.read_text().replace("model-", "../model-"), "names files elsewhere"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_flow(ours)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is a folder with other files, expected a model's or a new one"):
        convert(tmp_path / "published.pth", config, tmp_path / "full")
    with pytest.raises(ValueError, match="dtype is 'int4', expected one of keep, float32, bfloat16, int8"):
        convert(tmp_path / "published.pth", config, ours, dtype="int4")


class Harmful:
    """Would run a command when unpickled by the book."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harmed",)


def test_a_harmful_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, "published.pth")
    with pytest.raises(CheckpointError, match="is damaged or holds more than tensors, expected a state dict"):
        convert("published.pth", RunConfig.load("tiny"), "ours.safetensors")
    assert not Path("harmed").exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    config, target = RunConfig.load("tiny"), tmp_path / "ours.safetensors"
    with pytest.raises(CheckpointError, match=r"none.pth does not exist"):
        convert(tmp_path / "none.pth", config, target)
    torch.save({"a": torch.zeros(10000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match=r"cut.pth is (truncated or )?damaged"):
        convert(tmp_path / "cut.pth", config, target)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="is no state dict but list, expected tensors by name"):
        convert(tmp_path / "list.pth", config, target)


def test_the_frame_rates_of_a_yaml_are_mixed_in_training(tmp_path: Path) -> None:
    options = yaml.safe_load("{" + VIDEO.replace("\n", " ") + "}")
    for size, fps, mixed in (("81:16", 16.0, ()), ("81:16:24", 16.0, (16.0, 24.0)), ("81:24:24", 24.0, ())):
        data = published_config(arguments(tmp_path / "a.yaml", {**options, "vid_size": size})).data
        assert (data.frames, data.fps, data.mix_fps) == (81, fps, mixed)
    image = published_config(arguments(tmp_path / "a.yaml", {**options, "vid_size": "1:16:24"})).data
    assert (image.frames, image.mix_fps) == (1, ())


def test_published_options_that_cannot_be_honoured_are_named(tmp_path: Path) -> None:
    options = yaml.safe_load("{" + IMAGE.replace("\n", " ") + "}")
    for change, message in (
        ({"new_option": 1}, "flow.new_option is not an option"),
        ({"vae": "other"}, "vae is 'other', expected one of stabilityai/sd-vae-ft-ema"),
        ({"text": "other"}, "text is 'other', expected one of google/flan-t5-xl"),
        ({"vid_size": 4876}, "vid_size is 4876, expected frames:fps in quotes, such as '81:16'"),
        ({"vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:x"}, "5B-Diffusers:x', expected a number behind the colon"),
        ({"adaln": 1}, "adaln is 1, expected 0"),
        ({"noise_type": "uniform"}, "noise_type is 'uniform', expected 'gaussian'"),
        ({"vae_adapter": "dit"}, "vae_adapter is 'dit', expected none"),
        ({"img_size": 250}, "img_size is 250, expected a multiple of 8 pixels"),
        ({"use_pretrained_lm": "gemma"}, "flow.use_pretrained_lm is set, expected unset"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            published_config(arguments(tmp_path / "a.yaml", {**options, **change}))
    (tmp_path / "b.yaml").write_text("flow: {}")
    with pytest.raises(ConfigError, match=r"b.yaml has no list `arguments`, expected a yaml of the published code"):
        published_config(tmp_path / "b.yaml")


def test_every_packaged_config_loads_by_name_and_survives_a_round_trip() -> None:
    assert {"digits", "tiny"} <= set(config_names())
    for name in config_names():
        config = RunConfig.load(name)
        assert from_mapping(RunConfig, json.loads(json.dumps(to_mapping(config)))) == config


def test_wrong_options_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    flow = "flow: {in_channels: 1, img_size: 4, channels: 64, layers_per_block: [1]}"
    for text, message in (
        (f"{flow}\ntrain: {{step: 3}}", "config.train.step is not an option; did you mean 'steps'?"),
        (f"{flow}\ntrain: {{noise_std: -1}}", "train.noise_std is -1.0, expected a finite number >= 0"),
        (f"{flow}\ntrain: {{grad_clip: 0, grad_skip: 1}}", "train.grad_clip is 0.0, expected > 0 together with"),
        (f"{flow}\ndata: {{caption_fps: true}}", "data.fps is None, expected a number with data.caption_fps"),
        ("train: {}", "config lacks flow"),
        ("[1]", "is 'list', expected a mapping of options"),
        ("a: [", "is not yaml"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(message)):
            RunConfig.load(path)
    with pytest.raises(ConfigError, match=r"config nothing cannot be read: .*; expected a yaml file or one of .*tiny"):
        RunConfig.load("nothing")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text, expected a yaml file"):
        RunConfig.load(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"model.net.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("attn_blocks.", "_orig_mod.attn_blocks."): t for name, t in state.items()},
        lambda state: {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for name, t in state.items()},
        lambda state: {"model": state, "step": 3},
        lambda state: {"step": torch.tensor(3), "ema": {f"module.{name}": t for name, t in state.items()}, "lr": 0.1},
        lambda state: {"state_dict": state, "optimizer": {"moment": torch.zeros(3)}},
        lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    ],
)
def test_what_wrappers_and_trainers_put_around_a_state_dict_is_read_through(tmp_path: Path, wrap) -> None:
    about, state, _ = golden("v3_video_starflowv")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    torch.save(state, tmp_path / "plain.pth")
    convert(tmp_path / "plain.pth", config, tmp_path / "plain.safetensors")
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    said: list[str] = []
    convert(tmp_path / "wrapped.pth", config, tmp_path / "wrapped.safetensors", progress=said.append)
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "wrapped"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(said) >= 3 or isinstance(next(iter(wrap(state).values())), torch.nn.Parameter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.int(), "has tensors of int32: {name}; expected dense tensors of float32"),
        (lambda tensor: tensor.bool(), "has tensors of bool: {name}"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "has tensors of float8_e4m3fn: {name}"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "has tensors of float8_e5m2: {name}"),
        (lambda tensor: tensor.to(torch.complex64), "has tensors of complex64: {name}"),
        (lambda tensor: tensor.to_sparse(), "has tensors of layout sparse_coo: {name}"),
        (lambda tensor: tensor.to("meta"), "has tensors without content (meta): {name}"),
        (lambda tensor: torch.zeros(()), "{name} [] (expected"),
        (lambda tensor: torch.zeros(0, 3), "{name} [0, 3] (expected"),
        (lambda tensor: torch.full_like(tensor, float("nan")), "holds values that are not finite"),
        (lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64), "holds values that are not finite"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tensors_that_are_no_weights_are_named(tmp_path: Path, change, message: str, dtype) -> None:
    about, state, _ = golden("v3_video_starflowv")
    name = "blocks.0.proj_in.weight"
    torch.save({**state, name: change(state[name])}, tmp_path / "published.pth")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    with pytest.raises(CheckpointError, match=re.escape(message.format(name=name))) as caught:
        convert(tmp_path / "published.pth", config, tmp_path / "ours", dtype=dtype)
    assert len(str(caught.value)) < 800
    assert not (tmp_path / "ours").exists()


def test_a_message_is_short_however_many_names_differ(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    torch.save({f"{'x' * 3000}{name}": tensor for name, tensor in state.items()}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"missing: .* and .* more; unexpected: .* more") as caught:
        convert(tmp_path / "published.pth", config, tmp_path / "ours")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is neither a file of torch.save nor safetensors"),
        (b"\x80\x02.", "is truncated or damaged"),
        (b"\x80\x02" + b"(" * 100_000, "is truncated or damaged"),
        (b"\xff" * 8 + b"{", "is truncated, damaged or not safetensors"),
        (b"PK\x03\x04" + b"\0" * 100, "is "),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_a_file_that_is_none_is_told_by_its_content(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} {message}")):
        convert(tmp_path / name, RunConfig.load("tiny"), tmp_path / "ours.safetensors")


def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    torch.save(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        convert(tmp_path / name, config, tmp_path / "ours.safetensors")


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name) + b"\0" * (1 << 20))
    with pytest.raises(CheckpointError, match="is a compressed archive"):
        convert(tmp_path / "b.pth", RunConfig.load("tiny"), tmp_path / "ours.safetensors")


def test_several_state_dicts_are_named(tmp_path: Path) -> None:
    _, state, _ = golden("v3_video_starflowv")
    torch.save({"model": state, "ema": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds 2 state dicts, under 'model', 'ema', expected one"):
        convert(tmp_path / "a.pth", RunConfig.load("tiny"), tmp_path / "ours.safetensors")


def test_files_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    about, state, _ = golden("v3_video_starflowv")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    for name, factor in (("one", 1.0), ("two", 2.0)):
        torch.save({key: tensor * factor for key, tensor in state.items()}, tmp_path / "published.pth")
        convert(tmp_path / "published.pth", config, tmp_path / name, file_bytes=200_000)
    first = model_files(tmp_path / "one")[0]
    first.write_bytes((tmp_path / "two" / first.name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{first.name} is of another model than model.safetensors.index.json"):
        load_flow(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": []}, "is an index of another program"),
        ({"weight_map": [1]}, "is an index of another program"),
        ({"metadata": {"format": "starflow-2", "config": 3}}, "expected text in its metadata and its weight_map"),
        ({"weight_map": {"a": 3}}, "expected text in its metadata and its weight_map"),
        ({"weight_map": {"a": ""}}, "names files elsewhere"),
        ({"weight_map": {"a": ".."}}, "names files elsewhere"),
        ({"files": {}}, "does not have the checksum in it"),
    ],
)
def test_an_index_of_wrong_types_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    about, state, _ = golden("v3_video_starflowv")
    torch.save(state, tmp_path / "published.pth")
    config = RunConfig(FlowConfig.from_published(about["kwargs"], "starflow"))
    convert(tmp_path / "published.pth", config, tmp_path / "ours")
    index = tmp_path / "ours" / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_flow(tmp_path / "ours")


def test_published_options_of_wrong_types_are_named(tmp_path: Path) -> None:
    options = yaml.safe_load("{" + IMAGE.replace("\n", " ") + "}")
    for change, message in (
        ({"cfg": [1]}, "cfg is [1], expected a number"),
        ({"cfg": "much"}, "cfg is 'much', expected a number"),
        ({"layers_per_block": "2 two"}, "layers_per_block is [2, 'two'], expected integers"),
        ({"layers_per_block": {}}, "layers_per_block is {}, expected integers"),
        ({"blocks": "six"}, "blocks is 'six', expected an integer"),
        ({"img_size": -8}, "img_size is -8, expected a multiple of 8 pixels"),
        ({"vae": ["a"] * 10_000}, "vae is "),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            published_config(arguments(tmp_path / "a.yaml", {**options, **change}))
        assert len(str(caught.value)) < 800


def _bomb() -> str:
    """700 bytes that stand for 10^8 values."""
    lines = ["    - &b0 [l,l,l,l,l,l,l,l,l]"]
    lines += [f"    - &b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "flow:\n  in_channels:\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_bomb(), "stands for more than 1048576 values, expected fewer aliases"),
        ("a: &a [*a]", "holds an alias of itself, expected values that end"),
        ("a: &a {b: *a}", "holds an alias of itself, expected values that end"),
        ("train: {lr: " + "9" * 400 + "}", "expected at most 40 digits"),
        ("a: " + "[" * 60 + "]" * 60, "a is not an option"),
        ("a: " + "[" * 100_000, "is "),
        ("a: 2001-99-99", "is not yaml"),
        ("? [a]\n: 1", "is not yaml"),
        ("!!python/object/apply:os.mkdir [harmed]", "is not yaml"),
        ("", "expected a mapping of options"),
        ("x" * 5_000_000, "has more than 4194304 bytes"),
        ("flow: " + "x" * 100_000, "expected a mapping of options"),
    ],
)
def test_a_yaml_that_would_not_end_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        RunConfig.load(path)
    assert len(str(caught.value)) < 1000
    assert not Path("harmed").exists()
    with pytest.raises(ConfigError, match="is no file"):
        RunConfig.load(tmp_path)


def test_aliases_that_end_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &base {in_channels: 1, img_size: 4, channels: 64, layers_per_block: [1]}\n"
        "flow: {<<: *base, channels: 32}"
    )
    with pytest.raises(ConfigError, match=r"config\.base is not an option"):
        RunConfig.load(path)
    assert read_yaml(path)["flow"] == {"in_channels": 1, "img_size": 4, "channels": 32, "layers_per_block": [1]}
