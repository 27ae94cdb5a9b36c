"""What the object files hold: nothing of one ISA level may reach a machine that lacks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
# What only levels from one on may hold: registers, products of bfloat16, tiles.
FIRST_WITH = {"%ymm": "avx2", "%zmm": "avx512", "vdpbf16ps": "avx512_bf16", "tdpbf16ps": "amx", "%tmm": "amx"}
Tool = Callable[..., list[str]]

# What a kernel may call: libm for float64, and what the compiler itself makes of loops.
CALLED = {"exp", "log", "log1p", "tanh", "memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}
# Products that all kernels of a level share (csrc/cpu/group_products.h), by the level that they are compiled for.
SHARED = {"widened_groups": LEVELS[:3], "pair_groups": ("avx512_bf16",)}
SUFFIXES = {"_cpu.cpp": LEVELS[:3], "_dot.cpp": LEVELS, "_bf16.cpp": ("avx512_bf16",)}


def _kernels(objects: Path, level: str) -> list[Path]:
    found = sorted((objects / f"starflow_{level}.dir").rglob("*_*.cpp.o"))
    assert found, level
    return found


def _op(path: Path) -> str:
    return re.sub(r"_(cpu|dot|bf16)\.cpp\.o$", "", path.name)


def _shared(level: str) -> set[str]:
    """Names of the shared products that kernels of a level may call: its own, or those of a level below."""
    below = LEVELS[: LEVELS.index(level) + 1]
    return {f"starflow::{one}::{name}" for name, levels in SHARED.items() for one in levels if one in below}


def _instructions(tool: Tool, path: Path) -> list[str]:
    lines = tool("objdump", "-d", "--no-show-raw-insn", path)
    return [line.split("\t", 1)[1] for line in lines if re.match(r"\s+[0-9a-f]+:\t", line)]


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_define_their_table_and_nothing_else(objects: Path, tool: Tool, level: str) -> None:
    """A weak symbol (an inline function of a header) could be the copy that the linker keeps for every machine."""
    for path in _kernels(objects, level):
        shared, undefined = [], set()
        for line in tool("nm", "-C", path):
            kind, name = line[17], line[19:]
            if kind == "U":
                undefined.add(name)
            elif kind not in "tdrb":
                shared.append(name)
        assert shared == [f"starflow::{level}::{_op(path)}"]
        assert undefined <= CALLED | _shared(level), path.name


def test_baseline_has_no_vector_extensions(objects: Path, tool: Tool) -> None:
    baseline = [*(objects / "starflow_ops.dir").rglob("*.cpp.o"), *_kernels(objects, "scalar")]
    assert len(baseline) > 5
    for path in baseline:
        for instruction in _instructions(tool, path):
            assert not re.search(r"%[yz]mm|%k[1-7]|^v[a-z]+ps|^v[a-z]+[sp]d", instruction), (path.name, instruction)


@pytest.mark.parametrize("level", LEVELS)
def test_no_level_uses_instructions_of_a_higher_one(objects: Path, tool: Tool, level: str) -> None:
    for path in _kernels(objects, level):
        text = "\n".join(_instructions(tool, path))
        for word, first in FIRST_WITH.items():
            assert LEVELS.index(level) >= LEVELS.index(first) or word not in text, (path.name, word)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_each_level_uses_its_registers(objects: Path, tool: Tool, level: str) -> None:
    register = "%ymm" if level == "avx2" else "%zmm"
    for path in _kernels(objects, level):
        # Packing a weight has no arithmetic.
        assert "\n".join(_instructions(tool, path)).count(register) > (50 if _op(path) == "linear_pack" else 500), (
            path.name
        )


def test_products_use_the_instructions_that_were_made_for_them(objects: Path, tool: Tool) -> None:
    tables = {
        ("avx2", "widened_groups_cpu"): "vfmadd",
        ("avx512", "widened_groups_cpu"): "vfmadd",
        ("avx512_bf16", "pair_groups_bf16"): "vdpbf16ps",
    }
    for (level, name), product in tables.items():
        [path] = (objects / f"starflow_{level}.dir").rglob(f"{name}.cpp.o")
        assert "\n".join(_instructions(tool, path)).count(product) > 1000, path
    for level in LEVELS:
        for path in (objects / f"starflow_{level}.dir").rglob("*_dot.cpp.o"):
            tiles = "\n".join(_instructions(tool, path)).count("tdpbf16ps")
            assert (tiles > 10) == (level == "amx"), (path.name, level)


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_compiled_once(objects: Path, tool: Tool, level: str) -> None:
    """What multiplies a group of rows is in the shared tables alone: compiling it takes longer than all the rest."""
    for path in _kernels(objects, level):
        held = any("multiply_group<" in line for line in tool("nm", "-C", "--defined-only", path))
        assert held == (_op(path) in SHARED), (path.name, level)


def test_every_level_has_the_kernels_of_its_sources(root: Path, objects: Path) -> None:
    folders = (root / "csrc/ops", root / "csrc/cpu")
    sources = [path.name for folder in folders for path in folder.rglob("*_*.cpp")]
    for level in LEVELS:
        suffixes = tuple(suffix for suffix, levels in SUFFIXES.items() if level in levels)
        expected = {f"{name}.o" for name in sources if name.endswith(suffixes)}
        assert {path.name for path in _kernels(objects, level)} == expected, level


def test_kernel_files_include_neither_torch_nor_std(root: Path) -> None:
    """Followed through the project's own headers, kernel files reach only <cstdint> and intrinsics."""
    allowed = {"cstdint", "immintrin.h"}
    kernels = [path for suffix in SUFFIXES for path in sorted((root / "csrc").rglob(f"*{suffix}"))]
    for kernel in kernels:
        seen, queue = set(), [kernel]
        while queue:
            for mark, name in re.findall(r'^#include ([<"])([^>"]+)', queue.pop().read_text(), re.M):
                if mark == "<":
                    assert name in allowed, (kernel.name, name)
                elif name not in seen:
                    seen.add(name)
                    queue.append(root / "csrc" / name)
