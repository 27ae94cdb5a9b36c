"""Ways in which a file is malformed. Each gives the bytes of a good file back with the fault, and its name."""

from __future__ import annotations

import random
from collections.abc import Iterator

# Sizes that headers ask for when a bit is wrong: the largest of 16, 31, 32 and 63 bits, and a plausible one.
_ABSURD = (b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x7f" + 7 * b"\xff", b"\x00\x98\x96\x80")


def truncated(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Cut after a share of the bytes, in the header first."""
    ends = [len(data) // 2, *sorted({1, 8, 30, 100, len(data) // 10, len(data) * 9 // 10, len(data) - 1})]
    for end in ends[:count]:
        yield f"truncated after {end}", data[:end]


def flipped(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """One wrong bit, half of them in the first kilobyte, where headers are."""
    draw = random.Random(len(data))
    for number in range(count):
        place = draw.randrange(min(len(data), 1024) if number % 2 else len(data))
        bit = draw.randrange(8)
        yield f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def oversized(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Absurd numbers in the place of bytes of the header, in both byte orders."""
    draw = random.Random(len(data) + 1)
    for number in range(count):
        value = _ABSURD[number % len(_ABSURD)]
        value = value[::-1] if number % 2 else value
        place = draw.randrange(max(1, min(len(data), 1024) - len(value)))
        yield f"bytes from {place} on are {value.hex()}", data[:place] + value + data[place + len(value) :]


def scrambled(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """A piece that is missing, doubled, zero or random."""
    draw = random.Random(len(data) + 2)
    for number in range(count):
        first = draw.randrange(len(data))
        last = min(len(data), first + draw.randrange(1, 200))
        piece = (b"", 2 * data[first:last], bytes(last - first), draw.randbytes(last - first))[number % 4]
        kind = ("missing", "doubled", "zero", "random")[number % 4]
        yield f"bytes {first} to {last} {kind}", data[:first] + piece + data[last:]
