"""Which tiles block_attention's CUDA kernels pass over, against every query and key of random masks.

More masks: `STARFLOW_MASKS=10000 pytest tests/native/test_attention_schedule.py`.
"""

from __future__ import annotations

import os
from typing import Any

FLAGS = ("-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_tiles_of_random_masks(run_program: Any) -> None:
    masks = os.environ.get("STARFLOW_MASKS", "200")
    printed = run_program("attention_schedule.cpp", *FLAGS, "-DSTARFLOW_X86=0", "-DSTARFLOW_CUDA=0", arguments=(masks,))
    assert printed == f"{masks} masks\n"
