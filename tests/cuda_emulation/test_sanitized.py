"""A kernel of each kind under AddressSanitizer, which sees what the emulated device does not: a thread's own arrays.

The sanitizer must be there before everything else, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .emulator import ROOT

# Runs in the root of the checkout, which `python -c` puts on the path.
RUN = "from tests.cuda_emulation import sanitized; sanitized.{0}()"


def _run(what: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer")
    # Threads of the kernel leave their stacks in ways that the sanitizer does not know; Python leaks on purpose.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return subprocess.run(
        [sys.executable, "-c", RUN.format(what)],
        env=os.environ | {"LD_PRELOAD": str(library), "ASAN_OPTIONS": options},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("what", ["attention", "attention_sm90"])
def test_a_kernel(what: str) -> None:
    done = _run(what)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "right\n"


def test_an_index_past_an_array_of_a_thread() -> None:
    done = _run("past_own_array")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: stack-buffer-overflow" in done.stderr
    assert "planted.cu:" in done.stderr
