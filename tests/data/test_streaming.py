"""A streamed split: every row once an epoch, the same from anywhere on, and no more memory for more rows."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqat.data.sources import split_digest
from sqat.data.streaming import Stream, StreamedBatches
from sqat.data.text_files import read_rows
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.loader import load_recipe
from sqat.recipe.tasks import ClassificationTask, RegressionTask
from sqat.tasks.classification import Classification
from sqat.tasks.splits import load_rows, open_stream
from sqat.training.batches import Batches

TASK = ClassificationTask(labels=("bad", "good"))
KINDS = ["parquet", "arrow", "stream.arrow", "jsonl", "jsonl.gz", "csv"]


def rows_from(start: int, count: int) -> list[dict[str, Any]]:
    """Rows that each say their own number."""
    return [{"text": f"r{n}" + " x" * (n % 7), "label": ("bad", "good")[n % 2]} for n in range(start, start + count)]


def write_shard(path: Path, rows: list[dict[str, Any]], piece: int = 7) -> None:
    """One file, in pieces of 7 rows where its format has any."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=piece)
    elif path.suffix == ".arrow":
        new = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
        with new(path, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=piece):
                writer.write_batch(batch)
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    else:
        lines = "\n\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_shards(folder: Path, kind: str, sizes: tuple[int, ...] = (50, 3, 40)) -> int:
    """Shards of these sizes; how many rows there are."""
    for number, size in enumerate(sizes):
        write_shard(folder / f"part-{number}.{kind}", rows_from(sum(sizes[:number]), size))
    return sum(sizes)


def stream_of(folder: Path, kind: str, buffer: int = 24, seed: int = 3, **more: Any) -> Stream:
    split = SplitConfig(path=f"part-*.{kind}", streaming=True, buffer=buffer, **more)
    return open_stream(split, Columns(), TASK, folder, seed)


def batches_of(stream: Stream, size: int = 5) -> StreamedBatches:
    return StreamedBatches(stream, size, Classification(("bad", "good")).encode)


