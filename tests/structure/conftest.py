from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from starflow_ext._load import library_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def library() -> Path:
    return library_path()


@pytest.fixture(scope="session")
def objects() -> Path:
    """Where the newest build left its object files."""
    folders = sorted(ROOT.glob("build/*/CMakeFiles/starflow_ops.dir"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        pytest.skip("no object files: the wheel was not built in this checkout")
    return folders[-1].parent


@pytest.fixture(scope="session")
def tool() -> Callable[..., list[str]]:
    def run(*command: str | Path) -> list[str]:
        name = str(command[0])
        # NVIDIA's tools come from PyPI, which puts them beside the libraries.
        nvidia = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
        found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(nvidia)]))
        if found is None:
            pytest.skip(f"{name} is not on PATH")
        done = subprocess.run([found, *map(str, command[1:])], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run
