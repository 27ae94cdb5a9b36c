"""Files and lines that a command leaves: clips with their json, the contact sheet, and the meter of a stream."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.config import ConfigError
from starflow.files import replacing, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from starflow.sampling import Sampled, SampleOptions


logger = logging.getLogger(__name__)

# Names of `clip_name`.
_CLIP = re.compile(r"\d{3,}-(?:[a-z0-9-]+-)?seed\d+")


class Meter:
    """Counts frames and prints their rate on standard error.

    Args:
        begin: time that the rate is measured from.
    """

    def __init__(self, begin: float) -> None:
        self.frames, self.first, self.seconds = 0, 0.0, 0.0
        self._begin, self._told = begin, begin
        self._live = sys.stderr.isatty()

    @property
    def rate(self) -> float:
        """Frames a second since the first."""
        return (self.frames - 1) / (self.seconds - self.first) if self.frames > 1 else self.frames / self.seconds

    def add(self, frames: int) -> None:
        """Counts frames that have just come."""
        now = time.perf_counter()
        self.seconds = now - self._begin
        self.first = self.first if self.frames else self.seconds
        self.frames += frames
        if now - self._told >= (0.2 if self._live else 2.0):
            self._told = now
            end = "\r" if self._live else "\n"
            print(f"{self.frames} frames, {self.rate:.1f} frames/s", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the line that the rate is shown on."""
        if self._live:
            print(file=sys.stderr)


def clips_text(count: int) -> str:
    """A number of clips in words."""
    return "1 clip" if count == 1 else f"{count} clips"


def print_report(sampled: Sampled) -> None:
    """Prints the report of a sample."""
    report = sampled.report
    clips, frames = sampled.pixels.shape[:2]
    error = "" if report.backward_error is None else f", backward error {report.backward_error:.2g}"
    print(
        f"{clips_text(clips)} of {frames} frames in {report.seconds:.2f} s ({report.frames_per_second:.1f} frames/s): "
        f"solver {report.solver}, {report.sweeps} sweeps, {report.evaluations_per_token:.1f} evaluations/token{error}"
    )


class Output:
    """A folder that receives files; the new ones of a run that fails are taken back.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Files that could not be written, whose clips are kept as frames.
        self.kept_as_frames: list[Path] = []
        self._new: list[Path] = []
        self._made = False

    def __enter__(self) -> Output:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--out is {str(self.folder)!r}, which is a file, expected a folder")
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for path in self._new:
                path.unlink(missing_ok=True)
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def path(self, name: str) -> Path:
        """Where to write a file of this name."""
        path = self.folder / name
        if not path.exists():
            self._new.append(path)
        return path

    def renew(self, name: str) -> None:
        """Removes what tells of an earlier clip of this name, before another clip is written in its place.

        Whatever ends the command meanwhile, no numbers stand beside a clip that they are not of.
        """
        for suffix in (".json", ".npy"):
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def earlier(self, names: Iterable[str]) -> str:
        """What to tell of clips of earlier calls that the folder holds beside those of these names; empty for none."""
        theirs = sum(_CLIP.fullmatch(path.stem) is not None for path in self.folder.glob("*.mp4"))
        ours = sum((self.folder / f"{name}.mp4").is_file() for name in names)
        return f" (beside {clips_text(theirs - ours)} of earlier calls)" if theirs > ours else ""

    def encode(self, name: str, whole: Tensor, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Writes a file by an encoder; where it fails twice, the frames are kept, which took long to compute.

        Args:
            name: of the file.
            whole: frames to keep, uint8 (frames, height, width, channels).
            write: takes the path, and what follows.

        Raises:
            OSError: the disk is full.
        """
        path = self.path(name)
        for attempt in (1, 2):
            try:
                write(path, *arguments, **options)
                return
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                logger.warning("%s%s", error.strerror or error, "; it is tried once more" if attempt == 1 else "")
        import numpy

        path.unlink(missing_ok=True)  # One of an earlier clip.
        kept = self.path(f"{path.stem}.npy")
        with replacing(kept) as temporary:
            numpy.save(temporary, whole.cpu().numpy())
        self.kept_as_frames.append(path)
        logger.warning("%s holds the frames of %s (uint8: frames, height, width, channels)", kept, path.name)

    def json(self, name: str, values: Any) -> None:
        """Writes a json file."""
        write_json(self.path(name), values)

    def sheet(self, clips: Sequence[Any], captions: Sequence[str]) -> None:
        """Writes the contact sheet of all clips."""
        from starflow.data import write_contact_sheet

        write_contact_sheet(self.path("sheet.png"), clips, captions)


def write_json(path: Path, values: Any) -> None:
    """Writes a json file whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_clips(
    out: Output, sampled: Sampled, numbers: Sequence[int], fps: float, args: argparse.Namespace, asked: SampleOptions
) -> list[Any]:
    """Writes mp4, gif and json of each clip under its number; returns the frames for the contact sheet."""
    from starflow.data import enlarge, to_frames, write_gif, write_video

    side = min(sampled.pixels.shape[-2:])
    scale = args.scale or max(1, math.ceil(128 / side))
    # Browsers slow a gif down that shows more than 50 frames a second.
    skip = math.ceil(fps / 50)
    shown = []
    for row, pixels in enumerate(sampled.pixels):
        frames = enlarge(to_frames(pixels), scale)
        prompt, seed = sampled.prompts[row], sampled.seeds[row]
        name = clip_name(numbers[row], prompt, seed)
        out.renew(name)
        out.encode(f"{name}.mp4", frames, write_video, frames, fps, lossless=args.lossless)
        out.encode(f"{name}.gif", frames, write_gif, frames[::skip], fps / skip)
        out.json(
            f"{name}.json",
            {
                "prompt": prompt,
                "caption": sampled.captions[row],
                "seed": seed,
                "model": str(args.model),
                "frames": len(frames),
                "fps": fps,
                "height": pixels.shape[-2],
                "width": pixels.shape[-1],
                "given_frames": sampled.given,
                **options_told(asked),
                **sampled.report.to_mapping(),
                **computed_together(len(sampled.pixels)),
            },
        )
        shown.append(frames)
    return shown


def clip_name(row: int, prompt: str, seed: int) -> str:
    """The name of the files of a clip, without a suffix."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{row:03d}-{words + '-' if words else ''}seed{seed}"


def options_told(asked: SampleOptions) -> dict[str, Any]:
    """The options of a sample beside the prompts, for the json of a clip."""
    options = asked.to_mapping()
    return {"options": {name: value for name, value in options.items() if name not in ("seed", "seeds")}}


def computed_together(clips: int) -> dict[str, Any]:
    """Facts beside the options that decide the last bits of a clip."""
    import torch

    from starflow.cli.info import version

    return {"clips_together": clips, "versions": {"starflow": version(), "torch": torch.__version__}}
