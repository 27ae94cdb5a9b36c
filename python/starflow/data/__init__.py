"""Clips and captions: video files, folders of them, and a built-in set that needs no download."""

from starflow.data.captions import aspect_size, assemble
from starflow.data.clips import (
    Clip,
    ClipDataset,
    VideoFolder,
    sample_batch,
    sample_indices,
    stack_clips,
    to_frames,
    to_pixels,
)
from starflow.data.digits import DIGITS, DIRECTIONS, VOCABULARY, DigitJudge, MovingDigits
from starflow.data.video import (
    VideoError,
    VideoInfo,
    VideoWriter,
    enlarge,
    ffmpeg_binary,
    frames_at,
    probe,
    read_image,
    read_video,
    write_contact_sheet,
    write_gif,
    write_video,
)

__all__ = [
    "DIGITS",
    "DIRECTIONS",
    "VOCABULARY",
    "Clip",
    "ClipDataset",
    "DigitJudge",
    "MovingDigits",
    "VideoError",
    "VideoFolder",
    "VideoInfo",
    "VideoWriter",
    "aspect_size",
    "assemble",
    "enlarge",
    "ffmpeg_binary",
    "frames_at",
    "probe",
    "read_image",
    "read_video",
    "sample_batch",
    "sample_indices",
    "stack_clips",
    "to_frames",
    "to_pixels",
    "write_contact_sheet",
    "write_gif",
    "write_video",
]
