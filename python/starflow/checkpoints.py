"""Models and training states on disk: safetensors with everything needed to use them, never half-written.

A model is one file: the weights, and in its header the configuration (json) and a checksum. A training state is a
folder `checkpoints/step-00001000` of a run. Both are written under a temporary name, flushed to the disk and renamed,
so a run that is killed at any moment leaves the previous one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from starflow.codecs import Codec, make_codec
from starflow.config import ConfigError, RunConfig, from_mapping, to_mapping
from starflow.files import remove_leftovers, replacing
from starflow.flow import Flow
from starflow.text import TextEncoder, make_text_encoder

MODEL = "model.safetensors"
STATE = "state.safetensors"
FORMAT = "starflow-1"
KEPT_STATES = 2

# First bytes of what torch.save writes: a zip archive, or a bare pickle in older files.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written."""


@dataclass(frozen=True)
class Loaded:
    """What `load_model` returns.

    Args:
        flow: in eval mode, on the CPU.
        config: of the run that made it.
        codec: pixels to latents.
        text: captions to features; None for a flow that reads none.
    """

    flow: Flow
    config: RunConfig
    codec: Codec
    text: TextEncoder | None


@dataclass(frozen=True)
class Header:
    """What a model file says about itself.

    Args:
        config: of the run that made it.
        about: other entries, such as "weights" (which ones they are) and "licence" (of converted models).
    """

    config: RunConfig
    about: dict[str, str]


# -- models -----------------------------------------------------------------------------------------------------------


def save_model(
    path: str | Path,
    flow: Flow,
    config: RunConfig,
    codec: Codec,
    text: TextEncoder | None,
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a model into one file.

    Args:
        path: of the file; its folder exists.
        flow: whose weights are written.
        config: of the run.
        codec, text: as they are now; their options, defaults included, replace those of the config.
        about: further entries for the header.

    Raises:
        CheckpointError: the file cannot be written; the one before is left as it was.
    """
    config = replace(config, codec=codec.to_config(), text={} if text is None else text.to_config())
    write_model(path, flow.state_dict(), config, about or {})


def write_model(path: str | Path, state: Mapping[str, Tensor], config: RunConfig, about: Mapping[str, str]) -> None:
    """Writes the state dict of a flow with its configuration (see `save_model`)."""
    path = Path(path)
    with saving(path) as temporary:
        _write(temporary, state, {**about, **_fingerprints(config), "config": json.dumps(to_mapping(config))})


def read_header(path: str | Path) -> Header:
    """Reads what a model file says about itself, without its weights.

    Args:
        path: of the file, or of the folder of a run.

    Raises:
        CheckpointError: not a model of ours, or damaged.
    """
    path = model_file(path)
    with _open(path) as file:
        return _header(path, file.metadata())


def load_flow(path: str | Path) -> tuple[Flow, RunConfig]:
    """Reads flow and configuration alone: no codec, no text encoder (see `load_model`)."""
    path = model_file(path)
    with _open(path) as file:
        config = _header(path, file.metadata()).config
        with torch.device("meta"):
            flow = Flow(config.flow)
        expected = flow.state_dict()
        names = set(file.keys())
        shapes = {name: list(file.get_slice(name).get_shape()) for name in names & set(expected)}
        problems = {
            "missing": sorted(set(expected) - names),
            "unexpected": sorted(names - set(expected)),
            "of another shape": [
                f"{name} {shape} (expected {list(expected[name].shape)})"
                for name, shape in sorted(shapes.items())
                if shape != list(expected[name].shape)
            ],
        }
        if any(problems.values()):
            listed = "; ".join(f"{what}: {', '.join(found)}" for what, found in problems.items() if found)
            raise CheckpointError(f"checkpoint {path}: tensors do not match its config; {listed}")
        flow.load_state_dict(_read(path, file), assign=True)
    return flow.requires_grad_(True).eval(), config


def load_model(path: str | Path) -> Loaded:
    """Reads a model that `save_model` wrote.

    Args:
        path: of the file, or of the folder of a run (which holds `model.safetensors`).

    Raises:
        CheckpointError: no such file, not safetensors, truncated or damaged, or tensors that do not match the config
            (all of them listed).
        ValueError: codec or text encoder cannot be made, such as local weights that are not there.
    """
    about = read_header(path).about
    flow, config = load_flow(path)
    for part, found in _fingerprints(config).items():
        if about.get(part, found) != found:
            raise CheckpointError(
                f"checkpoint {path}: config.json of the {part.removesuffix('_sha256')} in its folder is another than "
                "the one that the model was trained with, expected the same autoencoder and text encoder"
            )
    return Loaded(flow, config, make_codec(config.codec), make_text_encoder(config.text) if config.text else None)


def model_file(path: str | Path) -> Path:
    """The file of a model given by its own path or by the folder of its run."""
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} does not exist, expected a model file or the folder of a run")
    return file


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if "config" not in metadata:
        raise CheckpointError(f"checkpoint {path} has no config in its header, expected a model written by starflow")
    try:
        config = from_mapping(RunConfig, json.loads(metadata["config"]))
    except (json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"checkpoint {path}: config in the header cannot be used: {error}") from None
    return Header(config, {key: value for key, value in metadata.items() if key not in ("config", "crc32", "format")})


def _fingerprints(config: RunConfig) -> dict[str, str]:
    """What identifies the local weights that a model depends on: the options beside them, statistics included."""
    found = {}
    for part, options in (("codec", config.codec), ("text", config.text)):
        file = Path(options.get("folder", "")) / "config.json"
        if "folder" in options and file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            # Names with an underscore say which program wrote the file, and from where.
            kept = {key: value for key, value in content.items() if not key.startswith("_")}
            found[f"{part}_sha256"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


# -- training states --------------------------------------------------------------------------------------------------


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Writes a training state and removes all but the last two.

    Args:
        folder: of the run.
        step: steps done.
        tensors: weights, averages and moments.
        about: counters and configuration, values for json.

    Returns:
        The folder of the state.

    Raises:
        CheckpointError: it cannot be written; the ones before are left as they were.
    """
    parent = folder / "checkpoints"
    target = parent / f"step-{step:08d}"
    with saving(target) as temporary:
        temporary.mkdir()
        _write(temporary / STATE, tensors, {"state": json.dumps(about)})
    for old in _states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old)
    remove_leftovers(parent)
    return target


