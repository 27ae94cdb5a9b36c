"""Uses files as users do, one after the other, in a process that may crash, hang or grow.

It reads lines of JSON, `{"use": name of a function here, "path": file}`, and answers each with one: how the use ended
("result", "sentence" or "other"), what it said, the seconds of the processor that it took, and the most memory that the
process has had, in MiB.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch

from starflow.data import VideoFolder, captions_of, frames_at, probe, read_actions, read_image, read_video, read_world


def video(path: Path) -> str:
    """Reads frames of a video in the ways that data sets do."""
    info = probe(path, count=True)
    size = {"height": 16, "width": 16, "info": info}
    count = min(4, frames_at(info, 8))
    first = read_video(path, frames=count, fps=8, **size)
    later = (frames_at(info, 8) - count) / 8
    assert read_video(path, frames=count, fps=8, start=later, **size).shape == first.shape == (count, 16, 16, 3)
    return f"{info}"


def picture(path: Path) -> str:
    """Reads a picture small and at its own size."""
    assert read_image(path, height=16, width=16).shape == (1, 16, 16, 3)
    return str(list(read_image(path).shape))


def captions(path: Path) -> str:
    """Reads the captions of the video beside the file."""
    return str(captions_of(path.with_suffix(".mp4")))[:200]


def actions(path: Path) -> str:
    """Reads the actions of a video of six frames."""
    return str(read_actions(path, 3, 6).nansum().item())


def world(path: Path) -> str:
    """Reads what a folder tells of its world."""
    return str(read_world(path.parent))[:200]


def folder(path: Path) -> str:
    """Opens a folder in which the file lies, and draws each clip."""
    frames = 1 if path.suffix in (".png", ".jpg") else 4
    clips = VideoFolder(path.parent, frames=frames, height=16, width=16, fps=8)
    assert all(clips.item(index).pixels.shape == (frames, 3, 16, 16) for index in range(len(clips)))
    return str(clips.captions)[:200]


@functools.cache
def _model() -> str:
    from starflow.cli import main

    runs = Path(tempfile.mkdtemp())
    assert main(["train", "--config", "tiny", "--steps", "1", "--quiet", "--out", str(runs / "run")]) == 0
    return str(runs / "run")


def score(path: Path) -> str:
    """Scores a video by `starflow score`."""
    return command("score", _model(), str(path))


class RefusedError(ValueError):
    """What a command wrote to standard error before it ended with an error."""


def command(*arguments: str) -> str:
    """Runs a command of starflow in this process.

    Raises:
        RefusedError: with the one sentence of the command.
        AssertionError: when it ended in any other way.
    """
    from starflow.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(list(arguments))
        except SystemExit as exit_:
            status = exit_.code
    said = [line for line in error.getvalue().splitlines() if line.startswith("starflow: error:")]
    if status == 0:
        return "status 0"
    assert status in (1, 2), f"status {status}: {error.getvalue()}"
    assert len(said) == 1, error.getvalue()
    assert "Traceback" not in error.getvalue()
    raise RefusedError(said[0])


USES: dict[str, Callable[[Path], str]] = {
    use.__name__: use for use in (video, picture, captions, actions, world, folder, score)
}


def ending(use: str, path: Path) -> dict[str, str | int]:
    before = time.process_time()
    try:
        end, text = "result", USES[use](path)
    except (ValueError, OSError) as error:
        text = str(error)
        plain = not any(unicodedata.category(each) == "Cc" for each in text)
        # Twice the name of a file or folder, and what is said of it.
        end = "sentence" if plain and 0 < len(text) < 400 + 2 * len(str(path)) else "other"
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            end, text = "other", repr(error)
    except (Exception, MemoryError) as error:
        end, text = "other", repr(error)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"end": end, "text": text, "mib": most, "seconds": round(time.process_time() - before)}


def main() -> None:
    torch.set_num_threads(1)
    # Answers go where nothing else is printed.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(ending(asked["use"], Path(asked["path"]))), file=answers, flush=True)


if __name__ == "__main__":
    main()
