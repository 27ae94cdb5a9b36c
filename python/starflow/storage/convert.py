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

from starflow.arguments import check_call, check_config
from starflow.config import (
    ConfigError,
    FlowConfig,
    RunConfig,
    config_names,
    from_mapping,
    read_yaml,
    require,
    to_mapping,
)
from starflow.data import aspect_size
from starflow.mapped import MappedFile, release
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
# Options of the published yamls and commands that have no counterpart here; the log names those that a yaml sets.
_IGNORED = (
    # the machine
    "compile fp8 fsdp fsdp_text_encoder gradient_checkpoint_mlp loss_scaling use_8bit_adam use_mm_attn "
    # files, names and logs
    "caption caption_column checkpoint_path dataset dry_run input_image logdir model_config_path resume_epoch "
    "resume_path return_sequence save_folder wandb_name "
    # data: a second set, tars, flipping (clips are never flipped here)
    "no_flip secondary_batch_size secondary_dataset secondary_epoch_length secondary_img_size secondary_vid_size wds "
    # sampling: what `starflow sample` is told at each call, and what the published code does not read
    "attn_temp context_length denoising_batch_size guide_top jacobi_max_iter num_samples sample_batch_size seed "
    "self_denoising_lr target_length target_noise_std vae_decoder_factor"
)
# Defaults of the published training script: clips of an epoch, and epochs of a run.
_EPOCH_LENGTH, _EPOCHS = 50_000, 1000
# What the release's own sampling commands give, for clips and for images: tokens of a chunk, change that ends it.
_CHUNKS = {True: "chunks:32:0.001", False: "chunks:16:0.001"}
# Autoencoders, by what their name begins with: kind here, pixels per latent position, folder (named like it if empty).
_CODECS = {
    "stabilityai/sd-vae-ft-ema": ("autoencoder_kl", 8, "sd-vae-ft-ema"),
    "Wan-AI/Wan2.2-TI2V-5B": ("wan", 16, "Wan2.2-TI2V-5B-Diffusers/vae"),
    "Wan-AI/Wan2.1": ("wan", 8, ""),
}
_TEXT_WIDTHS = {"google/flan-t5-xl": 2048}


