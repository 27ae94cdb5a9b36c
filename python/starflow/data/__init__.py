"""What goes in? Clips and captions: video files, folders of them, and a built-in set that needs no download."""

from starflow.data.actions import (
    ACTION_SUFFIX,
    WORLD_FILE,
    Action,
    RecordedWorld,
    action_line,
    action_vector,
    actions_beside,
    of_clip,
    read_actions,
    read_world,
)
from starflow.data.captions import ASPECT_RATIOS, CaptionMode, aspect_size, assemble, nearest_aspect
from starflow.data.clips import (
    Clip,
    ClipDataset,
    VideoFolder,
    actions_of,
    kept_clip,
    require_clip,
    sample_batch,
    sample_group,
    sample_indices,
    stack_clips,
    to_frames,
    to_pixels,
)
from starflow.data.digits import CHANGES, DIGITS, DIRECTIONS, VOCABULARY, DigitJudge, Motion, MovingDigits
from starflow.data.ffmpeg import VideoError, ffmpeg_binary
from starflow.data.pictures import IMAGE_SUFFIXES, read_image
from starflow.data.read import VideoInfo, frames_at, plays_otherwise, probe, read_video
from starflow.data.shards import VIDEO_SUFFIXES, Member, is_folder
from starflow.data.sheets import write_contact_sheet
from starflow.data.sidecars import caption_at, captions_of
from starflow.data.write import VideoWriter, enlarge, write_gif, write_video

__all__ = [
    "ACTION_SUFFIX",
    "ASPECT_RATIOS",
    "CHANGES",
    "DIGITS",
    "DIRECTIONS",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "VOCABULARY",
    "WORLD_FILE",
    "Action",
    "CaptionMode",
    "Clip",
    "ClipDataset",
    "DigitJudge",
    "Member",
    "Motion",
    "MovingDigits",
    "RecordedWorld",
    "VideoError",
    "VideoFolder",
    "VideoInfo",
    "VideoWriter",
    "action_line",
    "action_vector",
    "actions_beside",
    "actions_of",
    "aspect_size",
    "assemble",
    "caption_at",
    "captions_of",
    "enlarge",
    "ffmpeg_binary",
    "frames_at",
    "is_folder",
    "kept_clip",
    "nearest_aspect",
    "of_clip",
    "plays_otherwise",
    "probe",
    "read_actions",
    "read_image",
    "read_video",
    "read_world",
    "require_clip",
    "sample_batch",
    "sample_group",
    "sample_indices",
    "stack_clips",
    "to_frames",
    "to_pixels",
    "write_contact_sheet",
    "write_gif",
    "write_video",
]
