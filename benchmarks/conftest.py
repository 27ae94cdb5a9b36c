"""Where benchmarks run, against which ceiling, and the table of the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import starflow_ext
from starflow_ext._load import native

from . import machine, report

BUSY = pytest.StashKey[float]()
BEGIN = pytest.StashKey[machine.Times]()
RECORDS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture(scope="session")
def ceilings() -> machine.Ceilings:
    """Ceilings of the calls of this run."""
    return machine.Ceilings()


@pytest.fixture(autouse=True)
def _timed(request: pytest.FixtureRequest) -> None:
    """Nothing runs where pytest-benchmark would not time it."""
    if "benchmark" in request.fixturenames and request.getfixturevalue("benchmark").disabled:
        pytest.skip(
            "benchmarks are switched off (--benchmark-disable, or pytest-xdist, whose processes disturb each other)"
        )


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """A variant: plain torch, torch.compile of it, what else a user would choose, or a CPU level of this machine."""
    name = str(request.param)
    missing = native.isa_levels().get(name)
    if missing:
        pytest.skip(f"{name}: {missing}")
    if name in native.isa_levels():
        native.set_isa(name)
    yield name
    native.set_isa("")


def pytest_configure(config: pytest.Config) -> None:
    """Print one table with rates and shares in place of pytest-benchmark's, which knows of times alone."""
    if not config.getoption("benchmark_verbose", default=False):
        config.option.benchmark_quiet = True
    config.stash[RECORDS] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look at the machine before the first timing."""
    if session.items and not session.config.option.collectonly:
        session.config.stash[BUSY] = machine.sampled()
        session.config.stash[BEGIN] = machine.Times.now()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep what a benchmark measured."""
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    if getattr(fixture, "stats", None) is None:
        return
    best = {"min": fixture.stats.stats.min, "median": fixture.stats.stats.median}
    extra = dict(fixture.extra_info)
    item.config.stash[RECORDS].append({"group": fixture.group, "stats": best, "extra_info": extra})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and whether the machine was busy."""
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("benchmarks")
    for line in report.terminal(records):
        terminalreporter.write_line(line)
    during = config.stash[BEGIN].others(machine.Times.now())
    for when, busy in (("before the first timing", config.stash[BUSY]), ("while they were taken", during)):
        told = machine.warning(busy)
        if told:
            terminalreporter.write_line(f"warning: {when}, {told}", yellow=True)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace the facts that name the host by those that explain a figure."""
    machine_info.clear()
    facts = starflow_ext.info()
    machine_info.update(
        {
            "processor": machine.processor(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "torch": facts["build"]["torch"],
            "compiler": facts["build"]["compiler"],
            # Other work on the machine makes single timings two or three times as long.
            "cores": os.cpu_count(),
            "cores busy with other work": round(config.stash.get(BUSY, 0.0), 2),
        }
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep only the commit's id."""
    commit = commit_info.get("id")
    commit_info.clear()
    commit_info["id"] = commit


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Leave out single timings: the file is committed."""
    for record in output_json["benchmarks"]:
        record["stats"] = {key: record["stats"][key] for key in ("min", "median", "iqr", "rounds")}
        for key in ("options", "params", "param", "fullname"):
            record.pop(key, None)
    output_json.pop("datetime", None)
