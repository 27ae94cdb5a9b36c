"""Names of the published checkpoints (STARFlow, STARFlow-V, TarFlow) and of ours, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from starflow.config import FlowConfig
from starflow.flow import Flow

# Buffers of the published models that nothing reads.
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


def from_published(flow: Flow, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with published names under our names, checked and in our shapes; nothing is copied.

    Args:
        flow: of the matching config; its weights are not read.
        state: tensors by published name; buffers that nothing reads may be there or not.

    Returns:
        Our name -> tensor, for everything but what only this project has.

    Raises:
        ValueError: names or shapes that do not match, all of them listed.
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
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", sorted(unexpected)), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError("checkpoint: tensors do not match the config; " + "; ".join(problems))
    return {name: tensor.reshape(own[name].shape) for name, tensor in given.items()}


def load_published(flow: Flow, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict with published names into `flow`, which is overwritten (see `from_published`)."""
    own = flow.state_dict()
    with torch.no_grad():
        for name, tensor in from_published(flow, state).items():
            own[name].copy_(tensor)
