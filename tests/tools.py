"""Tools that read object files, and a disk that is full."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, which a write meets like a full disk.

    Only inside the block: the test runner's own output may be a file, and longer than that.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
