"""Programs of their own from the kernels' sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# run(name of a source in this folder, compiler flags, arguments of the program) -> what it printed
RunProgram = Callable[..., str]


@pytest.fixture
def run_program(tmp_path: Path) -> RunProgram:
    """Compile a source of this folder, with others of csrc if named, and run it: it must end with 0."""

    def run(source: str, *flags: str, arguments: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> str:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("g++ is not on PATH")
        program = tmp_path / Path(source).stem
        sources = [str(Path(__file__).with_name(source)), *(str(ROOT / "csrc" / name) for name in more)]
        command = [compiler, "-std=c++20", "-O1", "-g", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
