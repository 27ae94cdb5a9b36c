"""Clips whose frames tell their number, and ffmpeg to store them in any way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from starflow.data import ffmpeg_binary


def ffmpeg(*arguments: object) -> None:
    """Runs ffmpeg, which overwrites what is there."""
    subprocess.run([ffmpeg_binary(), "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def store(path: Path, *options: object, frames: int = 50, rate: int = 25, first: int = 0, size: str = "64x48") -> None:
    """A video whose frame k is grey of level 3 (first + k) + 20."""
    source = f"nullsrc=s={size}:r={rate}:d={frames / rate},format=gray,geq=lum='(N+{first})*3+20',format=yuv420p"
    ffmpeg("-f", "lavfi", "-i", source, *options, path)


def stored_numbers(frames: torch.Tensor) -> list[int]:
    """The numbers of frames of `store`."""
    return [round((frame.float().mean().item() - 20) / 3) for frame in frames]


def counting(frames: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Frame k is grey of level 4 k + 2, so that a frame tells its number even after a lossy codec."""
    levels = torch.arange(frames).mul(4).add(2).to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(-1, height, width, 1).contiguous()


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers of frames of `counting`."""
    return [round((frame.float().mean().item() - 2) / 4) for frame in frames]
