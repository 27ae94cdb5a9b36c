"""Tensors in files: safetensors with checksums of header and tensors, written one by one and never left half-written.

The safetensors library writes no file tensor by tensor (it takes all of them at once), and it writes the entries of the
metadata in another order each time, so that two runs of one seed would end in files that differ. Its format is a
length, a json header and the numbers; `write_tensors` is its writer here, and every file is read by the library.
"""

from __future__ import annotations

import json
import os
import re
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
from starflow.messages import short

# "starflow-1" had a checksum of the tensors alone.
FORMAT = "starflow-2"
FORMATS = ("starflow-1", FORMAT)

# First bytes of what torch.save writes: a zip archive, or a bare pickle in older files.
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

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
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

# A checksum in a header has ten digits, so that it can be filled in when the rest is written.
_UNFILLED = "0" * 10
_HEADER_SUM = re.compile(rb'"header_crc32":"(\d{10})"')

# Bytes read at once for a checksum; a multiple of every dtype's.
_CHUNK = 1 << 24
# Bytes of a header at most, as in the library.
_HEADER_BYTES = 100_000_000


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written.

    Args:
        dtype, shape: of the tensor.
        make: returns it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor | LazyTensor) -> LazyTensor:
        """A tensor that is there already."""
        return (
            tensor if isinstance(tensor, LazyTensor) else LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> int:
    """Writes a safetensors file with its checksums, one tensor after the other: memory holds one at a time.

    Args:
        path: of the file.
        tensors: by name.
        metadata: entries of the header.

    Returns:
        The checksum of the tensors.

    Raises:
        OSError: it cannot be written.
        CheckpointError: a tensor holds values that are not finite.
    """
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    # The order of the format: by size of the numbers, so that all are aligned.
    order = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    sums = {"crc32": _UNFILLED, "header_crc32": _UNFILLED}
    entries: dict[str, Any] = {"__metadata__": {**metadata, "format": FORMAT, **sums}}
    offset = 0
    for name in order:
        end = offset + lazy[name].nbytes
        shape = list(lazy[name].shape)
        entries[name] = {"dtype": _DTYPES[lazy[name].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    length = len(_json(entries))
    value = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b" " * length)
        for name in order:
            tensor = lazy[name].make().detach().to("cpu").contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (lazy[name].dtype, lazy[name].shape), name
            if not _finite(tensor):
                raise CheckpointError(f"tensor {short(name)} holds values that are not finite, expected finite weights")
            data = tensor.flatten().view(torch.uint8).numpy().data
            value = zlib.crc32(data, value)
            file.write(data)
        entries["__metadata__"]["crc32"] = f"{value:010d}"
        entries["__metadata__"]["header_crc32"] = f"{zlib.crc32(_json(entries)):010d}"
        file.seek(8)
        file.write(_json(entries))
    return value


def _json(entries: Mapping[str, Any]) -> bytes:
    """A header, with spaces behind it so that tensors are aligned."""
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_tensors(path: Path, source: Path | None = None) -> tuple[int, int]:
    """Compares the tensors of a file that `write_tensors` wrote with their checksum, and looks for NaN and infinity.

    Args:
        path: of the file, for errors.
        source: what is read, such as a copy; None is `path`.

    Returns:
        Checksums of the header and of the tensors: a file of the same ones holds the same.

    Raises:
        CheckpointError: it is damaged, or a tensor holds values that are not finite.
    """
    with (source or path).open("rb") as file:
        entries = _header(path, file)
        header = zlib.crc32(_json(entries))
        stated = entries.pop("__metadata__")["crc32"]
        value, unusable = 0, None
        buffer = bytearray(_CHUNK)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            dtype = _TORCH_DTYPES.get(entry["dtype"], torch.uint8)
            while first < end:
                part = memoryview(buffer)[: min(_CHUNK, end - first)]
                if file.readinto(part) != len(part):
                    raise CheckpointError(f"checkpoint {path} is truncated")
                value = zlib.crc32(part, value)
                if not _finite(torch.frombuffer(part, dtype=dtype)):
                    unusable = unusable or name
                first += len(part)
        if not stated.isdigit() or int(stated) != value or file.read(1):
            raise CheckpointError(f"checkpoint {path} is damaged: its tensors do not have the checksum of its header")
    if unusable is not None:
        raise CheckpointError(
            f"checkpoint {path}: tensor {short(unusable)} holds values that are not finite, expected finite weights"
        )
    return header, value


def sums_of(path: Path, source: Path) -> tuple[int, int]:
    """What `check_tensors` returns of a whole file, in a part of the time; arguments as there.

    Raises:
        CheckpointError: the header is damaged.
    """
    with source.open("rb") as file:
        return zlib.crc32(_json(_header(path, file))), _checksum(file)


def _header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The entries of a header that the library has read already, compared with its checksum."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_BYTES + 1
    content = file.read(length) if length <= _HEADER_BYTES else b""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        entries = None
    about = entries.get("__metadata__") if isinstance(entries, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("crc32"), str) or not isinstance(entries, dict):
        raise CheckpointError(f"checkpoint {path} is damaged: its header has no checksum")
    if about.get("format") == FORMAT:
        stated = _HEADER_SUM.search(content)
        if stated is None or int(stated[1]) != _unfilled(content, stated):
            raise CheckpointError(f"checkpoint {path} is damaged: its header does not have the checksum in it")
    return entries


def _unfilled(header: bytes, stated: re.Match[bytes]) -> int:
    """The checksum of a header before its own was filled in."""
    first, end = stated.span(1)
    return zlib.crc32(header[:first] + _UNFILLED.encode() + header[end:])


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


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def open_tensors(path: Path, source: Path | None = None) -> Iterator[Any]:
    """A safetensors file of ours whose header is whole; CheckpointError for everything else.

    Args:
        path: of the file, for errors.
        source: what is opened, such as a copy; None is `path`.
    """
    source = source or path
    try:
        with source.open("rb") as file:
            start = file.read(4)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if start.startswith(PICKLES):
        raise CheckpointError(
            f"checkpoint {path} is a pickle, expected safetensors (a pickle can run code when it is opened; "
            "published checkpoints are read by `starflow convert`)"
        )
    if size == 0:
        raise CheckpointError(f"checkpoint {path} is truncated, damaged or not safetensors (it is empty)")
    try:
        with source.open("rb") as named:
            # The library takes no name that is not UTF-8.
            link = Path(f"/proc/self/fd/{named.fileno()}")
            opened = safe_open(source if _is_utf8(source) or not link.exists() else link, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated, damaged or not safetensors ({short(error)})") from None
    with opened as file:
        found = (file.metadata() or {}).get("format")
        if found not in FORMATS:
            raise CheckpointError(
                f"checkpoint {path} is safetensors of another program, expected format {' or '.join(FORMATS)}"
            )
        with source.open("rb") as plain:
            _header(path, plain)
        yield file


# -- json -------------------------------------------------------------------------------------------------------------

# Bytes of a json file at most: an index has a line for each tensor, a state the words of a text encoder.
_JSON_BYTES = 64 << 20


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A json file that holds a mapping.

    Args:
        path: of the file.
        what: it is, for the error.

    Raises:
        CheckpointError: it cannot be read, is too large, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    try:
        values = json.loads(content, object_pairs_hook=_unique) if len(content) <= _JSON_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {path} is damaged, expected json of {what}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose names stand there once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands there twice")
    return values


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping for json with its format and its checksum, which `is_whole` looks at."""
    # As it will be read: keys of a mapping are text in json, and tuples are lists.
    content = json.loads(json.dumps({**values, "format": FORMAT}))
    return {**content, "crc32": _sum_of(content)}


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is as `sealed` returned it."""
    content = {name: value for name, value in values.items() if name != "crc32"}
    return values.get("format") == FORMAT and values.get("crc32") == _sum_of(content)


def _sum_of(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


# -- writing ----------------------------------------------------------------------------------------------------------


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
