"""Pictures of any depth, size and format, in the colours that a screen shows."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starflow.data import VideoError, VideoFolder, read_image


def test_sixteen_bits_go_from_black_to_white(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16).repeat(8, axis=0)
    # 257 levels of 16 bits to one of 8, rounded.
    expected = [0, 0, 1, 1, 128, 254, 255, 255]
    for suffix in ("png", "tiff"):
        Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
        picture = read_image(tmp_path / f"a.{suffix}")
        assert picture.shape == (1, 8, 8, 3)
        assert picture[0, 0].tolist() == [[level] * 3 for level in expected]
    Image.fromarray(levels.astype(">u2")).save(tmp_path / "big.tiff")
    assert read_image(tmp_path / "big.tiff")[0, 0, :, 0].tolist() == expected


def test_floating_point_goes_from_zero_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, 0, :, 0].tolist() == [0, 64, 128, 255]
    for value in (255.0, -0.5, float("nan")):
        Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / "b.tiff")
        with pytest.raises(VideoError, match=r"b\.tiff: floating-point pixels from .* to .*, expected 0 to 1"):
            read_image(tmp_path / "b.tiff")
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "c.tiff")
    with pytest.raises(VideoError, match=r"c\.tiff: pixels are integers of 32 bits, expected 8 or 16"):
        read_image(tmp_path / "c.tiff")


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "gif"])
def test_transparent_parts_are_black(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGBA", (32, 16), (200, 100, 50, 255))
    picture.paste((0, 255, 0, 0), (16, 0, 32, 16))
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    picture.save(tmp_path / f"a.{suffix}", **lossless)
    found = read_image(tmp_path / f"a.{suffix}").int()
    assert (found[:, :, :14] - torch.tensor([200, 100, 50])).abs().max() <= 4
    assert found[:, :, 18:].max() <= 4


def test_half_opaque_is_half_as_bright(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 100, 51, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0, 0].tolist() == [100, 50, 26]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "b.png", transparency=0)
    assert read_image(tmp_path / "b.png")[0, 0, 0].tolist() == [40, 50, 60]


def test_the_kind_of_picture_does_not_change_its_colours(tmp_path: Path) -> None:
    colours = Image.new("RGB", (4, 4), (200, 100, 50))
    colours.convert("CMYK").save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, 0, 0].tolist() == [200, 100, 50]
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0, 0].tolist() == [77, 77, 77]
    Image.new("1", (4, 4), 1).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png")[0, 0, 0].tolist() == [255, 255, 255]


def test_a_picture_of_a_camera_needs_a_package_or_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(Image.new("RGB", (640, 480), (200, 100, 50))).save(path)
    assert (read_image(path).int() - torch.tensor([200, 100, 50])).abs().max() <= 3
    assert VideoFolder(tmp_path, frames=1, height=16, width=16).item(0).pixels.shape == (1, 3, 16, 16)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(VideoError, match=r"a\.heic: a picture in HEIC needs the package pillow-heif: pip install"):
            read_image(path)


def test_the_first_of_several_pictures_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 20)]
    several[0].save(tmp_path / "a.webp", save_all=True, append_images=several[1:], lossless=True)
    assert read_image(tmp_path / "a.webp")[0, 0, 0].tolist() == [10, 0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.webp'}: several pictures in one file, the first is read"
    ]


def test_a_thin_picture_is_cropped_before_it_grows(tmp_path: Path) -> None:
    # Scaled to cover 64 x 64 it would have 6,400,000 x 64 pixels.
    picture = Image.new("RGB", (100_000, 1), (10, 20, 30))
    picture.paste((200, 100, 50), (49_990, 0, 50_010, 1))
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", height=64, width=64)[0, 20, 32].tolist() == [200, 100, 50]
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", height=64, width=64)[0, 32, 20].tolist() == [200, 100, 50]


def test_cropping_first_gives_what_cropping_last_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    last = read_image(tmp_path / "a.png", height=32, width=32).int()
    monkeypatch.setattr("starflow.data.pictures.must_crop_first", lambda *sizes: True)
    first = read_image(tmp_path / "a.png", height=32, width=32).int()
    # The outermost columns see other neighbours.
    assert (first[:, :, 12:-12] - last[:, :, 12:-12]).abs().max() <= 1


def test_a_header_may_not_ask_for_all_memory(tmp_path: Path) -> None:
    rows = zlib.compress((b"\0" + bytes(1500)) * 11_500, 9)
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 12_000, 11_500, 1, 0, 0, 0, 0), b"IDAT" + rows, b"IEND")
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(VideoError, match=r"a\.png: a picture of 12000x11500 pixels, expected at most 134217728 pixels"):
        read_image(tmp_path / "a.png")
    # One that is allowed, in a process that says what it took.
    body = body.replace(struct.pack(">II", 12_000, 11_500), struct.pack(">II", 12_000, 11_000))
    header = body[4:21]
    (tmp_path / "b.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + body[:21] + struct.pack(">I", zlib.crc32(header)) + body[25:]
    )
    program = (
        "import resource, sys\nfrom starflow.data import read_image\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore = most()\n"
        "assert not read_image(sys.argv[1], height=16, width=16).any()\nprint(most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "b.png"], capture_output=True, text=True, check=True
    )
    # 126 MiB of pixels as they are stored, and 504 in the four bytes that Pillow has for RGB.
    assert int(done.stdout) < 800
