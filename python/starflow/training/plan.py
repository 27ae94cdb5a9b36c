"""What a training run takes: parameters, memory of a device, arithmetic of a step and its time, before it is started.

Memory of activations is counted rather than estimated: the forward pass runs on tensors without memory, and what
autograd keeps of it is added up. Arithmetic counts products alone, of the pairs of tokens that see each other.

Reference: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022), for what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from starflow.arguments import check_config
from starflow.config import ConfigError, FlowConfig, RunConfig
from starflow.distributed import Parallel
from starflow.model import Conditioner, Flow, FlowBlock, Transformer, nll_of
from starflow.training.batches import make_parts
from starflow.training.optim import moments_of

GIB = 1 << 30
# Bytes of a float32 number; weights, gradients, moments and averages are kept in it whatever `train.precision` is.
_NUMBER = 4


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a training clip.

    Args:
        frames, height, width: of the token grid. text: tokens of text.
    """

    frames: int
    height: int
    width: int
    text: int

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return self.height * self.width


@dataclass(frozen=True)
class Plan:
    """What a run takes on each of its devices; memory in bytes.

    Args:
        devices: number of them. parallel: how they share the work.
        parameters: numbers of each part of the flow, the deep block last of the blocks.
        tokens: of a clip, text included.
        clips: computed on a device at a time.
        weights, gradients, moments, average: kept from step to step.
        gathered: weights of layers made whole while they compute (`train.parallel` "fsdp").
        activations: kept for the backward pass at its peak. workspace: of the layer that computes.
        flops: of a step on a device. seconds: of a step at `rate` FLOP/s.
        rate: what the device does, its peak times the efficiency.
    """

    devices: int
    parallel: str
    parameters: dict[str, int]
    tokens: int
    clips: int
    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int
    activations: int
    workspace: int
    flops: float
    rate: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.flops / self.rate

    @property
    def memory(self) -> int:
        """Bytes of all together."""
        kept = self.weights + self.gradients + self.moments + self.average
        return kept + self.gathered + self.activations + self.workspace

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return {**asdict(self), "memory": self.memory, "seconds": self.seconds}


