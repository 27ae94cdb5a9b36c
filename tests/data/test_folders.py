"""Files through links, and captions however people name and encode them."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.data import VideoFolder, captions_of, read_image, write_contact_sheet, write_video
from starflow.data.folders import find_files
from starflow.text import ClassEncoder, WordEncoder, split_words

from .made import counting


def _clips(folder: Path, **options: object) -> VideoFolder:
    settings: dict[str, object] = {"frames": 4, "height": 16, "width": 16, "channels": 1, **options}
    return VideoFolder(folder, **settings)  # type: ignore[arg-type]


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# Links


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, data = tmp_path / "store", tmp_path / "data"
    for folder in (store / "cats" / "black", data / "dogs"):
        folder.mkdir(parents=True)
    for path in (store / "cats" / "1.mp4", store / "cats" / "black" / "2.mp4", data / "dogs" / "3.mp4"):
        path.write_bytes(b"x")
    (data / "cats").symlink_to(store / "cats")
    (data / "again").symlink_to(store / "cats")
    (data / "all").symlink_to(data)
    (data / "dogs" / "up").symlink_to("..")
    (data / "a_dogs").symlink_to("dogs")
    (data / "black").symlink_to(store / "cats" / "black")
    (data / "nowhere.mp4").symlink_to("missing")
    (data / ".hidden").symlink_to(store)
    found = [str(path.relative_to(data)) for path in find_files(data)]
    assert found == ["again/1.mp4", "again/black/2.mp4", "dogs/3.mp4", "nowhere.mp4"]
    assert sorted(_lines(caplog)) == [
        f"skipped: {data}/a_dogs leads to the folder {data}/dogs, which is read already",
        f"skipped: {data}/all leads to the folder {data}, which is read already",
        f"skipped: {data}/black leads to the folder {data}/again/black, which is read already",
        f"skipped: {data}/cats leads to the folder {data}/again, which is read already",
        f"skipped: {data}/dogs/up leads to the folder {data}, which is read already",
    ]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write_video(tmp_path / "store" / "a.mp4", counting(8), 8)
    (tmp_path / "store" / "a.txt").write_text("counting")
    (tmp_path / "data").symlink_to("store")
    clip = _clips(tmp_path / "data").item(0)
    assert (clip.name.split("@")[0], clip.caption) == ("a.mp4", "counting")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert find_files(tmp_path) == []
    assert _lines(caplog) == [f"skipped: {tmp_path}/closed: the folder cannot be read (Permission denied)"]


# Captions


@pytest.mark.parametrize(
    "video, caption",
    [
        ("CLIP0001.MP4", "CLIP0001.TXT"),
        ("clip.mp4", "clip.Txt"),
        ("Clip.mp4", "clip.txt"),
        ("clip.v1.mp4", "clip.v1.txt"),
        (unicodedata.normalize("NFC", "café.mp4"), unicodedata.normalize("NFD", "café.txt")),
        (unicodedata.normalize("NFD", "Ünde.mp4"), unicodedata.normalize("NFC", "ünde.txt")),
    ],
)
def test_a_caption_is_found_by_its_name(tmp_path: Path, video: str, caption: str) -> None:
    (tmp_path / video).write_bytes(b"x")
    (tmp_path / caption).write_text("a red ball\n")
    assert captions_of(tmp_path / video) == ("a red ball",)


def test_the_caption_of_another_video_is_not_taken(tmp_path: Path) -> None:
    for name in ("a.mp4", "A.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("small")
    assert captions_of(tmp_path / "a.mp4") == ("small",)
    assert captions_of(tmp_path / "A.mp4") == ("",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("ein größerer Ball \u65e5\u672c\n", encoding=encoding)
    assert captions_of(tmp_path / "a.mp4") == ("ein größerer Ball \u65e5\u672c",)
    (tmp_path / "b.json").write_text(json.dumps({"caption": "größer"}, ensure_ascii=False), encoding=encoding)
    assert captions_of(tmp_path / "b.mp4") == ("größer",)


def test_other_encodings_are_one_sentence(tmp_path: Path) -> None:
    for encoding, words in (
        ("latin-1", r"is no text in UTF-8 \(byte 6\), expected UTF-8, or UTF-16 with a byte order mark"),
        ("utf-16-le", r"holds zero bytes, expected UTF-8, or UTF-16 with a byte order mark"),
    ):
        (tmp_path / "a.txt").write_text("ein gr\u00f6sserer" if encoding == "latin-1" else "a ball", encoding=encoding)
        with pytest.raises(ValueError, match=rf"VideoFolder: .*a\.txt {words}"):
            captions_of(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"a" * (1 << 20) + b"a")
    with pytest.raises(ValueError, match=r"a\.txt has 1048577 bytes, expected a caption of at most 1 MiB"):
        captions_of(tmp_path / "a.mp4")


def test_accents_are_composed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cafe\u0301", encoding="utf-8")
    (tmp_path / "b.json").write_text('{"caption": "cafe\\u0301"}')
    assert captions_of(tmp_path / "a.mp4") == captions_of(tmp_path / "b.mp4") == ("caf\u00e9",)
    assert captions_of(tmp_path / "un_cafe\u0301-noir.mp4", by_name=True) == ("un caf\u00e9 noir",)
    assert captions_of(tmp_path / "\u0928\u092e\u0938\u094d\u0924\u0947_1.mp4", by_name=True) == (
        "\u0928\u092e\u0938\u094d\u0924\u0947 1",
    )


def test_captions_that_are_not_read_have_their_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "a.mp4", counting(8), 8)
    for name in ("a.txt", "A.TXT", "a.json", "other.txt", "readme.txt"):
        (tmp_path / name).write_text(name)
    assert _clips(tmp_path).item(0).caption == "a.txt"
    assert _lines(caplog) == [
        f"skipped: {tmp_path}/A.TXT: the caption of a.mp4 is read from a.txt",
        f"skipped: {tmp_path}/a.json: the caption of a.mp4 is read from a.txt",
        f"skipped: {tmp_path}/other.txt and 1 more: .txt or .json without a video of this name, so no caption",
    ]


def test_json_of_any_shape_is_a_caption_or_one_sentence(tmp_path: Path) -> None:
    sidecar = tmp_path / "a.json"
    for text, words in (
        ("[" * 100_000, r"is not valid JSON \(nested too deeply\)"),
        ('{"caption": ' + "9" * 10_000 + "}", "is not valid JSON"),
        ('{"caption": 3}', "holds no caption"),
        ("null", "holds no caption"),
    ):
        sidecar.write_text(text)
        with pytest.raises(ValueError, match=rf"VideoFolder: .*a\.json {words}") as caught:
            captions_of(tmp_path / "a.mp4")
        assert len(str(caught.value)) < 400 + len(str(sidecar))


def test_a_source_is_found_however_accents_are_typed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, name in (
        ("target", unicodedata.normalize("NFC", "é.mp4")),
        ("source", unicodedata.normalize("NFD", "é.mkv")),
    ):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / name, counting(8), 8)
    write_video(tmp_path / "source" / unicodedata.normalize("NFC", "é.mp4"), counting(8), 8)
    assert _clips(tmp_path / "target", sources=tmp_path / "source").item(0).source is not None
    assert len([line for line in _lines(caplog) if "is the source of the same clips" in line]) == 1


def test_captions_with_seconds_are_as_many_as_the_seconds(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", counting(40), 8)
    assert _clips(tmp_path, caption_second=True, name_captions=True).captions == ("a 0", "a 1", "a 2", "a 3", "a 4")


# Words


def test_words_keep_their_marks() -> None:
    hindi = "\u0928\u092e\u0938\u094d\u0924\u0947"
    assert split_words(f"{hindi}, \u0939\u093f\u0928\u094d\u0926\u0940!") == [
        hindi,
        "\u0939\u093f\u0928\u094d\u0926\u0940",
    ]
    assert split_words("\u0e17\u0e35\u0e48 x") == ["\u0e17\u0e35\u0e48", "x"]
    # A joiner inside of a word is part of it.
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert split_words(f"{persian} \u200d") == [persian]
    assert split_words("Cafe\u0301 CAF\u00c9") == ["caf\u00e9"] * 2
    assert split_words("-don't, rock-'n'-roll a_b 'x'") == ["don't", "rock", "n", "roll", "a", "b", "x"]


def test_the_same_word_is_known_however_it_is_typed() -> None:
    words = WordEncoder(vocabulary=("cafe\u0301", "\u0928\u092e\u0938\u094d\u0924\u0947"), size=2)
    assert words.vocabulary[0] == "caf\u00e9"
    assert words.encode(["Caf\u00e9", "cafe\u0301"])[:, 0].tolist() == [[1.0, 0.0]] * 2
    classes = ClassEncoder(2, ["caf\u00e9", "tea"])
    assert classes.encode(["cafe\u0301"])[0, 0].tolist() == [1.0, 0.0]
    for names in (["cafe\u0301", "caf\u00e9"], [1, 2], "ab", 3):
        with pytest.raises(ValueError, match=r"ClassEncoder: names are .*, expected 2 different names"):
            ClassEncoder(2, names)  # type: ignore[arg-type]
    for vocabulary in ([1, 2], "ab", 3, []):
        with pytest.raises(ValueError, match=r"WordEncoder: vocabulary is .*, expected a list of at least one word"):
            WordEncoder(vocabulary)  # type: ignore[arg-type]


def test_a_caption_beside_others_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "a.mp4", counting(8), 8)
    for caption, lines in (("three", 1), ("two", 0)):
        (tmp_path / "a.json").write_text(json.dumps({"caption": caption, "captions": ["one", "two"]}))
        caplog.clear()
        assert _clips(tmp_path).captions == ("one", "two")
        told = f'skipped: {tmp_path / "a.json"}: its "caption", which is not among its "captions"'
        assert _lines(caplog) == [told] * lines
    (tmp_path / "a.json").write_text(json.dumps({"captions": ["", "two"]}))
    caplog.clear()
    assert _clips(tmp_path).captions == ("", "two")
    assert not _lines(caplog)


def test_actions_that_are_all_null_or_of_no_video_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "a.mp4", counting(8), 8)
    (tmp_path / "a.jsonl").write_text('{"action": null}\n' * 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a three"}\n')
    _clips(tmp_path, frame_dim=3)
    lonely = f"skipped: {tmp_path / 'metadata.jsonl'}: actions without a video of this name"
    assert _lines(caplog) == [lonely, f"no frame of {tmp_path} has an action (all are null)"]
    caplog.clear()
    _clips(tmp_path)
    assert _lines(caplog) == [f"skipped: the actions of 1 videos in {tmp_path}, the model reads none", lonely]


def test_contact_sheets_are_no_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(frames[0].numpy()).save(tmp_path / "a.png")
    write_contact_sheet(tmp_path / "sheet.png", [frames], ["a cat"])
    data = VideoFolder(tmp_path, frames=1, height=16, width=16)
    assert [data.item(index).name for index in range(len(data))] == ["a.png@0"]
    assert f"skipped: {tmp_path}/sheet.png: a contact sheet of samples, which is no picture of one" in _lines(caplog)
    # A picture that is named is read, whatever it shows.
    assert read_image(tmp_path / "sheet.png").shape[-1] == 3
