"""What the machine code of every CUDA kernel in the built library must hold, and must not, for each architecture.

Nothing here runs a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from starflow_ext._load import native

from .machine_code import Kernel, read


@dataclass(frozen=True)
class Rule:
    """Bounds for the kernels whose names match, on the architectures that match.

    Attributes:
        kernels: regular expression for the whole name.
        architectures: regular expression for the whole architecture.
        registers: at most, of a thread.
        least: instructions that must be there, by opcode.
        most: and those of which there may be no more.
        wide: least share of 16-byte accesses among those to global memory.
    """

    kernels: str
    architectures: str = r"sm_\w+"
    registers: int = 255
    least: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    wide: float = 0.0

    def __str__(self) -> str:
        return f"{self.kernels} on {self.architectures}"


HALF = r"B?Float16"
RULES = (
    Rule(rf"affine_\w+ forward_kernel<(float, float, 4|{HALF}, {HALF}, 8)>", registers=64, wide=0.95),
    Rule(rf"affine_\w+ backward_kernel<(float, float, 4|{HALF}, {HALF}, 8)>", r"sm_(80|90a)", registers=96, wide=0.95),
    # ptxas takes one of 72 to pieces.
    Rule(rf"affine_\w+ backward_kernel<(float, float, 4|{HALF}, {HALF}, 8)>", r"sm_1\w+", registers=96, wide=0.94),
    # One store of four bytes a row, of the change.
    Rule(rf"jacobi_update update_kernel<(float, float, 4|{HALF}, {HALF}, 8)>", registers=96, wide=0.85),
    # The stream by 16 bytes; tokens and tables, of which there are few, one by one.
    Rule(r"jacobi_sweep gather_kernel<4>", registers=64, wide=0.15),
    Rule(r"jacobi_sweep add_kernel", registers=32, wide=1.0),
    Rule(r"jacobi_solve (guess|update|accept)_kernel", registers=64),
    # A row is held in registers: few beside it leave room for other warps, whose work covers the time of loads.
    Rule(rf"norm forward_kernel<(float, 4|{HALF}, 8)>", registers=64, wide=1.0),
    Rule(rf"norm backward_kernel<(float, 4|{HALF}, 8)>", r"sm_(80|90a)", registers=96, wide=1.0),
    # Two blocks of 256 threads a multiprocessor, as with 96.
    Rule(rf"norm backward_kernel<(float, 4|{HALF}, 8)>", r"sm_1\w+", registers=128, wide=1.0),
    # Half-split planes are two accesses of 8 bytes.
    Rule(rf"rope_append forward_kernel<(float, 2|{HALF}, 4)>", registers=64, wide=0.15),
    Rule(rf"rope_append backward_kernel<(float, 2|{HALF}, 4)>", registers=80, wide=0.2),
    Rule(r"block_attention forward_kernel<Forward<float, .*", least={"HMMA": 96, "LDGSTS": 4}),
    Rule(rf"block_attention forward_kernel<Forward<{HALF}, .*", least={"HMMA": 64, "LDSM": 32, "LDGSTS": 4}),
    # Two products of 128 keys, by wgmma of a depth of 16, in two places each; keys and values by TMA. Four waits: ptxas
    # puts one behind each wgmma where it cannot keep several in flight. Their order has a test of its own below.
    *(
        Rule(
            rf"block_attention_sm90 forward_kernel<Forward<{HALF}, {width}, {groups}>>",
            "sm_90a",
            registers=registers,
            least={"HGMMA": (width + 128) // 8, "UTMALDG": width // 32},
            most={"WARPGROUP.DEPBAR": 4},
        )
        for width, groups, registers in ((64, 1, 128), (64, 2, 168), (128, 1, 255), (128, 2, 168))
    ),
    Rule(r"block_attention_backward grad_\w+<Backward<float, .*", least={"HMMA": 256, "LDGSTS": 6}),
    # Of 256 channels a warp has a part, and less to multiply: 80.
    Rule(
        rf"block_attention_backward grad_\w+<Backward<{HALF}, (64|128).*", least={"HMMA": 96, "LDSM": 48, "LDGSTS": 6}
    ),
    Rule(rf"block_attention_backward grad_\w+<Backward<{HALF}, 256.*", least={"HMMA": 80, "LDSM": 72, "LDGSTS": 6}),
    # Two products of 16 channels, two of 16 queries and one of 16 of 128 keys; queries, keys and what is beside them by
    # TMA. Their order has a test of its own below.
    *(
        Rule(
            rf"block_attention_backward_sm90 grad_kernel<Backward<{HALF}, {width}>>",
            "sm_90a",
            registers=168,
            least={"HGMMA": 32, "UTMALDG": width // 16},
            most={"WARPGROUP.DEPBAR": 3},
        )
        for width in (64, 128)
    ),
    Rule(r"linear multiply<Tile<SM80_.*", least={"HMMA": 8, "LDSM": 8, "LDGSTS": 16}),
    Rule(r"linear_sm90 multiply<.*", "sm_90a", registers=168, least={"HGMMA": 8, "UTMALDG": 2}),
    # A step of 64 in products of 16; a commit for each stage and one for each part (UTCBAR); sums from tensor memory.
    # Of 64 columns two blocks run on a multiprocessor, of 128 one of 384 threads.
    *(
        Rule(
            rf"linear_sm100 multiply<Tile<\w+, \d+, {columns}, .*",
            "sm_100f",
            registers=registers,
            least={"UTCHMMA": 4, "UTCBAR": 2, "UTMALDG": 2, "LDTM": 1},
        )
        for columns, registers in ((64, 128), (128, 168))
    ),
)


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Kernel]:
    if not native.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    found = read(library)
    assert found
    return found


def test_no_kernel_is_empty(kernels: list[Kernel]) -> None:
    """What an architecture cannot run may be compiled to nothing without a word."""
    for kernel in kernels:
        assert sum(kernel.instructions.values()) - kernel.count("NOP", "EXIT", "BRA") >= 10, str(kernel)


def test_every_architecture_has_every_kernel(kernels: list[Kernel]) -> None:
    """But for those that are written for one."""
    by_architecture: dict[str, set[str]] = {}
    for kernel in kernels:
        if not kernel.name.split()[0].endswith(("_sm90", "_sm100")):
            by_architecture.setdefault(kernel.architecture, set()).add(kernel.name)
    first, *others = by_architecture.values()
    assert all(other == first for other in others)


def test_nothing_is_spilled_or_kept_in_local_memory(kernels: list[Kernel]) -> None:
    wrong = [str(kernel) for kernel in kernels if kernel.in_local_memory]
    assert wrong == []


def test_products_are_those_of_tensor_cores(kernels: list[Kernel]) -> None:
    """As CUTLASS's kernels for one architecture have not a single one of them when compiled for another."""
    multiplying = [kernel for kernel in kernels if kernel.multiplies]
    assert {kernel.architecture for kernel in multiplying} == {kernel.architecture for kernel in kernels}
    assert [str(kernel) for kernel in multiplying if not kernel.tensor_core_instructions] == []


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule(rule: Rule, root: Path, kernels: list[Kernel]) -> None:
    source = re.match(r"[a-z_0-9]+", rule.kernels)
    if source and not list(root.glob(f"csrc/ops/*/{source[0].rstrip('_')}*.cu")):
        pytest.skip(f"no kernel of {source[0]} in this checkout")
    for architecture in sorted({kernel.architecture for kernel in kernels}):
        if not re.fullmatch(rule.architectures, architecture):
            continue
        found = [k for k in kernels if k.architecture == architecture and re.fullmatch(rule.kernels, k.name)]
        assert found, f"no kernel of {architecture} is meant"
        for kernel in found:
            assert kernel.registers <= rule.registers, f"{kernel} has {kernel.registers} registers"
            for opcode, least in rule.least.items():
                assert kernel.count(opcode) >= least, f"{kernel} has {kernel.count(opcode)} {opcode}"
            for opcode, most in rule.most.items():
                assert kernel.count(opcode) <= most, f"{kernel} has {kernel.count(opcode)} {opcode}"
            accesses = kernel.count("LDG", "STG")
            wide = kernel.count("LDG.128", "STG.128")
            assert wide >= rule.wide * accesses, f"{kernel} has {wide} accesses of 16 bytes among {accesses}"


