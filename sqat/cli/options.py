"""Arguments and options that several commands share, and the checks of paths that come first."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqat.cli.streams import show_log
from sqat.errors import SqatError, suggest_file

if TYPE_CHECKING:
    from sqat.recipe.schema import LoadedRecipe


def set_verbosity(count: int) -> int:
    """Show the libraries' messages for -v, and tracebacks as well for -vv."""
    if count:
        show_log(logging.INFO if count == 1 else logging.DEBUG)
        logging.captureWarnings(True)
        warnings.simplefilter("default")
    if count > 1:
        os.environ["SQAT_DEBUG"] = "1"
    return count


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. stages.qat.epochs=2; repeatable"),
]
Force = Annotated[bool, typer.Option("--force", help="run stages even if they are unchanged")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write all figures to a .json file")]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw the figures (.png, .svg, .pdf)")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print only results and errors")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        callback=set_verbosity,
        help="show messages of the libraries; -vv: tracebacks too",
    ),
]
Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="stage to run, if the recipe has several of this type")
]
Parent = Annotated[
    Path | None, typer.Option("--from", metavar="CHECKPOINT", help="start from this folder instead of the parent stage")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder to write; default: in the run folder")
]
Distill = Annotated[
    bool | None, typer.Option("--distill/--no-distill", help="turn MiniLM distillation on or off for this stage")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="NAME", help="export target; auto: the best one for this machine; repeatable"),
]


def load(recipe: Path, overrides: Sequence[str] | None) -> LoadedRecipe:
    """Load a recipe and check that its local files exist: a missing split must not show up hours later."""
    from sqat.recipe.loader import load_recipe

    return load_recipe(recipe, overrides or (), check_files=True)


def check_exists(path: Path) -> None:
    """Raise SqatError if there is no such file or folder."""
    if not path.exists():
        raise SqatError("no such file or folder", suggest_file(path), str(path), code="missing-file")


def check_artifact(path: Path) -> None:
    """Raise SqatError if a path is neither a folder nor an ONNX file."""
    check_exists(path)
    if not path.is_dir() and path.suffix != ".onnx":
        raise SqatError("is neither a checkpoint folder nor an .onnx file", place=str(path), code="unreadable-file")


def check_checkpoint(path: Path) -> None:
    """Raise SqatError if a folder holds no checkpoint."""
    check_exists(path)
    from sqat.checkpoint.manifest import load_manifest

    load_manifest(path)
