"""The examples run and agree with what they are compared with. How fast they are is for those who run them to see."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    """What the script defines; its `main` does not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_ops_in_a_plain_tarflow() -> None:
    done = example("tarflow_ops")["compare"](tokens=24, channels=3, width=64, layers=1, blocks=2, batch=2)
    assert done.log_prob_error < 1e-5
    assert done.sample_error < 1e-4
    assert done.solve_error < 1e-3


def test_ops_in_a_decoder_with_a_cache() -> None:
    done = example("decoder_cache")["compare"](prompt=40, new=5, chunk=16, width=256, layers=2, batch=2)
    assert done.error < 1e-5


def test_a_causal_model_of_transformers() -> None:
    """Padding on the left, dynamic and static caches, packed linears."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra `text`)")
    found = example("hugging_face")["compare"](width=128, layers=2, prompts=(40, 17, 5), new=6)
    assert found["logits"] < 1e-5
    assert found["dynamic"] == found["static"] == 1.0


def test_padding_that_is_not_on_the_left_is_refused() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra `text`)")
    _, model = example("hugging_face")["build"](width=128, layers=1)
    seen = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="expected padding on the left alone"):
        model(torch.ones(1, 4, dtype=torch.int64), attention_mask=seen)


def test_inverse_of_a_zuko_flow() -> None:
    pytest.importorskip("zuko", reason="zuko is not installed (extra `examples`)")
    zuko_inverse = example("zuko_inverse")
    flow = zuko_inverse["train"](side=4, steps=50, hidden=32)
    done = zuko_inverse["compare"](flow, batch=3, repeats=1)
    assert done.error < 1e-3
    assert done.zuko_error < 1e-4
    assert done.sweeps <= 3 * (16 + 1)
