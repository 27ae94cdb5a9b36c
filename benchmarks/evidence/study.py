"""What the study compares, on which data, at which budget: rows, their recipes and their variants of sampling.

A row is "KIND/MODEL/SEED". All models of a kind see the same clips in the same order, with the same text and keys, and
have as many parameters as the flow (within 3 %). A budget is in seconds of processor time; the steps that it allows a
model were measured once, models in turn in one process, and are written down in study.yaml, so that a row can be
trained again elsewhere to the same weights.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline, Diffusion, Regression
from torch import Tensor

from starflow.config import RunConfig, read_yaml
from starflow.training.batches import make_dataset, make_parts
from starflow.worlds import open_world, record

HERE = Path(__file__).parent
PLAN = HERE / "study.yaml"
# Results of another one are not mixed in.
VERSION = 1
KINDS = ("paddle", "digits", "freeway")
# Of tuning: every model's rate is chosen among the same ones, and its options of sampling among as many.
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
TUNING_SEED = 100
# Of a world that is recorded: frames of a split, and of its clips. Held-out clips are as long as the longest dream; one
# in 13, where an episode ends, is shorter and is left out.
RECORDED = {"train": (20000, 1000), "test": (72 * 160, 160)}
OPTIONS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "paddle": {
        "flow": [{"temperature": value} for value in (1.0, 0.7, 0.5, 0.3)],
        "diffusion": [{"context": value} for value in (0.02, 0.05, 0.1, 0.2)],
    },
    "freeway": {
        "flow": [{"temperature": value} for value in (1.0, 0.7, 0.5, 0.3)],
        "diffusion": [{"context": value} for value in (0.02, 0.05, 0.1, 0.2)],
    },
    "digits": {
        "flow": [
            {"temperature": 1.0},
            *(
                {"temperature": temperature, "guidance": guidance, "guidance_frames": 3}
                for temperature, guidance in ((0.7, 1.0), (0.5, 2.0), (0.3, 2.0))
            ),
        ],
        "diffusion": [
            {"context": context, "guidance": guidance, "guidance_frames": 3}
            for context, guidance in ((0.05, 0.0), (0.05, 1.0), (0.05, 2.0), (0.15, 1.0))
        ],
    },
}


@dataclass(frozen=True)
class Recipe:
    """How a model differs from the flow of its kind.

    Args:
        flow, train: options of the flow's config that it changes.
        baseline: class of a model that is no flow.
        width, layers: of its network.
    """

    flow: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    baseline: type[Baseline] | None = None
    width: int = 128
    layers: int = 7


MODELS: dict[str, Recipe] = {
    "flow": Recipe(),
    "diffusion": Recipe(baseline=Diffusion),
    "regression": Recipe(baseline=Regression),
    # Variants of the flow: the denoiser learns twice as often (in as many seconds), twice as many heads of half the
    # width, the frame before at each token's own place, that and data without their mean, both and a denoiser that
    # begins from a Gaussian of the data, and ablations of the paper.
    "flow-denoiser-2": Recipe(train={"denoiser_every": 2}),
    "flow-heads-32": Recipe(flow={"head_dim": 32}),
    "flow-previous": Recipe(flow={"previous_frames": 1}),
    "flow-improved": Recipe(flow={"previous_frames": 1, "centred": True}),
    "flow-gaussian": Recipe(
        flow={"previous_frames": 1, "centred": True, "denoiser_skip": 0.0, "denoiser_components": 8}
    ),
    "flow-lookahead": Recipe(flow={"temporal_causal": 2, "denoiser_window": None}),
    "flow-global": Recipe(flow={"shallow_block_local": False, "attention_frames": None}),
    "flow-noise-0.1": Recipe(flow={"denoiser_skip": 10.0}, train={"noise_std": 0.1}),
    "flow-noise-0.4": Recipe(flow={"denoiser_skip": 2.5}, train={"noise_std": 0.4}),
}


@dataclass(frozen=True)
class Row:
    """A model that is trained.

    Args:
        kind: of data. model: of `MODELS`. seed: of weights, data order and noise.
    """

    kind: str
    model: str
    seed: int

    @classmethod
    def parse(cls, text: str) -> Row:
        """From "KIND/MODEL/SEED".

        Raises:
            ValueError: it is none.
        """
        parts = text.split("/")
        if len(parts) != 3 or parts[0] not in KINDS or parts[1] not in MODELS or not parts[2].isdecimal():
            raise ValueError(
                f"row {text!r}: expected KIND/MODEL/SEED with a kind of {', '.join(KINDS)}, a model of "
                f"{', '.join(MODELS)} and a number"
            )
        return cls(parts[0], parts[1], int(parts[2]))

    def __str__(self) -> str:
        return f"{self.kind}/{self.model}/{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """How the model differs from the flow."""
        return MODELS[self.model]


@dataclass(frozen=True)
class Plan:
    """What study.yaml fixes.

    Args:
        budget: seconds of processor time of a training.
        steps: that they allow, by kind and model.
        rates: learning rates that tuning chose, by kind and model.
        options: of sampling that tuning chose, by kind and model.
    """

    budget: float
    steps: Mapping[str, Mapping[str, int]]
    rates: Mapping[str, Mapping[str, float]]
    options: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @classmethod
    def load(cls, path: Path = PLAN) -> Plan:
        """From a file."""
        return cls(**read_yaml(path))

    def of(self, row: Row) -> tuple[int, float, Mapping[str, Any]]:
        """Steps, learning rate and options of sampling of a row; a variant of the flow has its, or its own."""

        def own(values: Mapping[str, Any]) -> Any:
            return values.get(row.model, values.get("flow", {}) if row.recipe.baseline is None else {})

        return own(self.steps[row.kind]), own(self.rates[row.kind]), own(self.options[row.kind])


@functools.cache
def config_of_kind(kind: str) -> RunConfig:
    """The flow's run on a kind of data, before rates and steps; data that are a recording are made where they lack."""
    config = RunConfig.load(HERE / f"{kind}.yaml")
    if config.data.path is not None:
        folder = HERE.parents[1] / config.data.path
        _record(config, folder)
        config = replace(config, data=replace(config.data, path=str(folder)))
    return config


