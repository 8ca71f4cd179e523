"""A run changes nothing that sqat did not write, and nothing through a link: it is refused before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sqat.cli import main
from sqat.errors import SqatError
from sqat.pipeline import runner as pipeline
from sqat.recipe.loader import load_recipe
from sqat.training.resume_state import Progress, ResumeState
from tests.errors import raises_code
from tests.tiny import Project, Recorder, write_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project that has not run, and a file outside its run folder."""
    project = write_project(tmp_path / "project")
    (project.folder / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "step-1.safetensors").write_text("mine")
    return project


def snapshot(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes().hex() for path in paths}


FILES = (".lock", "sqat.log", "metrics.jsonl", "results.json")
FOLDERS = ("tracking", "01-train", "03-calibrate.rejected", ".01-train.state", ".02-prune.new", ".05-export.old")
PLACES: dict[str, Callable[[Path, Path], object]] = {
    **{f"{name} is a link": lambda place, far: place.symlink_to(far / "victim") for name in FILES},
    **{f"{name} is a link to nothing": lambda place, far: place.symlink_to(far / "nothing") for name in FILES},
    **{f"{name} is a hard link": lambda place, far: place.hardlink_to(far / "victim") for name in FILES},
    **{f"{name} is a pipe": lambda place, far: os.mkfifo(place) for name in FILES},
    **{f"{name} is a folder": lambda place, far: place.mkdir() for name in FILES},
    **{f"{name} is a link": lambda place, far: place.symlink_to(far / "folder") for name in FOLDERS},
    **{f"{name} is a file": lambda place, far: place.write_text("mine") for name in FOLDERS},
    **{f"{name} holds notes": lambda place, far: (place.mkdir(), (place / "notes").write_text("mine"))
       for name in FOLDERS if name not in ("tracking", ".01-train.state")},
    "results.json holds results of another": lambda place, far: place.write_text('{"accuracy": 0.5}'),
    ".lock holds notes": lambda place, far: place.write_text("mine"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_a_run_leaves_what_is_not_its_own(case: str, project: Project, tmp_path: Path) -> None:
    runs = project.folder / "runs" / "tiny"
    PLACES[case](runs / case.partition(" ")[0], tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(SqatError) as error:
        pipeline.run(load_recipe(project.recipe), Recorder())
    assert error.value.code in ("output-exists", "unwritable-file")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", FILES[:2])
def test_the_command_says_it_in_one_line(
    name: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "runs" / "tiny" / name).symlink_to(tmp_path / "victim")
    assert main(["run", str(project.recipe)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("error: ")) == ("", 1)
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_run_folder_itself_may_be_a_link(project: Project, tmp_path: Path) -> None:
    (project.folder / "runs" / "tiny").rmdir()
    (project.folder / "runs" / "tiny").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "01-train").write_text("mine")  # the first thing that is refused lies behind the link
    with raises_code("output-exists", "runs/tiny/01-train: is a file"):
        pipeline.run(load_recipe(project.recipe), Recorder())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["notes", "file", "link"])
def test_force_replaces_checkpoints_only(kind: str, force: bool, project: Project, tmp_path: Path) -> None:
    output = tmp_path / "output"
    if kind == "notes":
        output.mkdir()
        (output / "notes").write_text("mine")
    if kind == "file":
        output.write_text("mine")
    if kind == "link":
        output.symlink_to(tmp_path / "folder")
    before = snapshot(tmp_path)
    with raises_code("output-exists"):
        pipeline.run_stage(load_recipe(project.recipe), "train", Recorder(), output=output, force=force)
    assert snapshot(tmp_path) == before


def test_the_state_s_folder_keeps_what_is_not_of_the_state(tmp_path: Path) -> None:
    state = ResumeState(tmp_path / ".01-x.state", "key")
    state.save({}, Progress(step=1))
    for name in ("notes", "step-1.txt", "mine.new", "state.json.bak"):
        (state.directory / name).write_text("mine")
    (state.directory / "export-0").mkdir()
    (state.directory / "export-0" / "notes").write_text("mine")
    state.save({}, Progress(step=2))
    assert not (state.directory / "step-1.safetensors").exists()
    state.remove()
    kept = {path.name for path in state.directory.rglob("*") if path.is_file()}
    assert kept == {"notes", "step-1.txt", "mine.new", "state.json.bak"}
    assert (state.directory / "export-0" / "notes").read_text() == "mine"


def test_a_linked_state_is_neither_read_nor_removed(tmp_path: Path) -> None:
    far, near = ResumeState(tmp_path / "far", "key"), ResumeState(tmp_path / ".01-x.state", "key")
    far.save({}, Progress(step=1))
    near.directory.symlink_to("far")
    assert far.load() is not None
    assert near.load() is None
    before = snapshot(tmp_path)
    with raises_code("output-exists", "is a link"):
        near.save({}, Progress(step=2))
    near.remove()
    assert snapshot(tmp_path) == before
