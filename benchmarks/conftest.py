"""Where benchmarks run, and against which ceiling: facts that every result carries."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import starflow_ext
from starflow_ext._load import native

MEGABYTES = 256


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes read and written a second by copying 256 MB, best of several: the ceiling of an op that moves memory."""
    source = torch.ones(MEGABYTES << 18)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@pytest.fixture(params=["torch", "compile", *native.isa_levels()])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The variants: plain torch, torch.compile of it, and each CPU level of this machine."""
    name = str(request.param)
    missing = native.isa_levels().get(name)
    if missing:
        pytest.skip(f"{name}: {missing}")
    if name in native.isa_levels():
        native.set_isa(name)
    yield name
    native.set_isa("")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace the facts that name the host by those that explain a figure."""
    machine_info.clear()
    facts = starflow_ext.info()
    machine_info.update(
        {
            "processor": _processor(),
            "python": platform.python_version(),
            "threads": facts["threads"]["used"],
            "torch": facts["build"]["torch"],
            "compiler": facts["build"]["compiler"],
            # Other work on the machine makes single timings two or three times as long.
            "load when it began": round(os.getloadavg()[0], 1),
        }
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep only the commit's id."""
    commit = commit_info.get("id")
    commit_info.clear()
    commit_info["id"] = commit


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Leave out single timings: the file is committed."""
    for record in output_json["benchmarks"]:
        record["stats"] = {key: record["stats"][key] for key in ("min", "median", "iqr", "rounds")}
        for key in ("options", "params", "param", "fullname"):
            record.pop(key, None)
    output_json.pop("datetime", None)
