"""Print version and folder of a torch whose headers serve the build: ``2.13.0;/.../torch``, or nothing.

It is looked for where this interpreter imports from, then among the packages of its environment: pip builds in an
environment of its own, and a torch that is installed already need not be downloaded once more. Nothing is imported,
and no more than headers and one library to link with is taken.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

OLDEST = (2, 11)


def find_torch() -> tuple[str, Path] | None:
    """Return version and folder of the first torch that is new enough to build with."""
    for folder in dict.fromkeys([*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]):
        torch = Path(folder) / "torch"
        if (
            not (torch / "include/torch/csrc/stable/library.h").is_file()
            or not (torch / "lib/libtorch_cpu.so").is_file()
        ):
            continue
        found = re.search(r"^__version__ = '(\d+)\.(\d+)([^']*)'", (torch / "version.py").read_text(), re.MULTILINE)
        if found is not None and (int(found[1]), int(found[2])) >= OLDEST:
            return f"{found[1]}.{found[2]}{found[3]}", torch
    return None


if __name__ == "__main__":
    torch = find_torch()
    if torch is not None:
        sys.stdout.write(f"{torch[0]};{torch[1]}")
