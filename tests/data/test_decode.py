"""Each frame at its own time, in its own size, shape and colours, whatever the file does to them."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starflow.data import VideoError, VideoFolder, frames_at, probe, read_video, write_video
from starflow.data.colour import tone_map

from .made import ffmpeg, numbers, store, stored_numbers

SMALL = {"height": 16, "width": 16, "channels": 1}

X264 = ("-c:v", "libx264", "-bf", "3", "-g", "12", "-qp", "2")
X265 = ("-c:v", "libx265", "-x265-params", "log-level=error:bframes=3:keyint=12:lossless=1")
MPEG2 = ("-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "2")
MPEG4 = ("-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "2")
FORMATS = [
    ("mp4", X264),
    ("mkv", X264),
    ("flv", X264),
    ("ts", X264),
    ("avi", X264),
    ("h264", X264),
    ("mp4", X265),
    ("mkv", X265),
    ("hevc", X265),
    ("mpg", MPEG2),
    ("m2v", MPEG2),
    ("mxf", MPEG2),
    ("avi", MPEG4),
    ("mp4", MPEG4),
    ("webm", ("-c:v", "libvpx", "-b:v", "2M", "-g", "12")),
    ("webm", ("-c:v", "libvpx-vp9", "-b:v", "2M", "-g", "12", "-cpu-used", "8")),
    ("ogv", ("-c:v", "libtheora", "-q:v", "10", "-g", "12")),
    ("avi", ("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p")),
    ("mjpeg", ("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p")),
    ("wmv", ("-c:v", "wmv2", "-q:v", "2", "-g", "12")),
    ("apng", ("-f", "apng")),
    ("y4m", ("-strict", "-1")),
    ("mov", ("-c:v", "prores_ks")),
    ("dv", ("-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p")),
]


@pytest.mark.parametrize("suffix, codec", FORMATS, ids=[f"{suffix}-{codec[1]}" for suffix, codec in FORMATS])
def test_frame_k_is_shown_at_k_over_the_rate_from_any_start(
    tmp_path: Path, suffix: str, codec: tuple[str, ...]
) -> None:
    path = tmp_path / f"a.{suffix}"
    store(path, *codec, frames=58)
    info = probe(path, count=True)
    assert (info.fps, info.frames, info.duration) == (25.0, 58, pytest.approx(58 / 25, abs=0.002))
    assert stored_numbers(read_video(path, **SMALL)) == list(range(58))
    whole = read_video(path, fps=25, **SMALL)
    assert stored_numbers(whole) == list(range(58))
    assert frames_at(info, 25) == 58
    for start in (3, 26, 37, 50, 56):
        for known in (None, info):
            part = read_video(path, fps=25, start=start / 25, frames=2, info=known, **SMALL)
            assert torch.equal(part, whole[start : start + 2]), start
            assert torch.equal(read_video(path, start=start / 25, frames=2, info=known, **SMALL), part), start


def test_packets_that_an_edit_list_hides_are_no_frames(tmp_path: Path) -> None:
    store(tmp_path / "all.mp4", *X264)
    data = bytearray((tmp_path / "all.mp4").read_bytes())
    place = data.index(b"elst")
    # The duration of its one entry, in milliseconds.
    data[place + 12 : place + 16] = struct.pack(">I", 800)
    (tmp_path / "end.mp4").write_bytes(data)
    ffmpeg("-ss", "0.68", "-i", tmp_path / "all.mp4", "-c", "copy", tmp_path / "start.mp4")
    for name, shown in (("end.mp4", range(20)), ("start.mp4", range(17, 50))):
        info = probe(tmp_path / name, count=True)
        assert info.frames == len(shown)
        assert info.duration == pytest.approx(len(shown) / 25, abs=0.001)
        assert stored_numbers(read_video(tmp_path / name, **SMALL)) == list(shown)
        assert stored_numbers(read_video(tmp_path / name, fps=25, **SMALL)) == list(shown)
        (tmp_path / name[:-4]).mkdir()
        (tmp_path / name[:-4] / name).symlink_to(tmp_path / name)
        clips = VideoFolder(tmp_path / name[:-4], frames=len(shown), height=16, width=16, fps=25)
        assert clips.item(0).pixels.shape[0] == len(shown)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_counted_frames_are_those_that_are_shown_at_any_rate(tmp_path: Path, suffix: str) -> None:
    uneven = "settb=1/90000,setpts=expr='N*3600+mod(N*7,5)*211':strip_fps=1"
    store(tmp_path / "even.mkv", *X264)
    path = tmp_path / f"uneven.{suffix}"
    ffmpeg(
        *("-i", tmp_path / "even.mkv", "-vf", uneven, "-fps_mode", "passthrough", "-enc_time_base", "1/90000"),
        *("-c:v", "libx264", "-qp", "2", path),
    )
    info = probe(path, count=True)
    assert info.frames == len(read_video(path, **SMALL))
    for fps in (7.3, 25, 60):
        assert len(read_video(path, fps=fps, **SMALL)) == frames_at(info, fps)


def test_a_picture_size_that_changes_keeps_the_clock(tmp_path: Path) -> None:
    parts = []
    for number, size in enumerate(("64x48", "128x96", "48x48")):
        options = (*X264, "-bf", 0, "-output_ts_offset", number * 0.8)
        store(tmp_path / f"{number}.ts", *options, frames=20, first=20 * number, size=size)
        parts.append((tmp_path / f"{number}.ts").read_bytes())
    (tmp_path / "all.ts").write_bytes(b"".join(parts))
    ffmpeg("-i", tmp_path / "all.ts", "-c", "copy", tmp_path / "all.mkv")
    for name in ("all.ts", "all.mkv"):
        for fps in (None, 25):
            frames = read_video(tmp_path / name, fps=fps, height=48, width=64)
            assert frames.shape == (60, 48, 64, 3)
            assert stored_numbers(frames) == list(range(60))


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_files_joined_byte_by_byte_play_on(tmp_path: Path, suffix: str) -> None:
    codec = X264 if suffix == "ts" else MPEG2
    for number in range(2):
        store(tmp_path / f"{number}.{suffix}", *codec, frames=40, first=25 * number)
    path = tmp_path / f"all.{suffix}"
    path.write_bytes(b"".join((tmp_path / f"{number}.{suffix}").read_bytes() for number in range(2)))
    info = probe(path, count=True)
    expected = [*range(40), *range(25, 65)]
    assert (info.frames, info.continuous) == (80, False)
    assert stored_numbers(read_video(path, fps=25, **SMALL)) == expected
    assert stored_numbers(read_video(path, fps=25, start=2.2, frames=4, info=info, **SMALL)) == expected[55:59]


def test_a_rate_that_is_the_resolution_of_a_clock_is_not_believed(tmp_path: Path) -> None:
    store(tmp_path / "a.mkv", *X264, frames=40, rate=20)
    # Nanoseconds of a frame, as the header states them.
    stated, wrong = (b"\x23\xe3\x83\x84" + struct.pack(">I", duration) for duration in (50_000_000, 1_000_000))
    data = (tmp_path / "a.mkv").read_bytes()
    assert data.count(stated) == 1
    (tmp_path / "b.mkv").write_bytes(data.replace(stated, wrong))
    for count in (False, True):
        assert probe(tmp_path / "b.mkv", count=count).fps == pytest.approx(20, abs=0.1)
    # A camera that films 500 pictures a second is.
    store(tmp_path / "fast.mkv", *X264, frames=50, rate=500)
    assert probe(tmp_path / "fast.mkv").fps == 500


def test_hours_between_two_frames_are_damage(tmp_path: Path) -> None:
    store(tmp_path / "a.mkv", "-vf", "setpts='(N+if(gt(N,9),100000,0))/25/TB'", "-fps_mode", "passthrough", frames=20)
    for use in (lambda path: probe(path, count=True), lambda path: read_video(path, fps=8, **SMALL)):
        with pytest.raises(VideoError, match=r"a\.mkv: a gap of 4000 s between two frames, expected at most 3600 s"):
            use(tmp_path / "a.mkv")


def test_damaged_frames_are_left_out_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.mkv"
    store(path, "-c:v", "png")
    data = path.read_bytes()
    # The name of a picture's header, the sixth.
    place = -1
    for _ in range(6):
        place = data.index(b"IHDR", place + 1)
    path.write_bytes(data[:place] + b"IHDX" + data[place + 4 :])
    for _ in range(2):
        assert stored_numbers(read_video(path, **SMALL)) == [k for k in range(50) if k != 5]
        assert stored_numbers(read_video(path, fps=25, frames=8, **SMALL)) == [0, 1, 2, 3, 4, 4, 6, 7]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("(")[0] for line in lines] == [f"damaged: {path}: 1 frame left out from 0.16 s on "]


def test_what_a_cut_file_still_holds_is_read(tmp_path: Path) -> None:
    for suffix in ("mkv", "ts", "flv"):
        path = tmp_path / f"a.{suffix}"
        store(path, *X264)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        info = probe(path, count=True)
        frames = stored_numbers(read_video(path, **SMALL))
        # The last pictures may need others that are gone.
        assert frames[:-4] == list(range(len(frames) - 4))
        assert frames == sorted(set(frames))
        assert 15 < len(frames) < 50
        assert info.frames == len(frames)


# Shape and colours


@pytest.mark.parametrize("turn", range(8))
def test_any_orientation_stands_upright(tmp_path: Path, turn: int) -> None:
    corner = torch.full((2, 32, 64, 3), 30, dtype=torch.uint8)
    corner[:, :16, :16] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    corner[:, 16:, 48:] = torch.tensor([30, 30, 220], dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", corner, 8)
    mirror = ["-display_hflip"] * (turn // 4)
    ffmpeg("-display_rotation", 90 * (turn % 4), *mirror, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    # First turned against the clock, then mirrored.
    expected = corner.rot90(turn % 4, dims=(1, 2))
    expected = expected.flip(2) if mirror else expected
    info = probe(tmp_path / "b.mp4")
    assert (info.height, info.width) == tuple(expected.shape[1:3])
    found = read_video(tmp_path / "b.mp4")
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().mean() < 4


ALPHA = [
    ("webm", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", "1")),
    ("webm", ("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-b:v", "1M")),
    ("mov", ("-c:v", "png", "-pix_fmt", "rgba")),
    ("mov", ("-c:v", "prores_ks", "-pix_fmt", "yuva444p10le")),
    ("mkv", ("-c:v", "ffv1", "-pix_fmt", "yuva444p10le")),
    ("apng", ("-f", "apng", "-pix_fmt", "rgba")),
]


@pytest.mark.parametrize("suffix, codec", ALPHA, ids=[f"{suffix}-{codec[1]}" for suffix, codec in ALPHA])
def test_transparent_parts_are_black(tmp_path: Path, suffix: str, codec: tuple[str, ...]) -> None:
    half = "color=c=red:s=64x48:r=8:d=1,format=rgba,geq=r='200':g='100':b='50':a='if(lt(X,32),255,0)'"
    ffmpeg("-f", "lavfi", "-i", half, *codec, tmp_path / f"a.{suffix}")
    frames = read_video(tmp_path / f"a.{suffix}").int()
    assert frames.shape == (8, 48, 64, 3)
    assert (frames[:, :, :30] - torch.tensor([200, 100, 50])).abs().max() <= 3
    assert frames[:, :, 34:].max() <= 3


def test_a_gif_with_transparency_is_black_there(tmp_path: Path) -> None:
    pictures = []
    for level in (100, 200):
        picture = Image.new("RGBA", (32, 16), (level, 50, 50, 255))
        picture.paste((0, 255, 0, 0), (16, 0, 32, 16))
        pictures.append(picture)
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    frames = read_video(tmp_path / "a.gif").int()
    assert (frames[:, :, :14, 0].amax((1, 2)) - torch.tensor([100, 200])).abs().max() <= 3
    assert frames[:, :, 18:].max() == 0


def _pq(light: np.ndarray) -> np.ndarray:
    """The signal of a light in units of 203 cd/m^2, SMPTE ST 2084."""
    power = (light * 203 / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _hlg(light: np.ndarray) -> np.ndarray:
    """That of hybrid log-gamma for a screen of 1000 cd/m^2; of grey, where luminance is the light itself."""
    scene = (light * 203 / 1000) ** (1 / 1.2)
    low, high = np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, low, high)


@pytest.mark.parametrize("transfer, signal", [(16, _pq), (18, _hlg)])
def test_high_dynamic_range_is_mapped_to_a_common_screen(transfer: int, signal: object) -> None:
    assert callable(signal)
    light = np.array([0, 0.01, 0.1, 0.3, 0.6, 0.75, 1.0, 2.0, 4.0, 1000 / 203])
    code = np.rint(65535 * np.clip(signal(light), 0, 1)).astype(np.uint16)
    shown = tone_map(code[None, :, None].repeat(3, axis=2), transfer)[0]
    assert np.abs(shown.astype(int) - shown[:, :1]).max() <= 1
    # The same light on a screen of gamma 2.4, whose white is diffuse white.
    common = 255 * np.clip(light, 0, 1) ** (1 / 2.4)
    assert np.abs(shown[:6, 0] - common[:6]).max() <= 1
    assert shown[6, 0] == pytest.approx(255 * 0.875 ** (1 / 2.4), abs=1)
    assert (np.diff(shown[:, 0].astype(int)) > 0).all()
    assert shown[-1, 0] == 255


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_a_file_of_high_dynamic_range_is_told(tmp_path: Path, transfer: str, caplog: pytest.LogCaptureFixture) -> None:
    tags = ("-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc", "-color_range", "tv")
    params = f"log-level=error:lossless=1:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    source = "color=c=0x808080:s=32x32:r=8:d=0.5,format=yuv420p10le"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx265", "-x265-params", params, *tags, tmp_path / "a.mp4")
    with caplog.at_level(logging.WARNING):
        frames = read_video(tmp_path / "a.mp4")
    # The light whose signal is 128 of 255.
    light = np.linspace(0, 1, 10_000)
    signal = _pq(light) if transfer == "smpte2084" else _hlg(light)
    shown = 255 * np.interp(128 / 255, signal, light) ** (1 / 2.4)
    assert frames.float().mean() == pytest.approx(shown, abs=2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.mp4'}: a picture in {'PQ' if transfer == 'smpte2084' else 'HLG'} (high dynamic range), its "
        "tones are mapped to those of a common screen"
    ]


def test_a_thin_picture_is_cropped_before_it_grows(tmp_path: Path) -> None:
    # Scaled to cover 64 x 64 it would have 2,000,000 x 64 pixels.
    ffmpeg("-f", "lavfi", "-i", "color=c=red:s=32000x1:r=8:d=0.25", "-c:v", "ffv1", tmp_path / "a.mkv")
    frames = read_video(tmp_path / "a.mkv", height=64, width=64)
    assert frames.shape == (2, 64, 64, 3)
    assert (frames.int() - torch.tensor([254, 0, 0])).abs().max() <= 2


# What is no video


def test_text_is_no_video_and_a_play_list_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path / "film.mp4", *X264)
    texts = {
        "film.nfo": "<movie><title>Film</title></movie>\n" * 100,
        "list.ffconcat": "ffconcat version 1.0\nfile film.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfilm.mp4\n#EXT-X-ENDLIST\n",
        "drawing.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"></svg>',
        "film.srt": "1\n00:00:00,000 --> 00:00:01,000\nà bientôt\n",
        "ansi.ans": "\x1b[31mred\x1b[0m\n" * 100,
        "two.mp4": "ffconcat version 1.0\nfile film.mp4\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "wide.nfo").write_text("text of Windows", encoding="utf-16")
    for name in [*texts, "wide.nfo"]:
        with pytest.raises(VideoError, match=rf"{name}: the file holds text, expected a video$"):
            read_video(tmp_path / name)
    assert len(VideoFolder(tmp_path, frames=4, height=16, width=16)) == 1
    assert len([record for record in caplog.records if "the file holds text" in record.getMessage()]) == 8
    # A list behind bytes that are no text.
    (tmp_path / "hidden.mp4").write_bytes(b"ffconcat version 1.0\nfile film.mp4\n#\xff\xfe\n")
    with pytest.raises(VideoError, match=r"hidden\.mp4: not a video that ffmpeg can decode"):
        read_video(tmp_path / "hidden.mp4")


def test_a_picture_of_tiles_is_no_video(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 100, 50))).save(tmp_path / "a.heic")
    with pytest.raises(VideoError, match=r"a\.heic: the file holds a picture \(HEIF\), expected a video"):
        read_video(tmp_path / "a.heic")


def test_pictures_are_videos_of_one_frame_to_the_reader_of_videos(tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), (200, 100, 50)).save(tmp_path / "a.png")
    assert read_video(tmp_path / "a.png")[0, 3, 3].tolist() == [200, 100, 50]


def test_numbers_of_lossless_files_keep_their_bits(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (5, 24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    write_video(tmp_path / "a.mkv", frames, 8, lossless=True)
    assert torch.equal(read_video(tmp_path / "a.mkv"), frames)
    assert numbers(read_video(tmp_path / "a.mkv", channels=1))
