"""Training on frames with conditions: the vectors of a batch, clips made on the fly, and folders with actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.config import ConfigError, RunConfig
from starflow.data import Clip, MovingDigits
from starflow.model import Flow
from starflow.sampling import Pipeline
from starflow.storage import load_model
from starflow.training import Batches, make_dataset, make_parts, train
from starflow.training.batches import with_world
from starflow.worlds import PaddleBall, PaddleClips, record

from ..runs import Tiny

NO_TEXT = {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "conditional_denoiser": False, "text_embed": False}
GAME = {"kind": "paddle", "height": 24, "width": 24, "frames": 4, "actions": ("stay", "up", "down")}


def game(tiny: Tiny, flow: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    return tiny(flow=NO_TEXT | {"frame_dim": 3} | (flow or {}), data=GAME, text={}, **options)


def batches(config: RunConfig, dataset: Any = None) -> Batches:
    return Batches(config, make_dataset(config) if dataset is None else dataset, make_parts(config)[0])


def test_a_run_on_the_game_that_is_interrupted_ends_with_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    config = game(tiny, steps=4, flow={"conditional_denoiser": True})
    whole = train(config, tmp_path / "whole", quiet=True)
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    train(half, tmp_path / "parts", quiet=True)
    resumed = train(config, tmp_path / "parts", quiet=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    loaded = load_model(tmp_path / "parts")
    assert loaded.config.data.actions == ("stay", "up", "down")
    assert loaded.config.flow.frame_dim == 3


def test_vectors_of_a_batch_are_those_of_its_clips(tiny: Tiny) -> None:
    config = game(tiny, drop_frame_condition=0.0)
    batch = batches(config).make(3)
    assert batch.frame_conditions is not None
    assert batch.frame_conditions.shape == (4, 4, 3)
    assert batch.frame_conditions[:, 0].isnan().all()
    assert (batch.frame_conditions[:, 1:].sum(-1) == 1).all()
    for row, name in enumerate(batch.names):
        clip = PaddleClips(frames=4).item(int(name.split("/")[-1]), epoch=0, seed=config.train.seed)
        assert torch.equal(batch.pixels[row], clip.pixels)
        torch.testing.assert_close(batch.frame_conditions[row], clip.frame_conditions, equal_nan=True)
    dropped = batches(game(tiny, drop_frame_condition=1.0)).make(3)
    assert dropped.frame_conditions is not None
    assert dropped.frame_conditions.isnan().all()
    assert torch.equal(dropped.pixels, batch.pixels)
    some = [batches(game(tiny, drop_frame_condition=0.5)).make(step).frame_conditions for step in range(20)]
    share = torch.stack([told[:, 1].isnan().all(-1) for told in some if told is not None]).float().mean()
    assert 0.3 < share < 0.7


def test_vectors_of_images_references_and_extended_clips(tiny: Tiny) -> None:
    plain = batches(game(tiny, drop_frame_condition=0.0)).make(0).frame_conditions
    assert plain is not None
    image = batches(game(tiny, drop_frame_condition=0.0, image_prob=1.0)).make(0)
    assert image.pixels.dim() == 4
    assert image.frame_conditions is not None
    assert image.frame_conditions.shape == (4, 1, 3)
    assert image.frame_conditions.isnan().all()
    extend = batches(game(tiny, drop_frame_condition=0.0, drop_image=1.0)).make(0)
    assert extend.extend
    assert extend.frame_conditions is not None
    torch.testing.assert_close(extend.frame_conditions, plain[:, 1:])
    last = batches(game(tiny, drop_frame_condition=0.0, last_frame_prob=1.0)).make(0)
    assert last.frame_conditions is not None
    assert last.frame_conditions.shape == (4, 5, 3)
    assert last.frame_conditions[:, :2].isnan().all()
    assert torch.equal(last.frame_conditions[:, 2:], plain[:, 1:])


class Lights:
    """Frames that are as bright as their actions say."""

    def __len__(self) -> int:
        return 1000

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        actions = torch.randint(3, (4,), generator=torch.Generator().manual_seed(index))
        pixels = (actions - 1.0)[:, None, None, None].expand(4, 1, 24, 24) * 0.8
        return Clip(pixels, "", str(index), frame_conditions=torch.eye(3)[actions])


def test_a_flow_learns_what_actions_do(tiny: Tiny, tmp_path: Path) -> None:
    config = game(tiny, steps=60, batch_size=8, lr=1e-2, warmup_steps=5, drop_frame_condition=0.2)
    flow = train(config, tmp_path, quiet=True, dataset=Lights())
    codec, _ = make_parts(config)
    clips = [Lights().item(index) for index in range(500, 516)]
    x = codec.encode(torch.stack([clip.pixels for clip in clips]))
    x = x + config.train.noise_std * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    told = torch.stack([clip.frame_conditions for clip in clips if clip.frame_conditions is not None])
    with torch.no_grad():
        right, none, wrong = (flow.log_prob(x, None, given) for given in (told, None, told.roll(1, -1)))
    assert (right > none).all()
    assert (none > wrong).float().mean() > 0.9


def test_clips_without_actions_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"training: clip digits/train/\d+ has no actions, expected a vector"):
        batches(game(tiny), MovingDigits(frames=4, size=24)).make(0)
    wide = tiny(flow=NO_TEXT | {"frame_dim": 4}, data=GAME | {"actions": ()}, text={})
    with pytest.raises(ConfigError, match=r"has vectors of frames of shape \[4, 3\], expected \[4, 4\]"):
        batches(wide).make(0)


@pytest.mark.parametrize(
    ("flow", "data", "message"),
    [
        ({"frame_dim": 2}, {}, r"flow\.frame_dim is 2, expected 3, the number of data\.actions"),
        ({}, {"width": 48}, r"data\.width is 48, expected the height 24 for the paddle world"),
        ({}, {"channels": 3}, r"channels is 3, expected"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny: Tiny, flow: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    config = tiny(flow=NO_TEXT | {"frame_dim": 3} | flow, data=GAME | data, text={})
    with pytest.raises(ConfigError, match=message):
        (make_parts(config), make_dataset(config))


def test_a_codec_over_time_is_refused(tiny: Tiny) -> None:
    config = game(tiny)
    codec = {**config.codec, "temporal": 2}
    flow = dataclasses.replace(config.flow, in_channels=2 * config.flow.in_channels)
    with pytest.raises(ConfigError, match=r"flow\.frame_dim is 3, expected 0 with a codec of 2 pixel frames"):
        make_parts(dataclasses.replace(config, codec=codec, flow=flow))


def test_a_recorded_folder_tells_its_actions(tiny: Tiny, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    record(PaddleBall(), clips, 60, clip_frames=30)
    data = GAME | {"kind": "folder", "path": str(clips), "actions": None}
    config = tiny(flow=NO_TEXT | {"frame_dim": 1}, data=data, text={}, steps=2)
    filled = with_world(config)
    assert filled.data.actions == ("stay", "up", "down")
    assert filled.data.world == "paddle"
    assert filled.flow.frame_dim == 3
    assert with_world(filled) is filled
    train(config, tmp_path / "run", quiet=True)
    assert load_model(tmp_path / "run").config.data.world == "paddle"
    (clips / "world.json").write_text('{"world": "elsewhere", "actions": []}')
    with pytest.raises(ConfigError, match=r"data\.actions is None, expected a list, or .*which names none"):
        with_world(config)
    (clips / "world.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.actions is None, expected a list, or .*which does not exist"):
        train(config, tmp_path / "other", quiet=True)
    with pytest.raises(ConfigError, match=r"data\.path is None, expected a folder that `starflow record` wrote"):
        with_world(dataclasses.replace(config, data=dataclasses.replace(config.data, path=None)))
    with pytest.raises(ConfigError, match=r"data\.actions is None, expected a list but for a folder"):
        dataclasses.replace(config.data, kind="paddle")


def test_names_of_actions_are_those_of_the_folder(tiny: Tiny, tmp_path: Path, caplog) -> None:
    record(PaddleBall(24), tmp_path, 12)
    # The folder of a split has the world of the one above it.
    part = tmp_path / "part"
    part.mkdir()
    for path in tmp_path.glob("clip-*"):
        (part / path.name).write_bytes(path.read_bytes())
    told = {"kind": "folder", "path": str(tmp_path)}
    for names, place in ((("up", "stay", "down"), tmp_path), (("a", "b", "c"), tmp_path), (("a", "b", "c"), part)):
        told["path"] = str(place)
        with pytest.raises(
            ConfigError, match=r"data.actions is .*, expected \('stay', 'up', 'down'\) as in .*world.json"
        ):
            make_dataset(
                dataclasses.replace(game(tiny), data=dataclasses.replace(game(tiny).data, **told, actions=names))
            )
    assert not caplog.messages
    told["path"] = str(tmp_path)
    make_dataset(dataclasses.replace(game(tiny), data=dataclasses.replace(game(tiny).data, **told, actions=())))
    assert caplog.messages == [
        f"skipped: the names of the actions in {tmp_path / 'world.json'}, data.actions is empty; null takes them"
    ]


def test_the_configurations_fit_together() -> None:
    paddle = RunConfig.load("paddle")
    codec, text = make_parts(paddle)
    assert (codec.temporal, text) == (1, None)
    assert paddle.data.actions == PaddleBall.actions
    assert sum(p.numel() for p in Flow(paddle.flow).parameters()) < 3_000_000
    for name in ("world", "world-small"):
        world = RunConfig.load(name)
        filled = dataclasses.replace(world.data, actions=("noop", "fire"))
        config = dataclasses.replace(world, data=filled, flow=dataclasses.replace(world.flow, frame_dim=2))
        codec, text = make_parts(config)
        Pipeline(Flow(config.flow), config, codec, text)
