"""What the report reads and how it lays it out: logs, schedules, grids of layers, latencies."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from sqat.lint.layer_row import LayerRow
from sqat.recipe.stages import PruneConfig, QatConfig
from sqat.report.curves import Curves, read_log, schedule_of
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

BEGUN = """\
2026-01-01 00:00:00 qat-b: 20 steps
2026-01-01 00:00:01 qat-b: 2/20, task 9.0, 1.0 samples/s, 1.0s left
2026-01-01 00:00:01 qat-b: done in 2m05s
2026-01-01 00:00:02 qat: 20 steps
2026-01-01 00:00:03 qat: 5/20, task 1.0, 14.8 samples/s, 1m53s left
2026-01-01 00:00:04 qat: 9/20, task 0.5, minilm 2e-05, 14.8 samples/s, 1m40s left
"""
RESUMED = """\
2026-01-01 00:01:00 qat: resumed at step 6 of 20
2026-01-01 00:01:00 qat: 20 steps
2026-01-01 00:01:01 qat: 8/20, task 0.75, 14.8 samples/s, 2h07m left
2026-01-01 00:01:02 qat: done in 3.4s
2026-01-01 00:01:03 qat: dev accuracy 0.5 -> runs/x/04-qat
"""
AGAIN = """\
2026-01-01 00:02:00 qat: 20 steps
2026-01-01 00:02:01 qat: 3/20, task 0.125, 14.8 samples/s, 1m53s left
"""


DONE = "2026-01-01 00:03:00 qat: done in 3.4s\n"


def test_a_stage_has_its_own_lines() -> None:
    assert read_log((BEGUN + DONE).splitlines(), "qat") == {"task": [(5, 1.0), (9, 0.5)], "minilm": [(9, 2e-05)]}
    assert read_log((BEGUN + DONE).splitlines(), "qat-b") == {"task": [(2, 9.0)]}
    assert read_log((BEGUN + DONE).splitlines(), "train") == {}


def test_a_resumed_fit_goes_on_from_its_last_state() -> None:
    assert read_log((BEGUN + RESUMED).splitlines(), "qat")["task"] == [(5, 1.0), (8, 0.75)]


def test_a_fit_that_began_again_forgets_the_one_before() -> None:
    assert read_log((BEGUN + RESUMED + AGAIN + DONE).splitlines(), "qat") == {"task": [(3, 0.125)]}


def test_a_fit_under_way_is_not_that_of_the_checkpoint() -> None:
    assert read_log((BEGUN + RESUMED + AGAIN).splitlines(), "qat")["task"] == [(5, 1.0), (8, 0.75)]
    assert read_log(BEGUN.splitlines(), "qat") == {}


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


def test_parts_are_told_apart() -> None:
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


def test_figures_of_one_title_have_ids_of_their_own() -> None:
    one, other = (
        draw_curves(Stage("qat", QatConfig(), None, Curves(2, {"task": [(1, 1.0), (2, end)]}))) for end in (0.5, 0.75)
    )
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_figures_that_are_no_numbers() -> None:
    assert [format_metric(value) for value in (0.5, math.inf, -math.inf, math.nan)] == [
        "0.5000",
        "∞",
        "-∞",
        "not a number",
    ]


def test_the_bound_of_most_values_is_marked_where_it_is() -> None:
    seen = Activation("a.b:input", 2.0, 1.0, [60, 20, 10, 0, 10], 0.2, 3.0)
    far = [replace(seen, percentile=2.0 * MAX_RATIO + 0.1)]
    assert "99.99 %" not in draw_activations(far), "beyond the strip"
    panel = Figure().subplots()
    mark_percentiles(panel, [*far, seen], MAX_RATIO)
    assert [line.get_xydata().tolist() for line in panel.lines[:2]] == [[[1.5, 1.5]]] * 2


def test_names_lose_the_modules_they_share() -> None:
    assert strip_prefix(["bert.layer.0.query:input", "bert.layer.1.key:input"]) == ["0.query:input", "1.key:input"]
    assert strip_prefix(["a.query:input", "b.query:input"]) == ["a.query:input", "b.query:input"]
    assert strip_prefix(["alpha:input", "alpine:input"]) == ["alpha:input", "alpine:input"]


def test_values_are_spread_over_columns_in_units_of_the_bound() -> None:
    seen = Activation("a:input", 2.0, 1.0, [60, 20, 10, 0, 10], 0.2, 3.0)
    np.testing.assert_allclose(rebin(seen, np.array([0.0, 0.5, 1.0, 1.5])), [0.6, 0.2, 0.2])
    np.testing.assert_allclose(rebin(seen, np.array([0.0, 0.25, 3.0])), [0.3, 0.7], err_msg="half of a bin")
