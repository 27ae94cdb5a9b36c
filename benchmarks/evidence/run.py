"""Trains and measures rows of the study; a killed run goes on where it was.

    python benchmarks/evidence/run.py paddle/flow/0 paddle/diffusion/0      rows, one after the other
    python benchmarks/evidence/run.py --calibrate digits                    the steps that the budget allows
    python benchmarks/evidence/run.py --tune digits/diffusion               the learning rates of a model
    python benchmarks/evidence/run.py --try digits/diffusion                its options of sampling
    python benchmarks/evidence/run.py --denoisers paddle/flow/0             what cleans the flow's frames best
    python benchmarks/evidence/run.py --surprise paddle/flow/0              whether it knows a frame that cannot be
    python benchmarks/evidence/run.py --speed digits/diffusion              its frames a second, and its memory
    python benchmarks/evidence/run.py --schedules paddle/flow/0             how the flow's inverse is solved best

Weights and states are kept under --folder; results are added to --results, a line for each row and way of sampling.
What stands there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline, Diffusion, LastFrame, Regression
from denoisers import compare
from fit import fit, held_out_loss
from makers import Asked, drawn, make, open_session, ways
from measures import CLIPS, GIVEN, LONG, SECOND, Held, digits, distances, freeway, held_out, paddle
from sklearn.metrics import roc_auc_score
from study import OPTIONS, PLAN, RATES, TUNING_SEED, VERSION, Plan, Row, config_of
from torch import Tensor

from starflow.config import RunConfig
from starflow.data import to_frames
from starflow.model import Flow
from starflow.noise import draw
from starflow.storage import saving
from starflow.text import Features
from starflow.training.batches import make_parts
from starflow.training.machine import keep_freed_memory

RESULTS = Path(__file__).parents[1] / "results" / "evidence.jsonl"
# Steps of a training of tuning, as a share of those of the study.
TUNING_SHARE = 4
# Clips of tuning are others than those of the study: the ones behind them.
TUNING_CLIPS = CLIPS
# The slowest ways of sampling make a second alone.
SLOW_STEPS = 16
# Frames that are left out before a last frame that comes too early.
SKIPPED = 4
# Schedules of the deep block's inverse: token by token, the published chunks (four times as many tokens after the first
# frame) at the published threshold and a hundredth of it, windows at the default tolerance.
SCHEDULES = (
    "sequential",
    *(f"chunks:{block}:{threshold:g}" for threshold in (1e-3, 1e-5) for block in (1, 2, 4, 8)),
    *(f"window:{size}:0.01" for size in (4, 8, 16, 32)),
)
# Clips that are kept for contact sheets.
SHOWN = 8
# Two trainings of so many steps tell what a step takes: what comes before the first one counts in neither.
CALIBRATION_STEPS = (4, 16)


class ResultsError(ValueError):
    """Results that cannot be added to: of another version or budget."""


def read_results(path: Path, budget: float) -> list[dict[str, Any]]:
    """The lines of a results file.

    Raises:
        ResultsError: lines of another version of the study, or of another budget.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if (line.get("study"), line.get("budget")) != (VERSION, budget):
            raise ResultsError(
                f"{path}: line {number} is of version {line.get('study')} and budget {line.get('budget')}, expected "
                f"version {VERSION} and budget {budget} (name another file as --results)"
            )
    return lines


def add(path: Path, line: Mapping[str, Any], budget: float) -> None:
    """Adds a line to the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_known({"study": VERSION, "budget": budget, **line}), allow_nan=False) + "\n")


def _known(value: Any) -> Any:
    """The value with None in place of numbers that are not known, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {name: _known(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# -- what is fixed before the study -----------------------------------------------------------------------------------


def calibrate(kind: str, plan: Plan, folder: Path) -> None:
    """Prints the steps that the budget allows each model, trained in turn a few at a time; the median of three."""
    models = list(plan.steps[kind])
    taken: dict[str, list[float]] = {model: [] for model in models}
    for turn in range(3):
        for model in models:
            row = Row(kind, model, TUNING_SEED)
            few, many = (
                fit(row, config_of(row, steps, 1e-3), folder / "calibrate" / kind / f"{model}-{turn}-{steps}")[1]
                for steps in CALIBRATION_STEPS
            )
            taken[model].append((many - few) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0]))
    for model in models:
        each = statistics.median(taken[model])
        print(f"{kind}/{model}: {each:.4f} s a step, {round(plan.budget / each, -1):.0f} steps", flush=True)