def texts(batches: StreamedBatches, plan: Any) -> list[list[str]]:
    return [batches.pick(numbers)["text"][:] for numbers in plan]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_row_once_and_in_its_own_order(tmp_path: Path, kind: str) -> None:
    count = write_shards(tmp_path, kind)
    batches = batches_of(stream_of(tmp_path, kind))
    epochs = [texts(batches, batches.plan(epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch].count(5) == count // 5
        assert len(batches.plan(0)) == len(epoch) == -(-count // 5)
        assert sorted(text for batch in epoch for text in batch) == sorted(row["text"] for row in rows_from(0, count))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_labels_and_places(tmp_path: Path, kind: str) -> None:
    """The oracle reads each shard from its beginning."""
    count = write_shards(tmp_path, kind)
    paths = sorted(tmp_path.iterdir())
    known = {row["text"]: (place, row["label"]) for path in paths for place, row in read_rows(path, path.name)}
    rows = stream_of(tmp_path, kind).read(5, 0, count)
    assert len(rows) == len(known) == count
    assert {row["text"]: (row["place"], row["label"]) for row in rows} == known


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_with_the_same_batches(tmp_path: Path, kind: str) -> None:
    """From any batch on over two epochs, by a process that has read nothing before."""
    write_shards(tmp_path, kind)
    batches = batches_of(stream_of(tmp_path, kind))
    feed = Batches(batches.plan, lambda numbers: batches.pick(numbers)["text"][:])  # type: ignore[arg-type, return-value]
    whole = [feed.collate(numbers) for numbers in islice(feed.stream(0), 40)]
    for start in (1, 4, 5, 17, 18, 19, 25):
        fresh = batches_of(stream_of(tmp_path, kind))
        again = [
            fresh.pick(numbers)["text"][:] for numbers in islice(Batches(fresh.plan, feed.collate).stream(start), 6)
        ]
        assert again == whole[start : start + 6]


def test_what_a_resumed_run_reads_is_not_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, "parquet", (700,))
    stream = stream_of(tmp_path, "parquet", buffer=20)
    seen: list[str] = []
    true = stream.pieces.read
    monkeypatch.setattr(type(stream.pieces), "read", lambda self, n, skip=0: noted(true(n, skip), seen))
    batches = batches_of(stream)
    plan = batches.plan(0)
    batches.pick(plan[len(plan) - 2 :][0])
    assert 0 < len(seen) <= 20


@pytest.mark.parametrize(("at_once", "reads"), [(8, 5), (1, 10)])
def test_what_is_planned_at_once_is_read_once(
    at_once: int, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine batches planned before the first is made: of five windows, each read again where fewer are kept."""
    write_shards(tmp_path, "jsonl")
    windows: list[int] = []
    true = Stream.read

    def read(stream: Stream, epoch: int, start: int, count: int) -> Any:
        windows.append(start)
        return true(stream, epoch, start, count)

    monkeypatch.setattr(Stream, "read", read)
    batches = StreamedBatches(
        stream_of(tmp_path, "jsonl", buffer=10), 5, Classification(("bad", "good")).encode, at_once
    )
    planned = [*islice(batches.plan(0), 9)]
    for numbers in planned:
        batches.pick(numbers)
    assert len(windows) == reads, windows


def noted(rows: Iterator[Any], seen: list[str]) -> Iterator[Any]:
    for place, row in rows:
        seen.append(place)
        yield place, row


def test_seeds_and_buffers_make_other_orders(tmp_path: Path) -> None:
    write_shards(tmp_path, "jsonl")
    found = [stream_of(tmp_path, "jsonl", **more) for more in ({}, {"seed": 4}, {"buffer": 90})]
    orders = [str(texts(batches, batches.plan(0))) for batches in map(batches_of, found)]
    assert len(set(orders)) == 3


def test_a_buffer_as_large_as_the_split_shuffles_all_of_it(tmp_path: Path) -> None:
    """Where a row stands has nothing to do with where it was; rows of one window stay within its own batches."""
    write_shards(tmp_path, "jsonl", (300,))
    whole, small = (batches_of(stream_of(tmp_path, "jsonl", buffer=buffer)) for buffer in (300, 10))
    moved = np.array([int(text.split()[0][1:]) for batch in texts(whole, whole.plan(0)) for text in batch])
    assert abs(np.corrcoef(moved, np.arange(300))[0, 1]) < 0.2
    near = np.array([int(text.split()[0][1:]) for batch in texts(small, small.plan(0)) for text in batch])
    assert (near // 10 == np.arange(300) // 10).all()


def test_runs_of_lines_are_sought(tmp_path: Path) -> None:
    """Far more lines than a piece has, of several bytes a letter and with empty ones between."""
    lines = [json.dumps({"text": f"é{n}", "label": "bad"}, ensure_ascii=False) for n in range(5000)]
    (tmp_path / "part-0.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n \u00a0\n".join(lines).encode())
    stream = stream_of(tmp_path, "jsonl")
    assert len(stream.pieces.table) == 5
    assert sorted(stream.read(0, 0, 5000)["text"]) == sorted(f"é{n}" for n in range(5000))
    place = stream_of(tmp_path, "jsonl").read(0, 0, 5000)["place"][0]
    assert int(place.split(":")[1]) % 2 == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_keeps_the_first_rows(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path, kind)
    stream = stream_of(tmp_path, kind, limit=52)
    assert stream.rows == 52
    assert sorted(stream.read(0, 0, 99)["text"]) == sorted(row["text"] for row in rows_from(0, 52))


def test_memory_does_not_follow_the_rows(tmp_path: Path) -> None:
    """Python's and Arrow's own counts of what was allocated, not the system's."""
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, count in ((small, 4_000), (large, 32_000)):
        folder.mkdir()
        write_shard(folder / "part-0.parquet", rows_from(0, count), piece=500)
    first(small)
    peaks = [peak(first, folder) for folder in (small, large, large)]
    assert peaks[1] < 1.3 * peaks[0], peaks
    assert peak(whole, large) > 1.5 * peak(whole, small)  # so the count would show it


def first(folder: Path) -> None:
    """Plan and pick all batches of some windows, at the beginning and in the middle."""
    batches = batches_of(stream_of(folder, "parquet", buffer=1000), size=50)
    plan = batches.plan(0)
    for part in (plan, plan[len(plan) // 2 :]):
        for numbers in islice(part, 40):
            batches.pick(numbers)


def whole(folder: Path) -> None:
    load_rows(SplitConfig(path="part-0.parquet"), "train", Columns(), TASK, folder)


POOLS: list[Any] = []  # kept for good: what was allocated from one and is freed after it is gone ends the process


def peak(work: Any, folder: Path) -> float:
    """Most bytes that Python held at a time, and most that Arrow did."""
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    POOLS.append(counting)
    pa.set_memory_pool(counting)
    tracemalloc.start()
    try:
        work(folder)
        return float(tracemalloc.get_traced_memory()[1] + counting.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


# Mistakes.
def test_a_bad_row_is_told_at_its_place_once_it_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, "jsonl")
    write_shard(tmp_path / "part-9.jsonl", [{"text": "", "label": "bad"}])
    with pytest.raises(SqatError, match=r'part-9\.jsonl:1: "text" is empty'):
        stream_of(tmp_path, "jsonl").read(0, 0, 94)


def test_an_unknown_class_is_told_at_its_place(tmp_path: Path) -> None:
    write_shard(tmp_path / "part-0.jsonl", [*rows_from(0, 4), {"text": "x", "label": "goood"}])
    batches = batches_of(stream_of(tmp_path, "jsonl"))
    with pytest.raises(SqatError, match=r'part-0\.jsonl:9: unknown class "goood"; did you mean "good"'):
        batches.plan(0)[0]


def test_a_shard_that_lost_rows_meanwhile_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path, "jsonl")
    stream = stream_of(tmp_path, "jsonl")
    write_shard(tmp_path / "part-0.jsonl", rows_from(0, 9))
    with pytest.raises(SqatError, match="41 rows are not there any more; a shard has changed"):
        stream.read(0, 0, 93)


def test_shards_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SqatError, match=r"part-\*\.parquet: no file is called so or matches it"):
        stream_of(tmp_path, "parquet")
    for kind in ("parquet", "arrow"):
        (tmp_path / f"part-0.{kind}").write_bytes(b"PAR1" if kind == "parquet" else b"ARROW1 and nothing more")
        with pytest.raises(SqatError, match=rf"part-0\.{kind}: not an? {kind.capitalize()} file: .*right\?"):
            stream_of(tmp_path, kind)
    (tmp_path / "part-0.jsonl").write_bytes(b"\n")
    with pytest.raises(SqatError, match=r"part-0\.jsonl: no rows"):
        stream_of(tmp_path, "jsonl")


def test_batches_of_an_arrow_stream_with_dictionaries_do_not_stand_alone(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode(), "label": ["bad", "good"]})
    with pa.ipc.new_stream(tmp_path / "part-0.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SqatError, match="an Arrow stream with dictionaries do not stand alone; write it as"):
        stream_of(tmp_path, "arrow")
    assert [row["text"] for _, row in read_rows(tmp_path / "part-0.arrow", "a")] == ["a", "b"]


RECIPE = """
model: {source: x}
task: {name: classification, labels: [bad, good]}
data: {train: {path: "part-*.jsonl", streaming: true}, dev: dev.jsonl}
stages: {train: {}, calibrate: {}}
"""


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task={name: classification}", "recipe.yaml:4: the classes of a streamed split are not known beforehand"),
        ("task=relevance", "recipe.yaml:4: the task relevance cannot stream its rows"),
        ("data.dev={path: a, streaming: true}", "data.dev is measured as a whole"),
        ("data.train={path: a, buffer: 7}", "buffer belongs to streaming: true"),
        ("stages.calibrate.samples=20000", "'calibrate' needs 20000 rows, but the buffer .* holds 16384"),
    ],
)
def test_what_cannot_be_streamed_is_told_before_anything_runs(tmp_path: Path, override: str, line: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(SqatError, match=line):
        load_recipe(tmp_path / "recipe.yaml", [override])


def test_the_files_of_a_glob_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "dev.jsonl").touch()
    with pytest.raises(SqatError, match=r"recipe.yaml:4: data.train: .*no such file"):
        load_recipe(tmp_path / "recipe.yaml", check_files=True)
    (tmp_path / "part-0.jsonl").touch()
    assert load_recipe(tmp_path / "recipe.yaml", check_files=True).recipe.data.train.streaming


def test_the_digest_follows_every_shard_and_the_buffer(tmp_path: Path) -> None:
    write_shards(tmp_path, "jsonl")
    split = SplitConfig(path="part-*.jsonl", streaming=True)
    known = split_digest(split, tmp_path)
    assert split_digest(split.model_copy(update={"buffer": 7}), tmp_path) != known
    write_shard(tmp_path / "part-1.jsonl", rows_from(1, 3))
    assert split_digest(split, tmp_path) != known
    write_shards(tmp_path, "jsonl")
    assert split_digest(split, tmp_path) == known


# The hub: its own reader of a data set's layout, on a folder.
@pytest.fixture
def hub(tmp_path: Path) -> Path:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    (tmp_path / "set").mkdir()
    for number in range(2):
        rows = {"text": [f"{number}{letter}" for letter in "abc"], "label": [0, 1, number]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / f"train-0000{number}-of-00002.parquet")
    return tmp_path / "set"


def test_a_hub_data_set_is_streamed_from_its_own_files(hub: Path) -> None:
    stream = open_stream(SplitConfig(hub=str(hub), streaming=True), Columns(), TASK, Path(), 0)
    rows = {row["text"]: row["label"] for row in stream.read(0, 0, 6)}
    assert rows == {"0a": "bad", "0b": "good", "0c": "bad", "1a": "bad", "1b": "good", "1c": "good"}
    assert all("[train]/train-0000" in place for place in stream.read(1, 0, 6)["place"])


def test_a_hub_data_set_without_parquet_or_the_split_is_one_line(hub: Path) -> None:
    with pytest.raises(SqatError, match="the data set has no split other; it has"):
        open_stream(SplitConfig(hub=str(hub), split="other", streaming=True), Columns(), TASK, Path(), 0)
    for path in hub.iterdir():
        path.unlink()
    (hub / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(SqatError, match=r"only Parquet files .* it has train\.jsonl; .*refs/convert"):
        open_stream(SplitConfig(hub=str(hub), streaming=True), Columns(), TASK, Path(), 0)


def test_two_texts_are_streamed_too(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{n}", "other": f"o{n}", "label": n / 2}) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    columns, split = Columns(text_pair="other"), SplitConfig(path="a.jsonl", streaming=True)
    batches = StreamedBatches(open_stream(split, columns, RegressionTask(), tmp_path, 0), 4, lambda rows: rows)
    pairs = {(row["text"], row["text_pair"], row["label"]) for batch in batches.plan(2) for row in batches.pick(batch)}
    assert pairs == {(f"t{n}", f"o{n}", n / 2) for n in range(9)}