def published_config(
    path: str | Path,
    *,
    family: Family = "starflow",
    codec_folder: str | Path | None = None,
    codec_weights: str | Path | None = None,
    text_folder: str | Path | None = None,
) -> RunConfig:
    """Reads a yaml of the published STARFlow code (a list `arguments` of options).

    Options without a counterpart here are named in the log. A yaml of a released model samples as the release's own
    commands do, like the configuration of its name that comes with the package.

    Args:
        path: of the file.
        family: "tarflow" for a list of TarFlow's options, which come on the command line (`img_size`, `channel_size`,
            `patch_size`, `channels`, `blocks`, `layers_per_block`, `noise_std`, ...), and `num_classes`, `nvp`.
        codec_folder, text_folder: local copies of autoencoder and text encoder; by default folders of their names.
        codec_weights: weights that replace some of the autoencoder's, such as a fine-tuned decoder; by default the file
            that `finetuned_vae` names.

    Raises:
        ConfigError: not such a file, or an option that cannot be honoured, or is given twice or under two names; the
            message names it.
    """
    options = _arguments(Path(path))
    _tell_ignored(Path(path), options)
    if family == "tarflow":
        return _tarflow_config(options)
    codec, spatial = _codec(Path(path), options, codec_folder, codec_weights)
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
    if options.get("data") is not None:
        data["path"] = str(options["data"])
    if "vid_size" in options:
        size = options.pop("vid_size")
        told = re.fullmatch(r"(\d+)((?::\d+(?:\.\d+)?)+)", str(size))
        if told is None:
            # Without quotes yaml reads 81:16 as a number to the base of 60.
            raise ConfigError(f"vid_size is {shown(size)}, expected frames:fps in quotes, such as '81:16'")
        rates = list(dict.fromkeys(float(rate) for rate in told[2].split(":")[1:]))
        data.update(frames=int(told[1]), fps=rates[0])
        if len(rates) > 1 and data["frames"] > 1:
            data["mix_fps"] = rates
    data["caption_fps"] = bool(options.pop("fps_cond", False))
    data["mix_aspect"] = bool(options.pop("mix_aspect", False))
    options.pop("data", None)
    require(not options.get("adaln"), "adaln", options.pop("adaln", None), "0")
    sample = _sample_options(options, data)
    if codec.get("weights"):
        # A decoder that was tuned to noisy latents takes them as they are, as in the published code.
        sample["denoise"] = "none"
    # Defaults of the published training script that differ from ours.
    train = {"denoiser_lr": 1e-4, "grad_clip": 0.0, "ema": 0.0, "precision": "bfloat16", **_train_options(options)}
    ratio = options.pop("aspect_ratio", None)
    flow = _flow_options(options)
    flow.update(img_size=side // spatial, txt_dim=_TEXT_WIDTHS[encoder])
    config = from_mapping(
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
    if data["mix_aspect"]:
        # Clips of all shapes were trained on; by default the shape of the release's own commands is sampled.
        shape = str(ratio) if ratio not in (None, "random") else "16:9" if data["frames"] > 1 else "1:1"
        height, width = aspect_size(side, shape, spatial * config.flow.patch_size)
        config = replace(config, data=replace(config.data, height=height, width=width))
    return _as_released(Path(path), config)


def _codec(
    path: Path, options: dict[str, Any], folder: str | Path | None, weights: str | Path | None
) -> tuple[dict[str, Any], int]:
    """Takes the autoencoder out of the options: its configuration, and pixels of a latent position."""
    name, _, suffix = str(options.pop("vae", "")).partition(":")
    known = next((key for key in _CODECS if name.startswith(key)), None)
    if known is None:
        raise ConfigError(f"vae is {shown(name)}, expected one of {', '.join(_CODECS)}...")
    kind, spatial, usual = _CODECS[known]
    usual = usual or f"{name.rpartition('/')[2]}/vae"
    codec: dict[str, Any] = {"kind": kind, "folder": str(folder or usual)}
    if suffix:
        require(isinstance(_number(suffix), float), "vae", f"{name}:{suffix}", "a number behind the colon")
        codec["suffix_scale"] = float(suffix)
    adapter = options.pop("vae_adapter", None)
    require(adapter in (None, "none"), "vae_adapter", adapter, "none (a diffusion model behind the flow is no part)")
    tuned = options.pop("finetuned_vae", None)
    tuned = None if tuned in (None, "none") else str(tuned)
    found = None if tuned is None else next((p for p in (Path(tuned), path.parent / tuned) if p.is_file()), None)
    if weights is not None or found is not None:
        codec["weights"] = str(weights or found)
    elif tuned is not None:
        logger.warning(
            "finetuned_vae is %s, which is no file here: the autoencoder keeps its own weights; give the file of the "
            "fine-tuned ones (codec_weights, or --codec-weights of convert)",
            shown(tuned),
        )
    return codec, spatial


def _sample_options(options: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Takes what concerns sampling out of the options."""
    sample: dict[str, Any] = {"guidance": _pop_number(options, "cfg"), "solver": _CHUNKS[data["frames"] > 1]}
    fps = options.pop("out_fps", None) or data.get("fps")
    if fps:
        sample["fps"] = fps
    if options.pop("disable_learnable_denoiser", 0):
        sample["denoise"] = "score"
    _, block, threshold = sample["solver"].split(":")
    block, threshold = options.pop("jacobi_block_size", block), options.pop("jacobi_th", threshold)
    sample["solver"] = f"chunks:{block:g}:{threshold:g}" if isinstance(block, float) else f"chunks:{block}:{threshold}"
    if not options.pop("jacobi", 1):
        sample["solver"] = "sequential"
    return sample


def _train_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what concerns training out of the options."""
    noise = options.pop("noise_type", "gaussian")
    require(noise == "gaussian", "noise_type", noise, "'gaussian'")
    train = {_TRAIN[key]: options.pop(key) for key in list(options) if key in _TRAIN}
    if options.pop("last_frame_cond", 0):
        train["last_frame_prob"] = 1.0
    if options.pop("video_to_video", 0) and "last_frame_prob" not in train:
        train["source_prob"] = 1.0
    seed = options.pop("train_seed", None)
    if seed is not None:
        train["seed"] = seed
    # The published code counts epochs, of a number of clips that is no property of the data.
    length, epochs = options.pop("epoch_length", _EPOCH_LENGTH), options.pop("epochs", _EPOCHS)
    batch = train.get("batch_size", 128)
    for name, value in (("epoch_length", length), ("epochs", epochs), ("batch_size", batch)):
        require(isinstance(value, int) and value >= 1, name, value, "an integer >= 1")
    steps = max(length // batch, 1)
    train["steps"] = epochs * steps
    warmup = options.pop("warmup_steps", None)
    train["warmup_steps"] = steps if warmup is None else warmup
    for name, ours in (("save_every", "checkpoint_every"), ("sample_freq", "sample_every")):
        every = options.pop(name, None)
        if every is not None:
            require(isinstance(every, int) and every >= 0, name, every, "an integer >= 0")
            train[ours] = every * steps
    return train


def _as_released(path: Path, config: RunConfig) -> RunConfig:
    """A configuration of a released model, told by its flow, samples as the one that comes with the package does."""
    for name in config_names():
        released = RunConfig.load(name)
        if released.flow != config.flow:
            continue
        sample = replace(released.sample, denoise=config.sample.denoise)
        data = replace(config.data, height=released.data.height, width=released.data.width)
        if sample != config.sample:
            logger.info(
                "%s is of %s, which samples as the release's commands do: guidance %g (cfg is %g), solver %s",
                short(path),
                name,
                sample.guidance,
                config.sample.guidance,
                sample.solver,
            )
        return replace(config, sample=sample, data=data)
    return config


def _tell_ignored(path: Path, options: dict[str, Any]) -> None:
    """Takes the options that have no counterpart out, and names them."""
    ignored = sorted(set(_IGNORED.split()) & set(options))
    for name in ignored:
        del options[name]
    if ignored:
        logger.info("%s: %s have no counterpart here and are ignored", short(path), ", ".join(ignored))


def _tarflow_config(options: dict[str, Any]) -> RunConfig:
    """The configuration of a TarFlow model, whose codec leaves pixels as they are."""
    train = _train_options(options)
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
    flow = {_FLOW.get(key, key): value for key, value in options.items()}
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
        ChangedFileError: the checkpoint was written to meanwhile, or its times were set.
    """
    if dtype not in get_args(WeightDtype):
        raise ValueError(f"convert: dtype is {dtype!r}, expected one of {', '.join(get_args(WeightDtype))}")
    check_config("convert", config, RunConfig)
    check_call("convert", "progress", progress)
    tell = progress or logger.info
    tell(f"reading {short(checkpoint)}")
    state = read_foreign(Path(checkpoint), tell)
    mapped = MappedFile(Path(checkpoint), copied=0)
    require_numbers(Path(checkpoint), {name: tensor for name, tensor in state.items() if our_name(name) is not None})
    try:
        flow = empty_flow(config)
        given = from_published(flow, state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {str(error).removeprefix('checkpoint: ')}") from None
    ours: dict[str, Tensor | LazyTensor] = {}
    for name, tensor in flow.state_dict().items():
        if name in given:
            ours.update(_written(name, given[name].detach(), dtype, mapped))
        else:
            # Tensors that the published code does not have start as in a new model.
            ours[name] = torch.ones(tensor.shape) if name == "prior_variance" else torch.zeros(tensor.shape)
    if dtype == "int8":
        # The default would round the weights back to float32 numbers in memory.
        config = replace(config, sample=replace(config.sample, precision="int8"))
    if dtype == "keep" and (double := sum(tensor.dtype == torch.float64 for tensor in given.values())):
        tell(f"{double} tensors are in float64 and are written in float32, in which flows compute")
    size = sum(LazyTensor.of(tensor).nbytes for tensor in ours.values())
    tell(f"writing {target}: {sum(t.numel() for t in given.values()):,} numbers, {size / 1e9:.2f} GB; {LICENCE}")
    about = {"licence": LICENCE, "source": Path(checkpoint).name, "weights": "published", "dtype": dtype}
    write_model(target, ours, config, about, file_bytes=file_bytes)


def _written(name: str, tensor: Tensor, dtype: WeightDtype, mapped: MappedFile) -> dict[str, LazyTensor]:
    """The tensors that a file holds for one of the published checkpoint: two where its values become integers."""
    of_layer = _LAYER.match(name)
    if dtype == "int8" and of_layer and name.endswith(".weight"):
        shape = tuple(tensor.shape)
        # Each of the two tensors reads the weight by itself, so that memory holds one of them at a time.
        return {
            f"{name}_int8": LazyTensor(torch.int8, shape, partial(_made, mapped, tensor, lambda w: to_int8(w)[0])),
            f"{name}_scale": LazyTensor(
                torch.float32, shape[:1], partial(_made, mapped, tensor, lambda w: to_int8(w)[1])
            ),
        }
    # The rest of a flow, and what codecs and text encoders give it, is in float32.
    kept = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    if dtype != "keep":
        kept = torch.bfloat16 if dtype == "bfloat16" and of_layer else torch.float32
    return {name: LazyTensor(kept, tuple(tensor.shape), partial(_made, mapped, tensor, lambda weight: weight.to(kept)))}


def _made(mapped: MappedFile, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A changed copy of a tensor that is mapped from a file, whose own memory is given back to the system."""
    made = change(tensor)
    if made.data_ptr() == tensor.data_ptr():
        made = tensor.clone()
    mapped.require_same([tensor])
    release([tensor])
    return made


def _arguments(path: Path) -> dict[str, Any]:
    """The options of a published yaml."""
    content = read_yaml(path, "a yaml of the published code")
    arguments = content.get("arguments") if isinstance(content, Mapping) else None
    if not isinstance(arguments, list) or not all(isinstance(item, Mapping) for item in arguments):
        raise ConfigError(f"config {short(path)} has no list `arguments`, expected a yaml of the published code")
    options: dict[str, Any] = {}
    for item in arguments:
        for key, value in item.items():
            require(str(key) not in options, str(key), [options.get(str(key)), value], "one value, it is given twice")
            options[str(key)] = value
    for published, ours in (*_TRAIN.items(), *_FLOW.items()):
        if published != ours and published in options and ours in options:
            raise ConfigError(f"{published} and {ours} are given, expected one of them: both name one thing")
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
