"""The resolved stage tree, and what a fingerprint depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

import sqat
from sqat.pipeline.fingerprint import ALGORITHM_VERSIONS
from sqat.pipeline.graph import StageGraph, resolve_graph
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import STAGE_TYPES
from tests.tiny import Project, write_project

ALL = ["train", "prune", "calibrate", "qat", "export"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return write_project(tmp_path_factory.mktemp("graph"))


def graph_of(project: Project, *overrides: str) -> StageGraph:
    return resolve_graph(load_recipe(project.recipe, overrides))


def changed(project: Project, *overrides: str) -> list[str]:
    """Stages whose fingerprint the overrides change."""
    before, after = graph_of(project).nodes, graph_of(project, *overrides).nodes
    return [name for name in before if before[name].fingerprint != after[name].fingerprint]


def test_nodes_know_parent_teacher_and_folder(project: Project) -> None:
    nodes = graph_of(project).nodes
    assert list(nodes) == ALL
    assert [node.parent and node.parent.name for node in nodes.values()] == [None, *ALL[:-1]]
    teachers = {name: node.teacher.name for name, node in nodes.items() if node.teacher}
    assert teachers == {"prune": "train", "qat": "train"}
    assert nodes["qat"].directory == project.folder / "runs/tiny/04-qat"
    assert [node.manifest for node in nodes.values()] == [None] * 5
    assert [node.name for node in graph_of(project).leaves] == ["export"]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.qat.epochs=7", ["qat", "export"]),
        ("stages.train.epochs=7", ALL),
        ("seed=7", ALL),
        ("stages.prune.save_every=7", []),
        ("stages.prune.gates={accuracy: {min: 0.5}}", []),
        ("trackers=[tensorboard]", []),
        ("stages.prune.patterns={'*': '2:4'}", ALL[1:]),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it(project: Project, override: str, stages: list[str]) -> None:
    assert changed(project, override) == stages


def test_the_order_of_patterns_counts(project: Project) -> None:
    orders = ("{a: '2:4', b: dense}", "{b: dense, a: '2:4'}")
    graphs = [graph_of(project, f"stages.prune.patterns={order}") for order in orders]
    assert graphs[0].nodes["prune"].fingerprint != graphs[1].nodes["prune"].fingerprint


def test_an_algorithm_version_counts_and_that_of_sqat_does_not(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(ALGORITHM_VERSIONS) == list(STAGE_TYPES)
    before = {name: node.fingerprint for name, node in graph_of(project).nodes.items()}
    monkeypatch.setattr(sqat, "__version__", "99.0")
    assert {name: node.fingerprint for name, node in graph_of(project).nodes.items()} == before
    monkeypatch.setitem(ALGORITHM_VERSIONS, "calibrate", 99)
    after = graph_of(project).nodes
    assert [name for name in before if before[name] != after[name].fingerprint] == ["calibrate", "qat", "export"]


def test_a_missing_data_file_matters_only_for_a_fingerprint(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    graph = graph_of(project)
    assert not any(node.is_current for node in graph.nodes.values())
    with pytest.raises(sqat.errors.SqatError):
        _ = graph.nodes["train"].fingerprint
