"""Models on disk: safetensors with everything needed to use them, never half-written.

A model is one file, or a folder of files of a few gigabytes each with an index: the weights, and in the header (of the
file, or in the index) the configuration (json). Header, index and weights are under checksums. All are written under a
temporary name, flushed to the disk and renamed, so a process that is killed at any moment leaves the previous model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from starflow.arguments import check_config, check_text
from starflow.codecs import Codec, make_codec
from starflow.config import ConfigError, RunConfig, from_mapping, to_mapping
from starflow.files import standing
from starflow.inference import plain_modes
from starflow.mapped import MappedFile
from starflow.messages import listed, short, shown
from starflow.model import Flow, Int8Linear, keep_mapped
from starflow.storage.parts import check_parts, fingerprints
from starflow.storage.shipped import shipped_file, shipped_name, shipped_names
from starflow.storage.tensors import (
    FORMAT,
    FORMATS,
    CheckpointError,
    LazyTensor,
    check_tensors,
    is_whole,
    open_tensors,
    read_json,
    saving,
    sealed,
    sums_of,
    write_tensors,
)
from starflow.text import TextEncoder, make_text_encoder

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Loaded:
    """What `load_model` returns.

    Args:
        flow: in eval mode, on the CPU.
        config: of the run that made it.
        codec: pixels to latents.
        text: captions to features; None for a flow that reads none.
        about: other entries of the header (see `Header`).
    """

    flow: Flow
    config: RunConfig
    codec: Codec
    text: TextEncoder | None
    about: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """What a model file says about itself.

    Args:
        config: of the run that made it.
        about: other entries, such as "weights" (which ones they are) and "licence" (of converted models).
    """

    config: RunConfig
    about: dict[str, str]


def save_model(
    path: str | Path,
    flow: Flow | Mapping[str, Tensor],
    config: RunConfig,
    codec: Codec,
    text: TextEncoder | None,
    *,
    about: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Writes a model into one file.

    Args:
        path: of the file; its folder exists.
        flow: whose weights are written, or its state dict.
        config: of the run.
        codec, text: as they are now; their options, defaults included, replace those of the config.
        about: further entries for the header.
        parts: as of `write_model`.

    Raises:
        CheckpointError: the file cannot be written; the one before is left as it was.
        ValueError: the configuration is of another flow, or an entry of `about` is no text.
    """
    check_config("save_model", config, RunConfig)
    if isinstance(flow, Flow) and flow.config != config.flow:
        told, own = to_mapping(config.flow), to_mapping(flow.config)
        other = next(name for name in own if own[name] != told[name])
        raise ValueError(
            f"save_model: flow.{other} is {shown(told[other])} in the configuration, expected {shown(own[other])} as "
            "in the flow"
        )
    config = replace(config, codec=codec.to_config(), text={} if text is None else text.to_config())
    write_model(path, flow.state_dict() if isinstance(flow, Flow) else flow, config, about or {}, parts=parts)


def write_model(
    path: str | Path,
    state: Mapping[str, Tensor | LazyTensor],
    config: RunConfig,
    about: Mapping[str, str],
    *,
    parts: Mapping[str, str] | None = None,
    file_bytes: int = 4 << 30,
) -> None:
    """Writes the state dict of a flow with its configuration, tensor by tensor.

    Args:
        path: a name that ends in `.safetensors` for one file, else a folder of files and their index.
        state: by name, tensors or what makes them.
        config: of the run.
        about: further entries for the header.
        parts: what `fingerprints` said of the configuration before; None reads the folders of autoencoder and text
            encoder now.
        file_bytes: of the files of a folder, about; no tensor is split.

    Raises:
        CheckpointError: something cannot be written; what was there before is left as it was.
    """
    check_config("write_model", config, RunConfig)
    for name, entry in about.items():
        check_text("write_model", f"about[{name!r}]", entry)
    path = Path(path)
    about = {**(fingerprints(config) if parts is None else parts), **about, "config": json.dumps(to_mapping(config))}
    if path.suffix == ".safetensors":
        with saving(path) as temporary:
            write_tensors(temporary, state, about)
        return
    if path.is_dir() and not (path / INDEX).is_file() and any(path.iterdir()):
        raise CheckpointError(f"checkpoint {path} is a folder with other files, expected a model's or a new one")
    groups = _groups(state, file_bytes)
    with saving(path) as temporary:
        temporary.mkdir()
        places: dict[str, str] = {}
        sums = {}
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            sums[file] = write_tensors(temporary / file, {name: state[name] for name in names}, {})
            places.update(dict.fromkeys(names, file))
        # With the checksum of each file, so that one of another model is not taken for its own.
        index = {"metadata": {**about, "format": FORMAT}, "weight_map": places, "files": sums}
        (temporary / INDEX).write_text(json.dumps(sealed(index), indent=2), encoding="utf-8")


