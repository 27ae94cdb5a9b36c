"""Recordings: what is written is what was seen, it trains, and whatever ends a recording keeps its frames."""

from __future__ import annotations

import errno
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starflow.data import VideoFolder, read_actions, read_world, to_frames
from starflow.files import InUseError, sole
from starflow.worlds import PaddleBall, PlayableWorld, Step, WorldError, open_world, record


class Counting:
    """A world whose frame tells its number; its third action ends an episode, and it may fail."""

    name, fps, actions = "counting", 10.0, ("on", "off", "end")

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.number, self.fails_at, self.error = 0, fails_at, error or WorldError("world counting failed")
        self.seeds: list[int | None] = []

    def _frame(self) -> np.ndarray:
        self.number += 1
        if self.number == self.fails_at:
            raise self.error
        return np.full((8, 8, 3), self.number % 256, np.uint8)

    def reset(self, seed: int | None = None) -> np.ndarray:
        self.seeds.append(seed)
        return self._frame()

    def step(self, action: int) -> Step:
        return Step(self._frame(), float(action), action == 2)

    def suggest(self, aim: float) -> None:
        return None

    def close(self) -> None:
        pass


def clips_of(folder: Path, frames: int = 1, **options: Any) -> VideoFolder:
    return VideoFolder(folder, frames=frames, height=8, width=8, frame_dim=3, **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_what_was_seen(tmp_path: Path) -> None:
    made = record(PaddleBall(), tmp_path, 50, seed=4, clip_frames=30)
    assert (made.clips, made.frames, made.episodes) == (2, 50, 0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "clip-000000.jsonl", "clip-000000.mp4", "clip-000001.jsonl", "clip-000001.mp4", "world.json",
    ]  # fmt: skip
    assert read_world(tmp_path).actions == ("stay", "up", "down")  # type: ignore[union-attr]
    # The same actions in the same game give the same frames, to the last bit.
    world, rewards = PaddleBall(), 0.0
    frame = world.reset(4)
    for name, frames in (("clip-000000", 30), ("clip-000001", 20)):
        folder = VideoFolder(tmp_path, frames=frames, height=24, width=24, channels=1, frame_dim=3, cut="even")
        clips = {clip.name.split("@")[0]: clip for clip in (folder.item(index) for index in range(len(folder)))}
        seen, lines = to_frames(clips[f"{name}.mp4"].pixels).numpy(), lines_of(tmp_path / f"{name}.jsonl")
        assert [line["frame"] for line in lines] == list(range(frames))
        for line, shown in zip(lines, seen[:frames], strict=True):
            if line["action"] is not None:
                step = world.step(line["action"])
                frame, rewards = step.frame, rewards + step.reward
                assert line["reward"] == step.reward
            assert (frame == shown).all()
    assert lines_of(tmp_path / "clip-000000.jsonl")[0]["action"] is None
    assert rewards == made.reward


def test_a_recording_that_is_made_again_is_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record(PaddleBall(), tmp_path / name, 40, seed=4)
    one, other = (tmp_path / name / "clip-000000.jsonl" for name in ("a", "b"))
    assert one.read_text() == other.read_text()


def test_clips_are_added_to_those_of_the_same_world(tmp_path: Path) -> None:
    world = PaddleBall()
    world.actions = list(world.actions)  # type: ignore[assignment]
    record(PaddleBall(), tmp_path, 20)
    record(world, tmp_path, 20)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["clip-000000.mp4", "clip-000001.mp4"]
    first, second = (tmp_path / f"clip-00000{n}.jsonl" for n in (0, 1))
    assert first.read_text() != second.read_text()
    with pytest.raises(ValueError, match=r"holds the world paddle with the actions stay, up, down, expected counting"):
        record(Counting(), tmp_path, 5)


def test_episodes_are_clips(tmp_path: Path) -> None:
    world = Counting()
    made = record(world, tmp_path, 200, policy="random")
    assert made.episodes >= 2
    assert world.seeds[0] == 0
    assert world.seeds[1:] == [None] * (len(world.seeds) - 1)
    count = 0
    for path in sorted(tmp_path.glob("*.jsonl")):
        lines = lines_of(path)
        count += len(lines)
        assert lines[0]["action"] is None
        assert [line["done"] for line in lines[:-1]] == [False] * (len(lines) - 1)
    assert count == 200


@pytest.mark.parametrize("error", [WorldError("world counting failed"), KeyboardInterrupt()])
def test_a_world_that_fails_keeps_the_frames_so_far(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        record(Counting(fails_at=31, error=error), tmp_path, 200)
    total = sum(len(lines_of(path)) for path in tmp_path.glob("*.jsonl"))
    assert total == 30
    assert len(clips_of(tmp_path)) == len(list(tmp_path.glob("*.mp4")))


@pytest.mark.parametrize("name", ["frames", "clip_frames"])
def test_numbers_out_of_range_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"record: {name} is 0, expected an integer of at least 1"):
        record(PaddleBall(), tmp_path, **{"frames": 5, name: 0})


def test_the_first_frame_of_a_clip_has_no_action(tmp_path: Path) -> None:
    record(PaddleBall(), tmp_path, 40, seed=1)
    told = read_actions(tmp_path / "clip-000000.jsonl", 3)
    folder = VideoFolder(tmp_path, frames=8, height=24, width=24, channels=1, frame_dim=3)
    for epoch in range(5):
        clip = folder.item(0, epoch=epoch)
        start = int(clip.name.split("@")[1])
        assert clip.frame_conditions is not None
        assert clip.frame_conditions[0].isnan().all()
        assert torch.equal(clip.frame_conditions[1:], told[start + 1 : start + 8])


def test_a_folder_that_was_recorded_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Vectors in place of numbers, no world.json, and a model that reads none."""
    record(PaddleBall(), tmp_path, 12)
    (tmp_path / "world.json").unlink()
    vectors = [None, *([0.5 * frame, -1, 0] for frame in range(1, 12))]
    path = tmp_path / "clip-000000.jsonl"
    path.write_text("\n".join(json.dumps({"action": vector}) for vector in vectors))
    clip = VideoFolder(tmp_path, frames=12, height=24, width=24, channels=1, frame_dim=3).item(0)
    assert clip.frame_conditions is not None
    assert clip.frame_conditions[3].tolist() == [1.5, -1.0, 0.0]
    assert not caplog.messages
    plain = VideoFolder(tmp_path, frames=12, height=24, width=24, channels=1).item(0)
    assert plain.frame_conditions is None
    assert "skipped: the actions of 1 videos" in caplog.text


def test_lines_and_frames_that_disagree_are_refused(tmp_path: Path) -> None:
    record(PaddleBall(), tmp_path, 12)
    path = tmp_path / "clip-000000.jsonl"
    lines = path.read_text().splitlines()
    options: dict[str, Any] = {"frames": 4, "height": 24, "width": 24, "channels": 1}
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"clip-000000\.jsonl has 11 lines, expected 12 like the frames of the video"):
        VideoFolder(tmp_path, frame_dim=3, **options)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line \d+ has the action [12], expected an integer from 0 to 0"):
        VideoFolder(tmp_path, frame_dim=1, **options)
    with pytest.raises(ValueError, match=r"clip-000000\.mp4 has actions and 30 frames a second, expected fps None"):
        VideoFolder(tmp_path, frame_dim=3, fps=10, **options)
    path.unlink()
    with pytest.raises(ValueError, match=r"clip-000000\.jsonl does not exist, expected a line of JSON for each frame"):
        VideoFolder(tmp_path, frame_dim=3, **options)


def test_worlds_by_name() -> None:
    world: PlayableWorld = open_world("paddle", size=(48, 48))
    assert world.reset(0).shape == (48, 48, 3)
    with pytest.raises(ValueError, match="world paddle: size is 24x48, expected a square"):
        open_world("paddle", size=(24, 48))
    assert open_world("paddle", channels=1).reset(0).shape == (64, 64, 1)
    with pytest.raises(ValueError, match=r"PaddleBall: channels is 2, expected 1 \(grey\) or 3 \(RGB\)"):
        open_world("paddle", channels=2)
    with pytest.raises(WorldError, match="world '' is unknown, expected 'paddle' or the name of a gymnasium"):
        open_world("")


def test_two_recordings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with sole(tmp_path), pytest.raises(InUseError, match="is in use by another run, expected one that no running"):
        record(PaddleBall(), tmp_path, 3)
    assert not list(tmp_path.iterdir())
    assert record(PaddleBall(), tmp_path, 3).clips == 1


def test_actions_without_a_video_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(PaddleBall(), tmp_path, 12)
    (tmp_path / "metadata.jsonl").write_text("{}")
    clips = VideoFolder(tmp_path, frames=4, height=24, width=24, channels=1, frame_dim=3)
    assert len(clips) == 1
    assert caplog.messages == [f"skipped: {tmp_path / 'metadata.jsonl'}: actions without a video of this name"]


def test_actions_that_change_make_another_folder(tmp_path: Path) -> None:
    def listing() -> list[str]:
        return VideoFolder(tmp_path, frames=4, height=24, width=24, channels=1, frame_dim=3).listing()

    record(PaddleBall(), tmp_path, 12)
    before, path = listing(), tmp_path / "clip-000000.jsonl"
    assert listing() == before
    path.write_text(path.read_text().replace('"reward": 0.0', '"reward": 0.5'))
    assert listing() == before
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[5]["action"] = (lines[5]["action"] + 1) % 3
    path.write_text("\n".join(map(json.dumps, lines)))
    assert listing() != before


def test_a_full_disk_leaves_no_actions_without_their_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record(PaddleBall(), tmp_path, 3)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(importlib.import_module("starflow.worlds.record"), "write_video", full)
    with pytest.raises(OSError, match="No space left"):
        record(PaddleBall(), tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == before


def test_byte_order_marks_are_no_part_of_lines(tmp_path: Path) -> None:
    record(PaddleBall(), tmp_path, 3)
    told, known = read_actions(tmp_path / "clip-000000.jsonl", 3), read_world(tmp_path)
    for name in ("clip-000000.jsonl", "world.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text(), encoding="utf-8-sig")
    again = read_actions(tmp_path / "clip-000000.jsonl", 3)
    assert torch.equal(again[1:], told[1:])
    assert again[0].isnan().all()
    assert read_world(tmp_path) == known


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (PaddleBall(32), {}, "shows 32x32 in grey at 30 frames a second, expected 24x24 in grey at 30 frames a second"),
        (PaddleBall(24, channels=3), {}, "shows 24x24 in colour at 30 frames a second, expected 24x24 in grey"),
        (PaddleBall(24), {"fps": 5.0}, "shows 24x24 in grey at 5 frames a second, expected 24x24 in grey at 30"),
    ],
)
def test_clips_of_another_look_are_not_added(tmp_path: Path, other: PaddleBall, options: dict, message: str) -> None:
    record(PaddleBall(24), tmp_path, 6)
    with pytest.raises(ValueError, match=message):
        record(other, tmp_path, 6, **options)
    assert record(PaddleBall(24), tmp_path, 6, seed=1).clips == 1
    assert [path.name for path in sorted(tmp_path.glob("*.mp4"))] == ["clip-000000.mp4", "clip-000001.mp4"]


@pytest.mark.parametrize(
    "options", [{"frames": 2.5}, {"frames": True}, {"clip_frames": 1.5}, {"seed": -1}, {"seed": 1.5}, {"fps": True}]
)
def test_numbers_of_frames_are_integers(tmp_path: Path, options: dict[str, Any]) -> None:
    # 2.5 frames are never reached, so that nothing ended the recording.
    with pytest.raises(ValueError, match=r"^record: \w+ is "):
        record(PaddleBall(), tmp_path / "out", **{"frames": 5, **options})
    assert not (tmp_path / "out").exists()


def test_a_rate_of_the_world_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    world = Counting()
    world.fps = 0.0
    with pytest.raises(ValueError, match=r"^record: fps is 0\.0, expected"):
        record(world, tmp_path / "out", 5)


def test_a_world_that_changes_its_size_is_told(tmp_path: Path) -> None:
    world = Counting()
    world._frame = lambda: np.zeros((16, 16 + 2 * (world.number > 2), 3), np.uint8)  # type: ignore[method-assign]
    steps = world.step

    def step(action: int) -> Step:
        world.number += 1
        return steps(action)

    world.step = step  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^record: the world shows a frame of .16, 18, 3. after one"):
        record(world, tmp_path, 40)


class _Plain(Counting):
    """A world whose steps and actions are what a test says."""

    def __init__(self, answer: Any = None, actions: Any = ("wait", "go")) -> None:
        super().__init__()
        self._answer, self._names = answer, actions

    @property
    def actions(self) -> Any:
        return self._names

    def step(self, action: int) -> Any:
        return super().step(action) if self._answer is None else self._answer


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (
            object(),
            r"world is <object .*>, which has no name, fps, actions, reset, step, suggest, close, expected a star",
        ),
        (_Plain(actions=()), r"world.actions is \(\), expected at least one name, each once"),
        (_Plain(actions=("go", "go")), r"world.actions is \('go', 'go'\), expected at least one name, each once"),
        (_Plain(actions=("go", 1)), r"world.actions\[1\] is 1, expected a text"),
        (
            _Plain((np.zeros((2, 2, 1), np.uint8), 0.0, False)),
            r"step of the world returned \(array.*, expected a starfl",
        ),
        (
            _Plain(Step(np.zeros((8, 8, 3), np.uint8), 0.0, "no")),
            r"done of a step of the world is 'no', expected True or",
        ),  # type: ignore[arg-type]
        (
            _Plain(Step(np.zeros((8, 8, 4), np.uint8))),
            r"shows uint8 of shape \[8, 8, 4\], expected .*\(height, width, 1 or",
        ),
        (_Plain(Step(np.zeros((8, 8, 1), np.uint8), float("nan"))), "gives the reward nan, expected a finite number"),
        (_Plain(Step(np.zeros((8, 8, 1)))), r"shows float64 of shape \[8, 8, 1\], expected an array of uint8 \(height"),
        (_Plain(Step([[0]])), r"shows \[\[0\]\], expected an array of uint8 \(height"),  # type: ignore[arg-type]
    ],
)
def test_what_a_world_of_the_callers_own_does_wrong_is_told_at_once(tmp_path: Path, world: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^record: (the world )?{message}"):
        record(world, tmp_path / "out", 8)


@pytest.mark.parametrize("suggested", [3, -1, 0.5, "up"])
def test_a_suggestion_that_is_no_action_is_told(tmp_path: Path, suggested: Any) -> None:
    world = Counting()
    world.suggest = lambda aim: suggested  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"^world counting: action is {suggested!r}, expected an integer from 0 to 2$"):
        record(world, tmp_path, 400)


def test_what_a_world_is_called_is_a_text(tmp_path: Path) -> None:
    world = Counting()
    world.name = 3  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^record: world.name is 3, expected a text"):
        record(world, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_a_suggestion_may_be_a_number_of_numpy(tmp_path: Path) -> None:
    world = Counting()
    world.suggest = lambda aim: np.int64(1)  # type: ignore[method-assign]
    record(world, tmp_path, 200)
    actions = [line["action"] for path in tmp_path.glob("*.jsonl") for line in lines_of(path)]
    assert actions.count(1) > 60


def test_a_first_picture_that_is_none_is_told_beside_clips(tmp_path: Path) -> None:
    record(Counting(), tmp_path, 4)
    world = Counting()
    world.reset = lambda seed=None: np.zeros((8, 8), np.uint8)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"^record: the world shows uint8 of shape \[8, 8\], expected an array of uint8"
    ):
        record(world, tmp_path, 4)
