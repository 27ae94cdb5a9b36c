"""Tensors in files: safetensors with a checksum, written one by one and never left half-written."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from starflow.files import replacing

FORMAT = "starflow-1"


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
    with open_tensors(path) as opened:
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


def file_checksum(path: Path) -> int:
    """CRC-32 of a whole file."""
    with path.open("rb") as file:
        return _checksum(file)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
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
        raise not_written(what, target, error) from None


def not_written(what: str, target: Path, error: Exception) -> CheckpointError:
    """The error of a file that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(f"{what} {target} cannot be written: {reason}; what was there before is left as it was")