def _groups(state: Mapping[str, Tensor | LazyTensor], most: int) -> list[list[str]]:
    """Names in order, in groups of about `most` bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        stored = LazyTensor.of(tensor)
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
    with _open_model(path) as (file, metadata, opened):
        return _header(file, metadata, len(opened))


@plain_modes()
def load_flow(path: str | Path) -> tuple[Flow, RunConfig]:
    """Reads flow and configuration alone: no codec, no text encoder (see `load_model`).

    The weights of a file above 64 MiB stay in it and are mapped: memory holds what is used of them. Replace such a file
    by rename, as `save_model` and `mv` do. One that is written to in place ends the next use of the flow by
    `starflow.mapped.ChangedFileError`, and one that is cut off while a call reads it ends the process (SIGBUS).
    """
    mapped: dict[Path, MappedFile] = {}
    with _open_model(path, mapped) as (path, metadata, opened):
        config = _header(path, metadata, len(opened)).config
        try:
            flow = empty_flow(config)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: config in the header cannot be used: {error}") from None
        for name in opened:
            if name.endswith(".weight_int8"):
                _quantize(flow, path, name.removesuffix(".weight_int8"))
        expected = flow.state_dict()
        names = set(opened)
        found = {name: opened[name].get_slice(name) for name in names & set(expected)}
        shapes = {name: list(part.get_shape()) for name, part in found.items()}
        problems = {
            "missing": sorted(set(expected) - names),
            "unexpected": sorted(names - set(expected)),
            "of another shape": [
                f"{name} {shape} (expected {list(expected[name].shape)})"
                for name, shape in sorted(shapes.items())
                if shape != list(expected[name].shape)
            ],
            "of another dtype": [
                f"{name} {found[name].get_dtype()} (expected {' or '.join(_dtypes(expected[name].dtype))})"
                for name in sorted(found)
                if found[name].get_dtype() not in _dtypes(expected[name].dtype)
            ],
        }
        if any(problems.values()):
            told = "; ".join(f"{what}: {listed(found)}" for what, found in problems.items() if found)
            raise CheckpointError(f"checkpoint {path}: tensors do not match its config; {told}")
        for file, held in mapped.items():
            held.expect(check_tensors(file, held.source), partial(sums_of, file))
        flow.load_state_dict({name: file.get_tensor(name) for name, file in opened.items()}, assign=True)
    keep_mapped(flow, tuple(mapped.values()))
    return flow.requires_grad_(True).eval(), config


def _dtypes(expected: torch.dtype) -> tuple[str, ...]:
    """What a file may hold for a tensor of the flow: integers as they are, any numbers that layers compute with."""
    return ("F32", "BF16", "F16", "F64") if expected.is_floating_point else ("I8",)


def empty_flow(config: RunConfig) -> Flow:
    """A flow without memory for its weights, from a configuration that somebody wrote.

    Raises:
        ValueError: sizes that no tensor can have.
    """
    check_config("empty_flow", config, RunConfig)
    try:
        with torch.device("meta"):
            return Flow(config.flow)
    except (RuntimeError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"flow cannot be made: {short(str(error).splitlines()[0])}") from None


def _quantize(flow: Flow, path: Path, name: str) -> None:
    """Makes room for a weight that is kept as integers."""
    try:
        linear = flow.get_submodule(name)
    except AttributeError:
        return  # Listed with what else is unexpected.
    if not isinstance(linear, torch.nn.Linear):
        raise CheckpointError(
            f"checkpoint {path}: {short(name)} has a weight in integers, expected them of layers alone"
        )
    with torch.device("meta"):
        empty = Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    flow.set_submodule(name, empty)


@plain_modes()
def load_model(path: str | Path) -> Loaded:
    """Reads a model that `save_model` wrote.

    A file above 64 MiB is mapped, and must not be written into while the model is in use (see `load_flow`).

    Args:
        path: of the file or folder, or of the folder of a run (which holds `model.safetensors`); or the name of a
            model that comes with the package (see `shipped_names`).

    Raises:
        CheckpointError: no such file, not safetensors, truncated or damaged, weights that are not finite, or tensors
            that do not match the config (the first of them listed).
        ValueError: codec or text encoder cannot be made, such as local weights that are not there.
    """
    about = read_header(path).about
    flow, config = load_flow(path)
    check_parts(f"checkpoint {path}", about, config)
    codec = _part(path, "codec", lambda: make_codec(config.codec))
    text = _part(path, "text", lambda: make_text_encoder(config.text)) if config.text else None
    kept = {key: value for key, value in about.items() if not key.endswith("_sha256")}
    return Loaded(flow, config, codec, text, kept)


def _part(path: str | Path, section: str, make: Callable[[], Kind]) -> Kind:
    """What `make` makes of a section of the header whose options are of no declared type."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(short(error, 800)) from None
    except (TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: config.{section} in the header cannot be used: {short(error)}"
        ) from None


