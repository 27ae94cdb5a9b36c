"""csrc/cpu/matmul.h in a program of its own: the tiles of AMX in emulation, which no test of an op reaches."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from starflow_ext._load import native

ROOT = Path(__file__).resolve().parents[2]
AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
EMULATED = "-DSTARFLOW_EMULATE_AMX"
# Level that the machine must have, and flags; every other level runs in tests/ops.
BUILDS = {
    "emulated on scalar": ("scalar", (EMULATED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
    "emulated on avx512": ("avx512", (*AVX512, EMULATED)),
    "amx": ("amx", (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86-64")
@pytest.mark.parametrize("build", BUILDS)
def test_products_are_those_of_float64(build: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    level, flags = BUILDS[build]
    missing = native.isa_levels()[level]
    if missing:
        pytest.skip(f"{level}: {missing}")
    program = tmp_path / "multiply_panels"
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-DSTARFLOW_ISA=tested"]
    sources = (Path(__file__).with_name("multiply_panels.cpp"), ROOT / "csrc/cpu/isa.cpp")
    command += ["-DSTARFLOW_X86=1", *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(program)],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 6
