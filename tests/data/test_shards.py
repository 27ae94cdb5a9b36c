"""Tar shards: the same clips as those of a folder with the same files, and what is said of damaged and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.data import VideoFolder, captions_of, probe, read_actions, read_video, write_video
from starflow.data.shards import Shard, size_of

from .made import counting, store


def pack(path: Path, folder: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    """A shard of the files of a folder, as `tar` writes it."""
    with tarfile.open(path, "w", format=form) as archive:
        archive.add(folder, ".")
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **options: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for option, value in options.items():
        setattr(info, option, value)
    archive.addfile(info, io.BytesIO(data))


def clips(folder: Path, **options: object) -> VideoFolder:
    return VideoFolder(folder, **{"frames": 4, "height": 16, "width": 16, "channels": 1, **options})


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos with captions, one in a subfolder, one without, and a picture."""
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    write_video(made / "000.mp4", counting(30), 25, lossless=True)
    (made / "000.txt").write_text("counting up\n")
    write_video(made / "sub" / "001.mkv", counting(20), 25, lossless=True)
    (made / "sub" / "001.json").write_text(json.dumps({"captions": ["more counting", "still counting"]}))
    write_video(made / "sub" / "002.mp4", counting(12), 25, lossless=True)
    Image.linear_gradient("L").resize((20, 18)).save(made / "003.png")
    (made / "003.TXT").write_bytes("größer".encode("utf-16"))
    return made


@pytest.fixture
def video(tmp_path: Path) -> bytes:
    write_video(tmp_path / "one.mp4", counting(8), 8, lossless=True)
    return (tmp_path / "one.mp4").read_bytes()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("cache", [1 << 30, 0])
@pytest.mark.parametrize("frames", [4, 1])
def test_a_shard_gives_the_clips_of_its_files(folder: Path, tmp_path: Path, form: int, cache: int, frames: int) -> None:
    shard = clips(pack(tmp_path / "a.tar", folder, form), frames=frames, cache_bytes=cache, clips_per_file=2)
    plain = clips(folder, frames=frames, cache_bytes=cache, clips_per_file=2)
    assert len(shard) == len(plain) == (6 if frames == 4 else 8)
    assert shard.captions == plain.captions
    assert shard.listing() == plain.listing()
    for epoch in range(2):
        for index in range(len(plain)):
            one, two = (part.item(index, epoch=epoch, seed=3) for part in (shard, plain))
            assert torch.equal(one.pixels, two.pixels)
            assert (one.caption, one.name) == (two.caption, two.name)


def test_shards_lie_in_folders_beside_files(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    (whole / "deep").mkdir(parents=True)
    pack(whole / "deep" / "00.tar", folder)
    pack(whole / "01.TAR", folder / "sub")
    (whole / "z.mp4").write_bytes((folder / "000.mp4").read_bytes())
    found = clips(whole)
    names = [found.item(index).name.split("@")[0] for index in range(len(found))]
    assert names == [
        "01.TAR/001.mkv",
        "01.TAR/002.mp4",
        "deep/00.tar/000.mp4",
        "deep/00.tar/sub/001.mkv",
        "deep/00.tar/sub/002.mp4",
        "z.mp4",
    ]
    # A caption belongs to the video of its own shard.
    assert found.item(1).caption == found.item(5).caption == ""
    assert found.item(2).caption == "counting up"


def test_the_order_of_a_shard_does_not_matter(folder: Path, tmp_path: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for name, order in (("a.tar", files), ("b.tar", files[::-1])):
        with tarfile.open(tmp_path / name, "w") as archive:
            for path in order:
                archive.add(path, str(path.relative_to(folder)))
    one, two = clips(tmp_path / "a.tar"), clips(tmp_path / "b.tar")
    assert one.listing() == two.listing()
    assert all(torch.equal(one.item(index).pixels, two.item(index).pixels) for index in range(len(one)))


def test_pairs_and_actions_in_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, first in (("source", 10), ("target", 0)):
        (tmp_path / "made" / part).mkdir(parents=True)
        (tmp_path / "pairs" / part).mkdir(parents=True)
        write_video(tmp_path / "made" / part / "a.mp4", counting(30)[first:], 25, lossless=True)
        pack(tmp_path / "pairs" / part / "0.tar", tmp_path / "made" / part)
    paired = clips(tmp_path / "pairs" / "target", sources=tmp_path / "pairs" / "source")
    plain = clips(tmp_path / "made" / "target", sources=tmp_path / "made" / "source")
    assert torch.equal(paired.item(0).source, plain.item(0).source)
    acted = tmp_path / "made" / "target"
    (acted / "a.jsonl").write_text("".join(f'{{"action": {frame % 3}}}\r\n' for frame in range(30)))
    (acted / "lonely.jsonl").write_text('{"action": 1}')
    (acted / "other.jsonl").write_text('{"action": 1}')
    caplog.clear()
    told = clips(pack(tmp_path / "acted.tar", acted), frame_dim=3)
    lonely = ", ".join(f"{tmp_path}/acted.tar/{name}.jsonl" for name in ("lonely", "other"))
    assert lines(caplog) == [f"skipped: {lonely}: actions without a video of this name"]
    expected = clips(acted, frame_dim=3)
    assert told.listing() == expected.listing()
    assert torch.equal(told.item(0).frame_conditions[1:], expected.item(0).frame_conditions[1:])
    with pytest.raises(ValueError, match=r"actions: .*0\.tar/a\.jsonl does not exist"):
        clips(tmp_path / "pairs" / "target", frame_dim=3)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mpg", "a.gif", "a.flv", "a.webm", "a.y4m", "a.h264"]
)
def test_a_member_is_read_like_a_file(tmp_path: Path, name: str) -> None:
    store(tmp_path / name)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "odd", b"x" * 700)
        archive.add(tmp_path / name, name)
        add(archive, "more", b"y" * 1300)
    member = {found.name: found for found in Shard(tmp_path / "a.tar").members}[name]
    info = probe(member, count=True)
    assert info == probe(tmp_path / name, count=True)
    for start in (0.0, 1.2):
        one, two = (read_video(path, frames=4, fps=8, start=start, info=info) for path in (member, tmp_path / name))
        assert torch.equal(one, two)
    with member.open() as file:
        assert file.read() == (tmp_path / name).read_bytes()


