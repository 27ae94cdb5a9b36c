"""Models and training states on disk: safetensors with everything needed to use them, never half-written.

A model is one file, or a folder of files of a few gigabytes each with an index: the weights, and in the header (of the
file, or in the index) the configuration (json). Every file has a checksum. A training state is a folder
`checkpoints/step-00001000` of a run, written by `torch.distributed.checkpoint`, with the counters in `state.json`. All
are written under a temporary name, flushed to the disk and renamed, so a run that is killed at any moment leaves the
previous one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from starflow.codecs import Codec, make_codec
from starflow.config import ConfigError, RunConfig, from_mapping, to_mapping
from starflow.distributed import ALONE, World
from starflow.files import remove_leftovers, replacing
from starflow.flow import Flow
from starflow.layers import Int8Linear
from starflow.packed import keep_mapped
from starflow.text import TextEncoder, make_text_encoder

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
STATE = "state.json"
FORMAT = "starflow-1"
KEPT_STATES = 2

# First bytes of what torch.save writes: a zip archive, or a bare pickle in older files.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# Bytes read at once for a checksum.
_CHUNK = 1 << 24


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
    flow: Flow | Mapping[str, Tensor],
    config: RunConfig,
    codec: Codec,
    text: TextEncoder | None,
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a model into one file.

    Args:
        path: of the file; its folder exists.
        flow: whose weights are written, or its state dict.
        config: of the run.
        codec, text: as they are now; their options, defaults included, replace those of the config.
        about: further entries for the header.

    Raises:
        CheckpointError: the file cannot be written; the one before is left as it was.
    """
    config = replace(config, codec=codec.to_config(), text={} if text is None else text.to_config())
    write_model(path, flow.state_dict() if isinstance(flow, Flow) else flow, config, about or {})


