"""Two or three processes on one machine, over gloo: the numbers of one, and an end for all when one of them dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from starflow import distributed, training
from starflow.cli import main
from starflow.config import ConfigError, RunConfig
from starflow.data import read_video, to_frames
from starflow.model import Flow
from starflow.sampling import Pipeline
from starflow.storage import latest_state, load_model, save_model
from starflow.training import TrainStep, engine, make_parts, train

Curve = list[tuple[int, float, float, float]]


def entry(done: TrainStep) -> tuple[int, float, float, float]:
    return done.step, done.loss, -1.0 if done.denoiser_loss is None else done.denoiser_loss, done.grad_norm


def trained(config: RunConfig, folder: Path, kill: dict[str, int]) -> dict[str, Any]:
    curve: Curve = []
    if kill.get("signal") == signal.SIGSTOP:
        distributed.TIMEOUT = timedelta(seconds=10)

    def on_step(done: TrainStep) -> None:
        curve.append(entry(done))
        if done.step == kill.get("step") and os.environ["RANK"] == "1":
            os.kill(os.getpid(), kill["signal"])

    flow = train(config, folder, quiet=True, device="cpu", on_step=on_step)
    return {"curve": curve, "pieces": any(hasattr(p, "full_tensor") for p in flow.parameters())}


def failing(kind: str) -> dict[str, Any]:
    """The second process has an error where the first one waits for it."""
    with distributed.join(torch.device("cpu")) as world:
        if world.rank == 1:
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("no such number")
        return {"mean": world.mean(1.0)}


def commanded(*arguments: str) -> dict[str, Any]:
    return {"status": main(arguments)}


def one_rank(rank: int, size: int, port: int, out: Path, name: str, arguments: tuple) -> None:
    """What a process of `torchrun` does, and what it says of itself in a file."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    environment["MASTER_ADDR"] = "127.0.0.1"
    environment["TORCHELASTIC_USE_AGENT_STORE"] = True
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    try:
        said = globals()[name](*arguments)
    except (Exception, KeyboardInterrupt) as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    (out / f"{rank}.json").write_text(json.dumps(said))


