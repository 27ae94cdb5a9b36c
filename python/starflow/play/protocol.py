"""Messages between page and server, checked to the last field.

The page sends JSON objects, each with its `type` and exactly the fields that `FIELDS` names. The server answers with
JSON objects too, and sends pictures as binary messages: four bytes with the length of a JSON header (little endian),
the header, and the parts that it lists, one after the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starflow.messages import listed, shown

# Longest message that a page sends, in bytes.
MOST_BYTES = 4096


class MessageError(ValueError):
    """A message that is not one of the protocol."""


@dataclass(frozen=True)
class _Number:
    """A number between two bounds; whole ones where `whole` is set."""

    least: float
    most: float
    whole: bool = True

    def __str__(self) -> str:
        return f"{'an integer' if self.whole else 'a number'} from {self.least:g} to {self.most:.16g}"

    def fits(self, value: object) -> bool:
        kinds = int if self.whole else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and self.least <= value <= self.most


@dataclass(frozen=True)
class _Flag:
    """True or false."""

    def __str__(self) -> str:
        return "true or false"

    def fits(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class _Text:
    """A text of bounded length."""

    most: int

    def __str__(self) -> str:
        return f"a text of at most {self.most} characters"

    def fits(self, value: object) -> bool:
        return isinstance(value, str) and len(value) <= self.most


_COUNT = _Number(0, 2**53 - 1)

# Type -> its fields. What each does is said at the method of the same name of `starflow.play.server`.
FIELDS: Mapping[str, Mapping[str, _Number | _Flag | _Text]] = {
    # The key number comes back with the first frame that knows of the action.
    "act": {"action": _Number(0, 255), "key": _COUNT},
    "play": {"on": _Flag()},
    "step": {},
    "seek": {"frame": _COUNT},
    "pace": {"fps": _Number(1, 240, whole=False)},
    "temperature": {"value": _Number(0, 2, whole=False)},
    "new": {"seed": _Number(0, 2**31 - 1)},
    "teleport": {},
    "follow": {},
    "prompt": {"text": _Text(500)},
    "surprise": {"on": _Flag()},
    "record": {"on": _Flag()},
    # The page has received the picture of this number.
    "seen": {"number": _COUNT},
}


def read_message(text: str) -> dict[str, Any]:
    """A message of the page.

    Raises:
        MessageError: it is none; the sentence says what was given and what was expected.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError(f"play: message is {shown(text, 80)}, expected JSON") from None
    if not isinstance(message, dict):
        raise MessageError(f"play: message is {shown(message, 80)}, expected a JSON object with a type")
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise MessageError(f"play: type is {shown(kind, 80)}, expected one of {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    if others := sorted(message.keys() - fields.keys() - {"type"}):
        expected = ", ".join(("type", *fields))
        raise MessageError(f"play: message {kind} has {listed(others)}, expected no fields but {expected}")
    for name, expected_value in fields.items():
        value = message.get(name)
        if not expected_value.fits(value):
            given = f"{name} is {shown(value, 80)}" if name in message else f"{name} is missing"
            raise MessageError(f"play: message {kind}: {given}, expected {expected_value}")
    return message


def pack(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> bytes:
    """A binary message.

    Args:
        header: what the page reads first; `parts`, with the name and length of each, is added.
        parts: bytes by name.
    """
    told = {**header, "parts": {name: len(part) for name, part in parts.items()}}
    first = json.dumps(_finite(told), separators=(",", ":")).encode()
    return b"".join((struct.pack("<I", len(first)), first, *parts.values()))


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header and the parts of a binary message."""
    (length,) = struct.unpack_from("<I", message)
    header = json.loads(message[4 : 4 + length])
    parts, place = {}, 4 + length
    for name, size in header["parts"].items():
        parts[name], place = message[place : place + size], place + size
    return header, parts


def _finite(value: Any) -> Any:
    """A value in which null stands for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
