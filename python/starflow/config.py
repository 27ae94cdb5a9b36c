"""Configuration of the model, the data, training and sampling.

Frozen dataclasses: a field that does not exist is an error that names it, a value out of range is an error that
names the field, what was given and what was expected. `FlowConfig` keeps the option names of the published STARFlow
code wherever that code has the option, so that a published yaml reads like one of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from starflow.messages import short, shown
from starflow.numeric import integer, number
from starflow.schedules import parse_solver

ConfigType = TypeVar("ConfigType")
FrameOrder = Literal["raster", "spread", "farthest", "checkerboard", "interlace", "diagonal", "random"]

LogKind = Literal["tensorboard", "wandb", "none"]
DenoiseKind = Literal["auto", "learned", "published", "score", "none"]

# Layers and blocks of a flow: the published ones have 40. Far more is an accident, and would be made one by one.
_LAYERS = 10_000
# Channels and the like, so that the bytes of a weight fit into 63 bits; the widest published network has 3,072.
_SIZE = 1 << 20
# Integers end where those of tensors do.
_INTEGERS = 1 << 63

# Frames a second that video files and GIFs can be written at.
LEAST_FPS, MOST_FPS = 0.01, 100_000.0

CONFIGS = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be used: unknown key, wrong type or value out of range."""


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Raises `ConfigError` naming `option`, what was given and what was expected, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{option} is {shown(got)}, expected {expected}")


