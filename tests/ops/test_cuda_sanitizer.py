"""Every kernel on a CUDA device under NVIDIA's compute-sanitizer; skipped where there is no device or no such tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"),
]

# Runs in the root of the checkout, which `python -c` puts on the path.
PROGRAM = """
import torch

from tests.ops.battery import DIFFERENTIABLE, SPECS, gradients, outcome, plain, samples
from tests.ops.blocks import KINDS, block, state_of, sweeps

for spec in SPECS:
    for dtypes in spec.dtypes:
        if dtypes[0] in (torch.float32, torch.bfloat16):
            for sample in samples(spec, dtypes):
                outcome(spec, spec.on_cuda(sample))
for spec in DIFFERENTIABLE:
    gradients(spec, spec.on_cuda(plain(spec)), torch.square)
for kind in KINDS:
    weights = block(KINDS[kind], "bfloat16", "cuda")
    sweeps(weights, state_of(weights, 3, 90, storage="bfloat16"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_kernels_are_clean(tool: str) -> None:
    # Torch hands out pieces of memory that it keeps: what lies beyond a tensor would still be allocated.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
