"""Tools that read object files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest


def run_tool(name: str, *arguments: str | Path) -> list[str]:
    """The lines that a tool puts out. Without it the test is skipped."""
    # NVIDIA's tools come from PyPI, which puts them beside the libraries. One calls another.
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    path = os.pathsep.join([os.environ.get("PATH", ""), str(nvidia)])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not on PATH")
    done = subprocess.run(
        [found, *map(str, arguments)], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()
