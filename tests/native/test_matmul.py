"""csrc/cpu/matmul.h in a program of its own: the tiles of AMX in emulation, which no test of an op reaches."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from starflow_ext._load import native

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
def test_products_are_those_of_float64(build: str, run_program: Any) -> None:
    level, flags = BUILDS[build]
    missing = native.isa_levels()[level]
    if missing:
        pytest.skip(f"{level}: {missing}")
    defined = ("-ffp-contract=off", "-fno-math-errno", "-DSTARFLOW_ISA=tested", "-DSTARFLOW_X86=1")
    printed = run_program(
        "multiply_panels.cpp",
        *defined,
        *flags,
        more=("cpu/isa.cpp", "cpu/widened_groups_cpu.cpp", "cpu/pair_groups_bf16.cpp"),
    )
    assert printed.count("\n") == 6
