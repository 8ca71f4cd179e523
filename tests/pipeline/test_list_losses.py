"""A ranker learns a teacher's order of each query: whole queries share a batch, whatever the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sqat.checkpoint.store import load_checkpoint
from sqat.cli import main
from sqat.data.rows import Rows, column
from sqat.pipeline.plan import check_groups
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import PruneConfig, TrainConfig, row_grouping
from sqat.stages.training_batches import make_batches
from sqat.tasks.splits import Splits
from tests.errors import raises_code
from tests.tiny import relevance_rows, write_model, write_rows

pytestmark = pytest.mark.pipeline

RECIPE = """
model: {source: model, max_length: 16}
task: {name: relevance, loss: LOSS}
data: {train: train.jsonl, dev: dev.jsonl, columns: {group: qid, candidates: candidates}}
stages:
  train: {steps: 2, batch_size: 8}
  prune: {steps: 3, batch_size: 8, distill: {minilm_weight: 0, task_weight: 0, output_weight: 1, output_loss: OUTPUT}}
"""


class Plain:
    """A processor that adds the length which batches are planned by."""

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        return rows.add_column("length", [number % 5 for number in range(len(rows))])


def write(folder: Path, output: str = "listwise", loss: str = "pairwise", same_grade: int = 4) -> Path:
    """Write a recipe; of some queries all passages have one grade."""
    rows = relevance_rows(14, 0)
    for row in rows[:same_grade]:
        row["candidates"] = [candidate | {"label": 1} for candidate in row["candidates"][:3]]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", relevance_rows(6, 1))
    text = RECIPE.replace("OUTPUT", output).replace("LOSS", loss) + f"output: {folder / 'runs'}\n"
    (folder / "rank.yaml").write_text(text)
    return folder / "rank.yaml"


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
@pytest.mark.parametrize("output", ["listwise", "margin-mse", "mse"])
def test_a_querys_passages_share_a_batch_where_the_loss_compares_them(output: str, loss: str, tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, output, loss))
    splits, config = Splits(loaded.recipe, tmp_path), loaded.recipe.stages["prune"]
    assert isinstance(config, PruneConfig)
    check_groups(splits, config)
    processor: Any = Plain()
    batches = [*make_batches(splits, processor, 8, 1, row_grouping(config)).plan(0)]
    groups = column(splits.prepared("train", processor), "group")
    assert sorted(row for batch in batches for row in batch) == list(range(4 * 3 + 10 * 4)), "no query is left out"
    homes = [{number for number, batch in enumerate(batches) if group in groups[batch]} for group in range(14)]
    assert all(len(home) == 1 for home in homes) == (output != "mse")
    assert splits.epoch_sizes(row_grouping(config)) == (52, 1 if output == "mse" else 4)


def test_labels_and_lists_together_keep_whole_queries(tmp_path: Path) -> None:
    """A pointwise task takes each passage alone; beside a list loss it takes them together."""
    path = write(tmp_path, loss="pointwise")
    groupings = {override: row_grouping(stage) for override in ("task_weight=1", "output_weight=0")
                 if isinstance(stage := load_recipe(path, [f"stages.prune.distill.{override}",
                                                           "stages.prune.distill.minilm_weight=1"]).recipe.stages["prune"],
                               TrainConfig)}  # fmt: skip
    assert groupings == {"task_weight=1": "queries", "output_weight=0": "rows"}


def test_the_ranker_comes_closer_to_its_teachers_order(tmp_path: Path) -> None:
    path = write(tmp_path, "listwise")
    write_model(tmp_path / "model")
    assert main(["run", str(path), "-q"]) == 0
    losses = {}
    for steps in (1, 20):
        options = [f"stages.prune.steps={steps}", "stages.prune.learning_rate=1e-3", "stages.prune.epochs=null"]
        more = [word for each in options for word in ("--set", each)]
        assert main(["run", str(path), "-q", "--no-rehearsal", *more]) == 0
        manifest = load_checkpoint(tmp_path / "runs/rank/02-prune").manifest
        losses[steps] = manifest.losses["logits"]
        assert set(manifest.losses) == {"logits"}
    assert losses[20] < 0.5 * losses[1]


def test_lists_that_do_not_fit_or_have_one_passage_are_refused(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, same_grade=0), ["stages.prune.batch_size=3"])
    prune = loaded.recipe.stages["prune"]
    assert isinstance(prune, PruneConfig)
    with raises_code("recipe-conflict", match="a query has 4 passages"):
        check_groups(Splits(loaded.recipe, tmp_path), prune)
    rows = [{**row, "candidates": row["candidates"][:1]} for row in relevance_rows(6, 0)]
    rows[0]["candidates"][0]["label"] = 1
    rows[1]["candidates"][0]["label"] = 0
    write_rows(tmp_path / "train.jsonl", rows)
    alone = load_recipe(write_pointwise(tmp_path))
    prune = alone.recipe.stages["prune"]
    assert isinstance(prune, PruneConfig)
    with raises_code("recipe-conflict", match="compares the passages of a query"):
        check_groups(Splits(alone.recipe, tmp_path), prune)


def write_pointwise(folder: Path) -> Path:
    """Change the recipe that is there to the pointwise loss."""
    path = folder / "rank.yaml"
    path.write_text(path.read_text().replace("pairwise", "pointwise"))
    return path


@pytest.mark.parametrize(("task", "output"), [("classification", "mse"), ("retrieval", "listwise"),
                                              ("relevance", "cosine"), ("relevance", "lists")])  # fmt: skip
def test_an_output_loss_of_another_task_is_refused(task: str, output: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{source: tiny}}\ntask: {task}\ndata: {{train: a.jsonl, dev: b.jsonl}}\n"
                    f"stages: {{train: {{}}, prune: {{distill: {{output_loss: {output}}}}}}}\n")  # fmt: skip
    with raises_code("invalid-recipe" if output == "lists" else "recipe-conflict"):
        load_recipe(path)


def test_losses_of_embeddings_run_on_texts_without_labels(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_model(tmp_path / "model")
    rows = relevance_rows(6, 0)
    write_rows(tmp_path / "dev.jsonl", rows)
    write_rows(tmp_path / "train.jsonl", [{"text": each["text"]} for row in rows for each in row["candidates"]])
    losses = {}
    for output in ("l2", "similarities"):
        (tmp_path / "search.yaml").write_text(
            "model: {source: model, max_length: 16}\ntask: {name: retrieval}\ndata: {train: train.jsonl, "
            "dev: dev.jsonl, columns: {group: qid, candidates: candidates}}\nstages:\n  train: {steps: 0}\n"
            "  prune: {steps: 12, batch_size: 8, learning_rate: 1.0e-3, distill: {minilm_weight: 0, task_weight: 0, "
            f"output_weight: 1, output_loss: {output}}}}}\noutput: {tmp_path / 'runs'}\n"
        )
        assert main(["run", str(tmp_path / "search.yaml"), "-q", "--no-rehearsal"]) == 0
        losses[output] = load_checkpoint(tmp_path / "runs/search/02-prune").manifest.losses
    assert all(set(parts) == {"logits"} and 0 < parts["logits"] < 1 for parts in losses.values())