# The launches of a sweep and of the solver's turn that may begin before the one in front has ended.
EARLY = (
    r"linear(_sm90|_sm100)? multiply<.*",
    r"jacobi_sweep (gather_kernel<\d>|add_kernel)",
    r"jacobi_solve (update|accept)_kernel",
    r"rope_append forward_kernel<.*",
    r"norm forward_kernel<.*",
    r"block_attention(_sm90)? forward_kernel<.*",
)
# griddepcontrol.wait, and what touches global memory.
WAITS = {"ACQBULK": "W"} | dict.fromkeys(("LD", "LDG", "LDGSTS", "UTMALDG", "ST", "STG", "ATOM", "ATOMG", "RED"), "m")


@pytest.mark.parametrize("pattern", EARLY)
def test_early_launches_wait_before_they_touch_memory(pattern: str, kernels: list[Kernel]) -> None:
    """From sm_90 on, where they are launched early; before, there is nothing that could wait."""
    architectures = {kernel.architecture for kernel in kernels}
    found = [kernel for kernel in kernels if re.fullmatch(pattern, kernel.name)]
    assert {kernel.architecture for kernel in found} == architectures
    for kernel in found:
        order = kernel.events(WAITS)
        if kernel.architecture == "sm_80":
            assert "W" not in order
        else:
            assert re.match("W+m", order), f"{kernel}: {order[:20]}"


