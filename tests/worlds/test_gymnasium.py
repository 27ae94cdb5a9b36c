"""Environments of gymnasium: pictures of one size, names of actions, and errors that name the world."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow.worlds import WorldError, open_world, record

gymnasium = pytest.importorskip("gymnasium")


class Lamp(gymnasium.Env):  # type: ignore[misc]
    """As bright as it has been switched on; ends after nine steps, or fails."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    observation_space = gymnasium.spaces.Discrete(1)

    def __init__(self, render_mode: str | None = None, space: Any = None, fails: bool = False) -> None:
        self.render_mode, self.fails = render_mode, fails
        self.action_space = gymnasium.spaces.Discrete(2, start=5) if space is None else space
        self.level = self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.level = self.steps = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert action in (5, 6)
        self.steps += 1
        if self.fails and self.steps == 4:
            raise RuntimeError("the lamp\nbroke")
        self.level += 20 * (action == 6)
        return 0, float(action == 6), False, self.steps == 9, {}

    def render(self) -> np.ndarray:
        return np.full((30, 40, 3), self.level, np.uint8)


@pytest.fixture(autouse=True)
def lamps() -> Any:
    for name, options in (("Lamp", {}), ("Broken", {"fails": True}), ("Dimmer", {"space": gymnasium.spaces.Box(0, 1)})):
        gymnasium.register(f"starflow/{name}-v0", Lamp, kwargs=options, disable_env_checker=True)
    yield
    for name in ("Lamp", "Broken", "Dimmer"):
        gymnasium.registry.pop(f"starflow/{name}-v0")


def test_an_environment_is_seen_as_pictures() -> None:
    world = open_world("starflow/Lamp-v0", size=(10, 20))
    assert world.actions == ("0", "1")
    assert world.fps == 12
    assert world.reset(3).shape == (10, 20, 3)
    steps = [world.step(1) for _ in range(9)]
    assert [int(step.frame[0, 0, 0]) for step in steps[:3]] == [20, 40, 60]
    assert [step.done for step in steps] == [False] * 8 + [True]
    assert steps[0].reward == 1.0
    assert world.suggest(0.5) is None
    assert open_world("starflow/Lamp-v0", channels=1).reset().shape == (64, 64, 1)
    with pytest.raises(ValueError, match=r"world starflow/Lamp-v0: action is 2, expected an integer from 0 to 1"):
        world.step(2)


def test_recording_an_environment(tmp_path: Path) -> None:
    made = record(open_world("starflow/Lamp-v0"), tmp_path, 25)
    assert (made.frames, made.clips, made.episodes) == (25, 3, 2)
    with pytest.raises(WorldError, match="world starflow/Broken-v0 failed at frame 4: the lamp broke"):
        record(open_world("starflow/Broken-v0"), tmp_path / "broken", 25)
    assert len((tmp_path / "broken" / "clip-000000.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        WorldError, match=r"world NoSuchWorld-v0 cannot be made: .*; expected a name that gymnasium knows"
    ):
        open_world("NoSuchWorld-v0")
    with pytest.raises(WorldError, match=r"world starflow/Dimmer-v0 has the actions Box.*, expected Discrete ones"):
        open_world("starflow/Dimmer-v0")
    with pytest.raises(ValueError, match="GymnasiumWorld: height is 0, expected at least 1"):
        open_world("starflow/Lamp-v0", size=(0, 3))
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"the world Pong-v5 needs the package gymnasium: pip install .*\[worlds\]"):
        open_world("Pong-v5")


@pytest.mark.parametrize(("game", "actions"), [("Pong", 6), ("Breakout", 4)])
def test_atari(game: str, actions: int) -> None:
    pytest.importorskip("ale_py")
    world = open_world(f"ALE/{game}-v5", size=(64, 64), channels=1)
    assert len(world.actions) == actions
    assert world.actions[0] == "noop"
    frames = [world.reset(1), *(world.step(action % actions).frame for action in range(40))]
    assert all(frame.shape == (64, 64, 1) for frame in frames)
    assert any((frame != frames[0]).any() for frame in frames)
    world.close()
