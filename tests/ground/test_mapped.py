"""Files that are written to while tensors are mapped from them."""

from __future__ import annotations

import gc
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow.mapped import (
    ChangedFileError,
    MappedFile,
    is_as_mapped,
    own_memory,
    release,
    require_unchanged,
    watch,
)

from ..tools import full_disk

_SIZE = 1 << 16


def _module(folder: Path, copied: int) -> tuple[torch.nn.Module, Path]:
    """A module whose weight is mapped from a file that was written an hour ago."""
    path = folder / "a b.safetensors"
    save_file({"weight": torch.randn(256, _SIZE // 256)}, path)
    os.utime(path, (time.time() - 3600,) * 2)
    module = torch.nn.Linear(_SIZE // 256, 256, bias=False)
    file = MappedFile(path, copied)
    file.expect(path.read_bytes(), Path.read_bytes)
    module.load_state_dict(load_file(file.source), assign=True)
    watch(module, [file])
    require_unchanged(module)
    return module, path


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A module whose weight is mapped from a file that is not copied."""
    return _module(tmp_path, 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, in order."""
    found: list[Path] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: found.append(path) or read(path))
    return found


def _write_one_number(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<f", 12.0))


def _other(path: Path, size: int = _SIZE) -> Path:
    other = path.with_name("other.safetensors")
    save_file({"weight": torch.randn(256, size // 256)}, other)
    return other


@pytest.mark.parametrize("size", [_SIZE, 2 * _SIZE, _SIZE // 2])
def test_a_file_that_is_written_in_place_is_told(mapped, size: int) -> None:
    module, path = mapped
    shutil.copyfile(_other(path, size), path)
    # As by cp -p, which gives the copy the time of what it copies.
    for _ in range(2):
        with pytest.raises(ChangedFileError, match=rf"^{path} was written to since its weights were mapped from it"):
            require_unchanged(module)


def test_a_file_that_is_renamed_over_or_touched_or_removed_stays_what_it_was(mapped) -> None:
    module, path = mapped
    weight = module.weight.detach().clone()
    os.utime(path, (1, 1))
    require_unchanged(module)
    os.replace(_other(path), path)
    require_unchanged(module)
    path.unlink()
    require_unchanged(module)
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("place", [4096 + 1000, 2 * _SIZE + 8, 4 * _SIZE])
@pytest.mark.parametrize("by", ["file", "memmap"])
def test_one_number_that_is_written_anywhere_is_told(mapped, place: int, by: str) -> None:
    module, path = mapped
    before = path.stat()
    if by == "file":
        _write_one_number(path, place)
    else:
        numbers = np.memmap(path, np.float32, "r+")
        numbers[place // 4] = 12.0
        numbers.flush()
        del numbers
    # As by `touch -r`, or a copy that keeps times: only the time of the last change, which nobody sets, tells.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChangedFileError, match=rf"^{path} was written to since its weights were mapped from it"):
        require_unchanged(module)


def test_a_file_is_read_again_only_when_its_times_moved(reads: list[Path], mapped) -> None:
    module, path = mapped
    reads.clear()
    require_unchanged(module)
    assert not reads
    os.utime(path, (1, 1))
    require_unchanged(module)
    require_unchanged(module)
    assert len(reads) == 1
    path.with_name("another name").hardlink_to(path)
    require_unchanged(module)
    os.replace(_other(path), path)
    require_unchanged(module)
    assert len(reads) == 1
    _write_one_number(path.with_name("another name"), 4096)
    for _ in range(2):
        with pytest.raises(ChangedFileError):
            require_unchanged(module)
    assert len(reads) == 2


def test_a_write_that_left_the_same_time_is_found_later(tmp_path: Path, monkeypatch, reads: list[Path]) -> None:
    """Clocks of file systems step: two writes of one step have one time."""
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    passed = 0.0
    for clock in ("time", "monotonic"):
        read = getattr(time, clock)
        monkeypatch.setattr(f"starflow.mapped.time.{clock}", lambda read=read: read() + passed)
    monkeypatch.setattr(MappedFile, "_holds", lambda *_: True)
    file, other, later = (MappedFile(path, 0) for _ in range(3))
    for each in (file, other, later):
        each.expect(path.read_bytes(), Path.read_bytes)
    # `later` sees the file written once more, the same, and then another time within the step.
    path.write_bytes(b"weights")
    later.require_same([])
    stat = MappedFile._stat
    monkeypatch.setattr(MappedFile, "_stat", lambda each: each._state)
    reads.clear()
    file.require_same([])
    assert not reads
    passed += 3.0
    file.require_same([])
    file.require_same([])
    assert len(reads) == 1
    path.write_bytes(b"Weights")
    for each in (other, later):
        with pytest.raises(ChangedFileError):
            each.require_same([])
    monkeypatch.setattr(MappedFile, "_stat", stat)


def test_times_in_the_future_are_no_reason_to_read_again(tmp_path: Path, monkeypatch, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    os.utime(path, (time.time() + 3600,) * 2)
    file = MappedFile(path, 0)
    file.expect(path.read_bytes(), Path.read_bytes)
    reads.clear()
    now = time.monotonic()
    monkeypatch.setattr("starflow.mapped.time.monotonic", lambda: now + 10)
    file.require_same([])
    assert not reads


def test_times_alone_tell_of_a_file_whose_content_is_not_known(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    file = MappedFile(path, 0)
    monkeypatch.setattr(MappedFile, "_holds", lambda *_: True)
    file.require_same([])
    os.utime(path, (1, 1))
    with pytest.raises(ChangedFileError):
        file.require_same([])


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system keeps no copies of files in memory")
@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 0), lambda path: _write_one_number(path, 4096)])
def test_weights_of_a_small_file_stay_what_they_were(tmp_path: Path, change, reads: list[Path]) -> None:
    module, path = _module(tmp_path, 1 << 20)
    weight = load_file(path)["weight"].clone()
    assert is_as_mapped([module.weight])
    reads.clear()
    change(path)
    require_unchanged(module)
    release([module.weight.data])
    assert torch.equal(module.weight, weight)
    assert is_as_mapped([module.weight])
    assert not reads
    with torch.no_grad():
        module.weight[0, 0] = 12.0
    assert not is_as_mapped([module.weight])


def test_a_file_that_cannot_be_copied_is_mapped_itself(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights" * 1000)
    with full_disk(1000):
        file = MappedFile(path)
    file.expect(path.read_bytes(), Path.read_bytes)
    monkeypatch.setattr(MappedFile, "_holds", lambda *_: True)
    file.require_same([])
    path.write_bytes(b"weights" * 999 + b"Weights")
    assert file.source.read_bytes() == path.read_bytes()
    with pytest.raises(ChangedFileError):
        file.require_same([])


def test_a_system_without_proc_maps_the_file_by_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("starflow.mapped._DESCRIPTORS", tmp_path / "proc")
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    file = MappedFile(path)
    assert file.source == path
    file.expect(path.read_bytes(), Path.read_bytes)
    path.write_bytes(b"Weights")
    monkeypatch.setattr(MappedFile, "_holds", lambda *_: True)
    with pytest.raises(ChangedFileError):
        file.require_same([])


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system keeps no copies of files in memory")
def test_nobody_writes_to_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights" * 1000)
    held = MappedFile(path)
    with pytest.raises(PermissionError), held.source.open("r+b") as file:
        file.write(b"w")
    assert held.source.read_bytes() == b"weights" * 1000


def test_weights_of_their_own_memory_do_not_depend_on_the_file(mapped) -> None:
    module, path = mapped
    own_memory(module)
    weight = module.weight.detach().clone()
    shutil.copyfile(_other(path), path)
    require_unchanged(module)
    assert torch.equal(module.weight, weight)


def test_a_file_is_closed_with_its_module(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"weights")

    def held() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{name}") == str(path) for name in os.listdir("/proc/self/fd"))

    module = torch.nn.Linear(1, 1)
    watch(module, [MappedFile(path), MappedFile(path, 0)])
    assert held() == 2
    del module
    gc.collect()
    assert held() == 0
