"""Runs that are killed at random moments: each goes on to the bits of one that was not, and nothing is left behind.

A few in every test run; `STARFLOW_KILLS=200` kills so often, for one process and for two. Moments are counted from what
a run has written, so that other work on the machine does not gather them where runs begin.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starflow.config import RunConfig
from starflow.storage import load_model
from starflow.training import train

KILLS = int(os.environ.get("STARFLOW_KILLS", "0"))


def one_rank(rank: int, size: int, port: int, folder: Path, config: RunConfig) -> None:
    """What a process of a run does."""
    if size > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    train(config, folder, quiet=True, device="cpu")


@pytest.fixture(scope="module")
def start() -> Callable[..., list[multiprocessing.Process]]:
    """Starts the processes of a run, from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["starflow.training", "sklearn.datasets", "torch.distributed.checkpoint"])

    def run(size: int, folder: Path, config: RunConfig) -> list[multiprocessing.Process]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            # By the path of this file: it is no module that another process could import.
            context.Process(
                target=runpy.run_path, args=(__file__, {"RANK": (rank, size, port, folder, config)}, "rank")
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        return processes

    return run


def left_behind(folder: Path) -> list[str]:
    """Files that no finished run has."""
    allowed = re.compile(
        r"model\.safetensors|config\.yaml|log|log/events.*|samples|samples/step-\d{8}\.png|checkpoints|"
        r"checkpoints/step-\d{8}|checkpoints/step-\d{8}/(state\.json|shard-.*\.safetensors)"
    )
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if not allowed.fullmatch(name)]


def written(folder: Path) -> str:
    """The last thing that a run has written whole: its newest checkpoint, or "" before the first."""
    states = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return states[-1] if states else ""


class Moments:
    """Random moments of runs of `steps` steps that write a checkpoint after each.

    A moment lies so many checkpoints behind the beginning of a process, and then a random part of the time that the
    next one takes, as it was last seen.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self._random = random.Random(seed)
        self._steps = steps
        self._taken: dict[bool, float] = {}  # seconds up to the next checkpoint, from the beginning or from another

    def again(self) -> int:
        """How often a run is killed."""
        return self._random.randint(1, 4)

    def wait(self, folder: Path, processes: Sequence[multiprocessing.Process]) -> None:
        """Wait for a moment of a run that has just been started, or for its end if that comes first."""
        seen = written(folder)
        done = int(seen.removeprefix("step-") or 0)
        # Behind the last checkpoint a run still writes its model and closes what it has open.
        ahead = self._random.randint(0, self._steps - done)
        for place in range(ahead):
            begin = time.monotonic()
            while written(folder) == seen and any(process.is_alive() for process in processes):
                time.sleep(0.001)
            seen = written(folder)
            self._taken[place == 0] = time.monotonic() - begin
        time.sleep(self._random.uniform(0.0, self._taken.get(ahead == 0, 1.0)))


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tiny, tmp_path: Path, start, size: int) -> None:
    kills = KILLS or (3 if size == 1 else 0)
    if not kills:
        pytest.skip("STARFLOW_KILLS is not set")
    config = tiny(steps=8, checkpoint_every=1, sample_every=3)
    whole, folder = tmp_path / "whole", tmp_path / "run"

    def finish(place: Path) -> None:
        processes = start(size, place, config)
        for process in processes:
            process.join(900)
        assert [process.exitcode for process in processes] == [0] * size

    finish(whole)
    expected = load_file(whole / "model.safetensors")
    moments = Moments(size, config.train.steps)
    killed = late = 0
    while killed < kills:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(moments.again()):
            before = written(folder)
            processes = start(size, folder, config)
            moments.wait(folder, processes)
            # As a machine that loses its power: all at once.
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            seen = any(process.exitcode != 0 for process in processes)
            killed += seen
            late += seen and written(folder) != before
            if (folder / "model.safetensors").exists():
                load_model(folder)
        finish(folder)
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not left_behind(folder)
    print(f"{killed} kills were seen, {late} of them behind a checkpoint of the process")
    assert not KILLS or late * 2 > killed


if "RANK" in globals():
    one_rank(*globals()["RANK"])
