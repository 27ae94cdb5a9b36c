"""Contact sheets: pictures that show each clip as a row of its frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from starflow.arguments import check_texts
from starflow.data.pictures import SHEET
from starflow.data.write import check_frames, enlarge
from starflow.files import replacing


def write_contact_sheet(
    path: str | os.PathLike[str],
    clips: Sequence[torch.Tensor],
    captions: Sequence[str] | None = None,
    frames_per_row: int = 8,
    scale: int = 1,
) -> None:
    """Write a PNG that shows each clip as a row of frames, spread evenly from the first to the last.

    Args:
        path: .png, in a folder that exists.
        clips: uint8 of shape (frames, height, width, 1 or 3) each.
        captions: the line above each row; None for rows without one.
        frames_per_row: the most frames shown of a clip.
        scale: whole factor by which pixels are repeated.

    Raises:
        ValueError: when an argument is out of range.
        OSError: when the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f'write_contact_sheet: path {path} ends in "{Path(path).suffix}", expected .png')
    if not len(clips):
        raise ValueError("write_contact_sheet: clips is empty, expected at least one clip")
    if captions is not None:
        check_texts("write_contact_sheet", "captions", captions)
    if captions is not None and len(captions) != len(clips):
        raise ValueError(f"write_contact_sheet: got {len(captions)} captions for {len(clips)} clips, expected as many")
    if frames_per_row < 1:
        raise ValueError(f"write_contact_sheet: frames_per_row is {frames_per_row}, expected at least 1")
    gap, line = 2, 14
    rows = []
    for clip in clips:
        check_frames("write_contact_sheet", clip)
        shown = np.linspace(0, len(clip) - 1, min(frames_per_row, len(clip))).round().astype(int)
        pictures = enlarge(clip[shown].cpu().expand(-1, -1, -1, 3), scale)
        rows.append([Image.fromarray(picture.numpy()) for picture in pictures])
    header = 0 if captions is None else line
    font = ImageFont.load_default(size=11)
    texts = [] if captions is None else [caption.replace("\n", " ") for caption in captions]
    pictures_width = max(sum(picture.width + gap for picture in row) for row in rows)
    texts_width = max((math.ceil(font.getlength(text)) + gap for text in texts), default=0)
    sheet_height = sum(row[0].height + gap + header for row in rows)
    sheet = Image.new("RGB", (max(pictures_width, texts_width) + gap, sheet_height + gap), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    top = gap
    for index, row in enumerate(rows):
        if texts:
            draw.text((gap, top), texts[index], font=font, fill=(230, 230, 230))
        left = gap
        for picture in row:
            sheet.paste(picture, (left, top + header))
            left += picture.width + gap
        top += row[0].height + gap + header
    with replacing(Path(path)) as temporary:
        try:
            sheet.save(temporary, format="PNG", pnginfo=_mark())
        except OSError as error:
            message = f"cannot write {path}: {error.strerror or error}; no file was left behind"
            raise OSError(error.errno, message) from error


def _mark() -> PngImagePlugin.PngInfo:
    """What tells a contact sheet from a picture: samples in one folder with theirs can be trained on."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*SHEET)
    return mark
