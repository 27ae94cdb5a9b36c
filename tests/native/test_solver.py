"""The native solver under sanitizers, in a program of its own with threads of its own.

More seeds: `STARFLOW_SEEDS=200 pytest tests/native/test_solver.py`.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest

from starflow_ext._load import native

FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-pthread", "-fno-sanitize-recover=all", "-mavx2", "-mfma", "-mf16c")
DEFINED = ("-DSTARFLOW_ISA=tested", "-DSTARFLOW_X86=1", "-DSTARFLOW_CUDA=0")
WITH = ("cpu/widened_groups_cpu.cpp",)
TILES = "-DSTARFLOW_EMULATE_AMX"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86-64")
@pytest.mark.parametrize(
    "flags",
    [("-fsanitize=thread",), ("-fsanitize=address,undefined",), ("-fsanitize=address,undefined", TILES)],
    ids=["threads", "addresses", "addresses, emulated tiles"],
)
def test_random_blocks_have_the_same_bits_in_any_window_batch_and_team(
    flags: tuple[str, ...], run_program: Any
) -> None:
    if native.isa_levels()["avx2"]:
        pytest.skip(f"avx2: {native.isa_levels()['avx2']}")
    # Of emulated tiles a block takes half a minute.
    seeds = os.environ.get("STARFLOW_SEEDS", "1" if TILES in flags else "4")
    printed = run_program("solve_random.cpp", *FLAGS, *DEFINED, *flags, arguments=("0", seeds, "3"), more=WITH)
    assert printed == f"{seeds} blocks\n"
