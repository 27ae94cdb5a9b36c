"""The table of benchmarks, what it is compared with, and the warning of a busy machine. Nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


machine, report = _load("machine"), _load("report")


def _record(group: str, variant: str, seconds: float, **facts: Any) -> dict[str, Any]:
    extra = {"variant": variant, "GB/s": 2.5, **facts}
    return {"group": group, "stats": {"min": seconds, "median": 2 * seconds}, "extra_info": extra}


RECORDS = [
    _record("norm", "torch", 4e-3, ceiling="5 GB/s (L3)", **{"ceiling seconds": 1e-3}),
    _record("norm", "compile", 3e-3, ceiling="6 GB/s (L3)", **{"ceiling seconds": 0.9e-3}),
    _record("norm", "avx512", 1e-3, ceiling="5 GB/s (L3)", **{"ceiling seconds": 1e-3, "GFLOP/s": 7.25}),
]


def test_the_terminal_shows_rates_shares_and_the_best_competitor() -> None:
    head, group, *rows = report.terminal(RECORDS)
    assert head.split()[:4] == ["best", "median", "GB/s", "GFLOP/s"]
    # The ceiling of a group is the highest that was found, and shares are of that one.
    assert group == "norm, at most 6 GB/s (L3)"
    assert rows[0].split() == ["torch", "4.00", "ms", "8.00", "ms", "2.5", "22", "%"]
    assert rows[2].split() == ["avx512", "1.00", "ms", "2.00", "ms", "2.5", "7.25", "90", "%", "3.00x", "compile"]


def test_the_page_has_the_same_shares() -> None:
    facts = {"processor": "P", "threads": 2, "torch": "2", "compiler": "G", "cores": 4}
    facts["cores busy with other work"] = 0.5
    lines = report.table({"machine_info": facts, "commit_info": None, "benchmarks": RECORDS}).splitlines()
    assert "other work kept 0.5 of 4 cores busy" in lines[0]
    assert lines[-1] == "| norm | 6 GB/s (L3) | 4.00 ms (22 %) | 3.00 ms (30 %) | 1.00 ms (90 %) | 3.0x compile |"


def test_work_of_others_is_what_the_system_counts_and_this_process_does_not() -> None:
    begin = machine.Times(clock=10.0, busy=100.0, own=20.0)
    assert begin.others(machine.Times(clock=12.0, busy=103.0, own=21.0)) == pytest.approx(1.0)
    # The two counts are not taken at once.
    assert begin.others(machine.Times(clock=12.0, busy=101.0, own=21.5)) == 0.0
    assert machine.warning(0.1) == ""
    assert machine.warning(1.26).startswith(f"other work keeps 1.3 of {os.cpu_count()} cores busy")


def test_what_ran_is_read_from_the_system() -> None:
    begin = machine.Times.now()
    subprocess.run([sys.executable, "-c", "for _ in range(20_000_000): pass"], check=True)
    later = machine.Times.now()
    # A child that has ended counts for this process.
    assert later.own - begin.own > 0.05
    assert later.busy - begin.busy > 0.05


def test_a_working_set_is_compared_with_the_cache_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (("L1", 48 << 10, False), ("L2", 2 << 20, False), ("L3", 32 << 20, True))
    monkeypatch.setattr(machine, "caches", lambda: sizes)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    levels = [machine.level(size) for size in (96 << 10, 97 << 10, 4 << 20, 5 << 20, 32 << 20, 33 << 20)]
    assert levels == ["L1", "L2", "L2", "L3", "L3", "memory"]


def test_a_call_that_beats_its_ceiling_has_it_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e9, 2e9, 4e9, 3e9])
    calls: list[tuple[int, ...]] = []

    def measured(*arguments: int) -> dict[str, float]:
        calls.append(arguments)
        if arguments:
            return {"traffic": next(rates)}
        return {"fma": 1e10, "bf16_registers": 4e10, "bf16_tiles": 0.0}

    monkeypatch.setattr(machine, "_measure", measured)
    found = machine.Ceilings()
    assert found.of(machine.Work(600, 400), 1.0).rate == 1e9
    assert found.of(machine.Work(600, 400), 0.3e-6).rate == 4e9
    assert found.of(machine.Work(600, 400), 0.3e-6).seconds == pytest.approx(0.25e-6)
    assert calls == [(600, 400)] * 3
    # Arithmetic is the ceiling where it takes longer than memory.
    assert found.of(machine.Work(600, 400, 10_000), 1.0)[1:] == ("fma", 1e10)
    assert found.of(machine.Work(600, 400, 9_000, half=True), 1.0)[1:] == (machine.level(1000), 4e9)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the loops of ceilings.cpp are x86's")
def test_the_quick_benchmarks_run_and_print_the_table(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "found.json"
    chosen = "norm-window-avx2 or norm-window-torch or rope_append-window-half"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-q", "-k", chosen]
    # Not a process of the run that this test is part of, in which nothing would be timed.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--benchmark-json={path}"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "norm window [1, 64, 256], at most " in done.stdout
    assert "  as in Llama" in done.stdout
    assert "Name (time in" not in done.stdout
    records = json.loads(path.read_text())["benchmarks"]
    assert {record["extra_info"]["variant"] for record in records} >= {"torch", "as in Llama", "scalar"}
    assert "| norm window [1, 64, 256] | " in report.table(json.loads(path.read_text()))


def test_every_op_has_quick_benchmarks() -> None:
    pytest.importorskip("pytest_benchmark")
    from starflow_ext import ops

    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-q", "-m", "quick", "--co"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    for name in ops.SPECS:
        assert f"test_op[{name}-" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("targets.py", "--group", "cpu", "train_speed"),
            "NAME is 'train_speed' of the group quality, expected one of the",
        ),
        (("long_video.py", "--only", "chunk"), "--only is 'chunk', expected one of held-out clips, "),
    ],
    ids=["targets", "long_video"],
)
def test_a_name_that_would_measure_nothing_is_refused(command: tuple[str, ...], message: str) -> None:
    script, *options = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert message in done.stderr
