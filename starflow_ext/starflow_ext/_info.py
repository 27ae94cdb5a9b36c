"""What this build and this machine can do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from starflow_ext._load import native


class Info(dict[str, Any]):
    """A dictionary that prints one line a fact."""

    def __str__(self) -> str:
        lines = []
        for section, facts in self.items():
            lines.append(section)
            lines += [f"  {name}: {fact}" for name, fact in facts.items()]
        return "\n".join(lines)


def info() -> Info:
    """Report the build, the levels of this CPU with the reason for each missing one, threads and CUDA.

    Returns:
        Sections "build", "cpu levels", "cpu features", "threads" and "cuda"; print it to read it.

    Examples:
        >>> import starflow_ext
        >>> starflow_ext.info()["cpu levels"]["scalar"]
        'supported'
    """
    build = native.build_info()
    devices, reason = native.cuda_devices()
    levels = {name: missing or "supported" for name, missing in native.isa_levels().items()}
    return Info(
        {
            "build": {
                "version": build["version"],
                "torch": f"built with {build['torch_built_with']}, for {build['torch_target']} and later, "
                f"running {torch.__version__}",
                "compiler": build["compiler"],
            },
            "cpu levels": levels | {"selected": native.selected_isa()},
            "cpu features": {name: missing or "present" for name, missing in native.cpu_features().items()},
            "threads": _threads(),
            "cuda": {
                "kernels": f"{build['cuda_architectures']} by nvcc {build['cuda_compiler']}"
                if build["cuda"]
                else "none",
                "devices": devices if devices else f"none: {reason}",
            },
        }
    )


def _threads() -> dict[str, Any]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    usable = affinity if quota is None else min(affinity, max(1, round(quota)))
    used = torch.get_num_threads()
    facts: dict[str, Any] = {
        "used": used,
        "affinity": affinity,
        "cgroup quota": "none" if quota is None else quota,
    }
    if used > usable:
        facts["advice"] = f"torch.set_num_threads({usable}): more threads than this process may run wait for each other"
    return facts


def cgroup_quota(root: Path) -> float | None:
    """Return how many CPUs the control group grants, or None where it sets no limit.

    Args:
        root: where control groups are mounted, version 2 or 1.
    """
    limit = root / "cpu.max"
    if limit.exists():
        quota, period = limit.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_file, period_file = root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"
    if quota_file.exists() and period_file.exists():
        microseconds = int(quota_file.read_text())
        return None if microseconds < 0 else microseconds / int(period_file.read_text())
    return None
