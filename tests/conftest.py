"""For every test: fresh interpreters import the installed packages too; the checkout, what was built, and its tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from starflow_ext._load import library_path

# `python -m` and `python -c` put the current folder first, and the root holds folders of the packages' names.
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def library() -> Path:
    return library_path()


@pytest.fixture(scope="session")
def tool() -> Callable[..., list[str]]:
    def run(*command: str | Path) -> list[str]:
        name = str(command[0])
        # NVIDIA's tools come from PyPI, which puts them beside the libraries. One calls another.
        nvidia = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
        path = os.pathsep.join([os.environ.get("PATH", ""), str(nvidia)])
        found = shutil.which(name, path=path)
        if found is None:
            pytest.skip(f"{name} is not on PATH")
        done = subprocess.run(
            [found, *map(str, command[1:])], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    return run
