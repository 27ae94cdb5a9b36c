"""Names of published tensors and of ours are a bijection; what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starflow import Flow, FlowConfig
from starflow.storage import from_published, load_published, published_state
from starflow.storage.published import our_name, published_name

from ..flows import CASES, VIDEO, make_flow

FOLDER = Path(__file__).parents[1] / "goldens"
MODELS = sorted(path.stem for path in FOLDER.glob("v*.json"))


@pytest.mark.parametrize("name", MODELS)
def test_names_of_golden_files_go_there_and_back(name: str) -> None:
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    config = FlowConfig.from_published(about["kwargs"], about["family"])
    tensors = load_file(FOLDER / f"{name}.safetensors")
    names = [n.removeprefix("model.") for n in tensors if n.startswith("model.")]
    assert names
    ours = {n: our_name(n) for n in names}
    for published, own in ours.items():
        if own is None:
            assert "attn_mask" in published or "feat_rope" in published
        else:
            assert published_name(own, config) == published
    state = {n: tensors[f"model.{n}"] for n in names}
    flow = Flow(config)
    load_published(flow, state)
    again = Flow(config)
    load_published(again, published_state(flow))
    for (key, a), b in zip(flow.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_go_there_and_back(name: str) -> None:
    flow = make_flow(CASES[name])
    other = make_flow(CASES[name], seed=1)
    load_published(other, published_state(flow))
    for (key, a), b in zip(flow.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_everything_that_does_not_fit_is_listed() -> None:
    flow = make_flow(VIDEO)
    state = published_state(flow)
    del state["blocks.1.proj_in.bias"], state["blocks.0.attn_blocks.0.mlp.main.0.weight"]
    state["blocks.0.extra.weight"] = torch.zeros(2)
    state["blocks.2.sos_embed"] = torch.zeros(1, 1, 3)
    state["blocks.0.attn_mask"] = torch.zeros(4, 4)  # nothing reads it
    with pytest.raises(ValueError, match="checkpoint: tensors do not match the config") as caught:
        from_published(flow, state)
    message = str(caught.value)
    assert "missing: blocks.0.attn_blocks.0.mlp.main.0.weight, blocks.1.proj_in.bias" in message
    assert "unexpected: blocks.0.extra.weight" in message
    assert "of another shape: blocks.2.sos_embed [1, 1, 3] (expected [1, 1, 2])" in message
    assert "attn_mask" not in message


def test_a_transposed_matrix_does_not_fit() -> None:
    flow = make_flow(VIDEO)
    state = published_state(flow)
    state["blocks.0.proj_in.weight"] = state["blocks.0.proj_in.weight"].T
    with pytest.raises(ValueError, match=r"blocks.0.proj_in.weight \[2, 32\] \(expected \[32, 2\]\)"):
        load_published(flow, state)


def test_a_file_without_buffers_and_with_a_first_guess() -> None:
    flow = make_flow(VIDEO)
    flow._blocks()[0].guess.fill_(0.5)
    assert not any("guess" in name or name == "var" for name in published_state(flow))
    assert published_name("blocks.0.guess", flow.config) is None
    load_published(flow, published_state(flow))
    assert (flow._blocks()[0].guess == 0.5).all()