def model_file(path: str | Path) -> Path:
    """The file that holds the header of a model given by its own path, by the folder of its run, or as a shipped one.

    Raises:
        CheckpointError: there is no such model, or a shipped one that is damaged or has a namesake here.
    """
    shipped = shipped_name(path)
    if shipped is not None:
        return shipped_file(shipped)
    path = standing(Path(path))
    file = path
    if path.is_dir():
        file = path / INDEX if (path / INDEX).is_file() else path / MODEL
    if not file.is_file():
        raise CheckpointError(
            f"checkpoint {file} does not exist, expected a model file or the folder of a run, or a model that comes "
            f"with the package: {', '.join(shipped_names())}"
        )
    return file


def model_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of a model."""
    file = model_file(path)
    return [file.parent / name for name in sorted(set(_index(file)["weight_map"].values()))] if _split(file) else [file]


def _split(file: Path) -> bool:
    return file.name == INDEX


def _index(file: Path) -> dict[str, Any]:
    index = read_json(file, "an index of a model")
    about, places, sums = (index.get(key) for key in ("metadata", "weight_map", "files"))
    if not isinstance(about, dict) or not isinstance(places, dict) or about.get("format") not in FORMATS:
        raise CheckpointError(
            f"checkpoint {file} is an index of another program, expected format {' or '.join(FORMATS)}"
        )
    if not all(isinstance(text, str) for text in (*about.values(), *places.values())):
        raise CheckpointError(f"checkpoint {file} is damaged, expected text in its metadata and its weight_map")
    if any(name in ("", ".", "..") or Path(name).name != name or len(name) > 255 for name in places.values()):
        raise CheckpointError(f"checkpoint {file} names files elsewhere, expected them beside it")
    if about["format"] == FORMAT and (not is_whole(index) or not isinstance(sums, dict)):
        raise CheckpointError(f"checkpoint {file} is damaged: it does not have the checksum in it")
    return index


@contextmanager
def _open_model(
    path: str | Path, mapped: dict[Path, MappedFile] | None = None
) -> Iterator[tuple[Path, dict[str, str], dict[str, Any]]]:
    """The file with the header, its entries, and the open file of every tensor.

    Args:
        path: as of `load_flow`.
        mapped: is filled with the files of the weights, whose tensors are to outlive the block.
    """
    file = model_file(path)
    with ExitStack() as stack:

        def open_file(name: Path) -> Any:
            if mapped is None:
                return stack.enter_context(open_tensors(name))
            try:
                mapped[name] = MappedFile(name)
            except OSError as error:
                raise CheckpointError(f"checkpoint {name} cannot be read: {error.strerror}") from None
            return stack.enter_context(open_tensors(name, mapped[name].source))

        if not _split(file):
            opened = open_file(file)
            yield file, opened.metadata(), dict.fromkeys(opened.keys(), opened)
            return
        index = _index(file)
        places, sums = index["weight_map"], index.get("files", {})
        found: dict[str, Any] = {}
        for name in sorted(set(places.values())):
            opened = open_file(file.parent / name)
            if sums and int(opened.metadata()["crc32"]) != sums.get(name):
                raise CheckpointError(f"checkpoint {file.parent / name} is of another model than {file.name} says")
            names = set(opened.keys())
            if names != {tensor for tensor, place in places.items() if place == name}:
                raise CheckpointError(f"checkpoint {file.parent / name} holds other tensors than {file.name} says")
            found.update(dict.fromkeys(names, opened))
        yield file, index["metadata"], found


def _header(path: Path, metadata: Mapping[str, str], tensors: int) -> Header:
    """What a file with so many tensors says about itself."""
    if "config" not in metadata:
        raise CheckpointError(f"checkpoint {path} has no config in its header, expected a model written by starflow")
    try:
        values = json.loads(metadata["config"])
        if not isinstance(values, dict):
            raise ConfigError(f"it is {short(type(values).__name__)}, expected a mapping of options")
        config = from_mapping(RunConfig, values)
    except (ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path}: config in the header cannot be used: {short(error, 400)}") from None
    # Every layer and every block has tensors of its own; a number beyond those of the file would be made without end.
    if sum(config.flow.layers_per_block) + config.flow.num_blocks > tensors:
        raise CheckpointError(
            f"checkpoint {path}: tensors do not match its config; flow.layers_per_block asks for more than the "
            f"{tensors} that it has"
        )
    own = ("config", "crc32", "header_crc32", "format")
    return Header(config, {key: value for key, value in metadata.items() if key not in own})
