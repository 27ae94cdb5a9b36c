"""Files and folders that appear under their name whole or not at all: written beside it, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well and is removed when it does not.

    Everything is on the disk before the name changes, and the new name is on the disk before this returns. The
    temporary name is hidden, has the suffix of `target`, and is another one each time, so that two processes may write
    the same file. Only a process that is killed leaves it behind (see `remove_leftovers`).

    Args:
        target: file or folder, in a folder that exists; the block makes the one or the other at the temporary path.

    Raises:
        FileNotFoundError: the folder of `target` does not exist.
        OSError: something cannot be written; `target` is left as it was.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.partial{target.suffix}")
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
            _sync(path)
        if temporary.is_dir():
            # A folder cannot be renamed over another that is not empty.
            _remove(target)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        _remove(temporary)


def write_text(target: Path, text: str) -> None:
    """Writes a file of UTF-8 text whole or not at all (see `replacing`)."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of `replacing` in `folder`, which no other process may be writing to."""
    for path in folder.glob(".*.partial*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
