"""The tables, the front and the contact sheets of docs/evidence.md, from the results of run.py.

    python benchmarks/evidence/report.py

Every number has an interval: measures of clips by bootstrap over seeds and, within each, over clips; distances of sets
by the least and the greatest of the seeds. A row that is missing is a hole in the table.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import RESULTS, read_results
from study import KINDS, MODELS, PLAN, Plan
from torch import Tensor

from starflow.data import write_contact_sheet

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
DRAWS = 2000
# Of each kind: the measures of a table, by name and heading; those of sets have their names in `sets`.
COLUMNS = {
    "paddle": {
        "paddle": "paddle right",
        "ball": "ball followed",
        "one_ball": "one ball",
        "one_ball_last": "one ball, last second",
        "frechet": "Fréchet",
        "frechet_last": "Fréchet, last second",
        "frechet_motion": "Fréchet of motion",
        "precision": "precision",
        "recall": "recall",
    },
    "freeway": {
        "cars": "cars right",
        "cars_last": "cars right, last second",
        "psnr": "PSNR, dB",
        "psnr_last": "PSNR, last second",
        "frechet": "Fréchet",
        "frechet_last": "Fréchet, last second",
        "frechet_motion": "Fréchet of motion",
        "precision": "precision",
        "recall": "recall",
    },
    "digits": {
        "digit": "right in 12 frames",
        "digit_frames": "frames right",
        "digit_last": "frames right, last second",
        "direction": "way",
        "frechet": "Fréchet",
        "frechet_last": "Fréchet, last second",
        "frechet_motion": "Fréchet of motion",
        "precision": "precision",
        "recall": "recall",
    },
}
SHARES = {
    *("paddle", "ball", "one_ball", "one_ball_last"),
    *("cars", "cars_last"),
    *("digit", "digit_frames", "digit_last", "direction"),
}
# Other measures of clips.
RATIOS = {"psnr", "psnr_last"}
# What the front shows of a kind.
QUALITY = {"paddle": "ball", "digits": "digit_frames", "freeway": "cars"}
_NAMES = {
    "flow": "flow",
    "flow-denoiser-2": "flow, its denoiser learns twice as often",
    "flow-heads-32": "flow, heads of 32 in place of 64",
    "flow-previous": "flow, beside the frame before",
    "flow-improved": "flow, centred and beside the frame before",
    "flow-gaussian": "flow, centred, beside the frame before, its denoiser begun from a Gaussian",
    "flow-lookahead": "flow, its denoiser looks a frame ahead",
    "flow-global": "flow, every block sees the whole clip",
    "flow-noise-0.1": "flow, noise of 0.1",
    "flow-noise-0.4": "flow, noise of 0.4",
    "diffusion": "diffusion",
    "regression": "regression",
    "last": "the last frame",
}
# Frames of a sheet, counted from the first that was made.
SHOWN_FRAMES = (0, 3, 7, 11, 15, 29, 60, 90, 120, 155)
Line = dict[str, Any]


def interval(clips: Sequence[Sequence[float | None]]) -> tuple[float, float, float]:
    """Mean, and the middle 95 % of bootstrapped means, of the values of clips by seed; None are left out."""
    rng = np.random.default_rng(0)
    known = [np.array([value for value in values if value is not None]) for values in clips]
    means = []
    for _ in range(DRAWS):
        seeds = [known[index] for index in rng.integers(len(known), size=len(known))]
        means.append(np.mean([np.mean(values[rng.integers(len(values), size=len(values))]) for values in seeds]))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean([values.mean() for values in known])), float(low), float(high)


def _cell(lines: Sequence[Line], name: str) -> str:
    if name in SHARES | RATIOS:
        values = [line["clips"][name] for line in lines if name in line["clips"]]
        if not values:
            return ""
        mean, low, high = interval(values)
        if name in RATIOS:
            return f"{mean:.1f} ({low:.1f} to {high:.1f})"
        return f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"
    return _range([line["sets"][name] for line in lines], 2)


def _range(values: Sequence[float | None], digits: int) -> str:
    """The mean of what is known, and the least and the greatest where there are several; a hole for nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({min(known):.{digits}f} to {max(known):.{digits}f})" if len(known) > 1 else ""
    return f"{sum(known) / len(known):.{digits}f}{spread}"


