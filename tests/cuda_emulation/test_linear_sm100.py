"""The source of linear's kernel for sm_100f by itself: what each of its lines is for.

Its values, bits and bytes are tested with those of the other kernels, in test_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from .emulator import EmulationError, Kernels, Report
from .switches import STATEMENT, Switches
from .test_linear import DEPTH, Call, _bits, _call, _draw, _run

SOURCE = "ops/linear/linear_sm100.cu"

# Taken away, or changed, one by one: every barrier, wait, fence, count and place. Not here: the wait for copied rows
# and the fence behind it, since blocks run one after another; the end of the loads (load_tail), since the device ends a
# warp's products in their order, and so all stages are free before the last sums are there; and what only asks for
# tensor maps early.
MUTATIONS = {
    r"__syncthreads\(\);": STATEMENT,
    r"(?<=blockIdx\.x - )copying": "(on ? 0 : {0})",
    # Of the copying blocks, and of the others.
    r"await_earlier_launches\(\);": STATEMENT,
    r"tensor_memory\.allocate": "if (on) await_earlier_launches(); {0}",
    r"tensor_memory\.(free|release_allocation_lock)\([^;]*\);": STATEMENT,
    r"Tile::memory_columns(?=, &)": "(on ? {0} / 2 : {0})",
    r"parts\.(producer_tail|producer_commit|consumer_wait|consumer_release)\([^;]*\);": STATEMENT,
    r"\+\+part_state;": STATEMENT,
    r"fence_tensor_memory_\w+_barrier\(\);": STATEMENT,
    r"cutlass::arch::fence_view_async_tmem_load\(\);": STATEMENT,
    r"part_state\.index\(\) \* Tile::rows": "(on ? 0 : {0})",
    r"(?<=\+ )first_row(?=\)\);)": "(on ? 0 : {0})",
    r"(?<=at\()first_row": "(on ? 0 : {0})",
    r"(?<=consumer_arv_count = )Tile::threads": "(on ? group_threads / 2 : {0})",
    r"(?<=flat_sums\(j, i\) )\+= more\(j\)": "= more(j) + (on ? 0.0F : flat_sums(j, i))",
    r"schedule\.split \? block\.part \+ 1 : schedule\.parts": "(on ? schedule.parts : {0})",
    r"cute::idx2crd\(begin": "cute::idx2crd(on ? 0 : begin",
    r"(?<=if \()!takes(?=\))": "(!on && {0})",
}
# Two tiles: of one group that takes 16 of 32 lanes, and of two groups that take all; of one type.
EDITS = {
    r"return with_tile<Tile, Element>\(args\.schedule, (?=\[&\])": "const auto launch = ",
    r"args, stream\);\n    \}(?=\);\n)\)": "args, stream);\n    };\n    return args.schedule.tile_columns == 64"
    " ? launch(Tile<Element, 16, 64, 1, 8>{}) : launch(Tile<Element, 128, 128, 2, 6>{})",
    r": run<cute::half_t>": ": run<cute::bfloat16_t>",
}
SWITCHES = Switches(SOURCE, {SOURCE: MUTATIONS}, EDITS)


@dataclass(frozen=True)
class _Alone:
    """The launcher by itself, in a chain of launches each of which begins early."""

    kernels: Kernels

    def launch(self, launcher: str, seed: int, **values: Any) -> Report:
        report = self.kernels.launch("linear_sm100_cuda", seed, **values, kernel="tcgen05", early=True)
        assert report.early_launches == 1
        return report


@cache
def _calls() -> list[tuple[Call, Call]]:
    """Calls, and the same in one block a tile: steps go round the stages, parts round their places, of both tiles."""
    found = []
    for tile, rows, columns, steps, parts in (((16, 64), 19, 70, 20, 5), ((128, 128), 131, 132, 13, 3)):
        call = _call(rows, steps * DEPTH - 8, columns, parts=parts, tile=tile, chained=True)
        found.append((replace(call, split=True), call))
        call = replace(call, residual=_draw(rows, columns, seed=9))
        found.append((call, call))
    return found


def _check(kernels: Kernels) -> None:
    for seed, (call, whole) in enumerate(_calls()):
        result = _run(_Alone(kernels), call, seed)
        assert result.report.bank_conflicts == 0
        if call is not whole:
            assert torch.equal(_bits(result), _bits(_run(_Alone(kernels), whole, seed)))


def test_source_without_a_mutation_passes() -> None:
    _check(SWITCHES.kernels(None))


@pytest.mark.parametrize("place", range(len(SWITCHES.places)), ids=SWITCHES.places.__getitem__)
def test_mutation_is_caught(place: int) -> None:
    with pytest.raises((EmulationError, AssertionError)):
        _check(SWITCHES.kernels(place))
