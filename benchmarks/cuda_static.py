"""The targets of CUDA: facts of the kernels that need no GPU.

They are read from the machine code of the installed library, from bytes and bank conflicts of the kernels' sources on
the emulated device, and from the time to build a release. Reader and calls come from tests/static and
tests/cuda_emulation.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seven_b
from figures import Figure, Skipped, target

from starflow_ext import ops
from starflow_ext._load import library_path, native

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RELEASE = HERE / ".cache" / "release"


@contextmanager
def _tests(*names: str) -> Iterator[list[Any]]:
    """Modules of the tests; a skip that they raise skips the target."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    try:
        skip = importlib.import_module("pytest").skip.Exception
        modules = [importlib.import_module(f"tests.{name}") for name in names]
    except ModuleNotFoundError as error:
        raise Skipped(f"{error.name} is not installed: pip install 'starflow-ext[test]'") from error
    try:
        yield modules
    except skip as reason:
        raise Skipped(str(reason)) from reason


# -- machine code -----------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> list[Any]:
    """The kernels of the installed library, of every architecture."""
    if not native.build_info()["cuda"]:
        raise Skipped("this build has no CUDA kernels (build with STARFLOW_CUDA=ON)")
    with _tests("static.machine_code") as (machine_code,):
        found: list[Any] = machine_code.read(library_path())
    return found


def _by_architecture(kernels: list[Any]) -> dict[str, int]:
    return dict(sorted(Counter(kernel.architecture for kernel in kernels).items()))


@target("cuda")
def cuda_local_memory() -> Iterator[Figure]:
    """Kernels of the installed library that spill registers or hold anything in local memory."""
    kernels = _kernels()
    wrong = [kernel for kernel in kernels if kernel.in_local_memory]
    raw = {"kernels": _by_architecture(kernels), "which": [str(kernel) for kernel in wrong]}
    yield Figure("cuda_local_memory", len(wrong), "kernels with local memory", 0, 0, lower=True, raw=raw)


@target("cuda")
def cuda_tensor_cores() -> Iterator[Figure]:
    """Share of the kernels of products and attention that have instructions of tensor cores."""
    kernels = [kernel for kernel in _kernels() if kernel.multiplies]
    without = [kernel for kernel in kernels if not kernel.tensor_core_instructions]
    raw = {
        "kernels": _by_architecture(kernels),
        "fewest": min(kernel.tensor_core_instructions for kernel in kernels),
        "without": [str(kernel) for kernel in without],
    }
    yield Figure("cuda_tensor_cores", 1 - len(without) / len(kernels), "of the kernels", 1.0, 1.0, raw=raw)


@target("cuda")
def cuda_attention_softmax() -> Iterator[Figure]:
    """`MUFU.EX2` that stand between the waits for a tile's keys and for the values before it, in attention by wgmma."""
    letters = {"WARPGROUP.DEPBAR.1": "w", "WARPGROUP.DEPBAR.0": "W", "MUFU.EX2": "E"}
    raw = {}
    for kernel in _kernels():
        if kernel.name.startswith("block_attention_sm90 forward_kernel"):
            between = re.search("w(E*)W", kernel.events(letters))
            raw[kernel.name] = len(between[1]) if between else 0
    if not raw:
        raise Skipped("this build has no kernels for sm_90a")
    yield Figure("cuda_attention_softmax", min(raw.values()), "of 66 under products", 60, 66, raw=raw)


# -- the emulated device ----------------------------------------------------------------------------------------------


@target("cuda")
def cuda_bytes() -> Iterator[Figure]:
    """Bytes that one-pass ops move, over those of inputs and results; with 64 channels and with 61 (unaligned rows)."""
    with _tests("cuda_emulation.affine", "cuda_emulation.emulator") as (affine, emulator):
        for name in affine.OPS:
            kernels = emulator.emulated(affine.source_of(name))
            raw: dict[str, Any] = {}
            for dtypes in ops.SPECS[name].dtypes:
                for channels in (64, 61):
                    moved = affine.traffic(ops.SPECS[name], kernels, dtypes, channels)
                    label = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                    raw[f"{label}, {channels} channels"] = [moved.counted, moved.least]
            worst = max(counted / least for counted, least in raw.values())
            unit = "x inputs read once and results written once"
            yield Figure(f"cuda_bytes_{name}", worst, unit, 1.0, 1.0, lower=True, raw=raw)


@target("cuda")
def cuda_attention_banks() -> Iterator[Figure]:
    """Bank conflicts of attention's forward kernels, in calls of several tiles of keys."""
    with _tests("cuda_emulation.attention", "cuda_emulation.emulator") as (attention, emulator):
        raw = {}
        for kernel in attention.FORWARD_KERNELS:
            kernels = emulator.emulated(kernel.source)
            call = attention.Call.of(attention.arguments_for(kernel.dtype, kernel.width, keys=400))
            run = attention.run_forward(kernels, kernel.launcher, 0, call, kernel.rows)
            raw[str(kernel)] = run.report.bank_conflicts
        yield Figure("cuda_attention_banks", sum(raw.values()), "bank conflicts", 0, 0, lower=True, raw=raw)


