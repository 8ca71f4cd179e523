"""Arguments and options that several commands have, and the checks that come first."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqat.errors import SqatError, near_files

if TYPE_CHECKING:
    from sqat.recipe.schema import LoadedRecipe


def _set_verbosity(count: int) -> int:
    """-v shows the libraries' news and warnings, -vv also tracebacks."""
    if count:
        logging.basicConfig(level=logging.INFO if count == 1 else logging.DEBUG, stream=sys.stderr)
        warnings.simplefilter("default")
    if count > 1:
        os.environ["SQAT_DEBUG"] = "1"
    return count


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. stages.qat.epochs=2; repeatable"),
]
Force = Annotated[bool, typer.Option("--force", help="run even what is unchanged")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write all figures", show_default=False)]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="draw them (.png, .svg)", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        callback=_set_verbosity,
        help="libraries' messages; -vv: tracebacks too",
    ),
]
Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="which stage, if the recipe has several of the kind")
]
Parent = Annotated[
    Path | None,
    typer.Option("--from", metavar="CHECKPOINT", help="start from this folder, not from the recipe's run folder"),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="where to save; default: the run folder")
]
Distill = Annotated[
    bool | None,
    typer.Option("--distill/--no-distill", help="with or without MiniLM distillation, whatever the recipe says"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="NAME", help="instead of the recipe's; auto: what fits this machine; repeatable"),
]


def load(recipe: Path, overrides: Sequence[str] | None) -> LoadedRecipe:
    """Read a recipe whose local files must be there, so that the last split is not missed hours later."""
    from sqat.recipe.loader import load_recipe

    return load_recipe(recipe, overrides or (), check_files=True)


def must_exist(path: Path) -> None:
    """Tell early that a file or folder is not there."""
    if not path.exists():
        raise SqatError("no such file or folder", near_files(path), str(path))


def must_be_artifact(path: Path) -> None:
    """Tell early that something is not there, or neither a folder nor an ONNX file."""
    must_exist(path)
    if not path.is_dir() and path.suffix != ".onnx":
        raise SqatError("is neither a checkpoint folder nor an .onnx file", place=str(path))


def must_be_checkpoint(path: Path) -> None:
    """Tell early that a folder is not there, or holds no checkpoint."""
    must_exist(path)
    from sqat.checkpoint.manifest import load_manifest

    load_manifest(path)
