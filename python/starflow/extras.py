"""Packages that an installation may lack, and the sentence that says how to add them."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, *, purpose: str, extra: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: dotted name, such as "matplotlib.figure".
        purpose: what needs it, the subject of the error's sentence.
        extra: of `starflow-ext` that installs the package.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs the package {package}: pip install 'starflow-ext[{extra}]'") from error
