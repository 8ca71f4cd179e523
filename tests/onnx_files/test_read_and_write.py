"""Files of any size: whole or not at all, weights beside the graph when it grows too large, and read back the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from sqat.errors import SqatError
from sqat.export.qdq import insert_qdq
from sqat.onnx_files import write as files
from sqat.onnx_files.checks import check_file
from sqat.onnx_files.read import read_onnx
from sqat.onnx_files.write import is_large, on_disk, write_onnx
from sqat.runtime.sessions import optimized_graph, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import Family


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as too large for one protobuf."""
    monkeypatch.setattr(files, "LARGEST", 1000)


def constants(model: ModelProto) -> dict[str, bytes]:
    return {entry.name: numpy_helper.to_array(entry).tobytes() for entry in model.graph.initializer}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def quantized(family: Family) -> ModelProto:
    return insert_qdq(family.graph, family.quantization("output"))


def test_a_small_model_is_one_file(bert: Family, tmp_path: Path) -> None:
    write_onnx(bert.graph, tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx"]
    assert read_onnx(tmp_path / "model.onnx") == bert.graph
    assert not is_large(bert.graph)


@pytest.mark.usefixtures("large")
def test_a_large_model_has_its_weights_beside_it(bert: Family, tmp_path: Path) -> None:
    model, path = quantized(bert), tmp_path / "model.onnx"
    before = model.SerializeToString(deterministic=True)
    assert is_large(model)
    write_onnx(model, path)
    assert model.SerializeToString(deterministic=True) == before
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    outside = {
        entry.name: {field.key: field.value for field in entry.external_data}
        for entry in onnx.load(path, load_external_data=False).graph.initializer
        if entry.data_location == onnx.TensorProto.EXTERNAL
    }
    assert {fields["location"] for fields in outside.values()} == {"model.onnx.data"}
    assert "bert.embeddings.word_embeddings.weight" in outside
    back = read_onnx(path)
    assert constants(back) == constants(model)
    assert [node.name for node in back.graph.node] == [node.name for node in model.graph.node]
    assert list(check_file(path)) == []


@pytest.mark.usefixtures("large")
def test_onnx_runtime_runs_and_rewrites_it_by_path(bert: Family, tmp_path: Path) -> None:
    model, path = quantized(bert), tmp_path / "model.onnx"
    write_onnx(model, path)
    batch = {name: tensor.numpy() for name, tensor in bert.inputs(3, 7).items()}
    whole, parted = (run_batches(session(source, threads=1), [batch]) for source in (model.SerializeToString(), path))
    assert np.array_equal(whole, parted)
    assert count_operators(optimized_graph(path)) == count_operators(optimized_graph(model.SerializeToString()))


@pytest.mark.usefixtures("large")
def test_a_model_on_disk_for_a_while(bert: Family) -> None:
    with on_disk(bert.graph) as path:
        assert constants(read_onnx(path)) == constants(bert.graph)
        folder = path.parent
    assert not folder.exists()


def test_data_that_is_no_longer_needed_goes(bert: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(files, "LARGEST", 1000)
        write_onnx(bert.graph, path)
    write_onnx(bert.graph, path)
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("limit", [1000, files.LARGEST])
def test_a_write_that_breaks_off_leaves_the_old_files(
    bert: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(files, "LARGEST", limit)
    path = tmp_path / "model.onnx"
    write_onnx(bert.graph, path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fail(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_onnx(quantized(bert), path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.usefixtures("large")
def test_data_that_is_gone_or_short_is_an_error(bert: Family, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(bert.graph, path)
    data = tmp_path / "model.onnx.data"
    content = data.read_bytes()
    for broken in (content[:1000], None):
        data.unlink()
        if broken is not None:
            data.write_bytes(broken)
        with pytest.raises(SqatError) as caught:
            read_onnx(path)
        assert caught.value.code == "unreadable-file"
        assert caught.value.place == str(path)
        assert "\n" not in str(caught.value)
        data.write_bytes(content)


@pytest.mark.parametrize(("content", "problem"), [
    (None, "no such file"),
    (b"not a model", "not an ONNX file"),
    (b"", "holds no graph"),
])  # fmt: skip
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SqatError, match=problem):
        read_onnx(path)


@pytest.mark.usefixtures("large")
def test_what_the_checker_says_of_a_file(bert: Family, tmp_path: Path) -> None:
    model = quantized(bert)
    model.graph.node[-1].input[0] = "nobody"
    write_onnx(model, tmp_path / "model.onnx")
    found = list(check_file(tmp_path / "model.onnx"))
    assert len(found) == 1
    assert "nobody" in found[0]
    assert "\n" not in found[0]