def groups(results: Sequence[Line], kind: str) -> dict[tuple[str, str], list[Line]]:
    """The lines of a kind by model and way of sampling."""
    found: dict[tuple[str, str], list[Line]] = {}
    for model in dict.fromkeys((*_NAMES, *MODELS)):
        for line in results:
            if "way" in line and line.get("kind") == kind and line.get("model") == model:
                found.setdefault((model, line["way"]), []).append(line)
    return found


def speeds(results: Sequence[Line], kind: str) -> dict[tuple[str, str], float]:
    """Frames a second of a stream by model and way of sampling; of several measurements the last."""
    lines = [line for line in results if line.get("speed", "").startswith(f"{kind}/")]
    return {(line["speed"].split("/")[1], line["way"]): line["frames_per_second"] for line in lines}


def _name(model: str, way: str) -> str:
    return ", ".join(filter(None, (_NAMES.get(model, model), way)))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the head its first row."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def table(results: Sequence[Line], kind: str) -> str:
    """The table of a kind in Markdown."""
    columns = COLUMNS[kind]
    head = ["model", "seeds", *columns.values(), "bits a dimension", "frames a second"]
    rows = [head]
    rates = speeds(results, kind)
    for (model, way), lines in groups(results, kind).items():
        rate = rates.get((model, way))
        cells = [_cell(lines, name) for name in columns]
        seeds = len({line["seed"] for line in lines})
        rows.append(
            [
                _name(model, way),
                str(seeds),
                *cells,
                _range([line.get("bits") for line in lines], 3),
                "" if rate is None else f"{rate:.0f}",
            ]
        )
    return _markdown(rows)


def tries(results: Sequence[Line]) -> str:
    """What was tried before the study: rates and options, each with what it gave."""
    rows = [["model", "tried", "gave"]]
    for line in results:
        if "rate" in line and "tried" in line:
            gave = f"loss {line['loss']:.4f} on held-out clips"
            rows.append([line["tried"], f"rate {line['rate']:g}, {line['steps']} steps", gave])
        elif "options" in line:
            known = [f"{name} {line[name]:.3f}" for name in SHARES | RATIOS if line.get(name) is not None]
            options = ", ".join(f"{name} {value:g}" for name, value in line["options"].items())
            rows.append([line["tried"], options, ", ".join(sorted(known))])
    return _markdown(rows)


def denoisers(results: Sequence[Line]) -> str:
    """The ablation of the denoiser: means over the seeds, with the least and the greatest."""
    rows = [["beside", "cleaned by", "seeds", "PSNR, dB", "SSIM", "Fréchet"]]
    found: dict[tuple[str, str], list[Line]] = {}
    for line in results:
        if "denoiser" in line:
            found.setdefault((line["row"].split("/")[1], line["denoiser"]), []).append(line)
    for (model, way), mine in found.items():
        cells = [_range([line[name] for line in mine], digits) for name, digits in (("psnr", 1), ("ssim", 3))]
        cells.append(_range([line["frechet"] for line in mine], 2))
        rows.append([_NAMES.get(model, model), way, str(len(mine)), *cells])
    return _markdown(rows)


def schedules(results: Sequence[Line]) -> str:
    """What the deep block's inverse takes by schedule: means over the seeds, with the least and the greatest."""
    rows = [["data", "schedule", "seeds", "sweeps a frame", "evaluations a token", "frames a second", "apart", "worst"]]
    lines = [line for line in results if "schedule" in line]
    for kind, name in dict.fromkeys((line["kind"], line["schedule"]) for line in lines):
        mine = [line for line in lines if (line["kind"], line["schedule"]) == (kind, name)]
        cells = [
            _range([line[column] for line in mine], digits)
            for column, digits in (("sweeps", 1), ("evaluations", 2), ("frames_per_second", 0))
        ]
        apart = [value for line in mine for value in line["apart"]]
        rows.append([kind, f"`{name}`", str(len(mine)), *cells, f"{np.median(apart):.4f}", f"{max(apart):.4f}"])
    return _markdown(rows)


