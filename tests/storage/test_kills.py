"""Runs that are killed at random moments: each goes on to the bits of one that was not, and nothing is left behind.

A few in every test run; `STARFLOW_KILLS=200` kills so often, for one process and for two.
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
from collections.abc import Callable
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


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tiny, tmp_path: Path, start, size: int) -> None:
    kills = KILLS or (3 if size == 1 else 0)
    if not kills:
        pytest.skip("STARFLOW_KILLS is not set")
    config = tiny(steps=8, checkpoint_every=1, sample_every=3)
    whole, folder = tmp_path / "whole", tmp_path / "run"

    def finish(place: Path) -> float:
        begin = time.monotonic()
        processes = start(size, place, config)
        for process in processes:
            process.join(900)
        assert [process.exitcode for process in processes] == [0] * size
        return time.monotonic() - begin

    finish(whole)  # The first one also starts the process that the others are forked from.
    shutil.rmtree(whole)
    length = finish(whole)
    expected = load_file(whole / "model.safetensors")
    moments = random.Random(size)
    killed = 0
    while killed < kills:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(moments.randint(1, 4)):
            processes = start(size, folder, config)
            time.sleep(moments.uniform(0.0, length))
            # As a machine that loses its power: all at once.
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            killed += any(process.exitcode != 0 for process in processes)
            if (folder / "model.safetensors").exists():
                load_model(folder)
        finish(folder)
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not left_behind(folder)


if "RANK" in globals():
    one_rank(*globals()["RANK"])
