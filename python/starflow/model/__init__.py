"""What is the flow? Blocks, conditioner, layers and denoiser: data to noise, and the likelihood. Knows no solver."""

from starflow.model.affine import Affine
from starflow.model.block import Encoded, FlowBlock
from starflow.model.cache import DecodeState
from starflow.model.centre import Centre
from starflow.model.conditioner import Conditioner, Layout, make_layout
from starflow.model.denoiser import STEP, Denoiser, score_target, tweedie_step
from starflow.model.flow import Flow, nll_of
from starflow.model.gaussian import Gaussian
from starflow.model.guidance import Guidance
from starflow.model.layers import Int8Linear, Transformer, to_int8
from starflow.model.packed import compared_once, keep_mapped, pack_conditioner, pack_linears
from starflow.model.rope import concatenate, later
from starflow.model.tokens import Order, patchify, to_grid, to_sequence, token_order, unpatchify

__all__ = [
    "STEP",
    "Affine",
    "Centre",
    "Conditioner",
    "DecodeState",
    "Denoiser",
    "Encoded",
    "Flow",
    "FlowBlock",
    "Gaussian",
    "Guidance",
    "Int8Linear",
    "Layout",
    "Order",
    "Transformer",
    "compared_once",
    "concatenate",
    "keep_mapped",
    "later",
    "make_layout",
    "nll_of",
    "pack_conditioner",
    "pack_linears",
    "patchify",
    "score_target",
    "to_grid",
    "to_int8",
    "to_sequence",
    "token_order",
    "tweedie_step",
    "unpatchify",
]