def _record(config: RunConfig, folder: Path) -> None:
    """Plays the world of a kind for its training clips, and with another seed for those that are held out."""
    data = config.data
    assert data.world is not None
    for seed, (split, (frames, clip_frames)) in enumerate(RECORDED.items()):
        part = folder / split
        if len(list(part.glob("*.jsonl"))) >= frames // clip_frames:
            continue
        # What an interrupted run left is no recording from one seed.
        shutil.rmtree(part, ignore_errors=True)
        with closing(open_world(data.world, size=(data.height, data.width), channels=data.channels)) as world:
            record(world, part, frames, seed=seed, clip_frames=clip_frames)


def config_of(row: Row, steps: int, rate: float) -> RunConfig:
    """The run of a row; of a model that is no flow, what it shares with one."""
    config = config_of_kind(row.kind)
    flow = replace(config.flow, **row.recipe.flow)
    train = replace(config.train, steps=steps, lr=rate, seed=row.seed, log="none", **row.recipe.train)
    return replace(config, flow=flow, train=train)


def units_of(config: RunConfig) -> tuple[Tensor, float]:
    """Mean of the latents of the data (channels, 1, 1) and the deviation of the rest, from 64 training clips."""
    data, (codec, _) = make_dataset(config), make_parts(config)
    latents = codec.encode(torch.stack([data.item(index).pixels for index in range(64)]))
    mean = latents.mean((0, 1, 3, 4), keepdim=True)
    return mean[0, 0], float((latents - mean).std())


def new_baseline(row: Row, config: RunConfig) -> Baseline:
    """A baseline with the weights that its seed gives."""
    recipe = row.recipe
    assert recipe.baseline is not None
    torch.manual_seed(row.seed)
    mean, scale = units_of(config)
    return recipe.baseline(config.flow, width=recipe.width, layers=recipe.layers, mean=mean, scale=scale)
