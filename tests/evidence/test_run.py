"""Rows, results and tables of the study."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fit import STATE, fit
from report import PAGE, filled, interval, table
from run import RESULTS, ResultsError, add, read_results
from study import PLAN, Plan, Row, config_of

from starflow.training.optim import Optimizer


@pytest.mark.parametrize("text", ["paddle/flow", "paddle/flow/x", "paddle/none/0", "none/flow/0", "paddle/flow/0/1"])
def test_a_row_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected KIND/MODEL/SEED"):
        Row.parse(text)


def test_the_plan_has_steps_rates_and_options_of_every_model() -> None:
    plan = Plan.load(PLAN)
    for kind in plan.steps:
        for model in plan.steps[kind]:
            steps, rate, _ = plan.of(Row(kind, model, 0))
            assert steps > 0
            assert rate > 0


@pytest.mark.parametrize("other", [{"study": 0, "budget": 300.0}, {"study": 1, "budget": 1.0}, {}])
def test_results_of_another_version_or_budget_are_not_mixed_in(tmp_path: Path, other: dict[str, float]) -> None:
    path = tmp_path / "results.jsonl"
    add(path, {"row": "paddle/flow/0", "way": "", "clips": {"ball": [1.0, math.nan]}}, 300.0)
    (line,) = read_results(path, 300.0)
    assert line["clips"]["ball"] == [1.0, None]
    with path.open("a") as file:
        file.write(json.dumps(other) + "\n")
    with pytest.raises(ResultsError, match="line 2 is of version"):
        read_results(path, 300.0)


def test_an_interval_leaves_unknown_values_out_and_holds_the_mean() -> None:
    mean, low, high = interval([[0.0, 1.0, None, 1.0], [1.0, 1.0, 0.0, None]])
    assert mean == pytest.approx(2 / 3)
    assert low < mean < high
    assert interval([[0.5, 0.5], [0.5]]) == (0.5, 0.5, 0.5)


def test_a_missing_row_is_a_hole_and_no_number() -> None:
    sets = dict.fromkeys(("frechet", "frechet_last", "frechet_motion", "precision", "recall"), 1.0)
    line = {"kind": "paddle", "model": "flow", "seed": 0, "way": "denoised", "bits": 1.0, "sets": sets}
    written = table([{**line, "clips": {"paddle": [1.0, 0.0]}}], "paddle")
    head, _, row = (line.split(" | ") for line in written.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["ball followed"] == ""
    assert cells["paddle right"].startswith("50.0")
    assert "diffusion" not in written


@pytest.mark.parametrize("model", ["diffusion", "regression"])
def test_a_baseline_that_was_interrupted_ends_with_the_same_bits(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fit.CHECKPOINT_EVERY", 2)
    row = Row("digits", model, 3)
    whole, _ = fit(row, config_of(row, 4, 1e-3), tmp_path / "whole")

    step = Optimizer.step

    def interrupted(optimizer: Optimizer, updates: int) -> None:
        if updates == 3:
            raise KeyboardInterrupt
        step(optimizer, updates)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(row, config_of(row, 4, 1e-3), tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / STATE, weights_only=True)["step"] == 2
    resumed, seconds = fit(row, config_of(row, 4, 1e-3), tmp_path / "parts")
    assert seconds > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_page_has_the_tables_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, read_results(RESULTS, Plan.load(PLAN).budget)) == page
