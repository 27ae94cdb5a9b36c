"""Written beside, then renamed: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.files import remove_leftovers, replacing, write_text


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
