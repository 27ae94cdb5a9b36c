"""csrc/cpu/vec_math.h: the functions whose results are rounded to bfloat16 next."""

from __future__ import annotations

from typing import Any

import pytest

from starflow_ext._load import native

LEVELS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_coarse_functions_keep_their_bounds(level: str, run_program: Any) -> None:
    if native.isa_levels()[level]:
        pytest.skip(f"{level}: {native.isa_levels()[level]}")
    flags = ("-ffp-contract=off", "-fno-math-errno", "-DSTARFLOW_ISA=tested", *LEVELS[level])
    gelu, gelu_relative, power, lost = map(float, run_program("vec_math.cpp", *flags).split())
    assert gelu < 7.5e-5
    assert gelu_relative < 6.5e-4
    assert power < 2.8e-6
    assert lost == 0
