"""What the object files hold: nothing of one ISA level may reach a machine that lacks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

LEVELS = ("scalar", "avx2", "avx512")
Tool = Callable[..., list[str]]

# What a kernel may call: libm for float64, and what the compiler itself makes of loops.
CALLED = {"exp", "log", "log1p", "tanh", "memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}


def _kernels(objects: Path, level: str) -> list[Path]:
    found = sorted((objects / f"starflow_{level}.dir").rglob("*_cpu.cpp.o"))
    assert found, level
    return found


def _instructions(tool: Tool, path: Path) -> list[str]:
    lines = tool("objdump", "-d", "--no-show-raw-insn", path)
    return [line.split("\t", 1)[1] for line in lines if re.match(r"\s+[0-9a-f]+:\t", line)]


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_define_their_table_and_nothing_else(objects: Path, tool: Tool, level: str) -> None:
    """A weak symbol (an inline function of a header) could be the copy that the linker keeps for every machine."""
    for path in _kernels(objects, level):
        op = path.name.removesuffix("_cpu.cpp.o")
        shared, undefined = [], set()
        for line in tool("nm", "-C", path):
            kind, name = line[17], line[19:]
            if kind == "U":
                undefined.add(name)
            elif kind not in "tdrb":
                shared.append(name)
        assert shared == [f"starflow::{level}::{op}"]
        assert undefined <= CALLED, path.name


def test_baseline_has_no_vector_extensions(objects: Path, tool: Tool) -> None:
    baseline = [*(objects / "starflow_ops.dir").rglob("*.cpp.o"), *_kernels(objects, "scalar")]
    assert len(baseline) > 5
    for path in baseline:
        for instruction in _instructions(tool, path):
            assert not re.search(r"%[yz]mm|%k[1-7]|^v[a-z]+ps|^v[a-z]+[sp]d", instruction), (path.name, instruction)


@pytest.mark.parametrize("level, register", [("avx2", "%ymm"), ("avx512", "%zmm")])
def test_each_level_uses_its_registers(objects: Path, tool: Tool, level: str, register: str) -> None:
    for path in _kernels(objects, level):
        text = "\n".join(_instructions(tool, path))
        assert text.count(register) > 500, path.name
        assert "vfmadd" in text
        assert level == "avx512" or "%zmm" not in text


def test_kernel_files_include_neither_torch_nor_std(root: Path) -> None:
    """Followed through the project's own headers, kernel files reach only <cstdint> and intrinsics."""
    allowed = {"cstdint", "immintrin.h"}
    for kernel in sorted((root / "csrc").rglob("*_cpu.cpp")):
        seen, queue = set(), [kernel]
        while queue:
            for mark, name in re.findall(r'^#include ([<"])([^>"]+)', queue.pop().read_text(), re.M):
                if mark == "<":
                    assert name in allowed, (kernel.name, name)
                elif name not in seen:
                    seen.add(name)
                    queue.append(root / "csrc" / name)