def plan(config: RunConfig, *, devices: int = 1, peak: float = 1e15, efficiency: float = 0.4) -> Plan:
    """What a run takes on each of `devices`.

    Args:
        config: of the run. Codec and text encoder, which have no gradients, are not counted.
        devices: processes, one a device.
        peak: FLOP/s of a device in the dtype of the products.
        efficiency: share of it that is reached.

    Raises:
        ConfigError: numbers out of range, or a batch that does not divide.
    """
    check_config("plan", config, RunConfig)
    train, flow_config = config.train, config.flow
    if devices < 1 or not 0 < efficiency <= 1 or not peak > 0:
        raise ConfigError(
            f"plan: devices is {devices}, peak {peak:g}, efficiency {efficiency:g}, expected at least 1, above 0, and "
            "above 0 up to 1"
        )
    if train.batch_size % (devices * train.accumulate):
        raise ConfigError(
            f"plan: train.batch_size is {train.batch_size}, expected a multiple of {devices * train.accumulate}: "
            f"{devices} devices times train.accumulate"
        )
    rows = train.batch_size // (devices * train.accumulate)
    clip = grid_of(config)
    with torch.device("meta"):
        flow = Flow(flow_config)
    counts = _counts(flow)
    total = sum(counts.values())
    sharded = train.parallel == "fsdp" and devices > 1
    share = -(-total // devices) if sharded else total
    activations, workspace = _activations(flow_config, clip, train.precision, rows)
    return Plan(
        devices=devices,
        parallel=train.parallel if devices > 1 else "one process",
        parameters=counts,
        tokens=clip.text + clip.frames * clip.frame_tokens,
        clips=rows,
        weights=share * _NUMBER,
        gradients=share * _NUMBER,
        # Muon's are not shared out.
        moments=(2 * share if sharded else moments_of(flow, train)) * _NUMBER,
        average=share * _NUMBER if train.ema else 0,
        gathered=_gathered(flow) if sharded else 0,
        activations=activations,
        workspace=workspace,
        flops=rows * train.accumulate * step_flops(flow, clip, denoiser_every=train.denoiser_every),
        rate=peak * efficiency,
    )


def fitting(config: RunConfig, memory: int, **how: Any) -> tuple[RunConfig, Plan] | None:
    """The configuration nearest to `config` that fits into `memory` bytes of each device, and its plan.

    In this order: as it is; weights in pieces; activations recomputed; both; the same with a batch in more parts. None
    where even one clip at a time does not fit.

    Args:
        config: of the run.
        memory: of a device.
        how: as for `plan`.
    """
    check_config("fitting", config, RunConfig)
    for changed in _easier(config, how.get("devices", 1)):
        found = plan(changed, **how)
        if found.memory <= memory:
            return changed, found
    return None


def _easier(config: RunConfig, devices: int) -> Iterator[RunConfig]:
    parts = [
        parts
        for parts in range(config.train.accumulate, config.train.batch_size // devices + 1)
        if config.train.batch_size % (devices * parts) == 0
    ]
    kinds: list[Parallel] = (
        ["ddp", "fsdp"] if devices > 1 and config.train.parallel == "ddp" else [config.train.parallel]
    )
    for accumulate in parts:
        for recompute in dict.fromkeys((config.flow.use_checkpoint, config.flow.use_checkpoint or 1, 1)):
            for parallel in kinds:
                yield replace(
                    config,
                    flow=replace(config.flow, use_checkpoint=recompute),
                    train=replace(config.train, accumulate=accumulate, parallel=parallel),
                )


def grid_of(config: RunConfig) -> TokenGrid:
    """The tokens of a training clip, without reading codec or text encoder where they have folders of their own."""
    data, patch = config.data, config.flow.patch_size
    spatial, frames = _compression(config)
    # The longest clips of training have their source, or their last frame, before them.
    frames += frames if config.train.source_prob > 0 else config.train.last_frame_prob > 0
    return TokenGrid(frames, data.height // (spatial * patch), data.width // (spatial * patch), config.flow.txt_size)


def _compression(config: RunConfig) -> tuple[int, int]:
    """Pixels of a latent position, and latent frames of a clip."""
    kind, frames = config.codec.get("kind"), config.data.frames
    # The numbers of the published autoencoders are known, so that a plan needs none of their folders.
    if kind == "wan":
        # Wan 2.1 has 16 channels of a latent and does not patch pixels.
        return 8 if config.flow.in_channels == 16 else 16, (frames - 1) // 4 + 1
    if kind == "autoencoder_kl":
        return 8, frames
    codec, _ = make_parts(config)
    return codec.spatial, codec.latent_frames(frames)


def _counts(flow: Flow) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in flow.named_parameters():
        parts = name.split(".")
        part = f"block {parts[1]}" if parts[0] == "blocks" else parts[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _gathered(flow: Flow) -> int:
    """Bytes of whole weights at a time: two layers (one is fetched ahead), a gradient, and the rest of a network."""
    most = 0
    for network, _ in _networks(flow):
        layers = [sum(p.numel() for p in layer.parameters()) for layer in network.layers]
        rest = sum(p.numel() for p in network.parameters()) - sum(layers)
        most = max(most, 3 * max(layers, default=0) + 2 * rest)
    return most * _NUMBER


def _networks(flow: Flow) -> list[tuple[Transformer, bool]]:
    """The networks of a flow, and whether each sees one frame at a time."""
    found: list[tuple[Transformer, bool]] = []
    for block in flow.blocks:
        assert isinstance(block, FlowBlock)
        if block.conditioner is not None:
            found.append((block.conditioner, block.frame_local))
    return found if flow.denoiser is None else [*found, (flow.denoiser, False)]


# -- arithmetic -------------------------------------------------------------------------------------------------------


def step_flops(flow: Flow, clip: TokenGrid, *, denoiser_every: int = 1) -> float:
    """Floating-point operations of a training step on one clip: forward, twice that backward, and what is recomputed.

    Args:
        flow: weights are not read.
        clip: of training.
        denoiser_every: steps between those in which the denoiser learns.
    """
    total = 0.0
    for network, local in _networks(flow):
        every = network.checkpoint_every
        again = forward_flops(network, clip, local=local, layers_only=True) / every if every else 0.0
        once = 3 * forward_flops(network, clip, local=local) + again
        total += once / (1 if isinstance(network, Conditioner) else denoiser_every)
    return total


def forward_flops(
    network: Transformer, clip: TokenGrid, *, local: bool = False, dense: bool = False, layers_only: bool = False
) -> float:
    """Floating-point operations of one network on one clip, products alone, a multiplication and an addition as two.

    Args:
        network: weights are not read.
        clip: of tokens.
        local: it sees one frame at a time.
        dense: attention of all pairs of tokens, as a kernel without knowledge of the mask computes it.
        layers_only: without the projections around the layers.
    """
    grid = clip.frames * clip.frame_tokens
    text = clip.text if network.proj_text is not None else 0
    products = sum(_size(layer) for layer in network.layers) * (text + grid)
    if not layers_only:
        products += (_weight(network.proj_in) + _weight(network.proj_out)) * grid + _weight(network.proj_text) * text
        if isinstance(network, Conditioner):
            # Positions are those of what the network sees, once for all samples.
            slots = clip.frame_tokens if local else grid
            products += _weight(network.proj_position) * slots + _weight(network.proj_summary)
    if local:
        pairs = clip.frames * _pairs(network, TokenGrid(1, clip.height, clip.width, 0), 0, dense)
    else:
        pairs = _pairs(network, clip, text, dense)
    return 2.0 * products + 4.0 * len(network.layers) * network.heads * network.head_dim * pairs


def _size(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)


def _weight(linear: nn.Linear | None) -> int:
    return 0 if linear is None else linear.weight.numel()


def _pairs(network: Transformer, clip: TokenGrid, text: int, dense: bool) -> float:
    """Pairs of a token and one that it sees."""
    frames, size = clip.frames, clip.frame_tokens
    length = text + frames * size
    if dense:
        return length * length
    if isinstance(network, Conditioner):
        return length * (length + 1) / 2
    ahead = network.config.temporal_causal
    if ahead == 0:
        return length * length
    behind = frames if network.config.denoiser_window is None else network.config.denoiser_window
    seen = sum(min(frames, frame + ahead) - max(0, frame + ahead - 1 - behind) for frame in range(frames))
    return text * (text + size * min(frames, ahead)) + size * (frames * text + size * seen)


# -- memory of activations --------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _activations(flow: FlowConfig, clip: TokenGrid, precision: str, rows: int) -> tuple[int, int]:
    """Bytes for so many clips: what the backward pass finds at its start, and what one layer takes meanwhile."""
    kept = _kept(flow, clip, precision, rows)
    whole = replace(flow, use_checkpoint=0)
    shorter = replace(whole, layers_per_block=(*flow.layers_per_block[:-1], max(flow.layers_per_block[-1] - 1, 0)))
    layer = _kept(whole, clip, precision, rows) - _kept(shorter, clip, precision, rows) if shorter != whole else 0
    # A layer that is recomputed is kept while its gradient is taken; one that is not hands gradients of its largest
    # activations (MLP) on.
    hidden = rows * (clip.text + clip.frames * clip.frame_tokens) * 4 * flow.width(flow.num_blocks - 1) * _NUMBER
    return kept, (layer if flow.use_checkpoint else 0) + 2 * hidden


def _kept(config: FlowConfig, clip: TokenGrid, precision: str, rows: int) -> int:
    """Bytes that autograd keeps of a forward pass of so many clips, weights apart, with the results that are held."""
    patch = config.patch_size
    # Counted on the CPU: autograd keeps the same on every device, except where attention has no kernel.
    with FakeTensorMode(allow_non_fake_inputs=True):
        flow = Flow(config)
        x = torch.empty(rows, clip.frames, config.in_channels, clip.height * patch, clip.width * patch)
        y = torch.empty(rows, clip.text, config.txt_dim) if clip.text else None
        rounding = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with _counting(flow) as found, rounding:
            encoded = flow.encode(x.requires_grad_(flow.denoiser is not None), y)
            nll_of(encoded).mean()
            for held in (*(affine.raw for affine in encoded.affines if affine is not None), *encoded.latents):
                found.add(held)
        if flow.denoiser is None:
            return found.bytes
        with _counting(flow) as other, rounding:
            flow.denoiser(x.detach(), y if config.conditional_denoiser else None)
    # The graph of the flow is gone when the denoiser runs.
    return max(found.bytes, other.bytes)


class _counting:  # noqa: N801  (a context manager)
    """Adds up what autograd keeps, every memory once and that of the weights not at all."""

    def __init__(self, flow: Flow) -> None:
        self._weights = {parameter.untyped_storage()._cdata for parameter in flow.parameters()}
        self._held: dict[int, Tensor] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor that is held beside autograd."""
        self._pack(tensor.detach())

    @property
    def bytes(self) -> int:
        """Of everything that was kept."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._held.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._weights:
            # Held, so that no other memory gets its place.
            self._held.setdefault(key, tensor)
        return tensor

    def __enter__(self) -> _counting:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
