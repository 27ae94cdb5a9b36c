"""The native solver under sanitizers, in a program of its own with threads of its own.

More seeds: `STARFLOW_SEEDS=200 pytest tests/native/test_solver.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from starflow_ext._load import native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-fno-sanitize-recover=all")
DEFINED = ("-DSTARFLOW_ISA=tested", "-DSTARFLOW_X86=1", "-DSTARFLOW_CUDA=0")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86-64")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_random_blocks_have_the_same_bits_in_any_window_batch_and_team(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    if native.isa_levels()["avx2"]:
        pytest.skip(f"avx2: {native.isa_levels()['avx2']}")
    program = tmp_path / "solve_random"
    source = Path(__file__).with_name("solve_random.cpp")
    command = [compiler, *FLAGS, *DEFINED, "-mavx2", "-mfma", "-mf16c", f"-fsanitize={sanitizer}", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    seeds = os.environ.get("STARFLOW_SEEDS", "8")
    done = subprocess.run([str(program), "0", seeds, "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{seeds} blocks\n"
