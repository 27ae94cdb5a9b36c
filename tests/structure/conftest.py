from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def objects(root: Path) -> Path:
    """Where the newest build left its object files."""
    folders = sorted(root.glob("build/*/CMakeFiles/starflow_ops.dir"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        pytest.skip("no object files: the wheel was not built in this checkout")
    return folders[-1].parent
