"""How linear's CUDA kernels cut a product: every value once, no part empty, and every multiprocessor busy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 64
# Multiprocessors of A100, H100 and B200; and of small and odd devices.
DEVICES = (108, 132, 148, 1, 7, 46)


class Call(NamedTuple):
    rows: int
    out_channels: int
    in_channels: int
    multiprocessors: int
    input_bytes: int = 0


class Schedule(NamedTuple):
    tile_rows: int
    tile_columns: int
    row_tiles: int
    column_tiles: int
    depth_tiles: int
    parts: int
    group: int
    split: int
    blocks: int
    counters: int
    partials: int
    bytes: int
    each_tile_once: int
    bounds: tuple[int, ...]


Schedules = Callable[[Iterable[Call]], list[Schedule]]


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: pytest.TempPathFactory) -> Schedules:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    program = tmp_path_factory.mktemp("schedule") / "linear_schedule"
    source = Path(__file__).with_name("linear_schedule.cpp")
    command = [compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    def run(calls: Iterable[Call]) -> list[Schedule]:
        lines = "\n".join(" ".join(map(str, call)) for call in calls)
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        answers = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
        return [Schedule(*answer[:13], tuple(answer[13:])) for answer in answers]

    return run


SIZES = (0, 1, 7, 16, 17, 32, 33, 64, 65, 128, 129, 1000, 4096)
# (out_channels, in_channels) of a layer of the 7B model, of both widths.
LAYERS = [shape for w in (3072, 4096) for shape in ((3 * w, w), (w, w), (4 * w, w), (w, 4 * w))]
CHANNELS = (0, 1, 48, 63, 64, 65, 96, 768, 3072, 4096, 9216, 12288)


def test_tiles_and_parts_cover_the_product_once(schedules: Schedules) -> None:
    calls = [Call(r, o, i, m) for r in SIZES for o in CHANNELS for i in CHANNELS for m in DEVICES]
    for call, schedule in zip(calls, schedules(calls), strict=True):
        assert (schedule.row_tiles - 1) * schedule.tile_rows < max(call.rows, 1)
        assert schedule.row_tiles * schedule.tile_rows >= call.rows
        assert schedule.column_tiles * schedule.tile_columns >= call.out_channels
        assert schedule.each_tile_once
        # Groups of nearly one height, whose rows a cache of 40 MB holds, or eleven tiles.
        groups = -(-schedule.row_tiles // schedule.group)
        assert 0 <= schedule.group * groups - schedule.row_tiles < max(groups, 1)
        assert schedule.group <= 11 or schedule.group * schedule.tile_rows * call.in_channels * 2 <= 32 << 20
        assert schedule.bounds[0] == 0
        assert schedule.bounds[-1] == schedule.depth_tiles == -(-call.in_channels // DEPTH)
        steps = [after - before for before, after in zip(schedule.bounds, schedule.bounds[1:], strict=False)]
        assert len(steps) == schedule.parts >= 1
        # Each part fills the pipeline, unless there is one alone.
        assert schedule.parts == 1 or min(steps) >= 4, call
        assert max(steps) - min(steps) <= 1
        assert not schedule.split or schedule.parts > 1
        assert schedule.blocks == schedule.row_tiles * schedule.column_tiles * (schedule.parts if schedule.split else 1)


def test_parts_do_not_depend_on_the_rows(schedules: Schedules) -> None:
    """What makes the bits of a row independent of the others."""
    weights = [(o, i, m) for o in CHANNELS for i in CHANNELS for m in DEVICES]
    answers = iter(schedules(Call(rows, *weight) for weight in weights for rows in SIZES))
    for weight in weights:
        assert len({next(answers).bounds for _ in SIZES}) == 1, weight


def test_published_shapes_keep_every_multiprocessor_busy(schedules: Schedules) -> None:
    """Layers of the 7B model, 1 to 128 rows: a block for each at least, and all side by side where K is cut."""
    calls = [Call(rows, *layer, device) for rows in (1, 16, 32, 64, 128) for layer in LAYERS for device in DEVICES[:3]]
    for call, schedule in zip(calls, schedules(calls), strict=True):
        assert schedule.row_tiles == 1, call  # the weight passes once
        assert schedule.blocks >= call.multiprocessors, (call, schedule)
        assert not schedule.split or schedule.blocks <= 2 * call.multiprocessors, (call, schedule)


def test_workspace_holds_input_counters_and_partial_sums_apart(schedules: Schedules) -> None:
    calls = [Call(r, o, i, m, 2 * r * i) for r in SIZES for o in CHANNELS for i in CHANNELS for m in DEVICES]
    for call, schedule in zip(calls, schedules(calls), strict=True):
        tiles = schedule.row_tiles * schedule.column_tiles
        assert schedule.counters >= call.input_bytes
        assert schedule.partials >= schedule.counters + 4 * tiles * schedule.split
        assert schedule.partials % 128 == schedule.counters % 128 == 0
        sums = schedule.blocks * schedule.tile_rows * schedule.tile_columns * schedule.split
        assert schedule.bytes == schedule.partials + 4 * sums


def test_what_is_read_of_memory_by_a_model_of_the_cache(run_program: Callable[..., str]) -> None:
    """Of 132 multiprocessors and 50 MB: operands once, but of weights so deep that few rows stay in the cache."""
    cases = [(rows, *layer) for rows in (256, 4096) for layer in LAYERS]
    arguments = tuple(" ".join(map(str, (*case, 132, 50_000_000))) for case in cases)
    answers = run_program("linear_traffic.cpp", "-O2", arguments=arguments).splitlines()
    for (rows, out, depth), answer in zip(cases, answers, strict=True):
        read, ideal = map(int, answer.split())
        assert ideal <= read <= (1.3 if rows == 256 or depth <= 4096 else 3.5) * ideal, (rows, out, depth)
