"""The build backend: scikit-build-core's, asked for no more than this machine needs.

pip builds in an environment of its own, and fills it with what the hooks below return. Torch is among that only where
the environment that pip installs into has none to build with, CUTLASS's headers only where CUDA kernels may be built:
both are large. Run as a script, it prints all requirements, for an environment that builds without isolation.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from find_torch import find_torch

TORCH = "torch==2.13.0"
CUTLASS = "nvidia-cutlass==4.2.0.0"
ALL = ("scikit-build-core>=0.11", "pybind11>=2.13", "cmake>=3.24", "ninja>=1.11", TORCH, CUTLASS)

try:
    from scikit_build_core import build
    from scikit_build_core.build import (
        build_editable,
        build_sdist,
        build_wheel,
        get_requires_for_build_sdist,
        prepare_metadata_for_build_editable,
        prepare_metadata_for_build_wheel,
    )
except ImportError:
    if __name__ != "__main__":
        raise

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def may_build_cuda(settings: dict[str, Any]) -> bool:
    """Whether cmake/architectures.cmake could find something to build CUDA kernels for."""
    choice = settings.get("cmake.define.STARFLOW_CUDA") or os.environ.get("STARFLOW_CUDA") or "AUTO"
    named = settings.get("cmake.define.STARFLOW_CUDA_ARCHITECTURES") or os.environ.get("STARFLOW_CUDA_ARCHITECTURES")
    wanted = choice == "ON" or named or os.environ.get("TORCH_CUDA_ARCH_LIST") or shutil.which("nvidia-smi")
    return choice != "OFF" and bool(wanted)


def needed(settings: dict[str, Any] | None) -> list[str]:
    """Return what the build needs beside the requirements of pyproject.toml."""
    settings = settings or {}
    has_headers = bool(settings.get("cmake.define.STARFLOW_CUTLASS"))
    return [TORCH] * (find_torch() is None) + [CUTLASS] * (may_build_cuda(settings) and not has_headers)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the requirements of a wheel."""
    return [*build.get_requires_for_build_wheel(config_settings), *needed(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the requirements of an editable installation."""
    return [*build.get_requires_for_build_editable(config_settings), *needed(config_settings)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(ALL) + "\n")
