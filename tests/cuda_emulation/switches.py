"""All mutations of a source in one compiled library, where a global says which one is on.

A mutation is a pattern and what stands there instead, where ``{0}`` is what matched and the first ``on`` the condition
that this place is the one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from .emulator import CSRC, Kernels, Mutation, emulated

STATEMENT = "if (!on) {0}"
BOUND = "(on || ({0}))"
NOT = "(!on && {0})"

_HEAD = (
    'extern "C" __attribute__((visibility("default"))) int planted;\n'
    "int planted = -1;\nstatic inline bool planted_is(int place) { return planted == place; }\n"
)


class Switches:
    """A source with all its mutations, and what they are.

    Args:
        source: path in csrc/.
        changes: by file, patterns and what they become, in turn: what is inside of another comes first. The source
            itself, and headers that it includes.
        edits: further patterns for all of the text, such as what leaves instantiations out.
    """

    def __init__(self, source: str, changes: Mapping[str, Mapping[str, str]], edits: Mapping[str, str]) -> None:
        self.source = source
        self.places: list[str] = []
        self._changes = changes
        self._inlined: set[str] = set()
        text = _HEAD + self._planted(source)
        for pattern, new in edits.items():
            text, count = re.subn(pattern, new, text)
            assert count, f"{pattern} matches nothing in {source}"
        self._mutation = Mutation(source, 0, len((CSRC / source).read_text()), text)

    def kernels(self, place: int | None, flags: tuple[str, ...] = (), *, sanitized: bool = False) -> Kernels:
        """The library with one mutation on, or none."""
        kernels = emulated(self.source, self._mutation, flags, sanitized=sanitized)
        kernels.set_int("planted", -1 if place is None else place)
        return kernels

    def _planted(self, file: str) -> str:
        self._inlined.add(file)
        text = (CSRC / file).read_text()
        for pattern, new in self._changes[file].items():
            assert re.search(pattern, text), f"{pattern} matches nothing in {file}"
            text = re.sub(pattern, partial(self._plant, Path(file).name, new), text)
        for header in self._changes:
            include = f'#include "{header}"'
            if include in text and header not in self._inlined:
                text = text.replace(include, self._planted(header).replace("#pragma once", ""))
        return text

    def _plant(self, name: str, new: str, match: re.Match[str]) -> str:
        line = match.string.count("\n", 0, match.start()) + 1
        condition = f"planted_is({len(self.places)})"
        # What an earlier pattern has changed, as it was.
        original = re.sub(r"\(planted_is\(\d+\) \? [^?]*? : ([^?]*?)\)(?=[,);])", r"\1", match[0])
        self.places.append(f"{name}:{line}:{original}")
        return new.replace("on", condition, 1).replace("{0}", match[0])
