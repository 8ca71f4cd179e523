"""What the report reads and how it lays it out: curves, schedules, grids of layers, latencies."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sqat.lint.layer_row import LayerRow
from sqat.recipe.stages import PruneConfig, QatConfig
from sqat.report.curves import MOST_POINTS, Curves, read_losses, schedule_of
from sqat.report.figures import (
    COLOURS,
    MAX_RATIO,
    draw_activations,
    draw_curves,
    mark_percentiles,
    rebin,
    strip_prefix,
)
from sqat.report.grid import NUM_COLUMNS, make_grid, short_names
from sqat.report.page import curve_note
from sqat.report.read_run import Activation, Stage
from sqat.report.summary import format_metric
from sqat.sparsity.schedules.per_group import PerGroup


def line(step: int, task: float, stage: str = "qat", **more: Any) -> dict[str, Any]:
    return {"stage": stage, "fingerprint": "k", "attempt": 1, "step": step, "losses": {"task": task}, **more}


LINES = [line(2, 9.0, "qat-b"), line(5, 1.0), line(9, 0.5, losses={"task": 0.5, "minilm": 2e-5})]


def losses(entries: list[dict[str, Any]], stage: str = "qat", steps: int = 20, **manifest: Any) -> dict[str, Any]:
    known: Any = SimpleNamespace(**{"stage": stage, "fingerprint": "k", "attempt": 1, "steps": steps, **manifest})
    return read_losses(known, entries)


def test_a_stage_has_its_own_lines() -> None:
    assert losses(LINES) == {"task": [(5, 1.0), (9, 0.5)], "minilm": [(9, 2e-05)]}
    assert losses(LINES, "qat-b") == {"task": [(2, 9.0)]}
    assert losses(LINES, "train") == {}


def test_the_last_line_of_a_step_counts() -> None:
    assert losses([*LINES, line(5, 0.75)])["task"] == [(5, 0.75), (9, 0.5)]


@pytest.mark.parametrize("other", [{"fingerprint": "other"}, {"attempt": 2}])
def test_lines_of_another_run_or_attempt_are_not_those_of_the_checkpoint(other: dict[str, Any]) -> None:
    assert losses([line(1, 7.0), line(2, 3.0, **other)]) == {"task": [(1, 7.0)]}
    assert losses([line(1, 7.0), line(2, 3.0)], steps=1) == {"task": [(1, 7.0)]}


def test_a_long_training_is_thinned_out() -> None:
    points = losses([line(step, 1.0) for step in range(1, 5001)], steps=5000)["task"]
    assert len(points) <= MOST_POINTS + 1
    assert points[-1][0] == 5000


def test_the_schedule_is_that_of_the_prune_stage() -> None:
    config = PruneConfig(schedule=PerGroup(num_masks=2), recovery_fraction=0.8)
    assert schedule_of(config, 100) == [(0, 0.25), (20, 0.5)]
    assert schedule_of(PruneConfig(schedule=PerGroup(num_masks=1)), 100) == [(0, 0.5)]
    assert schedule_of(QatConfig(), 100) == []


def layers(*names: str) -> list[LayerRow]:
    return [LayerRow(name, (4, 4), "2:4", 0.5, None, None, None, None, "") for name in names]


def test_an_encoder_is_a_grid_of_blocks_and_parts() -> None:
    parts = ("attention.self.query", "attention.output.dense", "output.dense")
    grid = make_grid(layers("pooler.dense", *(f"bert.layer.{n}.{part}" for n in range(3) for part in parts)))
    assert (grid.regular, grid.rows) == (True, ["0", "1", "2"])
    assert grid.columns == ["attention.self.query", "attention.output.dense", "output.dense"]
    assert [[cell.name if cell else "" for cell in row] for row in grid.cells] == [
        [f"bert.layer.{n}.{part}" for part in parts] for n in range(3)
    ]
    assert [layer.name for layer in grid.outside] == ["pooler.dense"]


def test_other_models_keep_their_order() -> None:
    names = [f"down.{n}.{chr(97 + n)}.conv" for n in range(NUM_COLUMNS + 3)]
    grid = make_grid(layers(*names))
    assert not grid.regular
    assert grid.rows == ["1", str(NUM_COLUMNS + 1)]
    assert [cell.name for row in grid.cells for cell in row if cell is not None] == names


def test_short_names_are_different() -> None:
    assert short_names(["attention.self.query", "output.dense"]) == ["self.query", "output.dense"]
    same_end = short_names(["attention.output.dense", "output.dense"])
    assert len(set(same_end)) == 2


def test_metrics_beyond_one_are_named_and_not_drawn() -> None:
    metrics = {"pnr": [(5, 2.5), (10, 3.25)], "ndcg@10": [(5, 0.5), (10, 0.75)]}
    stage = Stage("qat", QatConfig(), None, Curves(10, {"task": [(10, 1.0)]}, metrics))
    assert curve_note(stage).endswith("not drawn on an axis of 0 to 1, last values: dev pnr 3.2500")
    drawn = draw_curves(stage)
    assert "dev ndcg@10" in drawn
    assert "dev pnr" not in drawn
    alone = draw_curves(Stage("qat", QatConfig(), None, Curves(10, {"task": [(10, 1.0)]}, {"pnr": metrics["pnr"]})))
    assert "metric" not in alone


def test_more_points_than_colours_are_all_drawn() -> None:
    losses = {f"loss{number}": [(1, 1.0), (2, 0.5)] for number in range(3 * len(COLOURS))}
    drawn = draw_curves(Stage("qat", QatConfig(), None, Curves(2, losses)))
    assert all(f">{name} loss<" in drawn for name in losses)


def test_ids_are_unique_on_the_page() -> None:
    one, other = (
        draw_curves(Stage("qat", QatConfig(), None, Curves(2, {"task": [(1, 1.0), (2, end)]}))) for end in (0.5, 0.75)
    )
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_metrics_that_are_not_finite() -> None:
    assert [format_metric(value) for value in (0.5, math.inf, -math.inf, math.nan)] == [
        "0.5000",
        "∞",
        "-∞",
        "not a number",
    ]


def test_the_percentile_is_marked() -> None:
    seen = Activation("a.b:input", 2.0, 1.0, [60, 20, 10, 0, 10], 0.2, 3.0)
    far = [replace(seen, percentile=2.0 * MAX_RATIO + 0.1)]
    assert "99.99 %" not in draw_activations(far), "beyond the strip"
    panel = Figure().subplots()
    mark_percentiles(panel, [*far, seen], MAX_RATIO)
    assert [line.get_xydata().tolist() for line in panel.lines[:2]] == [[[1.5, 1.5]]] * 2


def test_common_prefixes_are_removed() -> None:
    assert strip_prefix(["bert.layer.0.query:input", "bert.layer.1.key:input"]) == ["0.query:input", "1.key:input"]
    assert strip_prefix(["a.query:input", "b.query:input"]) == ["a.query:input", "b.query:input"]
    assert strip_prefix(["alpha:input", "alpine:input"]) == ["alpha:input", "alpine:input"]


def test_histograms_are_rebinned_in_units_of_amax() -> None:
    seen = Activation("a:input", 2.0, 1.0, [60, 20, 10, 0, 10], 0.2, 3.0)
    np.testing.assert_allclose(rebin(seen, np.array([0.0, 0.5, 1.0, 1.5])), [0.6, 0.2, 0.2])
    np.testing.assert_allclose(rebin(seen, np.array([0.0, 0.25, 3.0])), [0.3, 0.7], err_msg="half of a bin")
