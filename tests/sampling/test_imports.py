"""Importing the packages and sampling need the required packages alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXTRAS = ("diffusers", "matplotlib", "scipy", "sklearn", "tensorboard", "torch.utils.tensorboard", "transformers")
CODE = """
import sys
from pathlib import Path

EXTRAS = {extras}
# An import of a module that is None in this table fails as if the package were not installed.
sys.modules.update(dict.fromkeys(EXTRAS))

import starflow
import starflow_ext
from starflow import cli, codecs, data, evaluate, model, sampling, solver, storage, text, training

clip = starflow.Pipeline.load(Path({model!r}), device="cpu").sample("a three moving up", seed=1).pixels
assert clip.isfinite().all()
assert not [name for name in EXTRAS if sys.modules[name] is not None]
"""


def test_neither_imports_nor_samples_need_an_extra(model: Path) -> None:
    code = CODE.format(extras=EXTRAS, model=str(model))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
