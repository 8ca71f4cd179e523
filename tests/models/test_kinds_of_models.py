"""What a recipe may ask of which kind of model, and what a stage's key and calibration depend on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from sqat.data.sources import split_digest
from sqat.errors import SqatError
from sqat.models.layer_selection import encoder_blocks, find_qkv, is_convolutional
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.loader import load_recipe
from sqat.recipe.tasks import RetrievalTask

DATA = {"train": "train.jsonl", "dev": "dev.jsonl"}


def refused(folder: Path, recipe: dict[str, Any]) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump({"data": DATA, "stages": {"train": {}}, **recipe}))
    with pytest.raises(SqatError) as caught:
        load_recipe(folder / "r.yaml")
    return str(caught.value)


def test_a_text_task_needs_a_source(tmp_path: Path) -> None:
    told = refused(tmp_path, {"model": {"config": {"model_type": "bert"}}, "task": "classification"})
    assert "the task classification needs pretrained weights" in told


def test_only_text_to_image_has_captions_to_read(tmp_path: Path) -> None:
    told = refused(tmp_path, {"model": {"source": "m", "text_encoder": "e"}, "task": "classification"})
    assert "the task classification has no captions" in told


def test_only_images_are_varied(tmp_path: Path) -> None:
    data = {**DATA, "augment": {"shift": 1}}
    told = refused(tmp_path, {"model": {"source": "m"}, "task": "classification", "data": data})
    assert "the task classification does not augment images" in told


def test_a_network_of_convolutions_has_no_attention_to_distil() -> None:
    net = nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(4)])
    assert is_convolutional(net)
    assert encoder_blocks(net) == []
    with pytest.raises(SqatError, match=r"MiniLM distillation needs attention.*distill: {minilm_weight: 0}"):
        find_qkv(net)


def test_the_bytes_of_image_files_count(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"image": "a.png"}\n{"image": "' + "x" * 5000 + '"}\n')
    split, found = SplitConfig(path="some.jsonl"), []
    for content in (b"1", b"2", b"1"):
        (tmp_path / "a.png").write_bytes(content)
        found.append(split_digest(split, tmp_path, "image"))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("task", ["image-classification", "text-to-image"])
def test_both_tasks_of_images_have_them_in_their_keys(task: str, tmp_path: Path) -> None:
    from sqat.pipeline.graph import resolve_graph

    model = {"config": {"model_type": "resnet"}} | ({"text_encoder": "."} if task == "text-to-image" else {})
    recipe = {"model": model, "task": task, "data": DATA, "stages": {"train": {}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    keys = []
    for content in (b"1", b"2"):
        (tmp_path / "a.png").write_bytes(content)
        for name in DATA.values():
            (tmp_path / name).write_text('{"image": "a.png", "text": "a", "label": 0}\n')
        keys.append(resolve_graph(load_recipe(tmp_path / "r.yaml")).nodes["train"].fingerprint)
    assert keys[0] != keys[1]


def test_reranking_needs_something_to_rank(tmp_path: Path) -> None:
    from sqat.tasks.splits import load_rows

    (tmp_path / "dev.jsonl").write_text('{"query": "q", "text": "p", "label": 1}\n')
    load_rows(SplitConfig(path="dev.jsonl"), "dev", Columns(), RetrievalTask(), tmp_path)
    with pytest.raises(SqatError, match=r"task\.metric pnr compares a query's own passages"):
        load_rows(SplitConfig(path="dev.jsonl"), "dev", Columns(), RetrievalTask(metric="pnr"), tmp_path)
