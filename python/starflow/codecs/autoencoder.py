"""Learned codecs: autoencoders of the package diffusers with weights from a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starflow.codecs.codec import check_latents, check_pixels
from starflow.extras import import_extra

__all__ = ["AutoencoderKLCodec", "WanCodec"]


# What the published models were trained with, and how it comes into a folder.
_DOWNLOADS = {
    "AutoencoderKL": "hf download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors",
    "AutoencoderKLWan": "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --include 'vae/*'",
}


def _load(codec: str, class_name: str, folder: str | os.PathLike[str]) -> Any:
    """Load a frozen float32 autoencoder from a local folder, and nothing from anywhere else."""
    folder = Path(folder)
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
    # diffusers leaves parameters that the file lacks at random values, with no more than a warning.
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]][:4])
        raise ValueError(f"{codec}: the weights in {folder} lack or misshape {names}, expected all of {class_name}")
    return module.eval().requires_grad_(False)


def _parent(folder: Path) -> Path:
    """Where to download to, so that the files come to lie in `folder`."""
    return folder.parent if folder.name == "vae" else folder


def _check_noise(codec: str, noise: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"{codec}: noise has shape {list(noise.shape)}, expected {list(shape)} like the latents")


class AutoencoderKLCodec:
    """Image autoencoder of latent diffusion, applied to every frame alone (the published text-to-image model).

    Latents are (z - shift_factor) * scaling_factor, with both numbers from the folder's config.json.

    Args:
        folder: with config.json and the weights of a diffusers AutoencoderKL.
        frames_at_once: frames in one pass, which bounds the memory.

    Raises:
        FileNotFoundError: when the folder does not hold these files.
        ImportError: when the package diffusers is not installed.
        ValueError: when the weights do not fit.

    Reference: R. Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
    """

    exact = False
    log_det_per_dimension = None
    temporal = 1

    def __init__(self, folder: str | os.PathLike[str], frames_at_once: int = 8) -> None:
        if frames_at_once < 1:
            raise ValueError(f"AutoencoderKLCodec: frames_at_once is {frames_at_once}, expected at least 1")
        self.folder = str(folder)
        self.frames_at_once = frames_at_once
        self._module = _load("AutoencoderKLCodec", "AutoencoderKL", folder)
        config = self._module.config
        self.channels = int(config.in_channels)
        self.latent_channels = int(config.latent_channels)
        self.spatial = 2 ** (len(config.block_out_channels) - 1)
        self._scale = float(config.scaling_factor)
        self._shift = float(config.shift_factor or 0.0)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many pixel frames: as many."""
        return frames

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of so many latent frames: as many."""
        return latent_frames

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encode pixels.

        Args:
            pixels: floating point (batch, frames, channels, height, width) or (batch, channels, height, width), in
                [-1, 1]. The autoencoder moves to their device.
            noise: standard normal in the shape of the latents, for a draw from the posterior instead of its mean.

        Returns:
            float32 latents ([batch, frames,] latent_channels, height / spatial, width / spatial).

        Raises:
            ValueError: when a shape does not fit or divide.
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
            ValueError: when the shape is another.
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
        """Decodes a clip piece by piece: `decode`, since frames do not depend on each other."""
        return self.decode

    def to_config(self) -> dict[str, Any]:
        """The arguments that make this codec again, with its "kind" for `make_codec`."""
        return {"kind": "autoencoder_kl", "folder": self.folder, "frames_at_once": self.frames_at_once}


class WanCodec:
    """Causal video autoencoder of Wan (the published video model): 1 + 4n frames become 1 + n latent frames.

    The first latent frame holds the first frame alone, so an image is a video of one frame. Latents are normalised
    by the mean and deviation of each channel from the folder's config.json; posterior noise is added after that and
    is not normalised, as in the published recipe. Latents of all frames but the first are then multiplied by
    `suffix_scale`.

    Args:
        folder: with config.json and the weights of a diffusers AutoencoderKLWan.
        suffix_scale: positive; the published video model was trained with 0.6.

    Raises:
        FileNotFoundError: when the folder does not hold these files.
        ImportError: when the package diffusers is not installed.
        ValueError: when the weights do not fit, or `suffix_scale` is not positive.

    Reference: Wan: Open and Advanced Large-Scale Video Generative Models, 2025; Gu et al., STARFlow-V, 2025.
    """

    exact = False
    log_det_per_dimension = None

    def __init__(self, folder: str | os.PathLike[str], suffix_scale: float = 1.0) -> None:
        if not suffix_scale > 0:
            raise ValueError(f"WanCodec: suffix_scale is {suffix_scale}, expected a positive number")
        self.folder = str(folder)
        self.suffix_scale = float(suffix_scale)
        self._module = _load("WanCodec", "AutoencoderKLWan", folder)
        config = self._module.config
        patch = config.patch_size or 1
        self.channels = int(config.in_channels) // patch**2
        self.latent_channels = int(config.z_dim)
        self.spatial = patch * 2 ** (len(config.dim_mult) - 1)
        self.temporal: int = 2 ** sum(config.temperal_downsample)
        shape = (-1, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, dtype=torch.float32).view(shape)
        self._deviation = torch.tensor(config.latents_std, dtype=torch.float32).view(shape)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many pixel frames.

        Args:
            frames: 1 plus a multiple of `temporal`.

        Raises:
            ValueError: when it is not.
        """
        if frames < 1 or (frames - 1) % self.temporal:
            raise ValueError(f"WanCodec: frames is {frames}, expected 1 plus a multiple of {self.temporal}")
        return (frames - 1) // self.temporal + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of so many latent frames; the inverse of `latent_frames`."""
        return (latent_frames - 1) * self.temporal + 1

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encode pixels.

        Args:
            pixels: floating point (batch, 1 + temporal * n, channels, height, width), or images (batch, channels,
                height, width), in [-1, 1]. The autoencoder moves to their device.
            noise: standard normal in the shape of the latents, for a draw from the posterior instead of its mean.

        Returns:
            float32 latents (batch, 1 + n, latent_channels, h, w), images without the frame axis.

        Raises:
            ValueError: when a shape does not fit or divide.
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
            codes = codes + posterior.std * noise.to(codes).transpose(1, 2)
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
            ValueError: when the shape is another.
        """
        check_latents("WanCodec", latents, self.latent_channels)
        return self.decoder()(latents[:, None])[:, 0] if latents.ndim == 4 else self.decoder()(latents)

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Decodes a clip piece by piece; what the convolutions over time remember is kept from one call to the next."""
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
        """The arguments that make this codec again, with its "kind" for `make_codec`."""
        return {"kind": "wan", "folder": self.folder, "suffix_scale": self.suffix_scale}


def _unpatchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(batch, channels * patch^2, frames, height, width) to patches of pixels; column before row in the channels."""
    batch, channels, frames, height, width = pixels.shape
    cut = pixels.view(batch, channels // patch**2, patch, patch, frames, height, width)
    return cut.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, channels // patch**2, frames, height * patch, width * patch)