def stopped(process: int) -> bool:
    """Whether a process has been stopped by a signal; it would never end."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # it ended in this moment
        return False
    return state == "T"


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """Calls a function in two processes, or `size`; returns what each said, or nothing for one that was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["starflow.training", "sklearn.datasets", "torch.distributed.checkpoint"])

    def run(function: Callable[..., dict[str, Any]], *arguments: Any, size: int = 2) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("ranks")
        # As `torchrun` does, on a free port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # By the path of this file: it is no module that another process could import.
        processes = [
            context.Process(
                target=runpy.run_path,
                args=(__file__, {"RANK": (rank, size, store.port, out, function.__name__, arguments)}, "rank"),
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        first, *others = processes
        first.join(300)
        for other in others:
            while other.exitcode is None and not stopped(other.pid):
                other.join(1)
            other.kill()
        assert first.exitcode is not None
        found = [out / f"{rank}.json" for rank in range(size)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in found]

    return run


@pytest.fixture
def ranks(both) -> Callable[..., list[dict[str, Any]]]:
    """Trains in two processes."""
    return lambda config, folder, **kill: both(trained, config, folder, kill)


def alone(config: RunConfig, folder: Path) -> Curve:
    curve: Curve = []
    train(config, folder, quiet=True, on_step=lambda done: curve.append(entry(done)))
    return curve


def close(one: Curve, other: Curve) -> None:
    assert [row[0] for row in one] == [row[0] for row in other]
    for first, second in zip(one, other, strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)


def same_weights(one: Path, other: Path) -> None:
    state = load_model(other).flow.state_dict()
    for name, tensor in load_model(one).flow.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does_and_resume_each_other(tiny, tmp_path: Path, ranks, parallel: str) -> None:
    words = [*RunConfig.load("tiny").text["vocabulary"], "extend"]
    # Everything that a step may hold: parts, recomputation, a penalty, clipping, images, a frame cut off.
    config = tiny(
        flow={"txt_dim": 16, "txt_size": 4, "use_checkpoint": 2},
        text={"kind": "words", "size": 4, "vocabulary": words},
        steps=3,
        batch_size=4,
        accumulate=2,
        latent_norm_regularization=1e-3,
        grad_clip=0.05,
        drop_image=0.3,
        image_prob=0.3,
        denoiser_every=2,
        parallel=parallel,
    )
    expected = alone(config, tmp_path / "one")
    first, second = ranks(config, tmp_path / "two")
    assert "error" not in first | second
    close(first["curve"], expected)
    assert first["curve"] == second["curve"]
    assert (first["pieces"], second["pieces"]) == (False, parallel == "fsdp")
    same_weights(tmp_path / "one", tmp_path / "two")
    longer = replace(config, train=replace(config.train, steps=4))
    # Two processes go on from one, and one from two.
    more = alone(longer, tmp_path / "two")
    assert [row[0] for row in more] == [4]
    first, _ = ranks(longer, tmp_path / "one")
    close(first["curve"], more)


def test_three_processes_keep_what_was_measured_of_the_data(tiny, tmp_path: Path, both) -> None:
    """To the bit, as one process measured it: of three equal numbers the average is another one (0.1 is 0.10000001)."""
    config = tiny(flow={"centred": True, "denoiser_components": 4}, steps=2, batch_size=3)
    alone(config, tmp_path / "one")
    said = both(trained, config, tmp_path / "three", {}, size=3)
    assert not any("error" in each for each in said), said
    # One process goes on from three.
    alone(replace(config, train=replace(config.train, steps=3)), tmp_path / "three")
    one, three = (load_model(tmp_path / name).flow for name in ("one", "three"))
    assert len(one.measured()) == 5
    for first, second in zip(one.measured(), three.measured(), strict=True):
        assert torch.equal(first, second)
    assert one.measured()[0].count_nonzero() > 0


def test_a_killed_process_ends_the_other_and_leaves_the_last_checkpoint(tiny, tmp_path: Path, ranks) -> None:
    config = tiny(steps=6, checkpoint_every=2)
    first, second = ranks(config, tmp_path / "cut", step=3, signal=signal.SIGKILL)
    assert second == {}
    assert first["error"].startswith("DistributedError: process 1 of 2 is gone: ")
    assert latest_state(tmp_path / "cut").name == "step-00000002"
    # Two processes started again finish what they began, or one alone.
    whole = alone(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    first, second = ranks(config, tmp_path / "again")
    assert first["curve"] == second["curve"]
    close(first["curve"], whole[2:])
    close(alone(config, tmp_path / "cut"), whole[2:])


def test_a_silent_process_ends_the_other(tiny, tmp_path: Path, ranks) -> None:
    first, second = ranks(tiny(steps=6, checkpoint_every=2), tmp_path, step=3, signal=signal.SIGSTOP)
    assert second == {}
    assert re.match("RuntimeError: .*Timed out waiting 10000ms", first["error"])
    assert latest_state(tmp_path).name == "step-00000002"


def test_sigterm_of_one_process_saves_and_ends_all(tiny, tmp_path: Path, ranks) -> None:
    found = ranks(tiny(steps=50), tmp_path, step=2, signal=signal.SIGTERM)
    assert [said["error"] for said in found] == ["KeyboardInterrupt: "] * 2
    assert latest_state(tmp_path).name == "step-00000002"


def test_an_error_of_one_process_is_told_by_the_other(tiny, tmp_path: Path, ranks) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    # Where the first process writes its log.
    (tmp_path / "run" / "log").write_text("in the way")
    first, second = ranks(tiny(steps=2), tmp_path / "run")
    assert first["error"].startswith("FileExistsError")
    assert second["error"].startswith("DistributedError: process 0 of 2 stopped: FileExistsError: ")


@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError"])
def test_an_error_is_of_the_process_that_raised_it(both, kind: str) -> None:
    """A lost connection is a plain RuntimeError too; which came first is told all the same."""
    first, second = both(failing, kind)
    assert second["error"] == f"{kind}: no such number"
    assert first["error"] == f"DistributedError: process 1 of 2 stopped: {kind}: no such number"


def test_a_batch_that_does_not_divide_is_named(tiny, tmp_path: Path, ranks) -> None:
    message = "train.batch_size is 6, expected a multiple of 4: 2 processes times train.accumulate"
    found = ranks(tiny(batch_size=6, accumulate=2), tmp_path)
    assert [said["error"].startswith("ConfigError") for said in found].count(True) >= 1
    assert all(message in said["error"] for said in found)
    with pytest.raises(ConfigError, match="a divisor of 6"):
        tiny(batch_size=6, accumulate=4)


def test_prompts_are_shared_out_and_clips_are_those_of_one_process(tiny, tmp_path: Path, both, capsys) -> None:
    config = tiny()
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", Flow(config.flow), config, *make_parts(config))
    prompts = ["a three moving up", "a four", "a five"]
    command = ["sample", str(tmp_path), *prompts, "--seed", "7", "--solver", "window:16", "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert [said["status"] for said in both(commanded, *command, str(tmp_path / "two"))] == [0, 0]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) == 10
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        if name.endswith(".json"):
            one, two = (json.loads(text)["seed"] for text in (one, two))
        assert one == two, name


def pieces(model: str, prompt: str, out: str, denoise: str) -> dict[str, Any]:
    """Samples with weights in pieces; says how many numbers of the layers this process holds."""
    held: list[int] = []
    cut = engine.shard

    def counted(flow: Flow, world: Any) -> Any:
        found = cut(flow, world)
        held.append(sum(distributed.local(p).numel() for name, p in flow.named_parameters() if ".layers." in name))
        return found

    training.shard = counted
    command = ["sample", model, prompt, prompt, "--seed", "3", "--guidance", "1", "--solver", "window:8:0.001"]
    status = main([*command, "--denoise", denoise, "--parallel", "fsdp", "--lossless", "--out", out])
    return {"status": status, "held": held}


@pytest.mark.parametrize("denoise", ["learned", "published", "score"])
def test_a_model_samples_with_its_weights_in_pieces(tiny, tmp_path: Path, both, capsys, denoise: str) -> None:
    config = tiny()
    codec, text = make_parts(config)
    flow = Flow(config.flow)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_model(tmp_path / "model.safetensors", flow, config, codec, text)
    prompt, out = "a three moving up", tmp_path / "pieces"
    found = both(pieces, str(tmp_path / "model.safetensors"), prompt, str(out), denoise)
    assert [said.get("status") for said in found] == [0, 0], found
    # Processes that measured their windows would make other calls.
    auto = both(
        commanded,
        "sample",
        str(tmp_path / "model.safetensors"),
        prompt,
        "--solver",
        "window:auto",
        "--parallel",
        "fsdp",
        "--out",
        str(out),
    )
    # The one that hears of the other's error may be ended before it says anything.
    statuses = [said.get("status") for said in auto]
    assert 2 in statuses
    assert 0 not in statuses
    whole = sum(p.numel() for name, p in flow.named_parameters() if ".layers." in name)
    assert all(0.4 * whole < sum(said["held"]) < 0.6 * whole for said in found)
    pipeline = Pipeline(flow, config, codec, text)
    expected = pipeline.sample([prompt] * 2, seed=3, guidance=1.0, solver="window:8:0.001", denoise=denoise).pixels
    files = sorted(out.glob("*.mp4"))
    assert len(files) == 2
    for file, clip in zip(files, expected, strict=True):
        shown = read_video(file, channels=1)[:, 4::8, 4::8].float()  # middles of the enlarged pixels
        assert float((shown - to_frames(clip).float()).abs().max()) <= 2


if __name__ == "rank":
    one_rank(*globals()["RANK"])
