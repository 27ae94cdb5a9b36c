"""What the build says where something is missing: one sentence each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def _configure(root: Path, build: Path, *options: str) -> str:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake or ninja is not on PATH")
    done = subprocess.run(
        ["cmake", "-S", str(root), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    # CMake wraps its messages.
    return " ".join(done.stderr.split())


VERSION = "-DSKBUILD_PROJECT_VERSION=0.1.0"


def test_cmake_alone(root: Path, tmp_path: Path) -> None:
    assert "starflow-ext: build with `pip install .`" in _configure(root, tmp_path)


def test_no_compiler(root: Path, tmp_path: Path) -> None:
    said = _configure(root, tmp_path, VERSION, "-DCMAKE_PROGRAM_PATH=", "-DCMAKE_CXX_COMPILER=")
    assert "starflow-ext: no C++ compiler found; install g++ 11 or later" in said


def test_cuda_asked_for_and_missing(root: Path, tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    said = _configure(
        root,
        tmp_path,
        VERSION,
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSTARFLOW_CUDA=ON",
        f"-DSTARFLOW_CUTLASS={tmp_path}/nowhere",
    )
    assert "starflow-ext: STARFLOW_CUDA is ON, but this machine lacks" in said


def test_unknown_choice_of_cuda(root: Path, tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    said = _configure(root, tmp_path, VERSION, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DSTARFLOW_CUDA=MAYBE")
    assert 'starflow-ext: STARFLOW_CUDA is "MAYBE", expected AUTO, ON or OFF.' in said
