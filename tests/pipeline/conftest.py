"""A tiny project whose recipe has run, and copies of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Project, Recorder, write_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Any]:
    """A tiny project whose whole recipe has run, and its results; read it, do not change it."""
    from sqat.pipeline.runner import run
    from sqat.recipe.loader import load_recipe

    torch.set_num_threads(1)
    project = write_project(tmp_path_factory.mktemp("finished"), placement="tensorrt")
    return project, run(load_recipe(project.recipe), Recorder())


@pytest.fixture
def copy(finished: tuple[Project, Any], tmp_path: Path) -> Project:
    """The finished project in a folder of the test's own."""
    return finished[0].copy(tmp_path / "project")
