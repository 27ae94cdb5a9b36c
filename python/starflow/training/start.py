"""The weights that a run starts with: random ones, or those of a model that it goes on from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from starflow.codecs import Codec
from starflow.config import ConfigError, RunConfig, to_mapping
from starflow.messages import listed, short, shown
from starflow.model import Flow
from starflow.storage import check_parts, load_flow, read_header
from starflow.text import TextEncoder

logger = logging.getLogger(__name__)

# Options of a flow that may differ from those of the model that it starts from: they leave what the flow computes as it
# is, or add (or leave out) a part. All others say what the weights mean.
_FREE = (
    "use_checkpoint",
    "local_attn_window",
    "frame_dim",
    "learnable_self_denoiser",
    "conditional_denoiser",
    "denoiser_window",
)
# These say what the weights of a denoiser mean, of which there are none where one is added or left out.
_OF_DENOISER = ("flow.denoiser_layers", "flow.denoiser_skip", "flow.denoiser_components")
# What a flow may have more than its model: the projection of vectors of frames, and a denoiser.
_FRAMES = re.compile(r".*\bproj_frame\.(weight|bias)$")
_DENOISER = "denoiser."
_CENTRE = f"{_DENOISER}centre.mean"


def new_flow(config: RunConfig) -> Flow:
    """A flow with random weights, which follow from `train.seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        return Flow(config.flow)


def started_flow(config: RunConfig, codec: Codec, text: TextEncoder | None) -> Flow:
    """The flow of `config` with the weights of the model that `train.init` names, in float32.

    A projection of the vectors of frames that the model does not have starts at zero, so that the flow computes what
    the model does, whatever the vectors; a denoiser that it does not have starts as in a new flow. The log tells each
    option that is not the model's.

    Args:
        config: of the run, `train.init` set.
        codec, text: that it describes.

    Raises:
        ConfigError: another model than the configuration describes; the options that differ and the tensors that do
            not fit are listed.
        CheckpointError: a model that cannot be read, or one of another autoencoder or text encoder.
    """
    model = config.train.init
    assert model is not None
    source, base = load_flow(model)
    about = read_header(model).about
    flow = new_flow(config)
    own, given = flow.state_dict(), source.state_dict()
    filled = replace(config, codec=codec.to_config(), text={} if text is None else text.to_config())
    changes = list(_changes(base, config, filled))
    _check(model, config, base, changes, own, given)
    check_parts(f"train.init {short(model)}", about, config)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])
            elif _FRAMES.match(name):
                tensor.zero_()
            elif name == _CENTRE:
                # A denoiser that is added: the mean of the data is no weight that starts anew.
                tensor.copy_(given[name.removeprefix(_DENOISER)])
    kind = {"average": "averaged weights", "last": "last weights"}.get(about.get("weights", ""), "weights")
    step = f" of step {short(about['step'])}" if "step" in about else ""
    logger.info("starting from the %s%s of %s", kind, step, short(model))
    for option, was, now in changes:
        level = logging.WARNING if option.startswith("flow.") else logging.INFO
        logger.log(level, "%s is %s, in %s it is %s", option, shown(now), short(model), shown(was))
    return flow


def _check(
    model: str,
    config: RunConfig,
    base: RunConfig,
    changes: Iterable[tuple[str, Any, Any]],
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> None:
    """That weights of a model mean the same in a flow."""
    if any(name.endswith(".weight_int8") for name in given):
        raise ConfigError(
            f"train.init is {shown(model)}, whose weights are kept as integers, expected floating-point numbers "
            "(`starflow convert --dtype bfloat16`)"
        )
    both = base.flow.learnable_self_denoiser and config.flow.learnable_self_denoiser
    options = [
        f"{option} is {shown(now)}, the model has {shown(was)}"
        for option, was, now in changes
        if _decides(option) and (both or option not in _OF_DENOISER)
    ]
    added = base.flow.frame_dim == 0, not base.flow.learnable_self_denoiser
    dropped = config.flow.frame_dim == 0, not config.flow.learnable_self_denoiser
    problems = {
        "missing in the model": [name for name in own if name not in given and not _optional(name, *added)],
        "unexpected in the model": [name for name in given if name not in own and not _optional(name, *dropped)],
        "of another shape": [
            f"{name} {list(given[name].shape)} (expected {list(own[name].shape)})"
            for name in own
            if name in given and own[name].shape != given[name].shape
        ],
    }
    if not options and not any(problems.values()):
        return
    told = [f"tensors {what}: {listed(names, 16)}" for what, names in problems.items() if names]
    raise ConfigError(
        f"train.init is {shown(model)}, expected a model of the same flow, codec and text as the configuration: "
        f"{'; '.join([*options, *told])} (a yaml without the sections flow, codec and text takes them from the model, "
        "and so does --init without --config)"
    )


def _optional(name: str, frames: bool, denoiser: bool) -> bool:
    """Whether a tensor may be in one of model and flow alone: that of vectors of frames, or of a denoiser."""
    return (denoiser and name.startswith(_DENOISER)) or (frames and _FRAMES.match(name) is not None)


def _decides(option: str) -> bool:
    """Whether an option says what weights mean; the folder of local parts may be elsewhere."""
    section, _, name = option.partition(".")
    if section == "flow":
        return name not in _FREE
    return section in ("codec", "text") and name != "folder"


def _changes(base: RunConfig, config: RunConfig, filled: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Options that differ, as (name, value in the model, value here).

    Args:
        base: of the model.
        config: of the run, as it was given.
        filled: the same with every option of codec and text encoder, defaults included.
    """
    before, given, after = to_mapping(base), to_mapping(config), to_mapping(filled)
    for section, options in after.items():
        for name in dict.fromkeys((*options, *before[section])):
            now = options.get(name)
            # A converted model names the options of codec and text encoder that are not the defaults.
            was = before[section].get(name, None if name in given[section] else now)
            if was != now and (section, name) != ("train", "init"):
                yield f"{section}.{name}", was, now
