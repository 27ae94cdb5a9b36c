"""The original files of the Wan autoencoders: their names of tensors, and the options of the network that they hold.

The releases of Wan have the autoencoder as one file (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`), with names of its own; its
network is the one that diffusers has under others.

Reference: Wan: Open and Advanced Large-Scale Video Generative Models, 2025.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Mean and standard deviation of each latent channel of Wan 2.2; those of Wan 2.1 are the defaults of diffusers.
_MEAN = (
    "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 "
    "-0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 "
    "-0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 "
    "-0.0548 -0.1681 -0.0667"
)
_DEVIATION = (
    "0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 "
    "0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 "
    "0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744"
)

# Parts of a residual block: index among its layers -> name.
_PARTS = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_FIXED = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
}


def wan_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of diffusers' AutoencoderKLWan that an original state dict is of, as far as shapes tell them.

    Args:
        state: tensors by original name; their values are not read.

    Raises:
        KeyError: a name is missing that every Wan autoencoder has.
    """
    base, channels = state["encoder.conv1.weight"].shape[:2]
    levels = _levels(state)
    latent = state["conv2.weight"].shape[0]
    patch = math.isqrt(channels // 3)
    known = {"latents_mean": _numbers(_MEAN), "latents_std": _numbers(_DEVIATION)} if latent == 48 else {}
    return {
        "base_dim": base,
        "decoder_base_dim": state["decoder.head.0.gamma"].shape[0],
        "z_dim": latent,
        "dim_mult": [width // base for width, _, _ in levels],
        "num_res_blocks": levels[0][1],
        "temperal_downsample": [in_time for _, _, in_time in levels[:-1]],
        "is_residual": _nested(state),
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": patch * 2 ** (len(levels) - 1),
        **known,
    }


def wan_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Original name -> name in diffusers, for every tensor of a state dict.

    Raises:
        KeyError: a name that no Wan autoencoder has.
    """
    blocks = _levels(state)[0][1]
    return {name: _name(name, blocks) for name in state}


def _name(name: str, blocks: int) -> str:
    """The name in diffusers of a tensor, where a level of the encoder has so many residual blocks."""
    stem, _, leaf = name.rpartition(".")
    if stem in _FIXED:
        return f"{_FIXED[stem]}.{leaf}"
    if found := re.fullmatch(r"(encoder|decoder)\.middle\.([02])\.residual\.([0236])", stem):
        return f"{found[1]}.mid_block.resnets.{int(found[2]) // 2}.{_PARTS[found[3]]}.{leaf}"
    if found := re.fullmatch(r"(encoder|decoder)\.middle\.1\.(norm|to_qkv|proj)", stem):
        return f"{found[1]}.mid_block.attentions.0.{found[2]}.{leaf}"
    kinds = r"(residual\.[0236]|shortcut|resample\.1|time_conv)"
    if found := re.fullmatch(
        rf"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.{kinds}", stem
    ):
        side = "down" if found[1] == "encoder" else "up"
        part = _part(found[4])
        place = f"resnets.{found[3]}" if part else f"{side}sampler"
        return f"{found[1]}.{side}_blocks.{found[2]}.{place}.{part or found[4]}.{leaf}"
    if found := re.fullmatch(rf"encoder\.downsamples\.(\d+)\.{kinds}", stem):
        return f"encoder.down_blocks.{found[1]}.{_part(found[2]) or found[2]}.{leaf}"
    if found := re.fullmatch(rf"decoder\.upsamples\.(\d+)\.{kinds}", stem):
        # A level of the decoder has one residual block more, and what enlarges it.
        level, index = divmod(int(found[1]), blocks + 2)
        part = _part(found[2])
        if bool(part) != (index <= blocks):
            raise KeyError(name)
        return f"decoder.up_blocks.{level}.{f'resnets.{index}' if part else 'upsamplers.0'}.{part or found[2]}.{leaf}"
    raise KeyError(name)


def _part(kind: str) -> str:
    """Name of a part of a residual block; "" for one that changes the size."""
    if kind == "shortcut":
        return "conv_shortcut"
    return _PARTS[kind.removeprefix("residual.")] if kind.startswith("residual.") else ""


def _nested(state: Mapping[str, Tensor]) -> bool:
    """Whether levels are modules of their own, as in Wan 2.2."""
    return "encoder.downsamples.0.downsamples.0.residual.2.weight" in state


def _levels(state: Mapping[str, Tensor]) -> list[tuple[int, int, bool]]:
    """Of each level of the encoder: its width, its residual blocks, and whether it halves time."""
    levels: list[tuple[int, int, bool]] = []
    width = count = 0
    prefixes = _places(state)
    for index, prefix in enumerate(prefixes):
        if f"{prefix}.residual.2.weight" in state:
            width, count = state[f"{prefix}.residual.2.weight"].shape[0], count + 1
        smaller = f"{prefix}.resample.1.weight" in state
        if smaller or index == len(prefixes) - 1:
            levels.append((width, count, f"{prefix}.time_conv.weight" in state))
            count = 0
    return levels


def _places(state: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the blocks of the encoder, in order."""
    inner = r"\.downsamples\.(\d+)" if _nested(state) else "()"
    found = {
        (int(match[1]), int(match[2] or 0)): match[0]
        for match in (re.match(rf"encoder\.downsamples\.(\d+){inner}", name) for name in state)
        if match
    }
    if not found:
        raise KeyError("encoder.downsamples")
    return [found[place] for place in sorted(found)]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]
