"""The files of a folder, through links, each once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def find_files(folder: Path) -> list[Path]:
    """Find the files below a folder, except hidden ones.

    Links to folders are followed. A folder that is reached twice, as in a loop of links, is read once: by its own name
    where that lies below `folder`, and the other way to it has a line in the log. So has a folder that cannot be read.

    Args:
        folder: to search.

    Returns:
        the paths in order; links to nowhere are among them.
    """
    found: list[Path] = []
    known: dict[tuple[int, int], Path] = {}
    links: list[Path] = []
    waiting = [folder]
    while waiting or links:
        # Links last, so that a folder goes by its own name.
        here = waiting.pop() if waiting else links.pop(0)
        try:
            status = here.stat()
            first = known.setdefault((status.st_dev, status.st_ino), here)
            if first is not here:
                logger.warning("skipped: %s leads to the folder %s, which is read already", here, first)
                continue
            entries = sorted(os.scandir(here), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            logger.warning("skipped: %s: the folder cannot be read (%s)", here, error.strerror or error)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = here / entry.name
            if not _is_folder(path):
                found.append(path)
            elif entry.is_symlink():
                links.append(path)
            else:
                waiting.append(path)
        # Those of one folder were put down from last to first.
        links.sort()
    return sorted(found)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # Left to the reader of the file, which tells why.
        return False
