"""`sqat evaluate`: the metrics of one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sqat.cli.options import Json, Quiet, RecipeFile, Set, Verbose, check_artifact, load
from sqat.errors import SqatError

SPLITS: dict[str, Literal["test", "dev", "train"]] = {"test": "test", "dev": "dev", "train": "train"}


def evaluate(
    recipe: RecipeFile,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="checkpoint folder or .onnx file")],
    split: Annotated[str, typer.Option("--split", metavar="test|dev|train", help="split to measure on")] = "test",
    write_outputs: Annotated[
        Path | None, typer.Option("--write-outputs", metavar="FILE", help="write the outputs of each row (.jsonl)")
    ] = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure a checkpoint or an exported file."""
    if split not in SPLITS:
        raise SqatError(f"no split {split!r}", "allowed: test, dev, train", "--split", code="unknown-name")
    if split == "train" and write_outputs is None:
        raise SqatError("train is not measured", "give --write-outputs FILE, or another split", "--split", code="usage")
    from sqat.checkpoint.outputs import check_output

    check_output(write_outputs, ".jsonl")
    check_artifact(artifact)
    loaded = load(recipe, overrides)
    if split == "test" and loaded.recipe.data.test is None:
        hint = "add data.test or give --split dev"
        raise SqatError("the recipe has no test split", hint, recipe.name, code="usage")
    from sqat.cli.progress_bars import is_rank0, open_reporter
    from sqat.cli.tables.results import print_metrics
    from sqat.pipeline import runner

    with open_reporter(quiet=quiet) as reporter:
        metrics = runner.evaluate(loaded, artifact, SPLITS[split], reporter, write_outputs)
    if is_rank0() and (metrics or json):  # train has none
        print_metrics(metrics, split, artifact, as_json=json)
