"""Actions beside videos: a line of JSON for each frame, and what is known of the world that they were recorded in.

`NAME.jsonl` beside `NAME.mp4` has as many lines as the video has frames. Line t tells what led to frame t: `action` is
an integer from 0, or a list of numbers (a vector, such as a steering angle and a speed), or null where nothing is known
of it, as of the first frame. Other entries of a line are left alone, but for `frame`, the number of the line from 0.
`world.json` in the folder names the world and its actions; a folder whose model is told both needs none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import torch

from starflow.data.shards import Place, size_of
from starflow.messages import shown
from starflow.numeric import integer, number

ACTION_SUFFIX = ".jsonl"
WORLD_FILE = "world.json"

# A line has a few numbers; far more is no such file.
_MAX_LINE = 1 << 16
_MAX_BYTES = 1 << 30
_LARGEST = torch.finfo(torch.float32).max

Action = int | Sequence[float] | None


@dataclass(frozen=True)
class RecordedWorld:
    """What `world.json` tells of a folder.

    Args:
        world: name that `starflow.worlds.open_world` knows, or any other.
        actions: names of the actions, of which a line of JSON has the number; empty for vectors.
    """

    world: str
    actions: tuple[str, ...]

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_world(folder: Path) -> RecordedWorld | None:
    """What is known of the world that a folder was recorded in; None without `world.json`.

    Raises:
        ValueError: the file cannot be read, or does not name a world and its actions.
    """
    path = folder / WORLD_FILE
    if not path.is_file():
        return None
    told = _json(_text(path), str(path))
    world, actions = (told.get(name) for name in ("world", "actions")) if isinstance(told, dict) else (None, None)
    named = isinstance(actions, list) and all(isinstance(name, str) for name in actions)
    if not isinstance(world, str) or not isinstance(actions, list) or not named:
        raise ValueError(f'actions: {path} is no description, expected {{"world": "NAME", "actions": ["NAME", ...]}}')
    return RecordedWorld(world, tuple(actions))


def check_actions(folder: Path, names: Sequence[str] | None) -> None:
    """Holds the actions of a folder to those that a model learned: the number of one would mean another.

    Args:
        folder: of videos or of lines; `world.json` is in it or, for a split, in the one above.
        names: of the model's actions; None or none where it does not know them.

    Raises:
        ValueError: `world.json` names other actions, or the same ones in another order.
    """
    for place in (folder, folder.absolute().parent):
        if (told := read_world(place)) is None:
            continue
        if told.actions and names and told.actions != tuple(names):
            raise ValueError(
                f"actions: {place / WORLD_FILE} names {', '.join(told.actions)}, expected {', '.join(names)} as the "
                "model learned them (data.actions)"
            )
        return


@overload
def actions_beside(path: Path) -> Path: ...
@overload
def actions_beside(path: Place) -> Place: ...
def actions_beside(path: Place) -> Place:
    """Where the actions of a video are, whether the file exists or not."""
    return path.with_suffix(ACTION_SUFFIX)


def read_actions(path: Place, frame_dim: int, frames: int | None = None) -> torch.Tensor:
    """The actions of a video as vectors of its frames.

    Args:
        path: of the lines.
        frame_dim: width of the vectors; an integer action becomes the vector with a one in its place (one-hot).
        frames: of the video; None takes any number.

    Returns:
        float32 (frames, frame_dim), NaN for a frame whose action is null.

    Raises:
        ValueError: no such file, a line that is none of these, an action out of range or of another width, or more or
            fewer lines than frames; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(
            f"actions: {path} does not exist, expected a line of JSON for each frame of the video (the model has "
            f"{frame_dim} numbers for each, flow.frame_dim)"
        )
    # Not `splitlines`, which also cuts at signs that a line of JSON may hold.
    lines = _text(path).removesuffix("\n").split("\n")
    if frames is not None and len(lines) != frames:
        raise ValueError(f"actions: {path} has {len(lines)} lines, expected {frames} like the frames of the video")
    told = torch.full((len(lines), frame_dim), torch.nan)
    for frame, line in enumerate(lines):
        where = f"{path}, line {frame + 1}"
        entry = _json(line, where)
        if not isinstance(entry, dict) or "action" not in entry:
            raise ValueError(f'actions: {where} has no action, expected such as {{"frame": {frame}, "action": 0}}')
        if entry.get("frame", frame) != frame:
            raise ValueError(f"actions: {where} is of frame {shown(entry['frame'])}, expected frame {frame}")
        told[frame] = action_vector(entry["action"], frame_dim, where)
    return told


def of_clip(vectors: torch.Tensor, start: int, frames: int) -> torch.Tensor:
    """The vectors of a clip that is cut from a video at frame `start`, (frames, frame_dim).

    The first frame has none, since what its action acted on is not in the clip.
    """
    told = vectors[start : start + frames].clone()
    told[0] = torch.nan
    return told


def action_vector(action: Any, frame_dim: int, where: str) -> torch.Tensor:
    """One action as a vector of a frame, float32 (frame_dim,).

    Args:
        action: an integer, a list of numbers, or None.
        frame_dim: width of the vector.
        where: what an error names.

    Raises:
        ValueError: an integer that is not from 0 to frame_dim - 1, a list of another width, or anything else.
    """
    if action is None:
        return torch.full((frame_dim,), torch.nan, dtype=torch.float32)
    chosen = integer(action)
    if chosen is not None and 0 <= chosen < frame_dim:
        told = torch.zeros(frame_dim, dtype=torch.float32)
        told[chosen] = 1.0
        return told
    if isinstance(action, list | tuple) and len(action) == frame_dim:
        vector = list(map(number, action))
        if all(value is not None and abs(value) <= _LARGEST for value in vector):
            return torch.tensor(vector, dtype=torch.float32)
    raise ValueError(
        f"actions: {where} has the action {shown(action)}, expected an integer from 0 to {frame_dim - 1}, "
        f"{frame_dim} finite numbers, or null"
    )


def action_line(frame: int, action: Action, reward: float, done: bool) -> str:
    """A line of JSON of a frame, as `read_actions` reads it."""
    return json.dumps({"frame": frame, "action": action, "reward": reward, "done": done})


def _text(path: Place) -> str:
    try:
        if (size := size_of(path)) > _MAX_BYTES:
            raise ValueError(f"actions: {path} has {size} bytes, expected at most 1 GiB")
        with path.open("rb") as file:
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"actions: {path} is no text in UTF-8 (byte {error.start}), expected lines of JSON") from None
    except OSError as error:
        raise ValueError(
            f"actions: {path} cannot be read ({error.strerror or error}), expected lines of JSON"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        if len(text) > _MAX_LINE:
            raise ValueError(f"{len(text)} characters")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"actions: {where} is not valid JSON ({str(error)[:100]}), expected an object") from None
