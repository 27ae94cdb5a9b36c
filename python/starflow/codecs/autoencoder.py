"""Learned codecs: autoencoders of the package diffusers, whose weights are read from a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from starflow.codecs.codec import check_latents, check_pixels
from starflow.codecs.wan_file import wan_names, wan_options
from starflow.extras import import_extra
from starflow.mapped import own_memory
from starflow.messages import listed, short

__all__ = ["AutoencoderKLCodec", "WanCodec"]


# Commands that download the autoencoders that the published models were trained with.
_DOWNLOADS = {
    "AutoencoderKL": "hf download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors",
    "AutoencoderKLWan": "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --include 'vae/*'",
}


def _load(codec: str, class_name: str, folder: str | os.PathLike[str]) -> Any:
    """Load a frozen float32 autoencoder from a local folder, or from one original file of Wan, without any access to
    the network.
    """
    folder = Path(folder)
    if folder.is_file() and class_name == "AutoencoderKLWan":
        return _wan_of_file(codec, str(folder))
    if not (folder / "config.json").is_file() or not any(folder.glob("diffusion_pytorch_model*")):
        raise FileNotFoundError(
            f"{codec}: folder {folder} holds no autoencoder, expected the files config.json and "
            f"diffusion_pytorch_model.safetensors of a diffusers {class_name}; those of the published models come with "
            f"`{_DOWNLOADS[class_name]} --local-dir {_parent(folder)}` (codec.folder, or --codec of convert)"
        )
    diffusers = import_extra("diffusers", purpose=codec, extra="vae")
    module, info = getattr(diffusers, class_name).from_pretrained(
        folder,
        local_files_only=True,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    # Where the file lacks parameters diffusers only warns and leaves them at random values.
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]][:4])
        raise ValueError(f"{codec}: the weights in {folder} lack or misshape {names}, expected all of {class_name}")
    own_memory(module)
    return module.eval().requires_grad_(False)


def _wan_of_file(codec: str, file: str) -> Any:
    """The autoencoder of an original file of Wan, such as Wan2.2_VAE.pth."""
    diffusers = import_extra("diffusers", purpose=codec, extra="vae")
    given = _tensors(codec, file)
    try:
        module = diffusers.AutoencoderKLWan(**wan_options(given))
        state = {name: given[original] for original, name in wan_names(given).items()}
        module.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{codec}: {file} is no autoencoder of Wan ({short(error)}), expected Wan2.1_VAE.pth or Wan2.2_VAE.pth as "
            "released, or a folder in the format of diffusers"
        ) from None
    wrong = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"{codec}: {file} holds tensors that are not finite: {listed(wrong)}")
    return module.float().eval().requires_grad_(False)


def _replace(codec: str, module: torch.nn.Module, file: str) -> None:
    """Replaces weights of an autoencoder, such as those of a decoder that was tuned further.

    Args:
        codec: name for errors.
        module: whose parameters are overwritten.
        file: safetensors, or of `torch.save` with tensors alone; names are those of the module, with or without "vae."
            before them. Of each part (encoder, decoder, ...) all weights or none.
    """
    given = {name.removeprefix("vae."): tensor for name, tensor in _tensors(codec, file).items()}
    own = module.state_dict()
    parts = {name.partition(".")[0] for name in given}
    wrong = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in given.items()
        if name not in own or own[name].shape != tensor.shape or not tensor.isfinite().all()
    ]
    missing = [name for name in own if name.partition(".")[0] in parts and name not in given]
    if wrong or missing or not given:
        told = [f"{what}: {listed(names)}" for what, names in (("unfit", wrong), ("missing", missing)) if names]
        raise ValueError(
            f"{codec}: weights {file} do not fit the autoencoder ({'; '.join(told) or 'no tensors'}), expected all of "
            "its encoder, its decoder or both, finite"
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _tensors(codec: str, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a file; nothing in a pickle is run."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{codec}: weights {file} do not exist, expected a file of tensors")
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{codec}: weights {file} cannot be read: {short(error)}; expected tensors alone") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{codec}: weights {file} hold {type(content).__name__}, expected tensors by name")
    return {str(name): tensor for name, tensor in content.items()}


def _parent(folder: Path) -> Path:
    """The folder to download to so that the files end up in `folder`."""
    return folder.parent if folder.name == "vae" else folder


def _check_noise(codec: str, noise: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"{codec}: noise has shape {list(noise.shape)}, expected {list(shape)} like the latents")


class AutoencoderKLCodec:
    """Image autoencoder of latent diffusion, applied to each frame by itself, as in the published text-to-image model.

    Latents are (z - shift_factor) * scaling_factor, with both factors from the config.json of the folder.

    Args:
        folder: holds config.json and the weights of a diffusers AutoencoderKL.
        frames_at_once: number of frames that are encoded or decoded in one call; it bounds the memory.
        weights: a file of tensors that replace those of the folder, such as a fine-tuned decoder's.

    Raises:
        FileNotFoundError: when the folder lacks these files.
        ImportError: when the package diffusers is not installed.
        ValueError: when the weights do not fit.

    Reference: R. Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
    """

    exact = False
    log_det_per_dimension = None
    temporal = 1

    def __init__(self, folder: str | os.PathLike[str], frames_at_once: int = 8, weights: str | None = None) -> None:
        if frames_at_once < 1:
            raise ValueError(f"AutoencoderKLCodec: frames_at_once is {frames_at_once}, expected at least 1")
        self.folder = str(folder)
        self.frames_at_once, self.weights = frames_at_once, weights
        self._module = _load("AutoencoderKLCodec", "AutoencoderKL", folder)
        if weights is not None:
            _replace("AutoencoderKLCodec", self._module, weights)
        config = self._module.config
        self.channels = int(config.in_channels)
        self.latent_channels = int(config.latent_channels)
        self.spatial = 2 ** (len(config.block_out_channels) - 1)
        self._scale = float(config.scaling_factor)
        self._shift = float(config.shift_factor or 0.0)

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a number of pixel frames: the same."""
        return frames

    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames of a number of latent frames: the same."""
        return latent_frames

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encode pixels.

        Args:
            pixels: floating point (batch, frames, channels, height, width) or (batch, channels, height, width), in
                [-1, 1]. The autoencoder is moved to their device.
            noise: standard normal noise in the shape of the latents. With it the latents are a sample of the posterior,
                without it the mean.

        Returns:
            float32 latents ([batch, frames,] latent_channels, height / spatial, width / spatial).

        Raises:
            ValueError: when a shape does not fit, or a side is not a multiple of `spatial`.
        """
        check_pixels("AutoencoderKLCodec", pixels, self.channels, self.spatial)
        shape = (*pixels.shape[:-3], self.latent_channels, *(side // self.spatial for side in pixels.shape[-2:]))
        _check_noise("AutoencoderKLCodec", noise, shape)
        module = self._module.to(pixels.device)
        pictures = pixels.to(torch.float32).flatten(0, -4)
        draws = None if noise is None else noise.to(pictures).flatten(0, -4)
        parts = []
        for first in range(0, len(pictures), self.frames_at_once):
            some = slice(first, first + self.frames_at_once)
            posterior = module.encode(pictures[some]).latent_dist
            parts.append(posterior.mean if draws is None else posterior.mean + posterior.std * draws[some])
        return ((torch.cat(parts) - self._shift) * self._scale).view(shape)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents.

        Args:
            latents: as `encode` returns them.

        Returns:
            float32 pixels ([batch, frames,] channels, height, width); not clamped.

        Raises:
            ValueError: when the shape does not fit.
        """
        check_latents("AutoencoderKLCodec", latents, self.latent_channels)
        module = self._module.to(latents.device)
        codes = latents.to(torch.float32).flatten(0, -4) / self._scale + self._shift
        parts = [
            module.decode(codes[first : first + self.frames_at_once]).sample
            for first in range(0, len(codes), self.frames_at_once)
        ]
        pixels = torch.cat(parts)
        return pixels.view(*latents.shape[:-3], *pixels.shape[1:])

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that decodes a clip piece by piece. It is `decode`, since frames do not depend on each other."""
        return self.decode

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_codec` makes this codec again."""
        tuned = {} if self.weights is None else {"weights": self.weights}
        return {"kind": "autoencoder_kl", "folder": self.folder, "frames_at_once": self.frames_at_once, **tuned}


class WanCodec:
    """Causal video autoencoder of Wan, used by the published video model: 1 + 4n frames become 1 + n latent frames.

    The first latent frame encodes the first frame alone, so an image is a video of one frame. Latents are normalised by
    the mean and standard deviation of each channel, from the config.json of the folder. Noise of the posterior of Wan
    2.2 is added after that and is not normalised, as in the published recipe; that of Wan 2.1, whose pixels are not
    patched, is normalised too. The latents of all frames but the first are then multiplied by `suffix_scale`.

    Args:
        folder: holds config.json and the weights of a diffusers AutoencoderKLWan; or the file `Wan2.1_VAE.pth` or
            `Wan2.2_VAE.pth` as Wan released it.
        suffix_scale: positive; the published video model was trained with 0.6.
        weights: a file of tensors that replace those of the folder, such as a fine-tuned decoder's.

    Raises:
        FileNotFoundError: when the folder lacks these files.
        ImportError: when the package diffusers is not installed.
        ValueError: when the weights do not fit, or `suffix_scale` is not positive.

    Reference: Wan: Open and Advanced Large-Scale Video Generative Models, 2025; Gu et al., STARFlow-V, 2025.
    """

    exact = False
    log_det_per_dimension = None

    def __init__(self, folder: str | os.PathLike[str], suffix_scale: float = 1.0, weights: str | None = None) -> None:
        if not suffix_scale > 0:
            raise ValueError(f"WanCodec: suffix_scale is {suffix_scale}, expected a positive number")
        self.folder = str(folder)
        self.suffix_scale = float(suffix_scale)
        self.weights = weights
        self._module = _load("WanCodec", "AutoencoderKLWan", folder)
        if weights is not None:
            _replace("WanCodec", self._module, weights)
        config = self._module.config
        patch = config.patch_size or 1
        self._patched = patch > 1
        self.channels = int(config.in_channels) // patch**2
        self.latent_channels = int(config.z_dim)
        self.spatial = patch * 2 ** (len(config.dim_mult) - 1)
        self.temporal: int = 2 ** sum(config.temperal_downsample)
        shape = (-1, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, dtype=torch.float32).view(shape)
        self._deviation = torch.tensor(config.latents_std, dtype=torch.float32).view(shape)

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a number of pixel frames.

        Args:
            frames: 1 plus a multiple of `temporal`.

        Raises:
            ValueError: when `frames` is any other number.
        """
        if frames < 1 or (frames - 1) % self.temporal:
            raise ValueError(f"WanCodec: frames is {frames}, expected 1 plus a multiple of {self.temporal}")
        return (frames - 1) // self.temporal + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames of a number of latent frames; the inverse of `latent_frames`."""
        return (latent_frames - 1) * self.temporal + 1

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encode pixels.

        Args:
            pixels: floating point (batch, 1 + temporal * n, channels, height, width), or images (batch, channels,
                height, width), in [-1, 1]. The autoencoder moves to their device.
            noise: standard normal noise in the shape of the latents. With it the latents are a sample of the posterior,
                without it the mean.

        Returns:
            float32 latents (batch, 1 + n, latent_channels, h, w), images without the frame axis.

        Raises:
            ValueError: when a shape does not fit, or a side is not a multiple of `spatial`.
        """
        check_pixels("WanCodec", pixels, self.channels, self.spatial)
        size = (pixels.shape[-2] // self.spatial, pixels.shape[-1] // self.spatial)
        lead = pixels.shape[:1] if pixels.ndim == 4 else (pixels.shape[0], self.latent_frames(pixels.shape[1]))
        _check_noise("WanCodec", noise, (*lead, self.latent_channels, *size))
        if pixels.ndim == 4:
            return self.encode(pixels[:, None], noise=None if noise is None else noise[:, None])[:, 0]
        posterior = self._module.to(pixels.device).encode(pixels.to(torch.float32).transpose(1, 2)).latent_dist
        codes = (posterior.mean - self._mean.to(pixels.device)) / self._deviation.to(pixels.device)
        if noise is not None:
            spread = posterior.std if self._patched else posterior.std / self._deviation.to(pixels.device)
            codes = codes + spread * noise.to(codes).transpose(1, 2)
        latents: torch.Tensor = codes.transpose(1, 2).contiguous()
        latents[:, 1:] *= self.suffix_scale
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents.

        Args:
            latents: as `encode` returns them.

        Returns:
            float32 pixels (batch, 1 + temporal * n, channels, height, width), or (batch, channels, height, width);
            clamped to [-1, 1].

        Raises:
            ValueError: when the shape does not fit.
        """
        check_latents("WanCodec", latents, self.latent_channels)
        return self.decoder()(latents[:, None])[:, 0] if latents.ndim == 4 else self.decoder()(latents)

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that decodes a clip piece by piece; the convolutions over time keep their state between calls."""
        self._module.clear_cache()
        memory = list(self._module._feat_map)
        begun = False

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            nonlocal begun
            module = self._module.to(latents.device)
            codes = latents.to(torch.float32, copy=True)
            codes[:, 0 if begun else 1 :] /= self.suffix_scale
            codes = codes.transpose(1, 2) * self._deviation.to(codes.device) + self._mean.to(codes.device)
            parts = []
            for code in module.post_quant_conv(codes).split(1, 2):
                parts.append(module.decoder(code, feat_cache=memory, feat_idx=[0], first_chunk=not begun))
                begun = True
            pixels: torch.Tensor = torch.cat(parts, 2)
            if module.config.patch_size is not None:
                pixels = _unpatchify(pixels, module.config.patch_size)
            return pixels.clamp(-1.0, 1.0).transpose(1, 2).contiguous()

        return decode

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_codec` makes this codec again."""
        tuned = {} if self.weights is None else {"weights": self.weights}
        return {"kind": "wan", "folder": self.folder, "suffix_scale": self.suffix_scale, **tuned}


def _unpatchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Spread channels over patches of pixels.

    (batch, channels * patch^2, frames, height, width) becomes (batch, channels, frames, height * patch, width * patch).
    Among the channels the column within the patch varies more slowly than the row.
    """
    batch, channels, frames, height, width = pixels.shape
    cut = pixels.view(batch, channels // patch**2, patch, patch, frames, height, width)
    return cut.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, channels // patch**2, frames, height * patch, width * patch)
