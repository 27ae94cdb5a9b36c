"""The day of a GPU (benchmarks/gpu_day.sh) without one: its dry run, and what it says where it cannot begin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import starflow_ext._cuda
from starflow_ext._cuda import served_by, why_no_kernels
from starflow_ext._load import native

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="timeout (coreutils) is not on PATH")


def _run(root: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "benchmarks/gpu_day.sh"), *arguments],
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]


def test_dry_run(root: Path, tmp_path: Path) -> None:
    """All groups end as they should: ops run on the CPU, what needs a device is collected and skipped."""
    done = _run(root, tmp_path, "--dry-run", GPU_DAY_LIMIT="600", GPU_DAY_SECONDS="1800")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    lines = _lines(tmp_path)
    ended = {line["group"]: line["ended"] for line in lines if "ended" in line}
    assert set(ended.values()) == {"done"}
    smoke = {line["name"]: line["outcome"] for line in lines if line["group"] == "smoke" and "name" in line}
    assert smoke == dict.fromkeys(starflow_ext.ops.__all__, "passed")
    for group in ended:
        assert [line for line in lines if line["group"] == group and line.get("outcome")], group
    assert not [line for line in lines if line.get("outcome") == "failed"]
    table = done.stdout[done.stdout.index("| group | ended |") :]
    assert [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2 : 2 + len(ended)]] == list(ended)


def test_a_group_that_hangs_is_ended_and_told_and_the_others_run(root: Path, tmp_path: Path) -> None:
    done = _run(root, tmp_path, "--dry-run", GPU_DAY_LIMIT="0.01")
    assert done.returncode == 1
    ended = [line for line in _lines(tmp_path) if "ended" in line]
    assert len(ended) > 10
    assert {line["ended"] for line in ended} == {"ended after 0.01 s, in which it was not done"}


def test_groups_are_left_out_once_the_time_of_all_is_over(root: Path, tmp_path: Path) -> None:
    done = _run(root, tmp_path, "--dry-run", GPU_DAY_SECONDS="0")
    assert done.returncode == 1
    assert {line["ended"] for line in _lines(tmp_path)} == {"left out: the time of all groups is over"}


def test_a_folder_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    done = _run(root, out, "--dry-run")
    assert (done.returncode, done.stderr) == (
        2,
        f'gpu_day: OUT is "{out}", expected a folder that can be written\n',
    )


def test_an_unknown_argument(root: Path, tmp_path: Path) -> None:
    done = _run(root, tmp_path, "--dry")
    assert (done.returncode, done.stderr) == (2, 'gpu_day: the argument is "--dry", expected --dry-run or none\n')


def test_without_a_device_it_does_not_begin(root: Path, tmp_path: Path) -> None:
    reason = why_no_kernels(0)
    if not reason:
        pytest.skip("there is a device")
    done = _run(root, tmp_path, GPU_DAY_LIMIT="600")
    assert done.returncode == 2
    assert f"failed: device: device: {reason}\n" in done.stdout
    assert [line["group"] for line in _lines(tmp_path) if "ended" in line] == ["device"]


def _wheel(folder: Path, tag: str, content: str) -> None:
    """A wheel of that name, whose package says which it is."""
    info = "starflow_ext-0.1.0.dist-info"
    files = {
        "starflow_ext/__init__.py": f"KIND = {content!r}\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: starflow-ext\nVersion: 0.1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {'-'.join(tag.split('-')[-3:])}\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"starflow_ext-0.1.0-{tag}.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def _bare_checkout(root: Path, folder: Path) -> dict[str, str]:
    """The script alone, with an environment that has nothing but pip."""
    (folder / "benchmarks").mkdir()
    shutil.copy(root / "benchmarks/gpu_day.sh", folder / "benchmarks")
    (folder / "dist").mkdir()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    return {"PYTHON": str(folder / "venv/bin/python"), "PYTHONPATH": ""}


def test_the_wheel_that_is_installed_fits_and_has_cuda_kernels(root: Path, tmp_path: Path) -> None:
    environment = _bare_checkout(root, tmp_path)
    mine = "py3-none-any"
    for tag, content in (
        (mine, "for processors"),
        (f"1cu130-{mine}", "with CUDA kernels"),
        ("2cu130-cp27-none-any", "for another Python"),
    ):
        _wheel(tmp_path / "dist", tag, content)
    done = _run(tmp_path, tmp_path / "out", **environment)
    # Without the groups it does not go on.
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"gpu_day: benchmarks/gpu_day.py does not run with {environment['PYTHON']}",
    )
    command = [environment["PYTHON"], "-c", "import starflow_ext; print(starflow_ext.KIND)"]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert said.stdout == "with CUDA kernels\n"


def test_no_wheel_that_fits_and_no_headers(root: Path, tmp_path: Path) -> None:
    environment = _bare_checkout(root, tmp_path)
    _wheel(tmp_path / "dist", "cp27-none-any", "for another Python")
    done = _run(tmp_path, tmp_path / "out", **environment)
    assert (done.returncode, done.stderr) == (
        2,
        "gpu_day: neither the wheel in dist/ nor a build from source could be installed; "
        f"{tmp_path}/out/log.txt says why\n",
    )
    done = _run(tmp_path, tmp_path / "out", **environment, STARFLOW_CUTLASS="nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        'gpu_day: STARFLOW_CUTLASS is "nowhere", expected a folder with cutlass/cutlass.h\n',
    )


def test_the_table_tells_what_failed_and_what_was_measured(root: Path, tmp_path: Path) -> None:
    lines = (
        {"group": "linear", "name": "test_value[1]", "outcome": "failed", "error": "2.0 instead of 1.0"},
        {"group": "linear", "name": "test_value[2]", "outcome": "passed", "share of the bound": 0.3},
        {"group": "linear", "ended": "failed with exit status 1", "seconds": 3},
        {
            "group": "products",
            "name": "test[3]",
            "outcome": "passed",
            "case": "linear",
            "us": 40.5,
            "percent of copy": 71,
        },
        {"group": "products", "ended": "done", "seconds": 2},
    )
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(root / "benchmarks/gpu_day.py"), "table"]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "| linear | failed with exit status 1 | 3 | 1 | 1 | 0 |" in done.stdout
    assert "failed: linear: test_value[1]: 2.0 instead of 1.0" in done.stdout
    assert "| linear |  | 40.5 | percent of copy 71 |" in done.stdout


@pytest.mark.parametrize(
    "architectures, yes, no",
    [
        ("80-real;90a-real;90-virtual", [(8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 1)], [(7, 5)]),
        ("80-real;90a-real", [(8, 6), (9, 0)], [(7, 5), (10, 0), (11, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("100f-real;120f-real;120-virtual", [(10, 0), (10, 3), (12, 0), (13, 0)], [(8, 0), (9, 0), (11, 0)]),
        ("80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
    ],
)
def test_which_devices_a_build_serves(
    architectures: str, yes: list[tuple[int, int]], no: list[tuple[int, int]]
) -> None:
    assert [capability for capability in (*yes, *no) if served_by(architectures, *capability)] == yes


def test_why_this_build_has_no_kernels_here() -> None:
    if not native.build_info()["cuda"]:
        expected = "this build of starflow-ext has no CUDA kernels, expected one that was built with STARFLOW_CUDA=ON"
        assert why_no_kernels(0) == expected
    elif not native.cuda_devices()[0]:
        assert why_no_kernels(0) == native.cuda_devices()[1]


@pytest.mark.parametrize(
    "capability, sentence",
    [
        (
            (7, 5),
            "cuda:0 is Made Up of sm_75, expected what this build has kernels for, 80-real;90a-real: none are for less "
            "than sm_80",
        ),
        (
            (11, 0),
            "cuda:0 is Made Up of sm_110, expected what this build has kernels for, 80-real;90a-real: build with "
            'TORCH_CUDA_ARCH_LIST="11.0"',
        ),
        ((9, 0), ""),
    ],
)
def test_a_device_that_the_build_has_no_code_for(
    capability: tuple[int, int], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {"cuda": True, "cuda_architectures": "80-real;90a-real"}
    made_up = SimpleNamespace(build_info=lambda: build, cuda_devices=lambda: (1, ""))
    monkeypatch.setattr(starflow_ext._cuda, "native", made_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made Up")
    assert why_no_kernels(0) == sentence
