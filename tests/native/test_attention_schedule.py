"""Which tiles block_attention's CUDA kernels pass over, against every query and key of random masks.

More masks: `STARFLOW_MASKS=10000 pytest tests/native/test_attention_schedule.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_tiles_of_random_masks(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    program = tmp_path / "attention_schedule"
    source = Path(__file__).with_name("attention_schedule.cpp")
    command = [compiler, *FLAGS, "-DSTARFLOW_X86=0", "-DSTARFLOW_CUDA=0", f"-I{ROOT / 'csrc'}", str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    masks = os.environ.get("STARFLOW_MASKS", "200")
    done = subprocess.run([str(program), masks], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{masks} masks\n"