def surprises(results: Sequence[Line]) -> str:
    """How well models tell a frame that comes too early: means over the seeds, with the least and the greatest."""
    rows = [["data", "model", "seeds", "area under the curve"]]
    lines = [line for line in results if "surprise" in line]
    for kind, model in dict.fromkeys((line["kind"], line["model"]) for line in lines):
        areas = [line["area"] for line in lines if (line["kind"], line["model"]) == (kind, model)]
        rows.append([kind, _NAMES.get(model, model), str(len(areas)), _range(areas, 3)])
    return _markdown(rows)


def costs(results: Sequence[Line]) -> str:
    """Parameters, steps and processor seconds of trainings, and their total."""
    rows = [["row", "parameters", "rate", "steps", "processor seconds"]]
    total, seen = 0.0, set()
    for line in results:
        total += line["seconds"] if "tried" in line and "seconds" in line else 0.0
        if "steps" in line and "row" in line and line["row"] not in seen:
            seen.add(line["row"])
            total += line["seconds"]
            cells = [line["row"], f"{line['parameters']:,}", f"{line['rate']:g}", str(line["steps"])]
            rows.append([*cells, f"{line['seconds']:.0f}"])
    return f"{_markdown(rows)}\n\nTrainings of the study and of its tuning took {total / 3600:.1f} hours of one thread."


def front(results: Sequence[Line], path: Path) -> None:
    """The picture of quality against frames a second."""
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if speeds(results, kind)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(6.4 * len(kinds), 4.6), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        rates, quality = speeds(results, kind), QUALITY[kind]
        by_model: dict[str, list[tuple[float, float, float, float, str]]] = {}
        for (model, way), lines in groups(results, kind).items():
            if (model, way) in rates and quality in lines[0]["clips"] and model in _NAMES:
                point = (rates[model, way], *interval([line["clips"][quality] for line in lines]), way)
                by_model.setdefault(model, []).append(point)
        for model, points in by_model.items():
            x, y, low, high, _ = zip(*points, strict=True)
            error = [np.subtract(y, low), np.subtract(high, y)]
            axis.errorbar(x, y, yerr=error, fmt="o-" if model == "diffusion" else "o", capsize=3, label=_NAMES[model])
            for rate, value, *_, way in points:
                axis.annotate(way, (rate, value), textcoords="offset points", xytext=(-4, 5), ha="right", fontsize=8)
        axis.set(xscale="log", xlabel="frames a second, one thread", ylabel=COLUMNS[kind][quality], title=kind)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def sheet(kind: str, folder: Path, path: Path, count: int = 2) -> None:
    """What every model makes of the same beginnings, row by row."""
    strips, names = [], []
    for model in _NAMES:
        place = folder / kind / model / ("0" if model in MODELS else "")
        for file in sorted(place.glob("*.pt"), key=lambda file: (len(file.stem), file.stem)):
            clips = torch.load(file, weights_only=True)
            if not isinstance(clips, Tensor):  # weights
                continue
            frames = [index for index in SHOWN_FRAMES if index < clips.shape[1]]
            strips += [clip[frames] for clip in clips[:count]]
            names += [_name(model, "" if file.stem == "clips" else file.stem)] * min(count, len(clips))
    write_contact_sheet(path, strips, names, len(SHOWN_FRAMES), 2)


def filled(page: str, results: Sequence[Line]) -> str:
    """The page with its tables as the results have them.

    Raises:
        SystemExit: a table has no place in the page.
    """
    blocks = {kind: table(results, kind) for kind in filter(functools.partial(groups, results), KINDS)} | {
        "tries": tries(results),
        "costs": costs(results),
        "denoisers": denoisers(results),
        "schedules": schedules(results),
        "surprises": surprises(results),
    }
    for name, text in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        page, found = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}{match[2]}", page, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{PAGE}: no place for {name}, expected <!-- {name} --> and <!-- end -->")
    return page


def main() -> None:
    """Write the tables into the page and the pictures beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=None, help="of run.py, for the contact sheets")
    options = parser.parse_args()
    results = read_results(options.results, Plan.load(PLAN).budget)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    images = PAGE.parent / "images"
    if any(speeds(results, kind) for kind in KINDS):
        front(results, images / "evidence-front.png")
    if options.folder is not None:
        for kind in filter(functools.partial(groups, results), KINDS):
            sheet(kind, options.folder, images / f"evidence-{kind}.png")


if __name__ == "__main__":
    main()