def test_tensor_memory_is_had_before_the_next_launch_may_begin(kernels: list[Kernel]) -> None:
    """Its blocks would else take what this block waits for, and wait for it to end.

    The blocks that copy, which come first in the code, have none.
    """
    if "sm_100f" not in {kernel.architecture for kernel in kernels}:
        pytest.skip("this build has no code for sm_100f")
    found = [kernel for kernel in kernels if kernel.name.startswith("linear_sm100 multiply<")]
    assert len(found) == 10
    # Allocation, leave for the next launch, and the products.
    letters = {"UTCATOMSWS.FIND_AND_SET": "A", "PREEXIT": "N", "UTCHMMA": "P"}
    for kernel in found:
        order = kernel.events(letters)
        assert re.fullmatch("N?A+NP+", order), f"{kernel}: {order}"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [64, 128])
def test_products_of_attention_run_beside_its_softmax(kernels: list[Kernel], width: int, groups: int) -> None:
    """Products of keys and of the values before them are begun together; those of the values are awaited after softmax.

    Of two groups, each waits for its turn before it begins products, and passes the turn on once it has begun them,
    before it waits for any.
    """
    name = rf"block_attention_sm90 forward_kernel<Forward<{HALF}, {width}, {groups}>>"
    found = [kernel for kernel in kernels if re.fullmatch(name, kernel.name)]
    if "sm_90a" not in {kernel.architecture for kernel in kernels}:
        pytest.skip("this build has no code for sm_90a")
    assert len(found) == 2
    # Products of 16 channels, and of 16 of 128 keys; 64 weights of a thread and the two factors of its rows. Waits for
    # all products, and for all but those begun last.
    letters = {
        "HGMMA": "P",
        "WARPGROUP.DEPBAR.0": "W",
        "WARPGROUP.DEPBAR.1": "w",
        "MUFU.EX2": "E",
        "BAR.SYNC": "S",
        "BAR.ARV": "A",
    }
    keys, values, softmax = f"P{{{width // 16}}}", f"P{{{128 // 16}}}", f"E{{{64 + 2}}}"
    turn, next_turn = ("S", "A") if groups == 2 else ("", "")
    # Threads meet when barriers are set up and when queries are there, at the end to write, and wherever values are
    # those of hidden keys, before the turn.
    start = "SS" + next_turn
    first = turn + keys + next_turn + "W" + softmax
    loop = "S" + turn + keys + values + next_turn + "w" + softmax + "W"
    last = "S" + turn + values + next_turn + "WS"
    for kernel in found:
        order = kernel.events(letters)
        assert re.fullmatch(start + first + loop + last, order), f"{kernel}: {order}"


@pytest.mark.parametrize("width, rows", [(64, 128), (128, 64)])
def test_products_of_the_gradient_of_attention_are_in_flight_together(
    kernels: list[Kernel], width: int, rows: int
) -> None:
    """All products of a tile of queries are begun before one of them is waited for, and dQ before those of the sums."""
    if "sm_90a" not in {kernel.architecture for kernel in kernels}:
        pytest.skip("this build has no code for sm_90a")
    name = rf"block_attention_backward_sm90 grad_kernel<Backward<{HALF}, {width}>>"
    found = [kernel for kernel in kernels if re.fullmatch(name, kernel.name)]
    assert len(found) == 2
    # Waits for all products, and for all but the last two of those that were begun together.
    letters = {"HGMMA": "P", "WARPGROUP.DEPBAR.0": "W", "WARPGROUP.DEPBAR.2": "w", "MUFU.EX2": "E"}
    of_weights, of_sums = 2 * width // 16, 2 * rows // 16 + 128 // 16
    for kernel in found:
        order = kernel.events(letters)
        assert re.fullmatch(f"P{{{of_weights}}}WE{{{rows // 2}}}P{{{of_sums}}}wW", order), f"{kernel}: {order}"