def tune(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Trains a model at each of the rates for a quarter of its steps; adds the losses on held-out clips."""
    steps = plan.of(row)[0] // TUNING_SHARE
    for rate in RATES:
        config = config_of(row, steps, rate)
        trained, seconds = fit(row, config, folder / str(row) / f"rate-{rate:g}")
        loss = held_out_loss(trained, config)
        line = {"tried": f"{row.kind}/{row.model}", "rate": rate, "steps": steps, "loss": loss, "seconds": seconds}
        add(results, line, plan.budget)
        print(line, flush=True)


def attempt(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Measures each of the options of sampling of a trained row, on clips that the study does not use."""
    model, config, _ = trained(row, plan, folder)
    held = held_out(row.kind, GIVEN + SECOND, TUNING_CLIPS)
    for options in OPTIONS[row.kind][row.model]:
        made = make(model, config, _asked(row.kind, held, SECOND, TUNING_CLIPS), options)
        values = {name: _mean(each) for name, each in _read_back(row.kind, made, held).items()}
        line = {"tried": f"{row.kind}/{row.model}", "options": options, **values}
        add(results, line, plan.budget)
        print(line, flush=True)


# -- rows -------------------------------------------------------------------------------------------------------------


def trained(row: Row, plan: Plan, folder: Path) -> tuple[Flow | Baseline, RunConfig, float]:
    """The averaged model of a row, its config and the seconds that it took."""
    steps, rate, _ = plan.of(row)
    config = config_of(row, steps, rate)
    model, seconds = fit(row, config, folder / str(row))
    return model, config, seconds


def _asked(kind: str, held: Held, frames: int, seed: int) -> Asked:
    """Games go on from given frames; digits are made of their captions."""
    if kind == "digits":
        return Asked(held.captions, frames, seed=seed)
    told = None if held.told is None else held.told[:, : GIVEN + frames]
    return Asked(held.captions, frames, held.given, told, seed)


def _read_back(kind: str, made: Tensor, held: Held) -> dict[str, list[float]]:
    if kind == "digits":
        return digits(made, held.captions)
    return paddle(made, held) if kind == "paddle" else freeway(made, held)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def measure(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Trains a row where that is left to do, and adds what its ways of sampling make."""
    known = {
        (line["row"], line["way"]) for line in read_results(results, plan.budget) if "way" in line and "row" in line
    }
    model, config, seconds = trained(row, plan, folder)
    held = held_out(row.kind)
    facts = {
        "row": str(row),
        "kind": row.kind,
        "model": row.model,
        "seed": row.seed,
        "steps": config.train.steps,
        "rate": config.train.lr,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    bits: float | None = None
    for way, options in ways(model).items():
        if (str(row), way) in known:
            continue
        if bits is None:
            bits = bits_per_dim(model, config, held)
        frames = SECOND if options.get("steps", 1) > SLOW_STEPS else LONG
        begin = time.process_time()
        made = make(model, config, _asked(row.kind, held, frames, row.seed * CLIPS), {**plan.of(row)[2], **options})
        taken = time.process_time() - begin
        _keep(made, folder / str(row) / f"{way or 'clips'}.pt")
        line = {
            **facts,
            "way": way,
            "bits": bits,
            "batched_frames_per_second": len(made) * frames / taken,
            "sets": distances(row.kind, made, folder),
            "clips": _read_back(row.kind, made, held),
        }
        add(results, line, plan.budget)
        print({**line, "clips": {name: round(_mean(each), 3) for name, each in line["clips"].items()}}, flush=True)


def measure_last_frame(kind: str, plan: Plan, folder: Path, results: Path) -> None:
    """Adds what repeating the last given frame makes."""
    row = Row(kind, "flow", 0)
    config, held = config_of(row, *plan.of(row)[:2]), held_out(kind)
    asked = Asked(held.captions, LONG, held.given)
    made = make(LastFrame(), config, asked, {})
    _keep(made, folder / kind / "last" / "clips.pt")
    facts = {"row": f"{kind}/last/0", "kind": kind, "model": "last", "seed": 0, "way": "", "parameters": 0}
    add(results, {**facts, "sets": distances(kind, made, folder), "clips": _read_back(kind, made, held)}, plan.budget)


def compare_denoisers(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Adds what each way of cleaning makes of noisy held-out clips."""
    model, config, _ = trained(row, plan, folder)
    assert isinstance(model, Flow)
    for line in compare(row, model, config, folder):
        add(results, line, plan.budget)
        print(line, flush=True)


def speed(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Adds the frames a second of a stream of one clip, of one thread, by processor time: the best of three.

    With them goes the most memory that this process has held, which is that of the model where nothing was trained.
    """
    model, config, _ = trained(row, plan, folder)
    held = held_out(row.kind)
    one = held.one(0)
    for way, options in ways(model).items():
        taken = []
        for _ in range(3):
            begin = time.process_time()
            make(model, config, _asked(row.kind, one, SECOND, 0), {**plan.of(row)[2], **options})
            taken.append(time.process_time() - begin)
        line = {"speed": f"{row.kind}/{row.model}", "way": way, "frames_per_second": SECOND / min(taken)}
        line["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        add(results, line, plan.budget)
        print(line, flush=True)


def compare_schedules(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Adds what each schedule takes for the first second of held-out clips, one at a time, and what it changes.

    Sweeps and evaluations are those of the deep block. The frames are compared with those that are solved token by
    token, of the same noise.
    """
    model, config, _ = trained(row, plan, folder)
    assert isinstance(model, Flow)
    held = held_out(row.kind, GIVEN + SECOND)
    exact = torch.zeros(0)
    for schedule in SCHEDULES:
        options = {**plan.of(row)[2], "denoise": "none", "solver": schedule}
        clips, sweeps, evaluations, taken = [], [], [], 0.0
        for index in range(CLIPS):
            asked = _asked(row.kind, held.one(index), SECOND, index)
            begin = time.process_time()
            with torch.inference_mode():
                session = open_session(model, config, asked, options)
                clips.append(drawn(session, SECOND).clamp(-1.0, 1.0))
            taken += time.process_time() - begin
            report = session.reports[0]
            assert report is not None
            sweeps.append(report.sweeps / SECOND)
            evaluations.append(report.evaluations_per_token)
        made = torch.cat(clips)
        exact = made if schedule == "sequential" else exact
        apart = (made - exact).square().flatten(1).mean(1).sqrt()
        line = {"schedule": schedule, "kind": row.kind, "model": row.model, "seed": row.seed}
        line |= {"sweeps": statistics.fmean(sweeps), "evaluations": statistics.fmean(evaluations)}
        line |= {"frames_per_second": CLIPS * SECOND / taken, "apart": [round(float(each), 5) for each in apart]}
        line |= {name: _mean(each) for name, each in _read_back(row.kind, made, held).items()}
        add(results, line, plan.budget)
        print(line, flush=True)


def surprise(row: Row, plan: Plan, folder: Path, results: Path) -> None:
    """Adds how well a model tells clips whose last frame comes too early from clips as they were.

    What is compared is what the model holds the last frame to be worth: the flow's density, the bound of diffusion, and
    the error of regression.
    """
    model, config, _ = trained(row, plan, folder)
    frames = config.data.frames
    held = held_out(row.kind, GIVEN + SECOND)
    true = held.until(frames)
    late = held.pixels[:, frames - 1 + SKIPPED : frames + SKIPPED]
    false = replace(true, pixels=torch.cat([true.pixels[:, :-1], late], 1))
    worth = torch.cat([frame_nats(model, config, clips)[:, -1] for clips in (true, false)])
    area = float(roc_auc_score([0] * CLIPS + [1] * CLIPS, -worth))
    line = {"surprise": str(row), "kind": row.kind, "model": row.model, "seed": row.seed}
    line |= {"skipped": SKIPPED, "area": area}
    add(results, line, plan.budget)
    print(line, flush=True)


def bits_per_dim(model: Flow | Baseline, config: RunConfig, held: Held) -> float:
    """Bits a dimension of held-out clips with the noise of training: exact of the flow, the bound of diffusion."""
    if isinstance(model, Regression):
        return math.nan
    clips = held.until(config.data.frames)
    nats = frame_nats(model, config, clips)
    codec, _ = make_parts(config)
    return -float(nats.sum(1).mean()) / codec.encode(clips.pixels[:1]).numel() / math.log(2)


@torch.inference_mode()
def frame_nats(model: Flow | Baseline, config: RunConfig, clips: Held) -> Tensor:
    """Nats (clips, frames) of the latents of frames with the noise of training, given those before them.

    Exact of the flow, the bound of diffusion; of regression, which has no density, minus the squared error.
    """
    codec, text = make_parts(config)
    latents, y = codec.encode(clips.pixels), Features(config.flow, text)(clips.captions)
    noise_std, seeds = config.train.noise_std, tuple(range(len(latents)))
    if isinstance(model, Flow):
        noise = draw(seeds, *latents.shape[1:], purpose="train")
        return model.log_prob(latents + noise_std * noise, y, clips.told, by="frame")
    if isinstance(model, Diffusion):
        return model.bound(latents, y, clips.told, noise_std, seeds)
    assert isinstance(model, Regression)
    return -model.errors(latents, y, clips.told).flatten(2).sum(2)


def _keep(made: Tensor, path: Path) -> None:
    """Keeps some clips as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with saving(path, "clips") as temporary:
        torch.save(torch.stack([to_frames(clip) for clip in made[:SHOWN]]), temporary)


def main() -> None:
    """Parse the command and do it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="KIND/MODEL/SEED, or KIND/last")
    parser.add_argument("--calibrate", nargs="+", default=[], metavar="KIND")
    parser.add_argument("--tune", nargs="+", default=[], metavar="KIND/MODEL")
    parser.add_argument("--try", dest="attempt", nargs="+", default=[], metavar="KIND/MODEL")
    parser.add_argument("--surprise", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--speed", nargs="+", default=[], metavar="KIND/MODEL")
    parser.add_argument("--denoisers", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--schedules", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--plan", type=Path, default=PLAN, help="steps, rates and options of sampling")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Seconds of one thread, so that they are those of the processor.
    torch.set_num_threads(1)
    keep_freed_memory()
    plan = Plan.load(options.plan)
    for kind in options.calibrate:
        calibrate(kind, plan, options.folder)
    for name in options.tune:
        tune(Row.parse(f"{name}/{TUNING_SEED}"), plan, options.folder, options.results)
    for name in options.attempt:
        attempt(Row.parse(f"{name}/0"), plan, options.folder, options.results)
    for name in options.rows:
        if name.endswith("/last"):
            measure_last_frame(name.removesuffix("/last"), plan, options.folder, options.results)
        else:
            measure(Row.parse(name), plan, options.folder, options.results)
    for name in options.denoisers:
        compare_denoisers(Row.parse(name), plan, options.folder, options.results)
    for name in options.schedules:
        compare_schedules(Row.parse(name), plan, options.folder, options.results)
    for name in options.surprise:
        surprise(Row.parse(name), plan, options.folder, options.results)
    for name in options.speed:
        speed(Row.parse(f"{name}/0"), plan, options.folder, options.results)


if __name__ == "__main__":
    main()
