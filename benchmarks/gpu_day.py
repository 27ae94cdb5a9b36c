"""The groups that benchmarks/gpu_day.sh runs, each in a process of its own, and the table of what they found.

    python benchmarks/gpu_day.py groups | run GROUP [--dry-run] | table

A group appends lines to $OUT/lines.jsonl as it goes, so that what was found before a crash is kept. Tests and
benchmarks are those of tests/ops and bench_cuda.py, run by pytest: a line says which, how it ended, what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Exit status of a group without which no other one can run; pytest and the interpreter have none such.
CANNOT_BEGIN = 90


def lines_file() -> Path:
    return Path(os.environ.get("OUT", "build/gpu")) / "lines.jsonl"


def put(group: str, **facts: Any) -> None:
    """Append a line."""
    with lines_file().open("a") as file:
        file.write(json.dumps({"group": group, **facts}) + "\n")


# -- what a group does ------------------------------------------------------------------------------------------------


def device(group: str, dry: bool) -> int:
    """Say what the machine has, or in one sentence why nothing can run on it."""
    import torch

    import starflow_ext
    from starflow_ext._cuda import why_no_kernels

    reason = why_no_kernels(0)
    put(group, name="machine", info={section: dict(facts) for section, facts in starflow_ext.info().items()})
    if reason:
        put(group, name="device", outcome="skipped" if dry else "failed", error=reason)
        return 0 if dry else CANNOT_BEGIN
    properties = torch.cuda.get_device_properties(0)
    put(
        group,
        name="device",
        outcome="passed",
        device=properties.name,
        multiprocessors=properties.multi_processor_count,
        cache_MB=properties.L2_cache_size / 1e6,
        memory_GB=properties.total_memory / 1e9,
    )
    return 0


def smoke(group: str, dry: bool) -> int:
    """One call of every op: on the device, or dry on the CPU."""
    import torch

    sys.path.append(str(ROOT))
    from starflow_ext import ops
    from tests.ops import battery, blocks

    def sweep(device: str, storage: str) -> None:
        weights = blocks.block({}, storage, device)
        blocks.sweeps(weights, blocks.state_of(weights, 2, 90))

    def solve(device: str, storage: str) -> None:
        weights = blocks.block({}, storage, device)
        blocks.solve(weights, 7, 0.05)

    def one(name: str) -> None:
        sample = battery.plain(ops.SPECS[name])
        battery.outcome(ops.SPECS[name], sample if dry else ops.SPECS[name].on_cuda(sample))

    where = ("cpu", "float32") if dry else ("cuda", "bfloat16")
    calls: dict[str, Callable[[], None]] = {name: partial(one, name) for name in ops.SPECS}
    calls |= {"jacobi_sweep": partial(sweep, *where), "jacobi_solve": partial(solve, *where)}
    assert set(calls) == set(ops.__all__)
    failed = 0
    for name, call in calls.items():
        try:
            call()
            if not dry:
                torch.cuda.synchronize()
        except Exception as error:
            failed += 1
            put(group, name=name, outcome="failed", error=str(error).partition("\n")[0])
        else:
            put(group, name=name, outcome="passed")
    return 1 if failed else 0


class _Lines:
    """A plugin of pytest: a line for each test when it ends."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.seen = 0

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        stats = getattr(item.funcargs.get("benchmark"), "stats", None) if hasattr(item, "funcargs") else None
        if call.when == "call" and stats is not None:
            facts = item.funcargs["benchmark"].extra_info
            facts = {key: value for key, value in facts.items() if key != "device"}
            measured = {"case": item.funcargs["benchmark"].group, "us": round(1e6 * stats.stats.min, 2), **facts}
            item.user_properties.extend(measured.items())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.seen += 1
        error = {}
        if report.outcome != "passed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", text)
            error = {"error": crash.strip().partition("\n")[0][:400]}
        name = report.nodeid.rpartition("/")[2]
        facts = {"outcome": report.outcome, "seconds": round(report.duration, 3), **error}
        put(self.group, name=name, **facts, **dict(report.user_properties))


def by_pytest(*paths: str, chosen: str = "") -> Callable[[str, bool], int]:
    """A group of tests or benchmarks that need a device."""

    def run(group: str, dry: bool) -> int:
        import pytest

        lines = _Lines(group)
        options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", *(["-k", chosen] if chosen else [])]
        os.chdir(ROOT)
        status = int(pytest.main([*paths, *options], plugins=[lines]))
        if lines.seen == 0:
            where = " ".join(paths)
            put(group, name=where, outcome="failed", error=f"no test was found in {where} (pytest ended with {status})")
            return 1
        return 1 if status else 0

    return run


