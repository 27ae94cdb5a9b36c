"""Written beside, then renamed: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from starflow import files
from starflow.files import InUseError, remove_leftovers, replacing, sole, standing, write_text


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_changes_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".json"
        assert temporary.name.startswith(".")
        assert target.read_text() == "old"
    assert (target.read_text(), _names(tmp_path)) == ("new", ["a.json"])


def test_devices_and_pipes_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target in (pipe, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1")):
        with pytest.raises(OSError, match="a device or a pipe, expected a file"), replacing(target):
            raise AssertionError("nothing is written")
    assert pipe.is_fifo()
    assert os.readlink("/dev/stdout") == "/proc/self/fd/1"


def test_a_folder_takes_the_place_of_one_that_is_not_empty(tmp_path: Path) -> None:
    target = tmp_path / "state"
    for name in ("old", "new"):
        with replacing(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert (_names(target), _names(tmp_path)) == (["new"], ["state"])


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.mkdir() if folder else temporary.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert (target.read_text(), _names(tmp_path)) == ("old", ["a"])


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (target.read_text(), _names(tmp_path)) == ("first", ["a.txt"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*a\.txt: folder .*missing does not exist"):
        write_text(tmp_path / "missing" / "a.txt", "text")


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.0a1b2c3d.partial.txt").write_text("half")
    (tmp_path / ".state.0a1b2c3d.partial").mkdir()
    (tmp_path / ".kept").write_text("mine")
    write_text(tmp_path / "a.txt", "whole")
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == [".kept", "a.txt"]


def in_a_child(call: Callable[[], None], kill_at: int | None = None) -> int:
    """Runs a function in a process of its own and returns its exit status.

    Args:
        call: the function.
        kill_at: number of the line of `files` or of `shutil` before which the process ends at once, as if it were
            killed; the status is then 9.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in (files.__file__, shutil.__file__):
            return None
        if event == "line":
            if seen == kill_at:
                os._exit(9)
            seen += 1
        return trace

    try:
        files._swept.clear()
        sys.settrace(trace if kill_at is not None else None)
        call()
        sys.settrace(None)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_any_line_leaves_the_old_or_the_new(
    tmp_path: Path, kind: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.x"

    def write(text: str) -> None:
        with replacing(target) as temporary:
            if kind == "file":
                temporary.write_text(text)
                return
            temporary.mkdir()
            for name in ("a", "b"):
                (temporary / name).write_text(text)

    def read(path: Path) -> set[str]:
        return {part.read_text() for part in (path.iterdir() if kind == "folder" else [path])}

    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    kill_at, seen = 0, set()
    while True:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        write("old")
        status = in_a_child(lambda: write("new"), kill_at)
        assert status in (0, 9)
        (content,) = read(standing(target))
        assert (kind == "folder" and not exchanges) or target.exists()
        seen.add(content)
        # The next process that writes there, whatever it writes.
        assert in_a_child(lambda: write_text(tmp_path / "other", "text")) == 0
        assert _names(tmp_path) == ["model.x", "other"], kill_at
        assert read(target) == {content}
        if status == 0:
            break
        kill_at += 1
    assert kill_at > 20
    assert seen == {"old", "new"}


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        assert in_a_child(lambda: write_text(tmp_path / "b.txt", "text")) == 0
        assert temporary.read_text() == "half"


def test_what_another_machine_left_goes_after_a_day(tmp_path: Path) -> None:
    recent, old = (tmp_path / f".a.0123abcd-{number}-0a1b2c3d.partial.txt" for number in (1, 2))
    earlier = tmp_path / ".state.0a1b2c3d.partial"
    earlier.mkdir()
    for path in (recent, old):
        path.write_text("half")
    for path in (old, earlier):
        os.utime(path, (time.time() - 100_000,) * 2)
    (tmp_path / ".partial").write_text("mine")
    (tmp_path / ".mine.partial.txt").write_text("mine")
    assert in_a_child(lambda: write_text(tmp_path / "b.txt", "text")) == 0
    assert _names(tmp_path) == [recent.name, ".mine.partial.txt", ".partial", "b.txt"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    for target in (tmp_path / ("\u00e9" * 125 + ".json"), tmp_path / ("x" * 255)):
        write_text(target, "text")
        assert target.read_text() == "text"
    assert len(_names(tmp_path)) == 2


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "model").symlink_to("elsewhere")
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert (_names(tmp_path), _names(tmp_path / "model")) == (["elsewhere", "model"], ["new"])
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"


def test_a_folder_is_held_by_one_process_and_by_its_life(tmp_path: Path) -> None:
    def hold() -> None:
        with sole(tmp_path):
            pass

    with sole(tmp_path):
        assert in_a_child(hold) == 1
        with pytest.raises(InUseError, match="is in use by another run"), sole(tmp_path):
            pass
    assert in_a_child(hold) == 0
    assert _names(tmp_path) == []

    def die() -> None:
        with sole(tmp_path):
            os._exit(0)

    assert in_a_child(die) == 0
    with sole(tmp_path):
        pass


@pytest.mark.parametrize("names_it", [False, True])
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path: Path, names_it: bool) -> None:
    target = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left") as caught, replacing(target) as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(temporary)] if names_it else []))
    assert caught.value.filename == str(target)


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    for name in ("a.txt", "new.txt"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"
    assert _names(tmp_path / "real") == ["a.txt", "new.txt"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere" / "lost.txt")
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        write_text(tmp_path / "lost.txt", "new")


def test_who_may_read_stays(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    usual = target.stat().st_mode
    for mode in (0o600, 0o640):
        target.chmod(mode)
        write_text(target, "new")
        assert target.stat().st_mode & 0o777 == mode
    assert usual & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
