"""Published checkpoints (STARFlow, STARFlow-V, TarFlow) become models of ours; the weights keep their own licence."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starflow.config import ConfigError, FlowConfig, RunConfig, from_mapping, read_yaml, require, to_mapping
from starflow.mapped import release
from starflow.messages import short, shown
from starflow.model import to_int8
from starflow.storage.foreign import read_foreign, require_numbers
from starflow.storage.models import empty_flow, write_model
from starflow.storage.published import from_published, our_name
from starflow.storage.tensors import CheckpointError, LazyTensor

logger = logging.getLogger(__name__)

Family = Literal["starflow", "tarflow"]

# Dtype of weights in the file: as they come, or the matrices of layers rounded to bfloat16 or to integers (see
# `starflow.model.Int8Linear`) and all else in float32.
WeightDtype = Literal["keep", "float32", "bfloat16", "int8"]
_LAYER = re.compile(r".*\.layers\.\d+\.(attention\.(qkv|proj)|mlp\.(up|gate|down))\.(weight|bias)$")

LICENCE = (
    "converted from published weights, whose own licence goes with them (research use only; see LICENSE_MODEL of the "
    "release)"
)

# Our name of each training option of the published code.
_TRAIN = {
    "noise_std": "noise_std",
    "batch_size": "batch_size",
    "lr": "lr",
    "min_lr": "min_lr",
    "drop_label": "drop_label",
    "drop_image": "drop_image",
    "secondary_ratio": "image_prob",
    "cond_noise_level": "cond_noise_level",
    "grad_clip": "grad_clip",
    "grad_skip": "grad_skip",
    "latent_norm_regularization": "latent_norm_regularization",
    "acc": "accumulate",
}
_FLOW = {"channel_size": "in_channels", "blocks": "num_blocks", "gradient_checkpoint": "use_checkpoint"}
# Options of the published code that have no counterpart here: hardware, files, logging, and how data are arranged.
_DROPPED = (
    "adaln epochs finetuned_vae fsdp fsdp_text_encoder gradient_checkpoint_mlp loss_scaling no_flip "
    "sample_freq secondary_batch_size secondary_img_size wds"
)
# Autoencoders: kind here, pixels per latent position, channels of a latent.
_CODECS = {
    "stabilityai/sd-vae-ft-ema": ("autoencoder_kl", 8, "sd-vae-ft-ema"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("wan", 16, "Wan2.2-TI2V-5B-Diffusers/vae"),
}
_TEXT_WIDTHS = {"google/flan-t5-xl": 2048}


def published_config(
    path: str | Path,
    *,
    family: Family = "starflow",
    codec_folder: str | Path | None = None,
    text_folder: str | Path | None = None,
) -> RunConfig:
    """Reads a yaml of the published STARFlow code (a list `arguments` of options).

    Args:
        path: of the file.
        family: "tarflow" for a list of TarFlow's options, which come on the command line (`img_size`, `channel_size`,
            `patch_size`, `channels`, `blocks`, `layers_per_block`, `noise_std`, ...), and `num_classes`, `nvp`.
        codec_folder, text_folder: local copies of autoencoder and text encoder; by default folders of their names.

    Raises:
        ConfigError: not such a file, or an option that cannot be honoured; the message names it.
    """
    options = _arguments(Path(path))
    if family == "tarflow":
        return _tarflow_config(options)
    name, _, suffix = str(options.pop("vae", "")).partition(":")
    if name not in _CODECS:
        raise ConfigError(f"vae is {shown(name)}, expected one of {', '.join(_CODECS)}")
    kind, spatial, folder = _CODECS[name]
    codec: dict[str, Any] = {"kind": kind, "folder": str(codec_folder or folder)}
    if suffix:
        require(isinstance(_number(suffix), float), "vae", f"{name}:{suffix}", "a number behind the colon")
        codec["suffix_scale"] = float(suffix)
    encoder = str(options.pop("text", ""))
    if encoder not in _TEXT_WIDTHS:
        raise ConfigError(f"text is {shown(encoder)}, expected one of {', '.join(_TEXT_WIDTHS)}")
    text = {
        "kind": "t5",
        "folder": str(text_folder or encoder.rpartition("/")[2]),
        "size": options.get("txt_size", 0),
        "truncate": True,
        "zero_empty": False,
    }
    side = options.pop("img_size", None)
    require(
        isinstance(side, int) and side > 0 and side % spatial == 0, "img_size", side, f"a multiple of {spatial} pixels"
    )
    data: dict[str, Any] = {"kind": "folder", "channels": 3, "height": side, "width": side, "frames": 1}
    if "vid_size" in options:
        size = options.pop("vid_size")
        told = re.fullmatch(r"(\d+):(\d+(?:\.\d+)?)", str(size))
        if told is None:
            # Without quotes yaml reads 81:16 as a number to the base of 60.
            raise ConfigError(f"vid_size is {shown(size)}, expected frames:fps in quotes, such as '81:16'")
        data.update(frames=int(told[1]), fps=float(told[2]))
    data["caption_fps"] = bool(options.pop("fps_cond", False))
    data["mix_aspect"] = bool(options.pop("mix_aspect", False))
    sample: dict[str, Any] = {"guidance": _pop_number(options, "cfg")}
    if data.get("fps"):
        sample["fps"] = data["fps"]
    require(not options.get("adaln"), "adaln", options.get("adaln"), "0")
    # Defaults of the published training script that differ from ours.
    train: dict[str, Any] = {"denoiser_lr": 1e-4, "grad_clip": 0.0, "ema": 0.0, "precision": "bfloat16"}
    train.update({_TRAIN[key]: options.pop(key) for key in list(options) if key in _TRAIN})
    flow = _flow_options(options)
    flow.update(img_size=side // spatial, txt_dim=_TEXT_WIDTHS[encoder])
    return from_mapping(
        RunConfig,
        {
            "flow": to_mapping(FlowConfig.from_published(flow, "starflow")),
            "data": data,
            "codec": codec,
            "text": text,
            "train": train,
            "sample": sample,
        },
    )


def _tarflow_config(options: dict[str, Any]) -> RunConfig:
    """The configuration of a TarFlow model, whose codec leaves pixels as they are."""
    train = {_TRAIN[key]: options.pop(key) for key in list(options) if key in _TRAIN}
    guidance = _pop_number(options, "cfg")
    flow = FlowConfig.from_published(_flow_options(options), "tarflow")
    side = flow.img_size
    return from_mapping(
        RunConfig,
        {
            "flow": to_mapping(flow),
            "data": {"kind": "folder", "channels": flow.in_channels, "height": side, "width": side, "frames": 1},
            "codec": {"kind": "dct", "patch": 1, "channels": flow.in_channels, "opponent": False},
            "text": {"kind": "classes", "num_classes": flow.num_classes} if flow.num_classes else {},
            "train": {"grad_clip": 0.0, "ema": 0.0, **train},
            "sample": {"guidance": guidance},
        },
    )


def _flow_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor options of the published model among those of its training script."""
    flow = {_FLOW.get(key, key): value for key, value in options.items() if key not in _DROPPED.split()}
    layers = flow.get("layers_per_block", 1)
    if isinstance(layers, str):
        layers = [int(count) if count.isdecimal() else count for count in layers.split()]
    elif isinstance(layers, float):
        layers = [int(layers) if layers.is_integer() else layers]
    listed = layers if isinstance(layers, list) else [layers]
    require(bool(listed) and all(isinstance(count, int) for count in listed), "layers_per_block", layers, "integers")
    blocks = flow.get("num_blocks")
    require(blocks is None or isinstance(blocks, int), "blocks", blocks, "an integer")
    return {**flow, "layers_per_block": layers}


