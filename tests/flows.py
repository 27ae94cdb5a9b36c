"""Tiny flows with weights that are not zero anywhere, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starflow import Flow, FlowConfig

# A video model with every part; cases below change it.
VIDEO: dict[str, Any] = {
    "in_channels": 2,
    "img_size": 4,
    "channels": 32,
    "layers_per_block": (1, 1, 2),
    "head_dim": 16,
    "soft_clip": 4.0,
    "txt_size": 3,
    "txt_dim": 5,
    "cond_top_only": True,
    "use_final_norm": True,
    "seq_order": "L2R",
    "temporal_causal": 2,
    "shallow_block_local": True,
}
IMAGE: dict[str, Any] = {
    "in_channels": 3,
    "img_size": 4,
    "channels": 32,
    "layers_per_block": (1, 2),
    "head_dim": 16,
    "soft_clip": 4.0,
}
TARFLOW: dict[str, Any] = {
    "in_channels": 3,
    "img_size": 8,
    "patch_size": 2,
    "channels": 32,
    "layers_per_block": (1, 1),
    "head_dim": 16,
    "rope": False,
    "sos": False,
    "use_softplus": False,
    "soft_clip": 3.0,
    "channel_first_patches": True,
}

# Name -> options; together they take every option of the architecture off its default. A soft clip or a final norm
# keeps flows tame that are not trained: without, the exponential of what grew out of an exponential is infinite.
CASES: dict[str, dict[str, Any]] = {
    "video": VIDEO,
    "video spread": VIDEO | {"top_order": "spread"},
    "video spread embeddings": VIDEO | {"top_order": "spread", "position_embed": True, "text_embed": True},
    "video orders in all blocks": VIDEO | {"top_order": "farthest", "shallow_order": "spread", "position_embed": True},
    "video spread shifted": VIDEO | {"top_order": "spread", "sos": False},
    "video shallow blocks over time": VIDEO | {"shallow_block_local": False, "cond_top_only": False},
    "video backwards in time": VIDEO
    | {"temporal_causal": 0, "shallow_block_local": False, "cond_top_only": False, "seq_order": "R2L"},
    "video without text": VIDEO | {"txt_size": 0, "txt_dim": 0, "cond_top_only": False},
    "video wide top": VIDEO | {"top_block_channels": 48, "pt_seq_len": 7, "in_channels": 3},
    "video identity": VIDEO | {"layers_per_block": (1, 0, 1)},
    "video top without layers": VIDEO | {"layers_per_block": (1, 0)},
    "video of classes": VIDEO | {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "num_classes": 4},
    "video rolling": VIDEO | {"top_order": "spread", "position_embed": True, "text_embed": True, "attention_frames": 1},
    "video rolling beside": VIDEO
    | {"top_order": "spread", "text_embed": True, "attention_frames": 2, "previous_frames": 2},
    "video centred": VIDEO | {"centred": True, "learnable_self_denoiser": True, "denoiser_skip": 2.0},
    "video gaussian": VIDEO | {"centred": True, "learnable_self_denoiser": True, "denoiser_components": 1},
    "video rolling raster": VIDEO | {"text_embed": True, "attention_frames": 1, "temporal_causal": 1},
    "image": IMAGE,
    "image centred": IMAGE | {"centred": True},
    "image L2R": IMAGE | {"seq_order": "L2R", "hf_style_rope": True},
    "image spread": IMAGE | {"top_order": "spread", "layers_per_block": (1, 1, 1)},
    "image exp": IMAGE | {"use_softplus": False, "norm_type": "rms_norm"},
    "image shift only": IMAGE | {"use_softplus": False, "nvp": False},
    "image no clip": IMAGE | {"soft_clip": 0.0, "use_final_norm": True},
    "image no norm": IMAGE | {"norm_type": "none", "use_post_norm": True},
    "image gated": IMAGE | {"use_swiglu": True, "use_bias": False, "use_qk_norm": True, "use_post_norm": True},
    "image grouped": IMAGE | {"channels": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "image of text": IMAGE | {"txt_size": 4, "txt_dim": 6},
    "image patches": IMAGE | {"img_size": 8, "patch_size": 2, "in_channels": 1},
    "tarflow": TARFLOW,
    "tarflow classes": TARFLOW | {"num_classes": 5},
    "tarflow shift only": TARFLOW | {"nvp": False},
    "tarflow with a start token": TARFLOW | {"sos": True},
}


def make_flow(options: dict[str, Any], *, seed: int = 0, spread: float = 0.5, **changes: Any) -> Flow:
    """A flow in eval mode; `spread` is how far its affine maps are from the identity."""
    torch.manual_seed(seed)
    flow = Flow(FlowConfig(**(options | changes))).eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if name.endswith("proj_out.weight"):
                parameter.normal_(0.0, spread / parameter.shape[1] ** 0.5)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if not flow.config.nvp:
            flow.prior_variance.uniform_(0.5, 2.0)
    if flow.centre is not None:
        flow.centre_on(3.0 * torch.randn(flow.config.in_channels, flow.config.img_size, flow.config.img_size))
    return flow


def latents(flow: Flow, *, batch: int = 2, frames: int = 3, image: bool | None = None, seed: int = 1) -> Tensor:
    """Noise or data of an odd size; by default a video where the flow has time."""
    config = flow.config
    generator = torch.Generator().manual_seed(seed)
    side = config.patch_size
    # A learned table of positions fixes the number of tokens.
    height, width = (3 * side, 5 * side) if config.rope else (config.img_size, config.img_size)
    time = () if image or (image is None and config.temporal_causal == 0) else (frames,)
    x = torch.randn(batch, *time, config.in_channels, height, width, generator=generator, dtype=torch.float64)
    return x.to(torch.promote_types(flow.blocks[-1].guess.dtype, torch.float32))


def inputs(name: str, flow: Flow, *, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Data and condition for the case `name`."""
    return latents(flow, batch=batch, image=not name.startswith("video")), condition(flow, batch)


def condition(flow: Flow, batch: int = 2, seed: int = 2) -> Tensor | None:
    """Text or labels, or None for a flow that reads neither."""
    config = flow.config
    generator = torch.Generator().manual_seed(seed)
    if config.txt_size:
        text = torch.randn(batch, config.txt_size, config.txt_dim, generator=generator, dtype=torch.float64)
        return text.to(flow.blocks[-1].guess.dtype)
    if config.num_classes:
        return torch.randint(-1, config.num_classes, (batch,), generator=generator)
    return None


def null(flow: Flow, batch: int = 2) -> Tensor | None:
    """What the unconditional half reads."""
    return condition(flow, batch, seed=3) if flow.config.txt_size else None
