"""Fixtures of many tests; what they build stands in tests/tiny.py."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from transformers import BertTokenizerFast

from sqat.checkpoint.store import Checkpoint
from sqat.onnx_files.checks import structure_fault, typing_fault
from tests.tiny import (
    FAMILIES,
    VOCABULARY,
    MakeModel,
    Recorder,
    build_checkpoint,
    build_model,
    colour_rows,
    random_batch,
    write_rows,
)
from tests.traces import share, traced, traced_by_architecture

# How long an example takes is the machine's affair; whatever else is set (CI's own profile) stays.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# A search for garbage walks over all that is imported and collected: as Python sets it, a quarter of collection's time.
gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole stages first: handed to processes in this order, the short ones even out the end."""
    long = {item.path for item in items if item.get_closest_marker("pipeline")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """No search for garbage needs to look at what is imported and collected, for it stays."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite's processes share the cores, and sums do not depend on how many these are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace each model once in a run: the processes of pytest-xdist share a folder of graphs.

    Export stages take one trace of an architecture for all weights, as a rehearsal does, and compare each file with the
    torch model. `sqat.export_onnx`, and tests that call `export_float`, trace each model itself.
    """
    own = tmp_path_factory.getbasetemp()
    share((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqat.export.source.export_float", traced_by_architecture)
        patch.setattr("sqat.api.export.export_float", traced)
        patch.setattr("sqat.export.traced_graphs.export_float", traced)
        yield


@pytest.fixture(scope="session", autouse=True)
def checked_here() -> Iterator[None]:
    """ONNX checks files in this process; that it has one of its own is tested in tests/onnx_files/test_door.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqat.onnx_files.read.check_apart", lambda light: structure_fault(light) or typing_fault(light))
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family by name."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model(family, **settings)`: a tiny classifier in eval mode, the same weights for the same arguments."""
    return build_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A word tokenizer over `VOCABULARY`, saved once and read back."""
    folder = tmp_path_factory.mktemp("tokenizer")
    BertTokenizerFast(vocab=VOCABULARY).save_pretrained(folder)
    return BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_source(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_source(family, **settings)`: a folder with a pretrained model and its tokenizer."""

    def make(family: str = "bert", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("source")
        build_model(family, **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def batch() -> dict[str, Tensor]:
    """Three texts of 12, 9 and 5 tokens, padded on the right."""
    return random_batch()


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer: Any) -> Callable[..., Checkpoint]:
    """`make_checkpoint(family, **manifest)`: see `tests.tiny.build_checkpoint`."""
    return lambda family="bert", **manifest: build_checkpoint(build_model(family), tokenizer, **manifest)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder with train.jsonl (64 rows), dev.jsonl (24) and test.jsonl (24)."""
    for seed, (name, count) in enumerate({"train": 64, "dev": 24, "test": 24}.items()):
        write_rows(tmp_path / f"{name}.jsonl", colour_rows(count, seed))
    return tmp_path


@pytest.fixture
def write_recipe(data_folder: Path) -> Callable[..., Path]:
    """`write_recipe(source, stages)`: a recipe for the rows of `data_folder`; JSON is YAML."""

    def write(source: Path, stages: Mapping[str, Any], **more: Any) -> Path:
        path = data_folder / "tiny.yaml"
        splits = {name: f"{name}.jsonl" for name in ("train", "dev", "test")}
        recipe = {"model": {"source": str(source), "max_length": 16}, "task": "classification", "data": splits}
        recipe |= {"output": str(data_folder / "runs"), "stages": stages, **more}
        path.write_text(json.dumps(recipe, indent=2))
        return path

    return write


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
