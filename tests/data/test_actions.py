"""Lines of actions: what they may hold, and that an error names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from starflow.data import RecordedWorld, action_line, action_vector, read_actions, read_world


def test_numbers_vectors_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"action": null, "frame": 0}\n{"action": 2, "reward": 1.5}\n{"frame": 2, "action": [0.5, -1, 3], "more": {}}\n'
    )
    told = read_actions(path, 3, 3)
    assert told[0].isnan().all()
    assert torch.equal(told[1:], torch.tensor([[0.0, 0.0, 1.0], [0.5, -1.0, 3.0]]))
    path.write_text("\n".join(action_line(frame, frame % 2, 0.0, False) for frame in range(5)))
    assert read_actions(path, 2).argmax(1).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2 is not valid JSON"),
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("7", "line 2 has no action"),
        ('{"act": 1}', "line 2 has no action"),
        ('{"action": 3}', r"line 2 has the action 3, expected an integer from 0 to 2, 3 finite numbers, or null"),
        ('{"action": -1}', "line 2 has the action -1"),
        ('{"action": true}', "line 2 has the action True"),
        ('{"action": 1.0}', r"line 2 has the action 1\.0"),
        ('{"action": "up"}', "line 2 has the action 'up'"),
        ('{"action": [1, 2]}', r"line 2 has the action \[1, 2\]"),
        ('{"action": [1, 2, NaN]}', r"line 2 has the action \[1, 2, nan\]"),
        ('{"action": [1, 2, "x"]}', r"line 2 has the action \[1, 2, 'x'\]"),
        ('{"frame": 5, "action": 1}', "line 2 is of frame 5, expected frame 1"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"action": 0}}\n{line}\n{{"action": 0}}\n')
    with pytest.raises(ValueError, match=rf"actions: .*a\.jsonl, {message}"):
        read_actions(path, 3)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"a\.jsonl does not exist, expected a line of JSON for each frame"):
        read_actions(path, 3)
    path.write_bytes(b'{"action": 0}\n\xff\xfe')
    with pytest.raises(ValueError, match=r"a\.jsonl is no text in UTF-8 \(byte 14\)"):
        read_actions(path, 3)
    path.write_text('{"action": 0}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl has 1 lines, expected 2 like the frames of the video"):
        read_actions(path, 3, 2)


def test_what_is_known_of_a_world(tmp_path: Path) -> None:
    assert read_world(tmp_path) is None
    told = RecordedWorld("paddle", ("stay", "up"))
    (tmp_path / "world.json").write_text(told.to_json())
    assert read_world(tmp_path) == told
    for text in ("[]", '{"world": "paddle"}', '{"world": 3, "actions": []}', '{"world": "a", "actions": [1]}'):
        (tmp_path / "world.json").write_text(text)
        with pytest.raises(ValueError, match=r"world\.json is no description, expected"):
            read_world(tmp_path)
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(ValueError, match=r"world\.json is not valid JSON"):
        read_world(tmp_path)


def test_an_action_as_a_vector() -> None:
    assert action_vector(None, 2, "x").isnan().all()
    assert action_vector((1, 2.5), 2, "x").tolist() == [1.0, 2.5]
    with pytest.raises(ValueError, match="actions: x has the action 2, expected an integer from 0 to 1"):
        action_vector(2, 2, "x")
