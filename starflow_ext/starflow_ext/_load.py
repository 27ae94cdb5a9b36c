"""Load the native library, or say in one sentence what stands in its way."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

OLDEST_TORCH: Final = (2, 10)
LIBRARY: Final = "libstarflow_ops.so"
REINSTALL: Final = "run `pip install --force-reinstall --no-deps starflow-ext`, or `pip install .` in a checkout"


def library_path() -> Path:
    """Return where the op library lies: beside the module ``_C``.

    Raises:
        ImportError: if the package is not installed whole.
    """
    spec = importlib.util.find_spec("starflow_ext._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / LIBRARY
    folder = Path(__file__).parent
    others = sorted(path.name.split(".")[1] for path in folder.glob("_C.*.so"))
    if others:
        raise ImportError(
            f"starflow_ext: the native module was built for {', '.join(others)}, this is Python "
            f"{sys.version_info.major}.{sys.version_info.minor}; {REINSTALL}."
        )
    raise ImportError(
        f"starflow_ext: {folder} has no native module; if it is a source folder on Python's path, take it off, "
        f"else {REINSTALL}."
    )


def load() -> ModuleType:
    """Load the op library into torch, then the module that speaks for it.

    Returns:
        The module ``starflow_ext._C``.

    Raises:
        ImportError: if torch is too old, or a file is missing or broken; one sentence with what to do.
    """
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise ImportError(
            f"starflow_ext: found torch {torch.__version__}, expected {'.'.join(map(str, OLDEST_TORCH))} or later; run "
            f"`pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'`."
        )
    path = library_path()
    if not path.exists():
        raise ImportError(f"starflow_ext: {path} is missing; {REINSTALL}.")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"starflow_ext: {path} does not load with torch {torch.__version__} ({reason}); {REINSTALL}."
        ) from error
    return importlib.import_module("starflow_ext._C")


native: Final = load()


def operators() -> Any:
    """Return the namespace of the native ops; importing this module has loaded them."""
    return torch.ops.starflow_ext
