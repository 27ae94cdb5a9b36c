"""Names of the published checkpoints (STARFlow, STARFlow-V, TarFlow) and of ours, in both directions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from starflow.config import FlowConfig
from starflow.messages import listed
from starflow.model import Flow

# Buffers in published checkpoints that no computation reads.
_UNUSED = re.compile(r"feat_rope\.|.*\battn_mask$")

# (published, ours), applied in this order to a published name and in reverse order, backwards, to one of ours.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"attn_blocks\.", "layers."),
    (r"proj_txt\.", "proj_text."),
    (r"mlp\.gate_proj\.", "mlp.gate."),
    (r"mlp\.up_proj\.", "mlp.up."),
    (r"mlp\.down_proj\.", "mlp.down."),
    (r"mlp\.main\.0\.", "mlp.up."),
    (r"mlp\.main\.2\.", "mlp.down."),
)


def our_name(published: str) -> str | None:
    """Our name of a published tensor; None for a buffer that nothing reads."""
    if _UNUSED.match(published):
        return None
    if published == "var":
        return "prior_variance"
    for pattern, ours in _RENAMES:
        published = re.sub(rf"\b{pattern}", ours, published)
    published = re.sub(r"^learnable_self_denoiser\.", "denoiser.", published)
    return re.sub(r"^(blocks\.\d+\.)", r"\1conditioner.", published)


def published_name(ours: str, config: FlowConfig) -> str | None:
    """The published name of one of our tensors; None for what only this project has."""
    if ours.endswith(".guess"):
        return None
    if ours == "prior_variance":
        return "var"
    mlp = _RENAMES[2:5] if config.use_swiglu else _RENAMES[5:]
    for pattern, name in (*_RENAMES[:2], *mlp):
        ours = ours.replace(name, pattern.replace("\\", ""))
    ours = re.sub(r"^denoiser\.", "learnable_self_denoiser.", ours)
    return ours.replace(".conditioner.", ".", 1)


def published_state(flow: Flow) -> dict[str, Tensor]:
    """The state dict under published names, without the buffers that nothing reads."""
    named = ((published_name(name, flow.config), tensor) for name, tensor in flow.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None and (name != "var" or not flow.config.nvp)}


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of a flow that the names and shapes of a published state dict tell.

    Args:
        state: tensors by published name; their values are not read.

    Returns:
        Name of the option of `FlowConfig` (or of what follows from them) -> value.
    """
    layers: Counter[int] = Counter()
    first: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        if found := re.match(r"blocks\.(\d+)\.(?:attn_blocks\.(\d+)\.)?(.*)", name):
            block = int(found[1])
            layers[block] = max(layers[block], 0 if found[2] is None else int(found[2]) + 1)
            first.setdefault(block, {})[found[3]] = tuple(tensor.shape)
    matrices = ("proj_in.weight", "proj_out.weight")
    if not first or any(len(names.get(matrix, ())) != 2 for names in first.values() for matrix in matrices):
        return {}
    bottom, top = first[min(first)], first[max(first)]
    denoiser = {name for name in state if name.startswith("learnable_self_denoiser.")}
    options: dict[str, Any] = {
        "layers_per_block": tuple(layers[block] for block in range(max(first) + 1)),
        "dimensions of a token": top["proj_in.weight"][1],
        "nvp": top["proj_out.weight"][0] == 2 * top["proj_in.weight"][1],
        "sos": "sos_embed" in top,
        "rope": "pos_embed" not in top,
        "use_final_norm": "final_norm.weight" in top,
        "txt_dim": top["proj_txt.weight"][1] if len(top.get("proj_txt.weight", ())) == 2 else 0,
        "num_classes": top["class_embed"][0] if top.get("class_embed") else 0,
        "learnable_self_denoiser": bool(denoiser),
        "conditional_denoiser": "learnable_self_denoiser.proj_txt.weight" in denoiser,
    }
    if len(first) > 1:
        options["channels"] = bottom["proj_in.weight"][0]
        options["cond_top_only"] = options["txt_dim"] > 0 and "proj_txt.weight" not in bottom
    options["width of the deep block"] = top["proj_in.weight"][0]
    if layers[max(first)]:
        options["use_swiglu"] = "mlp.gate_proj.weight" in top
        options["use_qk_norm"] = "attention.query_norm.weight" in top
        options["use_post_norm"] = "attention.post_norm.weight" in top
        options["use_bias"] = "attention.qkv.bias" in top
        kinds = ("attention.norm.bias", "layer_norm"), ("attention.norm.weight", "rms_norm")
        options["norm_type"] = next((kind for name, kind in kinds if name in top), "none")
    return options


def differences(config: FlowConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Options in which a published state dict is of another flow than `config`, in words."""
    derived = {
        "dimensions of a token": config.token_channels,
        "width of the deep block": config.width(len(config.layers_per_block) - 1),
    }
    found = []
    for name, value in options_of(state).items():
        own = derived[name] if name in derived else getattr(config, name)
        if own != value:
            found.append(f"{name if name in derived else f'flow.{name}'} is {own!r}, the checkpoint has {value!r}")
    return found


def from_published(flow: Flow, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with published names under our names, checked and in our shapes; nothing is copied.

    Args:
        flow: of the matching config; its weights are not read.
        state: tensors by published name; buffers that nothing reads may be there or not.

    Returns:
        Our name -> tensor, for everything but what only this project has.

    Raises:
        ValueError: names or shapes that do not match; the options that this comes from are listed, as far as names
            and shapes tell them, and the first of the tensors.
    """
    own = flow.state_dict()
    expected = {
        name for name in own if not name.endswith(".guess") and (name != "prior_variance" or not flow.config.nvp)
    }
    given: dict[str, Tensor] = {}
    unexpected = []
    for published, tensor in state.items():
        name = our_name(published)
        if name is None or (name == "prior_variance" and flow.config.nvp):
            continue
        if name not in expected:
            unexpected.append(published)
        else:
            given[name] = tensor
    missing = sorted(str(published_name(name, flow.config)) for name in expected - set(given))
    shapes = [
        f"{published_name(name, flow.config)} {list(tensor.shape)} (expected {list(own[name].shape)})"
        for name, tensor in given.items()
        if tensor.numel() != own[name].numel() or tensor.squeeze().shape != own[name].squeeze().shape
    ]
    problems = {"missing": missing, "unexpected": sorted(unexpected), "of another shape": shapes}
    if any(problems.values()):
        options = differences(flow.config, state)
        # A wrong option is told by thousands of tensors.
        told = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
        raise ValueError("checkpoint: " + "; ".join([*options, "tensors do not match the config", *told]))
    return {name: tensor.reshape(own[name].shape) for name, tensor in given.items()}


def load_published(flow: Flow, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict with published names into `flow`, which is overwritten (see `from_published`)."""
    own = flow.state_dict()
    with torch.no_grad():
        for name, tensor in from_published(flow, state).items():
            own[name].copy_(tensor)
