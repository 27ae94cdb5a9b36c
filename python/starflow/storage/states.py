"""Training states on disk, of one process or of many: a run goes on from the last one, to the same bits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from starflow.distributed import ALONE, World
from starflow.files import remove_leftovers
from starflow.messages import listed, short
from starflow.storage.tensors import CheckpointError, file_checksum, is_whole, not_written, read_json, saving, sealed

STATE = "state.json"
KEPT_STATES = 2

# What helps: the state before is kept for this.
_REST = " (without this folder a run goes on from the checkpoint before it)"

_STEP = re.compile(r"step-(\d{8,18})")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], world: World = ALONE
) -> Path:
    """Writes a training state and removes all but the last two.

    Args:
        folder: of the run; all processes see it.
        step: steps done.
        tensors: weights, averages and moments, whole or in pieces.
        about: counters and configuration, values for json.
        world: the processes that call this together.

    Returns:
        The folder of the state.

    Raises:
        CheckpointError: it cannot be written; the ones before are left as they were.
    """
    parent = folder / "checkpoints"
    target = parent / f"step-{step:08d}"
    with saving(target) if world.first else nullcontext(target) as temporary:

        def make() -> Path:
            temporary.mkdir()
            return temporary

        place = world.share(make)
        try:
            names = world.save(tensors, place)
            sums = world.gather({name: file_checksum(place / name) for name in names})
        except (OSError, RuntimeError) as error:
            raise not_written("checkpoint", target, error) from None
        if world.first:
            files = {name: value for found in sums for name, value in found.items()}
            # One level down: what is damaged is never taken for a state of earlier versions, which had no checksum.
            state = sealed({"state": {**about, "files": files}})
            (place / STATE).write_text(json.dumps(state), encoding="utf-8")
    if world.first:
        for old in _states(folder)[:-KEPT_STATES]:
            shutil.rmtree(old)
        remove_leftovers(parent)
    return target


def latest_state(folder: Path) -> Path | None:
    """The last training state of a run, or None."""
    states = _states(folder)
    return states[-1] if states else None


def read_state(path: Path) -> dict[str, Any]:
    """Reads what a training state says about itself.

    Args:
        path: as `save_state` returned it.

    Raises:
        CheckpointError: missing or damaged.
    """
    about = read_json(path / STATE, "a training state")
    if "state" in about:
        if not is_whole(about) or not isinstance(about["state"], dict):
            raise CheckpointError(f"checkpoint {path / STATE} is damaged: it does not have the checksum in it{_REST}")
        about = about["state"]
    files = about.get("files")
    if not isinstance(files, dict) or not all(Path(name).name == name for name in files):
        raise CheckpointError(f"checkpoint {path / STATE} is damaged, expected json of a training state{_REST}")
    return about


def load_state(path: Path, tensors: Mapping[str, Tensor], world: World = ALONE) -> dict[str, Any]:
    """Reads a training state into tensors, whatever the number of processes that wrote it.

    Args:
        path: as `save_state` returned it.
        tensors: with the names and shapes that were given to `save_state`; overwritten.
        world: the processes that call this together.

    Returns:
        `about`, as given to `save_state`.

    Raises:
        CheckpointError: missing or damaged, or tensors that do not match.
    """
    about = read_state(path)
    files: dict[str, int] = about.pop("files")
    found = {name: path / name for name in sorted(files)[world.rank :: world.size]}
    damaged = [name for name, file in found.items() if not file.is_file() or file_checksum(file) != files[name]]
    # The reader takes every file of the folder.
    damaged += [file.name for file in path.glob("*.safetensors") if world.first and file.name not in files]
    wrong = sorted(name for names in world.gather(damaged) for name in names)
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {listed(wrong)} missing or without the checksum of {STATE}{_REST}"
        )
    try:
        world.load(tensors, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit: {short(error)}") from None
    return about


def _states(folder: Path) -> list[Path]:
    """In the order of their steps."""
    found = ((_STEP.fullmatch(path.name), path) for path in (folder / "checkpoints").glob("step-*") if path.is_dir())
    return [path for _, path in sorted((int(step[1]), path) for step, path in found if step)]
