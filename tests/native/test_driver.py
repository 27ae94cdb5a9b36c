"""What a machine is told whose NVIDIA driver is missing or too old for the kernels."""

from __future__ import annotations

from typing import Any


def test_drivers_and_runtimes(run_program: Any) -> None:
    assert run_program("driver_reason.cpp").split("\n") == [
        "this machine has no NVIDIA driver (libcuda.so.1), expected one for CUDA 13.0",
        "the NVIDIA driver serves CUDA up to 12.8, expected 13.0: install a newer driver",
        "",
        "",
        "",
        "",
    ]