def profile(group: str, dry: bool) -> int:
    """By ncu, the three kernels that take most of a sweep of two layers of the deep block."""
    import torch

    if dry or not torch.cuda.is_available():
        put(group, name="profile", outcome="skipped", error="no CUDA device")
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        put(group, name="profile", outcome="skipped", error="ncu is not on PATH")
        return 0
    sweep = _sweep_of_two_layers()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        sweep()
        torch.cuda.synchronize()
    took = Counter[str]()
    for event in found.key_averages():
        took[event.key] += round(event.self_device_time_total)
    failed = 0
    for kernel, microseconds in took.most_common(3):
        # The name as ncu has it begins where its arguments and namespaces do not.
        base = kernel.partition("<")[0].partition("(")[0].rpartition("::")[2].rpartition(" ")[2]
        report = lines_file().with_name(f"ncu_{base}")
        command = [ncu, "--clock-control", "none", "--set", "detailed", "--kernel-name", base, "--launch-count", "1"]
        command += ["--force-overwrite", "--export", str(report), sys.executable, __file__, "sweep"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        failed += done.returncode != 0
        error = {} if done.returncode == 0 else {"error": (done.stdout + done.stderr).strip().splitlines()[-1][:400]}
        outcome = "failed" if done.returncode else "passed"
        put(group, name=base, outcome=outcome, us=microseconds, kernel=kernel[:200], report=report.name, **error)
    return 1 if failed else 0


def _sweep_of_two_layers() -> Callable[[], Any]:
    """A sweep of two layers with guidance, 128 tokens in the middle of a clip."""
    import seven_b
    import torch

    from starflow_ext import ops

    weights = seven_b.block(seven_b.SIZES["top"], 2)
    state = seven_b.state(weights, 2)
    start = torch.full((2,), seven_b.TEXT + seven_b.TOKENS // 2)
    x = torch.randn(2, 128, seven_b.CHANNELS, device="cuda")
    call = torch.inference_mode()(partial(ops.jacobi_sweep, weights, state, x, start))
    call()
    torch.cuda.synchronize()
    return call


@dataclass(frozen=True)
class Group:
    """What runs in a process of its own, and for how many seconds at most."""

    limit: int
    run: Callable[[str, bool], int]


OPS = "tests/ops/test_cuda"
BENCH = "benchmarks/bench_cuda.py"
# A test that makes an illegal access takes all later ones of its process with it, so the kernels are kept apart.
GROUPS = {
    "device": Group(40, device),
    "smoke": Group(45, smoke),
    "values": Group(60, by_pytest(f"{OPS}.py", chosen="test_value")),
    "gradients": Group(40, by_pytest(f"{OPS}.py", chosen="gradient")),
    "linear": Group(60, by_pytest(f"{OPS}_linear.py", chosen="not tcgen05")),
    "attention": Group(45, by_pytest(f"{OPS}_attention.py")),
    "sweeps": Group(60, by_pytest(f"{OPS}.py", chosen="not test_value and not gradient")),
    "soak": Group(45, by_pytest(f"{OPS}_soak.py")),
    "products": Group(60, by_pytest(BENCH, chosen="test_products and not tcgen05")),
    "attention-timing": Group(45, by_pytest(BENCH, chosen="test_attention")),
    "7B-rate": Group(90, by_pytest(BENCH, chosen="test_rate")),
    # Of torch.compile, which takes seconds a case, the large cases of the ops that memory bounds.
    "ops-timing": Group(75, by_pytest(BENCH, chosen="test_op and (not compile or (large and (norm or affine)))")),
    "sweep-timing": Group(45, by_pytest(BENCH, chosen="test_sweep")),
    # The kernel that a device of 10.x does not run by itself yet, last, since it might hang: the values and the times
    # of the groups "linear" and "products" once more. Elsewhere all of it is skipped.
    "tcgen05": Group(100, by_pytest(f"{OPS}_linear.py", BENCH, chosen="tcgen05")),
    "profile": Group(60, profile),
}


# -- the table --------------------------------------------------------------------------------------------------------


def table() -> int:
    """Print what the lines say: how each group ended, what failed, what was measured."""
    lines = [json.loads(line) for line in lines_file().read_text().splitlines()]
    wrong = 0
    print("\n| group | ended | s | passed | failed | skipped |\n|---|---|---|---|---|---|")
    for end in (line for line in lines if "ended" in line):
        outcomes = Counter(line.get("outcome") for line in lines if line["group"] == end["group"])
        counts = " | ".join(str(outcomes[name]) for name in ("passed", "failed", "skipped"))
        print(f"| {end['group']} | {end['ended']} | {end.get('seconds', '')} | {counts} |")
        wrong += end["ended"] != "done"
    for line in lines:
        if line.get("outcome") == "failed":
            print(f"failed: {line['group']}: {line['name']}: {line.get('error', '')}")
            wrong += 1
    reasons = Counter(line.get("error", "") for line in lines if line.get("outcome") == "skipped")
    for reason, count in reasons.items():
        print(f"skipped: {count}: {reason}")
    measured = [line for line in lines if "us" in line]
    if measured:
        print("\n| what | by | us | found |\n|---|---|---|---|")
    known = ("group", "name", "outcome", "seconds", "case", "variant", "us", "call")
    for line in measured:
        found = ", ".join(f"{key} {value}" for key, value in line.items() if key not in known)
        print(f"| {line.get('case', line['name'])} | {line.get('variant', '')} | {line['us']} | {found} |")
    return 1 if wrong else 0


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("groups", help="print the groups and their seconds")
    commands.add_parser("table", help="print the table of $OUT/lines.jsonl")
    commands.add_parser("sweep", help="one sweep, for ncu")
    run = commands.add_parser("run", help="run a group")
    run.add_argument("group", choices=GROUPS)
    run.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.command == "groups":
        print("\n".join(f"{name} {group.limit}" for name, group in GROUPS.items()))
        return 0
    if args.command == "table":
        return table()
    if args.command == "sweep":
        _sweep_of_two_layers()()
        return 0
    return GROUPS[args.group].run(args.group, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