def latest_state(folder: Path) -> Path | None:
    """The last training state of a run, or None."""
    states = _states(folder)
    return states[-1] if states else None


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a training state.

    Args:
        path: as `save_state` returned it.

    Returns:
        Tensors and the rest, as given to `save_state`.

    Raises:
        CheckpointError: missing or damaged.
    """
    file = path / STATE
    with _open(file) as opened:
        metadata = opened.metadata()
        if "state" not in metadata:
            raise CheckpointError(f"checkpoint {file} is no training state, expected one written by starflow")
        return _read(file, opened), json.loads(metadata["state"])


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())


# -- files ------------------------------------------------------------------------------------------------------------


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(state, path, {**metadata, "format": FORMAT, "crc32": str(_checksum(state))})


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return value


def _read(path: Path, file: Any) -> dict[str, Tensor]:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    stated = file.metadata().get("crc32")
    if stated != str(_checksum(tensors)):
        raise CheckpointError(f"checkpoint {path} is damaged: its tensors do not have the checksum of its header")
    return tensors


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file of ours; CheckpointError for everything else."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if start.startswith(_PICKLES):
        raise CheckpointError(
            f"checkpoint {path} is a pickle, expected safetensors (a pickle can run code when it is opened; "
            "published checkpoints are read by `starflow convert`)"
        )
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is truncated, damaged or not safetensors ({error})") from None
    with opened as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise CheckpointError(f"checkpoint {path} is safetensors of another program, expected format {FORMAT}")
        yield file


@contextmanager
def saving(target: Path, what: str = "checkpoint") -> Iterator[Path]:
    """`starflow.files.replacing`, in a folder that is made where there is none; one CheckpointError says what failed.

    Args:
        target: file or folder.
        what: it is called in the error.

    Raises:
        CheckpointError: something cannot be written; `target` is left as it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{what} {target} cannot be written: {reason}; what was there before is left as it was"
        ) from None