@target("cuda")
def cuda_linear_traffic() -> Iterator[Figure]:
    """Bytes that `linear` reads by a model of the cache, over each operand once, on the eight weights of the 7B model.

    132 multiprocessors, 50 MB of second-level cache that forgets what was used least recently (the model is
    tests/native/linear_traffic.cpp). Of weights deeper than 4096 the rows that pass together do not fit the cache.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise Skipped("g++ is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "linear_traffic"
        source = ROOT / "tests/native/linear_traffic.cpp"
        subprocess.run([compiler, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
        for name, rows, deep, goal, moonshot in (
            ("256", 256, None, 1.3, 1.0),
            ("4096", 4096, False, 1.3, 1.0),
            ("4096_deep", 4096, True, 3.5, 1.0),
        ):
            raw: dict[str, Any] = {}
            for weight, (out, depth) in seven_b.WEIGHTS.items():
                if deep is None or deep == (depth > 4096):
                    call = f"{rows} {out} {depth} 132 50000000"
                    done = subprocess.run([program, call], check=True, capture_output=True, text=True)
                    raw[weight] = [int(word) for word in done.stdout.split()]
            worst = max(read / least for read, least in raw.values())
            yield Figure(
                f"cuda_linear_traffic_{name}", worst, "x operands read once", goal, moonshot, lower=True, raw=raw
            )


# -- what a release takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Elapsed seconds of a command, and CPU seconds of all its processes."""

    seconds: float
    cpu_seconds: float


def _timed(command: list[str | Path], environment: dict[str, str]) -> Took:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


def _slowest(log: Path) -> Path:
    """The CUDA source that took longest to compile, by ninja's log."""
    took: dict[str, int] = {}
    for line in log.read_text().splitlines()[1:]:
        begin, end, _, output, _ = line.split("\t")
        if inside := re.search(r"\.dir/(csrc/.*\.cu)\.o$", output):
            took[inside[1]] = max(int(end) - int(begin), took.get(inside[1], 0))
    return RELEASE / "sources" / max(took, key=lambda source: took[source])


def _release_environment() -> dict[str, str]:
    """Environment that builds all architectures on two cores, without a compiler cache."""
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None:
        raise Skipped("nvcc is not on PATH")
    for module in ("scikit_build_core", "pybind11", "cutlass_library"):
        if importlib.util.find_spec(module) is None:
            raise Skipped(f"{module} is not installed: install the build requirements (CONTRIBUTING.md)")
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_COMPILER_LAUNCHER")}
    options = {"STARFLOW_CUDA": "ON", "STARFLOW_CUDA_ARCHITECTURES": "all"}
    return kept | options | {"CCACHE_DISABLE": "1", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}


@target("cuda")
def cuda_build() -> Iterator[Figure]:
    """Minutes to build the wheel of all architectures from nothing on two cores, and its size.

    Sources are copied; wheel and objects stay in `.cache/release` beside this file.
    """
    environment = _release_environment()
    shutil.rmtree(RELEASE, ignore_errors=True)
    sources, wheels = RELEASE / "sources", RELEASE / "wheels"
    for name in ("csrc", "cmake", "python", "starflow_ext"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    took = _timed([*pip, "-C", f"build-dir={RELEASE / 'build'}", "--wheel-dir", wheels, sources], environment)
    (wheel,) = wheels.glob("*.whl")
    yield Figure("cuda_wheel", wheel.stat().st_size / 1e6, "MB, four architectures", 40.0, 20.0, lower=True)
    # CPU time is summed over all processes: other work on the machine lengthens a build, though not its CPU time.
    raw = {"cpu_minutes": took.cpu_seconds / 60, "cores": os.cpu_count()}
    yield Figure("cuda_build", took.seconds / 60, "minutes, four architectures", 25.0, 15.0, lower=True, raw=raw)


@target("cuda")
def cuda_rebuild() -> Iterator[Figure]:
    """Minutes to build all architectures once more after a change of the source that takes longest."""
    environment = _release_environment()
    log = RELEASE / "build" / ".ninja_log"
    if not log.is_file():
        raise Skipped("there is no build to repeat: run cuda_build first")
    changed = _slowest(log)
    changed.touch()
    took = _timed(["cmake", "--build", RELEASE / "build"], environment)
    raw = {"cpu_minutes": took.cpu_seconds / 60, "changed": changed.name}
    yield Figure("cuda_rebuild", took.seconds / 60, "minutes, the slowest kernel", 2.0, 1.0, lower=True, raw=raw)
