"""For which GPUs the build compiles kernels: cmake/architectures.cmake, alone and with a made-up nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = """
set(STARFLOW_CUDA "{choice}")
set(STARFLOW_CUDA_ARCHITECTURES "{named}")
include("{root}/cmake/architectures.cmake")
message("built: ${{STARFLOW_CUDA_ARCHITECTURES}} because ${{STARFLOW_CUDA_WHY}}")
"""
DEFAULT = "80-real;90a-real;90-virtual"


class Machine:
    """Runs the choice on a machine that shows some GPUs."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        cmake = shutil.which("cmake")
        if cmake is None:
            pytest.skip("cmake is not on PATH")
        self.cmake = cmake

    def run(self, choice: str = "AUTO", named: str = "", torch: str = "", gpus: str = "") -> str:
        script = self.folder / "choice.cmake"
        script.write_text(SCRIPT.format(choice=choice, named=named, root=self.root))
        tool = self.folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{f'printf {gpus!r}' if gpus else 'exit 9'}\n")
        tool.chmod(0o755)
        environment = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "TORCH_CUDA_ARCH_LIST": torch}
        command = [self.cmake, "-P", str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return " ".join((done.stdout + done.stderr).split())

    def built(self, **options: str) -> str:
        said = self.run(**options)
        assert "CMake Error" not in said
        return said.partition("built:")[2].partition("because")[0].strip()


@pytest.fixture
def machine(root: Path, tmp_path: Path) -> Machine:
    return Machine(root, tmp_path)


def test_auto_builds_for_the_gpus_of_the_machine(machine: Machine) -> None:
    assert machine.built(gpus="8.6\\n") == "86-real"
    assert machine.built(gpus="9.0\\n9.0\\n") == "90a-real"
    assert machine.built(gpus="12.0\\n8.9\\n") == "120-real;89-real"


def test_auto_without_a_gpu_builds_none(machine: Machine) -> None:
    assert machine.built() == ""
    assert "because this machine shows no GPU and TORCH_CUDA_ARCH_LIST is not set" in machine.run()


def test_a_gpu_that_is_too_old(machine: Machine) -> None:
    said = machine.run(gpus="7.5\\n")
    assert "starflow-ext: 7.5 of the GPU of this machine is left out, because the kernels need 8.0 or later." in said
    assert machine.built(gpus="7.5\\n") == ""


def test_on_builds_the_default_with_or_without_a_gpu(machine: Machine) -> None:
    assert machine.built(choice="ON") == machine.built(choice="ON", gpus="12.0\\n") == DEFAULT


def test_off_builds_none(machine: Machine) -> None:
    assert machine.built(choice="OFF", named="80-real", torch="8.0", gpus="8.0\\n") == ""


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("8.0", "80-real"),
        ("8.0 8.6", "80-real;86-real"),
        ("8.0;8.6", "80-real;86-real"),
        # The kernels of sm_90a run on every processor of 9.0; its PTX would serve no later one.
        ("9.0", "90a-real"),
        ("9.0a+PTX", "90a-real;90-virtual"),
        ("8.0 9.0a+PTX", DEFAULT),
        ("10.0f 12.0+PTX", "100f-real;120-real;120-virtual"),
        # sm_100f runs on both.
        ("10.0", "100f-real"),
        ("10.0a 10.3+PTX", "100f-real;103-virtual"),
        ("7.0 7.5 8.0", "80-real"),
        ("8.0 8.0", "80-real"),
    ],
)
@pytest.mark.parametrize("choice", ["AUTO", "ON"])
def test_the_list_of_torch(machine: Machine, choice: str, torch: str, expected: str) -> None:
    assert machine.built(choice=choice, torch=torch, gpus="8.9\\n") == expected


def test_our_own_list_comes_first(machine: Machine) -> None:
    assert machine.built(named="86-real;90-virtual", torch="8.0", gpus="8.9\\n") == "86-real;90-virtual"
    # PTX of 90 is for what has no machine code of its own: sm_110, and what comes later.
    assert machine.built(named="all") == "80-real;90a-real;90-virtual;100f-real;120f-real"


@pytest.mark.parametrize("word", ["Hopper", "8", "80", "9.0b", "9.0+ptx"])
def test_a_bad_entry_of_the_list_of_torch(machine: Machine, word: str) -> None:
    said = machine.run(torch=f"8.0 {word}")
    assert f'starflow-ext: TORCH_CUDA_ARCH_LIST has "{word}", expected numbers such as 8.0, 9.0a or 9.0+PTX.' in said


def test_a_bad_entry_of_our_own_list(machine: Machine) -> None:
    assert (
        'starflow-ext: STARFLOW_CUDA_ARCHITECTURES has "8.0", expected CMake\'s names such as 80-real, 90a-real or '
        "90-virtual, or all."
    ) in machine.run(named="8.0")


def test_kernels_asked_for_and_none_left(machine: Machine) -> None:
    said = machine.run(choice="ON", torch="7.5")
    assert "starflow-ext: STARFLOW_CUDA is ON, but TORCH_CUDA_ARCH_LIST has nothing of 8.0 or later." in said