@dataclass(frozen=True)
class FlowConfig:
    """Architecture of the flow (STARFlow-V, STARFlow and TarFlow are settings of one definition).

    Args:
        in_channels: channels of a latent frame.
        patch_size: side p of a patch; a token has `p * p * in_channels` dimensions.
        img_size: nominal latent side; fixes `pt_seq_len` and the size of a learned position table, not what fits.
        channels: width of the transformers.
        layers_per_block: transformer layers of each block, shallow blocks first; the last is the deep block, applied
            last from data to noise. 0 makes an identity block (not for the last).
        head_dim, num_heads, num_kv_heads: attention heads; `num_heads` defaults to width // head_dim.
        top_block_channels: width of the deep block where it differs.
        rope: rotary positions; otherwise a learned table. pt_seq_len: side that rotary coordinates are scaled to.
        sos: a learned start token is read in place of the token before the first; otherwise the output is shifted and
            the first token passes unchanged (TarFlow).
        txt_size, txt_dim: text tokens and their width. cond_top_only: only the deep block reads them.
        frame_dim: width of the vector that each latent frame may be given, such as an action; 0 for none. The deep
            block adds its projection to the tokens of that frame: a frame depends on the vectors up to its own.
        use_softplus: scale = softplus(a + const) instead of exp(a). nvp: False predicts the shift only.
        soft_clip: bound s of the network output, s * tanh(raw / s); 0 switches it off.
        norm_type: "layer_norm", "rms_norm" or "none". use_final_norm: RMSNorm before the output projection.
        use_swiglu: gated MLP (tanh GELU gate). use_qk_norm: RMSNorm of queries and keys, head by head. use_post_norm:
            RMSNorm of each branch before it is added to the residual stream. use_bias: linear layers have a bias.
        hf_style_rope: rotate halves against each other instead of neighbours.
        seq_order: "L2R" or "R2L": whether even blocks use the flipped or the raster order.
        top_order: "raster" follows `seq_order` in the deep block too; "spread" visits the tokens of a frame in
            bit-reversed order (far apart first) with separate query and key positions; so do the others, in orders of
            their own (see `starflow.model.token_order`). shallow_order: the same for all other blocks.
        position_embed: each embedded token also gets a projection of the rotary cosines and sines of the token that it
            predicts; the published models lack this. text_embed: each token of a block that reads text also gets a
            projection of the sum of the text features; the published models lack this too.
        temporal_causal: with 0, flipped blocks visit the whole sequence backwards; above 0 they flip each frame for
            itself, and the number is the look-ahead of the denoiser in frames.
        shallow_block_local: shallow blocks see one frame at a time. local_attn_window: frames of a sampling window.
        attention_frames: frames that every layer of the deep block sees behind its own; None is all of the clip, or of
            its window. With a number nothing that the block reads depends on how long a clip has become: positions
            are relative in time, and text enters by `text_embed` alone. A clip then grows for ever in the memory of
            these frames, and nothing is encoded twice.
        previous_frames: frames before its own whose tokens at the very place that is predicted are added to the input
            of the deep block, by a projection: attention has to learn where to look for them. At most
            `attention_frames`, which it takes; the published models have 0 (Alonso et al., Diffusion for World
            Modeling: Visual Details Matter in Atari, 2024, join past frames to a noisy one likewise).
        centred: the mean of the data is taken off before any network reads them, and added to what is made (see
            `starflow.model.Centre`). Training measures it before its first step; the published models lack this.
        learnable_self_denoiser: the model has a network for the score (`starflow.model.Denoiser`).
            denoiser_layers: of that network, 8 as published. conditional_denoiser: it reads text and the vectors of
            frames. denoiser_window: frames before its own that a frame sees in that network; None is all of them.
            denoiser_skip: the network predicts the score less so many times its noisy input. With 1 / `train.noise_std`
            what is left to it is the clean latents, which it can tell of tokens of more channels than its own width;
            noise it cannot. The published models have 0 (Li & He, Back to Basics: Let Denoising Generative Models
            Denoise, 2025, on patches of many values). denoiser_components: the network predicts the score less that of
            a Gaussian with so many principal components of the data at each place of a frame (see
            `starflow.model.Gaussian`), which training measures before its first step; 0 is none, as published.
        use_checkpoint: recompute activations of every n-th layer in the backward pass; 0 never.
        num_classes: class-conditional embedding instead of text (TarFlow). channel_first_patches: channel slowest
            inside a token (TarFlow) instead of fastest.

    Reference: Gu et al., STARFlow (2025); Gu et al., STARFlow-V (2025); Zhai et al., TarFlow (2024).
    """

    in_channels: int
    img_size: int
    channels: int
    layers_per_block: tuple[int, ...]
    patch_size: int = 1
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    top_block_channels: int | None = None
    rope: bool = True
    pt_seq_len: int | None = None
    sos: bool = True
    txt_size: int = 0
    txt_dim: int = 0
    cond_top_only: bool = False
    frame_dim: int = 0
    use_softplus: bool = True
    nvp: bool = True
    soft_clip: float = 0.0
    norm_type: Literal["layer_norm", "rms_norm", "none"] = "layer_norm"
    use_final_norm: bool = False
    use_swiglu: bool = False
    use_qk_norm: bool = False
    use_post_norm: bool = False
    use_bias: bool = True
    hf_style_rope: bool = False
    seq_order: Literal["L2R", "R2L"] = "R2L"
    top_order: FrameOrder = "raster"
    shallow_order: FrameOrder = "raster"
    position_embed: bool = False
    text_embed: bool = False
    temporal_causal: int = 0
    shallow_block_local: bool = False
    local_attn_window: int | None = None
    attention_frames: int | None = None
    previous_frames: int = 0
    centred: bool = False
    learnable_self_denoiser: bool = False
    denoiser_layers: int = 8
    conditional_denoiser: bool = False
    denoiser_window: int | None = None
    denoiser_skip: float = 0.0
    denoiser_components: int = 0
    use_checkpoint: int = 0
    num_classes: int = 0
    channel_first_patches: bool = False

    def __post_init__(self) -> None:
        _settle(self, "flow")
        for name in ("in_channels", "img_size", "channels", "patch_size", "head_dim", "denoiser_layers"):
            require(getattr(self, name) >= 1, f"flow.{name}", getattr(self, name), "an integer >= 1")
        for name in ("num_heads", "num_kv_heads", "top_block_channels", "pt_seq_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"flow.{name}", value, "an integer >= 1 or nothing")
        for name in ("txt_size", "txt_dim", "frame_dim", "temporal_causal", "use_checkpoint", "num_classes"):
            require(getattr(self, name) >= 0, f"flow.{name}", getattr(self, name), "an integer >= 0")
        for name in ("in_channels", "img_size", "channels", "head_dim", "top_block_channels", "txt_dim", "num_classes"):
            value = getattr(self, name) or 0
            require(value <= _SIZE, f"flow.{name}", value, f"at most {_SIZE}")
        require(self.img_size % self.patch_size == 0, "flow.img_size", self.img_size, "a multiple of patch_size")
        require(len(self.layers_per_block) >= 1, "flow.layers_per_block", self.layers_per_block, "one entry a block")
        require(
            all(n >= 0 for n in self.layers_per_block), "flow.layers_per_block", self.layers_per_block, "entries >= 0"
        )
        require(
            sum(self.layers_per_block) + self.num_blocks <= _LAYERS,
            "flow.layers_per_block",
            self.layers_per_block,
            f"at most {_LAYERS} layers and blocks together",
        )
        require(
            self.denoiser_layers <= _LAYERS and (self.denoiser_layers == 8 or self.learnable_self_denoiser),
            "flow.denoiser_layers",
            self.denoiser_layers,
            f"at most {_LAYERS}, and 8 without learnable_self_denoiser",
        )
        for block in range(self.num_blocks):
            require(self.heads(block) >= 1, "flow.head_dim", self.head_dim, f"at most the {self.width(block)} channels")
            require(
                self.heads(block) % self.kv_heads(block) == 0,
                "flow.num_kv_heads",
                self.kv_heads(block),
                f"a divisor of the {self.heads(block)} heads of block {block}",
            )
        require(not self.text_embed or self.txt_size > 0, "flow.text_embed", self.text_embed, "txt_size > 0 with it")
        require(not self.position_embed or self.rope, "flow.position_embed", self.position_embed, "rope with it")
        if self.rope:
            require(self.head_dim % 4 == 0, "flow.head_dim", self.head_dim, "a multiple of 4 with rope")
            if self.third_axis:
                require(self.head_dim >= 16, "flow.head_dim", self.head_dim, "at least 16 with rope and text or video")
        require((self.txt_size > 0) == (self.txt_dim > 0), "flow.txt_dim", self.txt_dim, "> 0 exactly when txt_size is")
        require(
            not self.cond_top_only or self.txt_size > 0,
            "flow.cond_top_only",
            self.cond_top_only,
            "txt_size > 0 with it",
        )
        require(
            self.temporal_causal == 0 or self.seq_order == "L2R", "flow.seq_order", self.seq_order, "L2R for videos"
        )
        require(
            not self.shallow_block_local or self.cond_top_only or self.txt_size == 0,
            "flow.shallow_block_local",
            self.shallow_block_local,
            "cond_top_only with it (frame-local blocks read no text)",
        )
        require(
            self.local_attn_window is None
            or (self.local_attn_window >= 2 and self.shallow_block_local and self.temporal_causal > 0),
            "flow.local_attn_window",
            self.local_attn_window,
            "a number of frames >= 2, together with shallow_block_local and temporal_causal",
        )
        require(
            self.attention_frames is None
            or (
                self.attention_frames >= 1
                and self.rope
                and self.sos
                and self.shallow_block_local
                and self.temporal_causal > 0
                and self.local_attn_window is None
            ),
            "flow.attention_frames",
            self.attention_frames,
            "a number of frames >= 1, together with rope, sos, shallow_block_local and temporal_causal, without "
            "local_attn_window",
        )
        require(
            self.attention_frames is None or self.txt_size == 0 or self.text_embed,
            "flow.text_embed",
            self.text_embed,
            "True with attention_frames and text",
        )
        require(
            0 <= self.previous_frames <= (self.attention_frames or 0),
            "flow.previous_frames",
            self.previous_frames,
            f"0 to attention_frames ({self.attention_frames or 0})",
        )
        require(
            self.denoiser_window is None or self.denoiser_window >= max(self.temporal_causal - 1, 0),
            "flow.denoiser_window",
            self.denoiser_window,
            "a number of frames >= temporal_causal - 1, so that a frame sees itself",
        )
        require(
            0 <= self.denoiser_skip < float("inf") and (self.denoiser_skip == 0 or self.learnable_self_denoiser),
            "flow.denoiser_skip",
            self.denoiser_skip,
            "a finite number >= 0, and 0 without learnable_self_denoiser",
        )
        require(
            self.denoiser_components == 0
            or (
                0 < self.denoiser_components <= self.token_channels
                and self.learnable_self_denoiser
                and self.centred
                and self.denoiser_skip == 0
            ),
            "flow.denoiser_components",
            self.denoiser_components,
            f"an integer from 0 to {self.token_channels}, and 0 without learnable_self_denoiser and centred, or with "
            "denoiser_skip",
        )
        require(
            self.num_classes == 0 or self.txt_size == 0, "flow.num_classes", self.num_classes, "0 when there is text"
        )
        require(
            not self.conditional_denoiser
            or (self.learnable_self_denoiser and (self.txt_size > 0 or self.frame_dim > 0)),
            "flow.conditional_denoiser",
            self.conditional_denoiser,
            "learnable_self_denoiser and txt_size > 0 or frame_dim > 0 with it",
        )
        require(
            self.frame_dim == 0 or self.temporal_causal > 0,
            "flow.temporal_causal",
            self.temporal_causal,
            "a number > 0 with frame_dim (frames go forward in time)",
        )
        require(self.frame_dim == 0 or self.sos, "flow.sos", self.sos, "True with frame_dim")
        require(0 <= self.soft_clip < float("inf"), "flow.soft_clip", self.soft_clip, "a finite bound >= 0")
        require(
            self.nvp or not self.use_softplus, "flow.use_softplus", self.use_softplus, "False with nvp False (no scale)"
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the deep one included."""
        return len(self.layers_per_block)

    @property
    def token_channels(self) -> int:
        """Dimensions of a token."""
        return self.in_channels * self.patch_size**2

    @property
    def frame_side(self) -> int:
        """Tokens along a side of a frame of the nominal size."""
        return self.img_size // self.patch_size

    @property
    def position_side(self) -> float:
        """Side length that rotary coordinates of a frame are scaled to."""
        return float(self.pt_seq_len if self.pt_seq_len is not None else self.frame_side)

    @property
    def third_axis(self) -> bool:
        """Whether rotary positions have an axis for text and time beside rows and columns."""
        return self.txt_size > 0 or self.temporal_causal > 0

    @property
    def activation(self) -> Literal["softplus", "exp", "none"]:
        """How the scale comes from the network output."""
        if not self.nvp:
            return "none"
        return "softplus" if self.use_softplus else "exp"

    def is_top(self, block: int) -> bool:
        """Whether `block` is the deep one."""
        return block == self.num_blocks - 1

    def width(self, block: int) -> int:
        """Transformer width of `block`."""
        return self.top_block_channels if self.top_block_channels and self.is_top(block) else self.channels

    def heads(self, block: int) -> int:
        """Query heads of `block`."""
        return self.num_heads if self.num_heads is not None else self.width(block) // self.head_dim

    def kv_heads(self, block: int) -> int:
        """Key and value heads of `block`."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.heads(block)

    def text_width(self, block: int) -> int:
        """Width of the text that `block` reads, 0 where it reads none."""
        return self.txt_dim if self.is_top(block) or not self.cond_top_only else 0

    @classmethod
    def from_published(cls, options: Mapping[str, Any], family: Literal["starflow", "tarflow"]) -> FlowConfig:
        """Reads the constructor options of the published code, with that code's defaults.

        Args:
            options: option name -> value, as in a published yaml or checkpoint.
            family: which published code the options belong to.

        Raises:
            ConfigError: an option that neither the published code nor this one knows, or one that cannot be honoured.
        """
        given = dict(options)
        if family == "tarflow":
            defaults: dict[str, Any] = {
                "rope": False,
                "sos": False,
                "use_softplus": False,
                "channel_first_patches": True,
            }
        else:
            defaults = {"rope": False, "sos": False, "use_softplus": False}
            for inert in ("use_mm_attn", "noise_embed_denoiser", "use_checkpoint_mlp"):
                given.pop(inert, None)
            if given.pop("use_pretrained_lm", None):
                raise ConfigError("flow.use_pretrained_lm is set, expected unset: the published code cannot build it")
            norm = given.get("norm_type", "layer_norm")
            given["norm_type"] = norm if norm in ("layer_norm", "rms_norm") else "none"
        layers = given.pop("layers_per_block", 1)
        blocks = given.pop("num_blocks", None)
        layers = [layers] if isinstance(layers, int) else list(layers)
        if blocks is not None and len(layers) == 1:
            layers = layers * blocks
        require(blocks in (None, len(layers)), "flow.num_blocks", blocks, f"the {len(layers)} of layers_per_block")
        # 0 stands for "not set" in published yamls.
        for name in ("num_heads", "num_kv_heads", "pt_seq_len", "top_block_channels", "local_attn_window"):
            if given.get(name) == 0:
                given[name] = None
        return from_mapping(cls, {**defaults, **given, "layers_per_block": layers}, "flow")


@dataclass(frozen=True)
class DataConfig:
    """What a flow is trained on.

    Args:
        kind: "digits" (moving handwritten digits), "paddle" (a ball game and its keys, see
            `starflow.worlds.PaddleBall`), both made on the fly, or "folder" (video and image files, with the actions of
            their frames where these were recorded, see `starflow.data.read_actions`).
        path: the folder, or a tar file, which counts as a folder of its members; of pairs (`train.source_prob`) a
            folder with subfolders `source` and `target`.
        images: a folder of images (or videos, cut anywhere) that the steps on images take (`train.image_prob`); None
            takes frames of the clips. image_height, image_width: their size; None is that of the clips.
        frames: pixel frames of a clip.
        height, width: clips are resized to cover this and centre-cropped.
        fps: frames a second that files are read at; None keeps each file's own.
        mix_fps: frame rates of which each clip of a training draws one, among those that its file is not slower than
            and has enough frames for; `fps` is one of them, that of samples and scores by default. Captions that state
            the rate (`caption_fps`) state the drawn one. Empty: all clips have the rate `fps`.
        channels: 1 (grey) or 3.
        clips_per_file: clips that an epoch cuts from each file of a folder.
        cut: where clips begin in training: with "random" elsewhere in each epoch; with "even" at the same places in
            every epoch, spread from the first possible start to the last, which a small flow learns sooner.
        name_captions: a file without caption is captioned by its name.
        caption_second: captions of a folder end in a whole number, the second of the file at which the clip begins. A
            prompt can then ask for one part of a long video.
        caption_fps: captions state the frame rate, as in the published recipe.
        mix_aspect: clips of a folder keep the published aspect ratio that is nearest to their file's, with about the
            area of height x width, and captions state it; the clips of a step have one shape.
        cache_gb: gibibytes of decoded frames that are kept in memory.
        actions: names of the actions of frames, `flow.frame_dim` of them: clips have these as one-hot vectors. Null
            takes those of the folder's `world.json`, and `flow.frame_dim` and `world` follow; an empty list is for
            vectors that are no actions, or for none.
        world: name of the world that the clips show, which `starflow.worlds.open_world` opens; null for none.
        start, handwritings: of digits: whether clips begin in the "middle" of the picture or "anywhere", and whether
            they show the "typical" 40 % of the handwritings or "all" (see `starflow.data.MovingDigits`).
        contacts: of the paddle world: share of the clips that begin as a ball is about to reach the paddle.
    """

    kind: Literal["digits", "paddle", "folder"] = "digits"
    path: str | None = None
    images: str | None = None
    image_height: int | None = None
    image_width: int | None = None
    frames: int = 8
    height: int = 32
    width: int = 32
    fps: float | None = None
    mix_fps: tuple[float, ...] = ()
    channels: int = 1
    clips_per_file: int = 1
    cut: Literal["random", "even"] = "random"
    name_captions: bool = False
    caption_second: bool = False
    caption_fps: bool = False
    mix_aspect: bool = False
    cache_gb: float = 2.0
    actions: tuple[str, ...] | None = ()
    world: str | None = None
    start: Literal["middle", "anywhere"] = "middle"
    handwritings: Literal["typical", "all"] = "typical"
    contacts: float = 0.0

    def __post_init__(self) -> None:
        _settle(self, "data")
        for name in ("frames", "height", "width", "clips_per_file"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "an integer >= 1")
        for name in ("image_height", "image_width"):
            side = getattr(self, name)
            require(side is None or side >= 1, f"data.{name}", side, "an integer >= 1 or nothing")
            require(side is None or self.images is not None, f"data.{name}", side, "data.images together with it")
        require(self.channels in (1, 3), "data.channels", self.channels, "1 or 3")
        require(self.fps is None or 0.0 < self.fps < math.inf, "data.fps", self.fps, "a finite number > 0")
        if self.mix_fps:
            fine = all(0.0 < rate < math.inf for rate in self.mix_fps)
            require(fine, "data.mix_fps", self.mix_fps, "finite numbers > 0")
            require(len(set(self.mix_fps)) == len(self.mix_fps), "data.mix_fps", self.mix_fps, "numbers that differ")
            require(self.kind == "folder", "data.mix_fps", self.mix_fps, "an empty list but for a folder")
            require(self.frames > 1, "data.mix_fps", self.mix_fps, "an empty list with data.frames 1 (images)")
            require(
                self.fps in self.mix_fps,
                "data.fps",
                self.fps,
                "one of data.mix_fps, the rate of samples and scores",
            )
        require(0.0 <= self.cache_gb < math.inf, "data.cache_gb", self.cache_gb, "a finite number >= 0")
        names = self.actions or ()
        require(len(set(names)) == len(names), "data.actions", names, "names that differ")
        require(
            self.actions is not None or self.kind == "folder",
            "data.actions",
            None,
            "a list but for a folder, whose world.json has the names",
        )
        require(
            not self.caption_fps or self.fps is not None or self.frames == 1,
            "data.fps",
            self.fps,
            "a number with data.caption_fps",
        )
        for name, usual in (("start", "middle"), ("handwritings", "typical")):
            require(
                self.kind == "digits" or getattr(self, name) == usual,
                f"data.{name}",
                getattr(self, name),
                f"{usual!r} but for digits",
            )
        require(0.0 <= self.contacts <= 1.0, "data.contacts", self.contacts, "a share from 0 to 1")
        require(
            self.kind == "paddle" or not self.contacts, "data.contacts", self.contacts, "0 but for the paddle world"
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe.

    Args:
        init: a model that the run starts from: the folder of a run, a model file or folder (a converted one too), or
            the name of one that comes with the package. Flow, codec and text must be its own, apart from vectors of
            frames and a denoiser, which may be added (see `starflow.training.start`); None for random weights.
        steps: optimiser steps. batch_size: clips of a step. accumulate: equal parts in which a step is computed; their
            gradients are added up.
        lr, min_lr, warmup_steps: learning rate of the flow: a linear warm-up to `lr`, then a cosine down to `min_lr`.
            denoiser_lr: peak learning rate of the denoiser, which has the same schedule and learns in every
            `denoiser_every`-th step.
        optimizer: "adamw", or "muon", which takes the matrices inside of layers out of AdamW (see `starflow.training`).
        beta1, beta2, weight_decay: AdamW of the flow; the denoiser's has the default betas.
        noise_std: standard deviation sigma of the noise added to latents. cond_noise_level: captions state sigma, and
            the loss is weighted by sigma / 0.3.
        latent_norm_regularization: weight of a penalty, the mean square of the latents that enter each block.
        drop_label: probability that a caption is emptied. drop_frame_condition: probability that the vectors of all
            frames of a clip are left out, so that the flow learns what happens whatever they are. drop_image:
            probability that the first latent frame of a clip is dropped and its caption begins with "(extend) ", so
            that the flow learns to continue a clip.
            last_frame_prob: probability that the last frame of a clip, encoded alone, stands before the clip and its
            caption begins with "(last) ", so that the flow learns to arrive at a given frame. source_prob: of the steps
            that do neither and show no images, the share in which the source of each clip stands before it and its
            caption begins with "(v2v) ", so that the flow learns to make a clip from its source; above 0 the data must
            be pairs.
        image_prob: probability that a step trains on single frames as images, `image_batch_size` of them (default
            `batch_size`). image_frame: the frame of a clip that is shown as an image: "any", or "first" for data whose
            first frames look unlike later ones, when sampled images shall look like first frames.
        grad_clip: norm that gradients are clipped to; 0 is off. grad_skip: after 100 steps, skip a step whose norm
            exceeds `grad_skip` times the clip; 0 is off. The log tells when more than half of 100 steps are skipped,
            and 500 in a row end the training.
        ema: decay of the averaged weights that are sampled from; 0 is off, and the weights themselves are sampled from.
        precision: dtype in which matrix products are computed; the residual stream and the affine maps stay float32.
            "auto" is "bfloat16" where the processor or the GPU is faster at such products, else "float32".
        parallel: how the processes that `torchrun` starts share the work: "ddp" keeps all weights and moments in each
            of them, "fsdp" a piece (slower, less memory). It does nothing in one process, and changes results only by
            the order of sums.
        seed: of weights, data order, noise and dropping.
        checkpoint_every: steps between checkpoints; 0 writes one at the end alone. sample_every: steps between sheets
            of samples; 0 makes none.
        log: where curves go: "tensorboard" (a folder; left out where TensorBoard is not installed), "wandb" (Weights &
            Biases, with the account and the server of its own settings), or "none".
    """

    init: str | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-6
    denoiser_lr: float = 1e-3
    denoiser_every: int = 1
    warmup_steps: int = 50
    optimizer: Literal["adamw", "muon"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-4
    noise_std: float = 0.1
    cond_noise_level: bool = False
    latent_norm_regularization: float = 0.0
    drop_label: float = 0.1
    drop_frame_condition: float = 0.1
    drop_image: float = 0.0
    last_frame_prob: float = 0.0
    source_prob: float = 0.0
    image_prob: float = 0.0
    image_batch_size: int | None = None
    image_frame: Literal["any", "first"] = "any"
    grad_clip: float = 1.0
    grad_skip: float = 0.0
    ema: float = 0.999
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    checkpoint_every: int = 0
    sample_every: int = 0
    log: LogKind = "tensorboard"

    def __post_init__(self) -> None:
        _settle(self, "train")
        for name in ("steps", "batch_size", "accumulate", "denoiser_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer >= 1")
        for size in (self.batch_size, self.image_batch_size or self.batch_size):
            require(
                size >= 1 and size % self.accumulate == 0, "train.accumulate", self.accumulate, f"a divisor of {size}"
            )
        shares = ("drop_label", "drop_frame_condition", "drop_image", "last_frame_prob", "source_prob", "image_prob")
        for name in (*shares, "ema"):
            require(0.0 <= getattr(self, name) <= 1.0, f"train.{name}", getattr(self, name), "a number from 0 to 1")
        numbers = ("lr", "min_lr", "denoiser_lr", "noise_std", "grad_clip", "grad_skip", "weight_decay")
        counts = ("warmup_steps", "checkpoint_every", "sample_every")
        for name in (*numbers, "latent_norm_regularization", *counts):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}", value, "a finite number >= 0")
        for name in ("beta1", "beta2"):
            require(
                0.0 <= getattr(self, name) < 1.0, f"train.{name}", getattr(self, name), "a number from 0 to below 1"
            )
        require(
            self.optimizer == "adamw" or self.parallel == "ddp",
            "train.optimizer",
            self.optimizer,
            "'adamw' with parallel 'fsdp' (Muon needs whole matrices)",
        )
        require(0 <= self.seed < 1 << 63, "train.seed", self.seed, "an integer from 0 to 2^63 - 1")
        require(
            self.grad_skip == 0 or self.grad_clip > 0, "train.grad_clip", self.grad_clip, "> 0 together with grad_skip"
        )


@dataclass(frozen=True)
class SampleConfig:
    """Defaults of sampling, kept with the model.

    Args:
        guidance: weight of classifier-free guidance.
        guidance_frames: first frames of a clip that are guided, for flows with attention_frames; None for all.
        temperature: factor of the noise that clips are made from; below 1 they vary less and keep together better.
        solver: "sequential", "chunks[:block[:threshold]]" or "window[:size[:tolerance]]".
        denoise: how the noise of the training data is removed (see `SampleOptions`).
        precision: dtype of the arithmetic: "float32", "two_bfloat16", "float16", "bfloat16" or "int8" (see
            docs/solver.md).
        fps: frames a second of the files that are written.
        prompts: of the samples that training makes while it runs.
    """

    guidance: float = 0.0
    guidance_frames: int | None = None
    temperature: float = 1.0
    solver: str = "window"
    denoise: DenoiseKind = "auto"
    precision: Literal["float32", "two_bfloat16", "float16", "bfloat16", "int8"] = "float32"
    fps: float = 8.0
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _settle(self, "sample")
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"sample.{name}", value, "a number >= 0")
        frames = self.guidance_frames
        require(frames is None or frames >= 1, "sample.guidance_frames", frames, "an integer >= 1 or nothing")
        require(LEAST_FPS <= self.fps <= MOST_FPS, "sample.fps", self.fps, f"{LEAST_FPS:g} to {MOST_FPS:g}")
        try:
            parse_solver(self.solver)
        except ValueError as error:
            raise ConfigError(f"config.sample.{error}") from None


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made of.

    Args:
        flow: architecture; data, train, sample: as their names say.
        codec: pixels to latents, e.g. `{kind: dct, patch: 4}` (see `starflow.codecs.make_codec`).
        text: captions to features, e.g. `{kind: words}` (see `starflow.text.make_text_encoder`); empty for none.
            `{kind: words, vocabulary: null}` takes the words of the data's captions when training begins,
            `{kind: classes, names: null}` the captions as they are.
    """

    flow: FlowConfig
    data: DataConfig = field(default_factory=DataConfig)
    codec: dict[str, Any] = field(default_factory=lambda: {"kind": "dct", "patch": 4, "channels": 1})
    text: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(
            self.flow.frame_dim == 0 or not self.data.mix_fps,
            "data.mix_fps",
            self.data.mix_fps,
            "an empty list with flow.frame_dim: each frame of a video has an action of its own",
        )

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Reads a yaml file.

        Args:
            path: of the file, or the name of a config that comes with the package (see `config_names`).

        Raises:
            ConfigError: not a file, not yaml, or an option that is wrong; the message names it.
        """
        return from_mapping(cls, cls.sections(path))

    @staticmethod
    def sections(path: str | Path) -> dict[str, Any]:
        """The options of a yaml file as they stand there, section by section; arguments and errors as of `load`."""
        included = str(path) in config_names() and not Path(path).is_file()
        expected = f"a yaml file or one of {', '.join(config_names())}"
        values = read_yaml(CONFIGS / f"{path}.yaml" if included else Path(path), expected)
        require(isinstance(values, Mapping), f"config {short(path)}", type(values).__name__, "a mapping of options")
        return dict(values)


# Bytes of a yaml file, and its values with every alias written out. A text of 700 bytes can hold 10^9 values, as lists
# of aliases of lists of aliases, which whatever copies or prints them writes out.
_YAML_BYTES = 4 << 20
_YAML_VALUES = 1 << 20
# Digits of a number: more are an accident, and Python computes with all of them.
_YAML_DIGITS = 40

# Numbers of yaml 1.1 that mean another one than in any other text: of base 8 by a leading zero, of base 60 by colons.
_OLD_NUMBERS = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")

# The parser in C is ten times as fast; not every build of PyYAML has it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path, expected: str = "a yaml file") -> Any:
    """The content of a yaml file (see `parse_yaml`).

    Args:
        path: of the file.
        expected: what the error says of a file that cannot be read.

    Raises:
        ConfigError: not a file, too large, or not yaml; the message names it.
    """
    name = f"config {short(path)}"
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{name} cannot be read: it is no file; expected {expected}")
        with path.open("rb") as file:
            content = file.read(_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name} cannot be read: {reason}; expected {expected}") from None
    if len(content) > _YAML_BYTES:
        raise ConfigError(f"{name} has more than {_YAML_BYTES} bytes, expected {expected}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not text, expected a yaml file") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Any:
    """The values of a yaml text: plain ones, in a number and a size that can be copied and printed.

    Args:
        text: that was read.
        name: of where it is from, for errors.

    Raises:
        ConfigError: not yaml; yaml whose aliases stand for more than a million values or for themselves; a key that
            stands twice in a mapping, of which yaml takes the last; or a number that yaml reads as another one than it
            looks like, 010 as 8 and 1:30 as 90.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if _values(node, {}) > _YAML_VALUES:
                raise ConfigError(f"{name} stands for more than {_YAML_VALUES} values, expected fewer aliases")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(name) else f"{name} {error}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply, expected a mapping of options") from None
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ConfigError(f"{name} is not yaml: {short(error.problem or error.context or 'unknown')}{where}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is not yaml: {short((str(error) or 'unknown').splitlines()[0])}") from None


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a yaml document has, every alias written out."""
    place = id(node)
    if place in known:
        if not known[place]:
            raise ConfigError("holds an alias of itself, expected values that end")
        return known[place]
    known[place] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        _refuse_doubles(node)
        count += sum(_values(part, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_values(part, known) for part in node.value)
    elif node is not None and node.tag.endswith((":int", ":float")) and len(node.value) > _YAML_DIGITS:
        raise ConfigError(f"has the number {short(node.value, 40)}, expected at most {_YAML_DIGITS} digits")
    elif node is not None and node.tag.endswith((":int", ":float")) and _OLD_NUMBERS.fullmatch(node.value):
        raise ConfigError(
            f"has {node.value} in line {node.start_mark.line + 1}, which yaml reads as a number of base 8 or 60; "
            "expected digits without a 0 in front and without a colon, or quotes around a text"
        )
    known[place] = count
    return count


def _refuse_doubles(node: yaml.MappingNode) -> None:
    """Raises `ConfigError` where a key of a mapping stands twice; a merge (`<<`) may."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
            if key.value in seen:
                raise ConfigError(
                    f"has {shown(key.value)} a second time in line {key.start_mark.line + 1}, expected each key once"
                )
            seen.add(key.value)


def config_names() -> list[str]:
    """Names of the configs that come with the package, which `RunConfig.load` reads."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """Checks `value` against the annotated type `kind` and converts what yaml cannot say (tuples, nested configs)."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        require(isinstance(value, Mapping), path, value, "a mapping of options")
        return from_mapping(kind, value, path)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is not type(None):
                try:
                    return _coerce(option, value, path)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0]
    if origin is Literal:
        require(value in typing.get_args(kind), path, value, "one of " + ", ".join(map(repr, typing.get_args(kind))))
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_coerce(typing.get_args(kind)[0], item, path) for item in value)
    if origin in (dict, Mapping):
        require(isinstance(value, Mapping), path, value, "a mapping")
        return dict(value)
    if kind is bool:
        require(isinstance(value, bool) or value in (0, 1), path, value, "true or false")
        return bool(value)
    whole = integer(value) if kind in (int, float) else None
    if whole is not None:
        require(-_INTEGERS <= whole < _INTEGERS, path, value, "a number of at most 63 bits")
    if kind is int:
        require(whole is not None, path, value, "an integer")
        return whole
    if kind is float:
        if isinstance(value, str):  # yaml reads 1e-4 (no dot) as text
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{path} is {shown(value)}, expected a number") from None
        found = number(value)
        if found is None:
            raise ConfigError(f"{path} is {shown(value)}, expected a number")
        return float(found)
    if kind is str:
        require(isinstance(value, str), path, value, "text")
        return value
    return value


def _settle(section: Any, path: str) -> None:
    """Holds the options of a section that was made in Python to their types, as those of a file are."""
    made: Any = type(section)
    for name, kind in _kinds(made).items():
        object.__setattr__(section, name, _coerce(kind, getattr(section, name), f"{path}.{name}"))


@cache
def _kinds(section: type) -> dict[str, Any]:
    """The types of the options of a section."""
    return typing.get_type_hints(section)


def from_mapping(kind: type[ConfigType], values: Mapping[str, Any], path: str = "config") -> ConfigType:
    """Builds the config dataclass `kind` from a mapping; an unknown key is an error that names the nearest one."""
    hints = _kinds(typing.cast(Any, kind))
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(short(key), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
            raise ConfigError(f"{path}.{short(key)} is not an option{hint}")
    required = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}, expected a value for each of {', '.join(required)}")
    return kind(**{key: _coerce(hints[key], value, f"{path}.{key}") for key, value in values.items()})


def to_mapping(config: Any) -> dict[str, Any]:
    """The config dataclass as plain values that yaml and json can write."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))