def write_model(
    path: str | Path,
    state: Mapping[str, Tensor | Stored],
    config: RunConfig,
    about: Mapping[str, str],
    *,
    file_bytes: int = 4 << 30,
) -> None:
    """Writes the state dict of a flow with its configuration, tensor by tensor.

    Args:
        path: a name that ends in `.safetensors` for one file, else a folder of files and their index.
        state: by name, tensors or what makes them.
        config: of the run.
        about: further entries for the header.
        file_bytes: of the files of a folder, about; no tensor is split.

    Raises:
        CheckpointError: something cannot be written; what was there before is left as it was.
    """
    path = Path(path)
    about = {**about, **_fingerprints(config), "config": json.dumps(to_mapping(config))}
    if path.suffix == ".safetensors":
        with saving(path) as temporary:
            write_tensors(temporary, state, about)
        return
    if path.is_dir() and not (path / INDEX).is_file() and any(path.iterdir()):
        raise CheckpointError(f"checkpoint {path} is a folder with other files, expected a model's or a new one")
    groups = _groups(state, file_bytes)
    with saving(path) as temporary:
        temporary.mkdir()
        places = {}
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_tensors(temporary / file, {name: state[name] for name in names}, {})
            places.update(dict.fromkeys(names, file))
        index = {"metadata": {**about, "format": FORMAT}, "weight_map": places}
        (temporary / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _groups(state: Mapping[str, Tensor | Stored], most: int) -> list[list[str]]:
    """Names in order, in groups of about `most` bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        stored = Stored.of(tensor)
        if groups[-1] and size + stored.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += stored.nbytes
    return groups


def read_header(path: str | Path) -> Header:
    """Reads what a model says about itself, without its weights.

    Args:
        path: of the file or folder, or of the folder of a run.

    Raises:
        CheckpointError: not a model of ours, or damaged.
    """
    with _open_model(path) as (file, metadata, _):
        return _header(file, metadata)


def load_flow(path: str | Path) -> tuple[Flow, RunConfig]:
    """Reads flow and configuration alone: no codec, no text encoder (see `load_model`).

    The weights stay in the file and are mapped: memory holds what is used of them.
    """
    with _open_model(path) as (path, metadata, opened):
        config = _header(path, metadata).config
        with torch.device("meta"):
            flow = Flow(config.flow)
        for name in opened:
            if name.endswith(".weight_int8"):
                _quantize(flow, path, name.removesuffix(".weight_int8"))
        expected = flow.state_dict()
        names = set(opened)
        shapes = {name: list(opened[name].get_slice(name).get_shape()) for name in names & set(expected)}
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
        for file in model_files(path):
            check_tensors(file)
        flow.load_state_dict({name: file.get_tensor(name) for name, file in opened.items()}, assign=True)
    keep_mapped(flow)
    return flow.requires_grad_(True).eval(), config


def _quantize(flow: Flow, path: Path, name: str) -> None:
    """Makes room for a weight that is kept as integers."""
    try:
        linear = flow.get_submodule(name)
    except AttributeError:
        return  # Listed with what else is unexpected.
    if not isinstance(linear, torch.nn.Linear):
        raise CheckpointError(f"checkpoint {path}: {name} has a weight in integers, expected them of layers alone")
    with torch.device("meta"):
        empty = Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    flow.set_submodule(name, empty)


def load_model(path: str | Path) -> Loaded:
    """Reads a model that `save_model` wrote.

    Args:
        path: of the file or folder, or of the folder of a run (which holds `model.safetensors`).

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
    """The file that holds the header of a model given by its own path or by the folder of its run."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / INDEX if (path / INDEX).is_file() else path / MODEL
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} does not exist, expected a model file or the folder of a run")
    return file


def model_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of a model."""
    file = model_file(path)
    return [file.parent / name for name in sorted(set(_index(file)["weight_map"].values()))] if _split(file) else [file]


def _split(file: Path) -> bool:
    return file.name == INDEX


def _index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {error}") from None
    about, places = (index.get(key) if isinstance(index, dict) else None for key in ("metadata", "weight_map"))
    if not isinstance(about, dict) or not isinstance(places, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {file} is an index of another program, expected format {FORMAT}")
    if any(Path(name).name != name for name in places.values()):
        raise CheckpointError(f"checkpoint {file} names files elsewhere, expected them beside it")
    return dict(index)


@contextmanager
def _open_model(path: str | Path) -> Iterator[tuple[Path, dict[str, str], dict[str, Any]]]:
    """The file with the header, its entries, and the open file of every tensor."""
    file = model_file(path)
    with ExitStack() as stack:
        if not _split(file):
            opened = stack.enter_context(_open(file))
            yield file, opened.metadata(), dict.fromkeys(opened.keys(), opened)
            return
        index = _index(file)
        files = {name: stack.enter_context(_open(file.parent / name)) for name in set(index["weight_map"].values())}
        found = {key: opened for opened in files.values() for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        yield file, index["metadata"], found


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
            sums = world.gather({name: _file_checksum(place / name) for name in names})
        except (OSError, RuntimeError) as error:
            raise _not_written("checkpoint", target, error) from None
        if world.first:
            files = {name: value for found in sums for name, value in found.items()}
            (place / STATE).write_text(json.dumps({**about, "files": files}), encoding="utf-8")
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
    try:
        about = json.loads((path / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path / STATE} cannot be read: {error.strerror}") from None
    except ValueError:
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("files"), dict):
        raise CheckpointError(f"checkpoint {path / STATE} is damaged, expected json of a training state")
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
    damaged = [name for name, file in found.items() if not file.is_file() or _file_checksum(file) != files[name]]
    listed = sorted(name for names in world.gather(damaged) for name in names)
    if listed:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {', '.join(listed)} missing or without the checksum of {STATE}"
        )
    try:
        world.load(tensors, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit: {' '.join(str(error).split())}") from None
    return about


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor of a file before it is made.

    Args:
        dtype, shape: of the tensor.
        make: returns it; called when it is written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor | Stored) -> Stored:
        """A tensor that is there already."""
        return tensor if isinstance(tensor, Stored) else Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with its checksum, one tensor after the other: memory holds one at a time.

    Args:
        path: of the file.
        tensors: by name.
        metadata: entries of the header.

    Raises:
        OSError: it cannot be written.
    """
    # The order of the format: by size of the numbers, so that all are aligned.
    order = sorted((-stored.dtype.itemsize, name) for name, stored in ((n, Stored.of(t)) for n, t in tensors.items()))
    entries: dict[str, Any] = {"__metadata__": {**metadata, "format": FORMAT, "crc32": "0" * 10}}
    offset = 0
    for _, name in order:
        stored = Stored.of(tensors[name])
        end = offset + stored.nbytes
        entries[name] = {"dtype": _DTYPES[stored.dtype], "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    value = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, name in order:
            stored = Stored.of(tensors[name])
            tensor = stored.make().detach().to("cpu").contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), name
            data = tensor.flatten().view(torch.uint8).numpy().data
            value = zlib.crc32(data, value)
            file.write(data)
        file.seek(8 + header.index(b'"crc32":"') + len('"crc32":"'))
        file.write(b"%010d" % value)


def check_tensors(path: Path) -> None:
    """Compares a file that `write_tensors` wrote with its checksum.

    Raises:
        CheckpointError: it is damaged.
    """
    with _open(path) as opened:
        stated = opened.metadata().get("crc32", "")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, 1)
        if not stated.isdigit() or int(stated) != _checksum(file):
            raise CheckpointError(f"checkpoint {path} is damaged: its tensors do not have the checksum of its header")


def _checksum(file: BinaryIO) -> int:
    """Of the rest of a file."""
    value = 0
    while chunk := file.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value


def _file_checksum(path: Path) -> int:
    with path.open("rb") as file:
        return _checksum(file)


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
        raise _not_written(what, target, error) from None


def _not_written(what: str, target: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(f"{what} {target} cannot be written: {reason}; what was there before is left as it was")
