"""Files that are written to while tensors are mapped from them."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow.mapped import ChangedFileError, MappedFile, own_memory, require_unchanged, watch

_SIZE = 1 << 16


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A module whose weight is mapped from a file."""
    path = tmp_path / "a b.safetensors"
    save_file({"weight": torch.randn(256, _SIZE // 256)}, path)
    module = torch.nn.Linear(_SIZE // 256, 256, bias=False)
    file = MappedFile(path)
    module.load_state_dict(load_file(path), assign=True)
    watch(module, [file])
    require_unchanged(module)
    return module, path


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
    watch(module, [MappedFile(path)])
    assert held() == 1
    del module
    gc.collect()
    assert held() == 0
