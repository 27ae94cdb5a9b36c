"""The kernels in a library or an object, read from its machine code.

A kernel is named by its source and its template arguments: "norm forward_kernel<float, 4>".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..tools import run_tool


@dataclass(frozen=True)
class Kernel:
    """One kernel in the code of one architecture."""

    architecture: str
    name: str
    registers: int
    stack: int
    order: tuple[str, ...]  # opcodes with their modifiers, as they stand; of a wait for wgmma, how many may be left too

    @cached_property
    def instructions(self) -> Counter[str]:
        return Counter(self.order)

    def __str__(self) -> str:
        return f"{self.name} of {self.architecture}"

    def count(self, *opcodes: str) -> int:
        """Instructions of an opcode, whatever its modifiers; with "LDG.128", those that have these modifiers too."""
        return sum(
            number for name, number in self.instructions.items() if any(_matches(name, opcode) for opcode in opcodes)
        )

    def events(self, letters: Mapping[str, str]) -> str:
        """A letter for each instruction of some opcodes (as of ``count``), in the order of the code."""
        found = {name: [c for opcode, c in letters.items() if _matches(name, opcode)] for name in self.instructions}
        return "".join(found[name][0] for name in self.order if found[name])

    @property
    def in_local_memory(self) -> bool:
        """Whether registers are spilled or a thread has memory of its own."""
        return self.stack > 0 or self.count("LDL", "STL") > 0

    @property
    def multiplies(self) -> bool:
        """Whether it is one of linear or attention, whose products belong on tensor cores."""
        return (
            re.match(r"linear(_sm\d+)? multiply<|block_attention\w* (forward_kernel|grad_\w+)<", self.name) is not None
        )

    @property
    def tensor_core_instructions(self) -> int:
        """Those of mma.sync, of wgmma and of tcgen05."""
        return self.count("HMMA", "HGMMA", "UTCHMMA")


def _matches(instruction: str, opcode: str) -> bool:
    parts = instruction.split(".")
    first, *modifiers = opcode.split(".")
    return parts[0] == first and set(modifiers) <= set(parts[1:])


def _source(mangled: str) -> str:
    """The source that an anonymous namespace of nvcc's is named after."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", mangled)
    return found[1] if found else "shared"


def _short(demangled: str) -> str:
    """The name and its template arguments, without namespaces and parameters."""
    name = re.sub(r"starflow::|cuda::|cute::|cutlass::|\(anonymous namespace\)::|\(bool\)|^void ", "", demangled)
    name = name.replace("> >", ">>")
    depth = 0
    for place, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:place]
    return name


def _names(mangled: Iterable[str]) -> dict[str, str]:
    symbols = list(mangled)
    return {s: f"{_source(s)} {_short(name)}" for s, name in zip(symbols, run_tool("c++filt", *symbols), strict=True)}


def _sections(lines: Iterable[str], head: str) -> Iterator[tuple[str, str, list[str]]]:
    """Architecture, mangled name and lines of each function."""
    architecture, name, found = "", "", []
    for line in lines:
        if match := re.match(r"arch = (\w+)", line):
            if name:
                yield architecture, name, found
            architecture, name = match[1], ""
        elif match := re.match(head, line):
            if name:
                yield architecture, name, found
            name, found = match[1], []
        elif name:
            found.append(line)
    if name:
        yield architecture, name, found


def read(path: Path) -> list[Kernel]:
    """The kernels of a library or an object."""
    usage = {}
    for architecture, name, lines in _sections(run_tool("cuobjdump", "-res-usage", path), r"\s*Function (\S+):"):
        usage[architecture, name] = [int(re.search(rf"{key}:(\d+)", lines[0])[1]) for key in ("REG", "STACK")]
    code = list(_sections(run_tool("cuobjdump", "-sass", path), r"\s*Function : (\S+)"))
    names = _names({name for _, name, _ in code})
    kernels = []
    for architecture, name, lines in code:
        found = (
            re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(?: gsb0, 0x([0-9a-f]))?", line)
            for line in lines
        )
        order = tuple(".".join(filter(None, match.groups())) for match in found if match)
        kernels.append(Kernel(architecture, names[name], *usage[architecture, name], order))
    return kernels
