"""What the shipped libraries need and show: the stable ABI of torch 2.10, and no more."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starflow_ext._load import native

Tool = Callable[..., list[str]]
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "libdl.so.2"}
SYSTEM |= {"libpthread.so.0", "librt.so.1"}


@pytest.fixture(scope="module")
def module(library: Path) -> Path:
    return library.parent / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _needed(tool: Tool, path: Path) -> set[str]:
    return {match[1] for line in tool("readelf", "-dW", path) if (match := re.search(r"\(NEEDED\).*\[(.*)\]", line))}


def _undefined(tool: Tool, path: Path) -> set[str]:
    names = {line.split()[-1] for line in tool("nm", "-D", "--undefined-only", path)}
    return {name for name in names if "@" not in name and not name.startswith(("_ITM_", "__gmon", "__cxa_finalize"))}


def test_op_library_needs_torch_and_the_system_only(library: Path, tool: Tool) -> None:
    """No OpenMP (a second pool fights torch's), no Python, no shared CUDA runtime."""
    assert _needed(tool, library) - SYSTEM == {"libtorch_cpu.so"}


def test_module_needs_the_op_library_and_not_torch(module: Path, tool: Tool) -> None:
    assert _needed(tool, module) - SYSTEM == {"libstarflow_ops.so"}


def test_no_paths_are_baked_in(library: Path, module: Path, root: Path, tool: Tool) -> None:
    for path in (library, module):
        dynamic = "\n".join(tool("readelf", "-dW", path))
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        contents = path.read_bytes()
        assert str(root).encode() + b"/csrc" not in contents
        assert b"site-packages" not in contents


def test_op_library_takes_only_stable_symbols_of_torch(library: Path, tool: Tool) -> None:
    names = _undefined(tool, library)
    assert "torch_parallel_for" in names
    strangers = {name for name in names if not re.match(r"(aoti_torch|torch)_[a-z]", name)}
    assert strangers == set()


def test_every_symbol_was_in_torch_2_10(library: Path, tool: Tool) -> None:
    """Torch's own headers say since when each C function exists."""
    include = Path(torch.__file__).parent / "include/torch/csrc"
    later: set[str] = set()
    for header in (include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"):
        guards: list[bool] = []
        for line in header.read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)", line)
                guards.append(version is not None and int(version[1]) > 10)
            elif re.match(r"\s*#\s*endif", line):
                guards.pop()
            elif any(guards):
                later |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    assert "torch_stream_native_handle" in later
    assert _undefined(tool, library) & later == set()


def test_op_library_shows_only_what_the_module_calls(library: Path, tool: Tool) -> None:
    shown = [line.split(" ", 2)[2] for line in tool("nm", "-DC", "--defined-only", library)]
    names = {re.split(r"[\[(]", name)[0] for name in shown}
    assert names == {
        "starflow::cpu::features",
        "starflow::cpu::fingerprint",
        "starflow::cpu::selected",
        "starflow::cpu::set_override",
        "starflow::cpu::why_not",
        "starflow::cuda::count_devices",
        "starflow::cuda::repeat_name",
        "starflow::cuda::set_early_launches",
        "starflow::cuda::set_repeat",
        "starflow::linear_choice_of",
        "starflow::set_linear_kernel",
    }


def test_cuda_code_for_every_architecture_and_ptx_for_the_next(library: Path, tool: Tool) -> None:
    if not native.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    machine_code = "\n".join(tool("cuobjdump", "--list-elf", library))
    ptx = "\n".join(tool("cuobjdump", "--list-ptx", library))
    architectures = str(native.build_info()["cuda_architectures"]).split(";")
    # A build for one GPU, which it was made on, needs none for later ones.
    assert any(architecture.endswith("-virtual") for architecture in architectures) or len(architectures) == 1
    for architecture in architectures:
        name, kind = architecture.split("-")
        # A family's code ("f") is listed under its first member.
        assert f"sm_{name.removesuffix('f')}." in {"real": machine_code, "virtual": ptx}[kind]
