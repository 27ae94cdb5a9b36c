"""What a message echoes of what a user gave: short, on one line, and without characters that steer a terminal."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Characters of what is echoed: a name of a megabyte or a state dict of thousands of names would bury the sentence.
MOST = 200


class _Bounded(reprlib.Repr):
    """A `repr` whose length and time do not depend on what it is of: lists may hold each other a billion times."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 32
        self.maxstring = self.maxother = self.maxlong = MOST

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write an integer of more than 4300 digits.
        return repr(value) if value.bit_length() < 1024 else f"an integer of {value.bit_length()} bits"


def shown(value: object, most: int = MOST) -> str:
    """The `repr` of a value, of at most `most` characters; where it is longer its middle is left out."""
    return short(_Bounded().repr(value), most)


def short(text: object, most: int = MOST) -> str:
    """A text on one line, of at most `most` characters, with unprintable ones written as escapes."""
    line = str(text)
    if len(line) > 8 * most:
        line = line[: 4 * most] + " ... " + line[-most:]
    line = " ".join("".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in line).split())
    if len(line) <= most:
        return line
    head = (most - 5) * 2 // 3
    return f"{line[:head]} ... {line[head + 5 - most :]}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names with commas between them: the first `most`, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(short(name, 120) for name in found[:most]) + more


class _Once(logging.Filter):
    """Lets a line of the log through that it has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.levelno, record.getMessage()
        known = line in self._seen
        self._seen.add(line)
        return not known


# The loggers of what a clip is made by.
_OF_SAMPLES = ("starflow.codecs.codec", "starflow.sampling.pipeline", "starflow.text.pretrained")


@contextmanager
def told_once() -> Iterator[None]:
    """Within it a line of the log on how clips are made appears once: each of several calls has the same to tell."""
    once = _Once()
    loggers = [logging.getLogger(name) for name in _OF_SAMPLES]
    for logger in loggers:
        logger.addFilter(once)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(once)
