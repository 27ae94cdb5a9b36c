"""Every kind of file that starflow reads, malformed in every way: each use ends in a result or in one sentence.

`STARFLOW_MALFORMED=all` runs the whole table instead of a small part of it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults import flipped, oversized, scrambled, truncated
from .inputs import INPUTS, Input

WHOLE = os.environ.get("STARFLOW_MALFORMED", "") == "all"

# Limits of one use, whatever the file asks for: it may take this long on a busy machine, and no more memory.
SECONDS = 60
MIB = 3_000


class Worker:
    """A process that uses files; a new one where the last has crashed or hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def use(self, use: str, path: Path) -> dict[str, str | int]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).parent / "worker.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._answer()
        assert self._process.stdin is not None
        print(json.dumps({"use": use, "path": str(path)}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, str | int]:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close()
        return {"end": "crash" if ready else "hang", "text": "", "mib": 0}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def faults_of(kind: Input, data: bytes, others: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """All malformed files of a kind, the small part first."""
    yield "empty", b""
    yield from truncated(data, 8 if WHOLE else 2)
    yield from flipped(data, 16 if WHOLE else 2)
    yield from oversized(data, 12 if WHOLE else 2)
    yield from scrambled(data, 8 if WHOLE else 1)
    special = list(kind.special(data))
    yield from special if WHOLE else special[:: max(1, len(special) // 4)]
    names = [name for name in others if name != kind.name]
    for name in names if WHOLE else names[len(data) % len(names) :][:1]:
        yield f"holds {name}", others[name]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    for kind in INPUTS:
        kind.make(folder / kind.name)
    return {kind.name: (folder / kind.name).read_bytes() for kind in INPUTS}


@pytest.mark.parametrize("kind", INPUTS, ids=lambda kind: kind.name)
def test_a_malformed_file_ends_in_a_result_or_in_one_sentence(
    kind: Input, good: dict[str, bytes], worker: Worker, tmp_path: Path
) -> None:
    faults = list(faults_of(kind, good[kind.name], good))
    wrong = []
    for number, (fault, data) in enumerate([("good", good[kind.name]), *faults]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / kind.name
        path.write_bytes(data)
        if path.suffix in (".txt", ".json"):
            path.with_suffix(".mp4").write_bytes(good["a.mp4"])
        # One use of each fault, in turn; the good file by all.
        for use in kind.uses if fault == "good" or WHOLE else [kind.uses[number % len(kind.uses)]]:
            ended = worker.use(use, path)
            fine = ("result",) if fault == "good" else ("result", "sentence")
            if ended["end"] not in fine or int(ended["mib"]) > MIB:
                wrong.append((use, fault, ended))
            if int(ended["mib"]) > MIB:
                # What the next file needs is seen in a new process alone.
                worker.close()
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("use", ["video", "picture"])
def test_what_is_no_file_is_named(use: str, worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "missing")
    for name, words in (
        ("folder.mp4", "not a file"),
        ("pipe.mp4", "not a file"),
        ("loop.mp4", "no such file"),
        ("nowhere.mp4", "no such file"),
        ("missing.mp4", "no such file"),
        ("x" * 300 + ".mp4", "cannot be read (File name too long)"),
    ):
        ended = worker.use(use, tmp_path / name)
        assert (ended["end"], ended["text"]) == ("sentence", f"{tmp_path / name}: {words}")
