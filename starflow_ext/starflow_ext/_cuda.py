"""Why the CUDA kernels of this build cannot run on a device."""

from __future__ import annotations

import re

import torch

from starflow_ext._load import native


def why_no_kernels(device: int) -> str:
    """Say in one sentence why the CUDA kernels cannot run on a device, and what to do; "" where they can.

    Args:
        device: number of the device; the driver is asked for it.
    """
    build = native.build_info()
    if not build["cuda"]:
        return "this build of starflow-ext has no CUDA kernels, expected one that was built with STARFLOW_CUDA=ON"
    devices, reason = native.cuda_devices()
    if devices == 0:
        return str(reason)
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device, expected a build of torch with CUDA"
    capability = torch.cuda.get_device_capability(device)
    if served_by(str(build["cuda_architectures"]), *capability):
        return ""
    major, minor = capability
    return (
        f"cuda:{device} is {torch.cuda.get_device_name(device)} of sm_{major}{minor}, expected what this build has "
        f"kernels for, {build['cuda_architectures']}: "
        + ("none are for less than sm_80" if major < 8 else f'build with TORCH_CUDA_ARCH_LIST="{major}.{minor}"')
    )


def served_by(architectures: str, major: int, minor: int) -> bool:
    """Whether a build for ``architectures`` (CMake's names) has code for a device of this compute capability.

    Machine code of 80 runs on 8.0 and later ones of 8, that of a family (100f) likewise, that of 90a on 9.0 alone; PTX
    (90-virtual) on all later ones, and with a suffix on none but its own.
    """
    for number, suffix, kind in re.findall(r"(\d+)([af]?)(?:-(real|virtual))?", architectures):
        base = int(number) // 10, int(number) % 10
        served = base == (major, minor) if suffix == "a" else base[0] == major and base[1] <= minor
        # Without a kind there are both.
        if served or (kind != "real" and not suffix and base <= (major, minor)):
            return True
    return False
