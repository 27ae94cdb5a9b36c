"""What is installed, what the machine can do, and what a model file holds."""

from __future__ import annotations

import logging
import os
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import starflow_ext
from starflow.config import ConfigError, to_mapping
from starflow.data import ffmpeg_binary
from starflow.messages import listed, short
from starflow.solver import cache_folder
from starflow.storage import empty_flow, model_file, model_files, read_header, shipped_card, shipped_name

logger = logging.getLogger(__name__)

DISTRIBUTION = "starflow-ext"


# Characters of a fact: a vocabulary has some thousands.
_MOST_TOLD = 20_000
_PACKAGES = ("numpy", "safetensors", "av", "ffmpeg-python", "imageio-ffmpeg", "transformers", "diffusers")


def version(distribution: str = DISTRIBUTION) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def set_threads(count: int | None = None) -> int:
    """Sets how many threads torch and the kernels compute with.

    Args:
        count: of threads; None keeps OMP_NUM_THREADS where it is set, and otherwise takes no more than this process
            may use by its affinity and by the quota of its control group.

    Returns:
        The number in use.
    """
    if count is None and not os.environ.get("OMP_NUM_THREADS"):
        facts = starflow_ext.info()["threads"]
        quota = facts["cgroup quota"]
        usable = facts["affinity"] if quota == "none" else min(facts["affinity"], max(1, round(quota)))
        count = min(usable, torch.get_num_threads())
    if count is not None and count != torch.get_num_threads():
        torch.set_num_threads(count)
    return torch.get_num_threads()


# Variables of the environment that commands or the build read (README.md).
_VARIABLES = ("ISA", "CACHE", "CUDA", "CUDA_ARCHITECTURES", "CUTLASS")


def check_surroundings() -> None:
    """Refuses an environment in which no command can work, and tells of variables with our prefix that nothing reads.

    Raises:
        ConfigError: a variable of the environment that the ops refuse, or a folder that is gone.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the folder that this command was started in does not exist any more") from None
    known = [f"STARFLOW_{name}" for name in _VARIABLES]
    if unread := sorted(name for name in os.environ if name.startswith("STARFLOW_") and name not in known):
        logger.warning("nothing reads %s in the environment (known: %s)", listed(unread), ", ".join(known))
    try:
        starflow_ext.info()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None


def machine() -> dict[str, dict[str, Any]]:
    """Versions, build, processor, threads, ffmpeg and folders: sections of named facts."""
    facts: dict[str, dict[str, Any]] = {
        "starflow": {DISTRIBUTION: version(), "package": str(Path(__file__).parent), "cache": str(cache_folder())}
    }
    facts.update({section: dict(entries) for section, entries in starflow_ext.info().items()})
    facts["ffmpeg"] = _ffmpeg()
    facts["packages"] = {"torch": torch.__version__, **{name: version(name) for name in _PACKAGES}}
    return facts


def _ffmpeg() -> dict[str, str]:
    try:
        binary = ffmpeg_binary()
    except FileNotFoundError as error:
        return {"binary": f"none: {error}"}
    shown = subprocess.run([binary, "-hide_banner", "-version"], capture_output=True, text=True, check=False)
    return {"binary": binary, "version": (shown.stdout.splitlines() or ["does not run"])[0]}


def model(path: str | Path) -> dict[str, dict[str, Any]]:
    """Contents of a model file, without reading its weights: sections of named facts.

    Args:
        path: path of the file, or of the folder of a run, or the name of a shipped model.

    Raises:
        CheckpointError: not a model of ours, or damaged.
    """
    file = model_file(path)
    header = read_header(file)
    size = sum(part.stat().st_size for part in model_files(file))
    flow = empty_flow(header.config)
    counts: Counter[str] = Counter()
    for name, parameter in flow.named_parameters():
        parts = name.split(".")
        part = f"block {parts[1]}" if parts[0] == "blocks" else parts[0]
        counts[part] += parameter.numel()
    last = f"block {header.config.flow.num_blocks - 1}"
    parameters = {f"{part} (deep)" if part == last else part: f"{count:,}" for part, count in counts.items()}
    shipped = shipped_name(path)
    card = {} if shipped is None else {"card": to_mapping(shipped_card(shipped))}
    return {
        **card,
        "model": {"file": str(file), "size": f"{size / 2**20:.1f} MiB", **header.about},
        "parameters": {**parameters, "all": f"{sum(counts.values()):,}"},
        **{section: options for section, options in to_mapping(header.config).items() if options},
    }


def text_of(facts: dict[str, dict[str, Any]]) -> str:
    """Sections of facts as text, one fact a line."""
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        for name, value in entries.items():
            shown = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000)
            told = shown.removesuffix("\n").removesuffix("...").strip()
            lines.append(f"  {short(name)}: {short(told, _MOST_TOLD)}")
    return "\n".join(lines)