def test_a_member_is_a_file_that_ends_where_it_ends(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a/b.c.mp4", b"0123456789")
        add(archive, "a/b.c.txt", b"words")
    video, caption = Shard(tmp_path / "a.tar").members
    assert (video.name, video.stem, video.suffix) == ("b.c.mp4", "b.c", ".mp4")
    assert str(video) == f"{tmp_path}/a.tar/a/b.c.mp4"
    assert captions_of(video) == ("words",)
    assert video.with_suffix(".txt") == caption
    assert (size_of(video), video.is_file(), video.with_suffix(".json").is_file()) == (10, True, False)
    with video.open() as file:
        assert (file.seek(-3, 2), file.read(), file.read(), file.tell()) == (7, b"789", b"", 10)
        assert (file.seek(2), file.read(3), file.seek(1, 1), file.read(100)) == (2, b"234", 6, b"6789")
        assert (file.seek(50), file.read()) == (50, b"")
        with pytest.raises(OSError, match="seek to -1"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
    with pytest.raises(FileNotFoundError, match=r"no member a/b\.c\.json in .*a\.tar"):
        video.with_suffix(".json").open()
    with pytest.raises(FileNotFoundError, match=r"no member a/b\.c\.json in .*a\.tar"):
        size_of(video.with_suffix(".json"))
    with pytest.raises(ValueError, match=r"actions: .*a\.tar/a/b\.c\.jsonl does not exist"):
        read_actions(video.with_suffix(".jsonl"), 3)


# Shards that are damaged


def three(path: Path, video: bytes) -> bytes:
    """A shard of three videos; each takes a header and whole blocks."""
    with tarfile.open(path, "w") as archive:
        for name in ("a.mp4", "b.mp4", "c.mp4"):
            add(archive, name, video)
    return path.read_bytes()


def test_a_shard_that_ends_in_a_member_gives_those_before_it(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    whole = three(path, video)
    step = 512 + -(-len(video) // 512) * 512
    shows = f"damaged: {path}: "
    before = "; the members before that place are read"
    for end, count, said in (
        (2 * step + 512 + 100, 2, "it ends in the middle of c.mp4, after 100 bytes"),
        (2 * step + 512, 2, "it ends in the middle of c.mp4, after 0 bytes"),
        (2 * step + 512 + len(video), 3, "it ends without the mark of an archive's end, so it may be cut off"),
        (3 * step, 3, "it ends without the mark of an archive's end, so it may be cut off"),
        (2 * step, 2, "it ends without the mark of an archive's end, so it may be cut off"),
        (2 * step + 99, 2, f"no header of a member at byte {2 * step}"),
        (3 * step + 512, 3, None),
    ):
        caplog.clear()
        path.write_bytes(whole[:end])
        assert len(clips(path)) == count, end
        assert lines(caplog) == ([] if said is None else [f"{shows}{said}{before}"]), end


def test_damaged_headers_end_a_shard_with_one_line(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    whole = three(path, video)
    step = 512 + -(-len(video) // 512) * 512
    flipped = whole[: step + 3] + b"?" + whole[step + 4 :]
    path.write_bytes(flipped)
    assert len(clips(path)) == 1
    assert lines(caplog) == [
        f"damaged: {path}: no header of a member at byte {step}; the members before that place are read"
    ]
    caplog.clear()
    # As `cat` joins shards.
    path.write_bytes(whole + whole)
    assert len(clips(path)) == 3
    assert len(lines(caplog)) == 1
    assert "bytes behind the mark of the archive's end at byte" in lines(caplog)[0]


@pytest.mark.parametrize("size", [-512, -(1 << 40), 1 << 62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_absurd_sizes_end_a_shard(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture, size: int, kind: bytes
) -> None:
    info = tarfile.TarInfo("x.mp4")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.mp4", video)
    whole = path.read_bytes()
    step = 512 + -(-len(video) // 512) * 512
    path.write_bytes(whole[:step] + bytes(header) + whole[:step])
    assert len(clips(path)) == 1
    assert len(lines(caplog)) == 1
    assert lines(caplog)[0].startswith(f"damaged: {path}: ")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.tar", lambda data: b"", "the file is empty"),
        ("a.tar", lambda data: bytes(10240), "the shard has no member that can be read"),
        ("a.tar", lambda data: b"no archive\n" * 200, "not a tar archive (invalid header)"),
        ("a.tar", lambda data: data[:300], "not a tar archive (truncated header)"),
        ("a.tar", gzip.compress, "a shard compressed by gzip, of which no member can be read alone"),
        ("a.tgz", gzip.compress, "a shard compressed by gzip, of which no member can be read alone"),
        ("a.tar.bz2", bz2.compress, "a shard compressed by bzip2, of which no member can be read alone"),
        ("a.tar.xz", lzma.compress, "a shard compressed by xz, of which no member can be read alone"),
    ],
)
def test_what_is_no_shard_is_told(
    tmp_path: Path,
    video: bytes,
    caplog: pytest.LogCaptureFixture,
    name: str,
    make: Callable[[bytes], bytes],
    said: str,
) -> None:
    path = tmp_path / "shards" / name
    path.parent.mkdir()
    path.write_bytes(make(three(tmp_path / "whole.tar", video)))
    with pytest.raises(ValueError, match=rf"^{path}: ") as refused:
        clips(path)
    assert said in str(refused.value)
    # Among other files it is skipped like a broken video.
    (path.parent / "b.mp4").write_bytes(video)
    assert len(clips(path.parent)) == 1
    assert [line.startswith(f"skipped: {path}: {said}") for line in lines(caplog)] == [True]


def test_members_that_are_not_read_have_a_line_for_each_kind(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "./a.mp4", b"an earlier one")
        add(archive, "a.mp4", video)
        add(archive, "screen\u202f1.mp4", video)
        add(archive, "sub", type=tarfile.DIRTYPE)
        add(archive, "/etc/b.mp4", video)
        add(archive, "../b.mp4", video)
        add(archive, "c.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "d.mp4", type=tarfile.LNKTYPE, linkname="a.mp4")
        add(archive, "e.mp4", type=tarfile.CHRTYPE)
        add(archive, "f\n\x1b[31m.mp4", video)
        add(archive, "._a.mp4", b"of a Mac")
        add(archive, ".cache/a.mp4", video)
        add(archive, "a.cls", b"3")
        add(archive, "b.npy", bytes(100))
        add(archive, "lonely.txt", b"no video")
    found = clips(path)
    assert found.listing() == [f"a.mp4 {len(video)} ('',)", f"screen\u202f1.mp4 {len(video)} ('',)"]
    assert lines(caplog) == [
        f"skipped: {path}: a.mp4: a name that stands in the shard twice, of which the last is read",
        f"skipped: {path}: /etc/b.mp4 and 1 more: a name that leads out of the shard, expected a relative one",
        f"skipped: {path}: c.mp4 and 1 more: a link, expected a file (links within a shard are not followed)",
        f"skipped: {path}: e.mp4: neither a file nor a folder",
        f"skipped: {path}: f \\x1b[31m.mp4: a name with control characters",
        f"skipped: {path}: members of other kinds: 1 of .cls, 1 of .npy",
        f"skipped: {path}/lonely.txt: .txt or .json without a video of this name, so no caption",
    ]


def test_captions_of_members_are_checked_and_doubles_counted(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(10):
            add(archive, f"{number:02}.mp4", video)
            add(archive, f"{number:02}.txt", b"words")
            add(archive, f"{number:02}.json", b'{"width": 16}')
    assert clips(path).captions == ("words",)
    assert len(lines(caplog)) == 9
    assert lines(caplog)[0] == f"skipped: {path}/00.json: the caption of 00.mp4 is read from 00.txt"
    assert lines(caplog)[-1] == "skipped: 2 more captions that stand behind another file"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.mp4", video)
        add(archive, "a.json", b'{"width": 16}')
    with pytest.raises(ValueError, match=r"VideoFolder: .*a\.tar/a\.json holds no caption, expected"):
        clips(path)


def test_a_broken_member_is_skipped_like_a_broken_file(
    tmp_path: Path, video: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.mp4", video[: len(video) // 2])
        add(archive, "b.mp4")
        add(archive, "c.mp4", b"words")
        add(archive, "d.mp4", video)
    with caplog.at_level(logging.WARNING):
        found = clips(path)
    assert len(found) == 1
    assert [line.partition(" (")[0] for line in lines(caplog) if line.startswith("skipped")] == [
        f"skipped: {path}/a.mp4: not a video that ffmpeg can decode",
        f"skipped: {path}/b.mp4: the file is empty",
        f"skipped: {path}/c.mp4: the file holds text, expected a video",
    ]
    # A shard that is cut off while it is read.
    path.write_bytes(path.read_bytes()[:512])
    with pytest.raises(ValueError, match="can be read any more"):
        found.item(0)