def convert(
    checkpoint: str | Path,
    config: RunConfig,
    target: str | Path,
    *,
    dtype: WeightDtype = "keep",
    file_bytes: int = 4 << 30,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes a published checkpoint as a model of ours, tensor by tensor.

    The tensors are mapped from the file, so that memory holds about one of them at a time.

    Args:
        checkpoint: of `torch.save` (tensors only: a pickle that holds anything else is refused, nothing in it is run)
            or safetensors, with published names (see `starflow.storage.foreign.read_foreign`).
        config: that the model belongs to (see `published_config`).
        target: a name that ends in `.safetensors` for one file, else a folder of files of about `file_bytes`.
        dtype: of the weights in the file (see `WeightDtype`).
        file_bytes: of the files of a folder.
        progress: called with a line on each stage.

    Raises:
        ValueError: an unknown dtype.
        CheckpointError: the file cannot be read, holds more than tensors, does not match the config (the options that
            differ are listed, or the first names and shapes), has tensors that are not finite or no floating-point
            numbers, or the target cannot be written.
    """
    if dtype not in get_args(WeightDtype):
        raise ValueError(f"convert: dtype is {dtype!r}, expected one of {', '.join(get_args(WeightDtype))}")
    tell = progress or logger.info
    tell(f"reading {short(checkpoint)}")
    state = read_foreign(Path(checkpoint), tell)
    require_numbers(Path(checkpoint), {name: tensor for name, tensor in state.items() if our_name(name) is not None})
    try:
        flow = empty_flow(config)
        given = from_published(flow, state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {str(error).removeprefix('checkpoint: ')}") from None
    ours: dict[str, Tensor | LazyTensor] = {}
    for name, tensor in flow.state_dict().items():
        if name in given:
            ours.update(_written(name, given[name].detach(), dtype))
        else:
            # Tensors that the published code does not have start as in a new model.
            ours[name] = torch.ones(tensor.shape) if name == "prior_variance" else torch.zeros(tensor.shape)
    if dtype == "int8":
        # The default would round the weights back to float32 numbers in memory.
        config = replace(config, sample=replace(config.sample, precision="int8"))
    size = sum(LazyTensor.of(tensor).nbytes for tensor in ours.values())
    tell(f"writing {target}: {sum(t.numel() for t in given.values()):,} numbers, {size / 1e9:.2f} GB; {LICENCE}")
    about = {"licence": LICENCE, "source": Path(checkpoint).name, "weights": "published", "dtype": dtype}
    write_model(target, ours, config, about, file_bytes=file_bytes)


def _written(name: str, tensor: Tensor, dtype: WeightDtype) -> dict[str, LazyTensor]:
    """The tensors that a file holds for one of the published checkpoint: two where its values become integers."""
    of_layer = _LAYER.match(name)
    if dtype == "int8" and of_layer and name.endswith(".weight"):
        shape = tuple(tensor.shape)
        # Each of the two tensors reads the weight by itself, so that memory holds one of them at a time.
        return {
            f"{name}_int8": LazyTensor(torch.int8, shape, partial(_made, tensor, lambda w: to_int8(w)[0])),
            f"{name}_scale": LazyTensor(torch.float32, shape[:1], partial(_made, tensor, lambda w: to_int8(w)[1])),
        }
    kept = tensor.dtype
    if dtype != "keep":
        kept = torch.bfloat16 if dtype == "bfloat16" and of_layer else torch.float32
    return {name: LazyTensor(kept, tuple(tensor.shape), partial(_made, tensor, lambda weight: weight.to(kept)))}


def _made(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A changed copy of a mapped tensor, whose own memory is given back to the system."""
    made = change(tensor)
    if made.data_ptr() == tensor.data_ptr():
        made = tensor.clone()
    release([tensor])
    return made


def _arguments(path: Path) -> dict[str, Any]:
    """The options of a published yaml."""
    content = read_yaml(path, "a yaml of the published code")
    arguments = content.get("arguments") if isinstance(content, Mapping) else None
    if not isinstance(arguments, list) or not all(isinstance(item, Mapping) for item in arguments):
        raise ConfigError(f"config {short(path)} has no list `arguments`, expected a yaml of the published code")
    options = {str(key): value for item in arguments for key, value in item.items()}
    # yaml reads 1e-6 (no dot) as text.
    return {key: _number(value) if isinstance(value, str) else value for key, value in options.items()}


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _pop_number(options: dict[str, Any], name: str) -> float:
    """Takes a number out of the options; 0 where it is not among them."""
    value = options.pop(name, 0.0)
    require(isinstance(value, int | float), name, value, "a number")
    return float(value)
