"""Messages are checked to the last field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from starflow.play.protocol import FIELDS, MessageError, pack, read_message, unpack

GOOD: list[dict[str, Any]] = [
    {"type": "act", "action": 2, "key": 7},
    {"type": "play", "on": True},
    {"type": "step"},
    {"type": "seek", "frame": 0},
    {"type": "pace", "fps": 59.94},
    {"type": "temperature", "value": 0},
    {"type": "new", "seed": 2**31 - 1},
    {"type": "teleport"},
    {"type": "follow"},
    {"type": "prompt", "text": "a three, then „eight“"},
    {"type": "surprise", "on": False},
    {"type": "record", "on": False},
    {"type": "seen", "number": 3},
]


def test_every_message_is_read() -> None:
    assert {message["type"] for message in GOOD} == set(FIELDS)
    for message in GOOD:
        assert read_message(json.dumps(message)) == message


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "message is '', expected JSON"),
        ("{", "expected JSON"),
        ("[" * 4000, "expected JSON"),
        ("9" * 4000, "expected JSON object with a type|expected a JSON object with a type"),
        ("[]", r"message is \[\], expected a JSON object with a type"),
        ("null", "message is None, expected a JSON object"),
        ("{}", "type is None, expected one of act, play, step"),
        ('{"type": ["act"]}', r"type is \['act'\], expected one of"),
        ('{"type": "open", "path": "/etc/passwd"}', "type is 'open', expected one of act"),
        ('{"type": "act", "action": 1}', "message act: key is missing, expected an integer from 0"),
        ('{"type": "act", "action": 1.5, "key": 1}', "message act: action is 1.5, expected an integer from 0 to 255"),
        ('{"type": "act", "action": true, "key": 1}', "action is True, expected an integer"),
        ('{"type": "act", "action": -1, "key": 1}', "action is -1"),
        ('{"type": "act", "action": "up", "key": 1}', "action is 'up'"),
        ('{"type": "act", "action": 1, "key": 1, "more": 2}', "has more, expected no fields but type, action, key"),
        ('{"type": "step", "frame": 1}', "message step has frame, expected no fields but type$"),
        ('{"type": "play", "on": 1}', "on is 1, expected true or false"),
        ('{"type": "pace", "fps": 0}', "fps is 0, expected a number from 1 to 240"),
        ('{"type": "pace", "fps": NaN}', "fps is nan, expected a number"),
        ('{"type": "pace", "fps": 1e999}', "fps is inf, expected a number"),
        ('{"type": "temperature", "value": null}', "value is None, expected a number from 0 to 2"),
        ('{"type": "new", "seed": 2147483648}', "seed is 2147483648, expected an integer from 0 to 2147483647"),
        ('{"type": "seek", "frame": 9007199254740992}', "expected an integer from 0 to 9007199254740991"),
        (json.dumps({"type": "prompt", "text": "a" * 501}), "expected a text of at most 500 characters"),
        ('{"type": "prompt", "text": ["a"]}', r"text is \['a'\], expected a text"),
    ],
)
def test_bad_messages_are_told_in_one_short_sentence(text: str, told: str) -> None:
    with pytest.raises(MessageError, match=told) as caught:
        read_message(text)
    assert str(caught.value).startswith("play: ")
    assert len(str(caught.value)) < 300


def test_binary_messages_come_back() -> None:
    header = {"type": "picture", "bits": [{"dream": math.nan, "real": 1.5}], "seconds": math.inf, "key": 0}
    parts = {"dream": bytes(range(9)), "real": b"", "map": b"\xff" * 5}
    told, found = unpack(pack(header, parts))
    assert found == parts
    assert told["bits"] == [{"dream": None, "real": 1.5}]
    assert told["seconds"] is None
    assert told["key"] == 0
