"""scripts/data/query_performance.py: its labels against scikit-learn, its files, and every mistake in its source."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from scripts.data import query_performance as script

ANIMALS = ["cat", "dog", "owl", "fox", "bee", "elk", "yak", "ant", "emu", "cod", "eel", "hen"]


def query(qid: int, text: str, *labels: int) -> dict[str, Any]:
    """A query about an animal, with candidates that name it but for the last."""
    animal = text.split()[-1]
    candidates = [{"id": str(i), "text": f"the {animal} number {i} sleeps", "label": n} for i, n in enumerate(labels)]
    return {"qid": f"Q{qid}", "query": text, "title": animal.capitalize(), "candidates": candidates}


SPLITS = {
    "train": [query(0, "where sleeps a cat", 0, 1, 0), query(1, "where sleeps a dog", 0, 0)],
    "dev": [query(2, "where sleeps an owl", 1), query(3, "where sleeps a fox", 0, 0, 1)],
    "test": [query(4, "where sleeps a bee", 1, 0), query(5, "where sleeps an elk", 0), query(6, "quo vadis", 0)],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, queries in SPLITS.items():
        for entry in queries:
            if entry["query"] == "quo vadis":
                entry["title"], entry["candidates"] = "", [{"text": "something else", "label": 0}]
        text = "".join(json.dumps(entry) + "\n" for entry in queries)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 1000))
def test_the_label_is_ndcg_over_the_whole_corpus(grades: list[int], seed: int) -> None:
    """Oracle: scikit-learn, given a score for every passage of the corpus."""
    scores = np.random.default_rng(seed).permutation(len(grades)).astype(float)
    found = [grades[i] for i in np.argsort(-scores)[:10]]
    wanted = ndcg_score([2.0 ** np.array(grades) - 1], [scores], k=10) if any(grades) else 0.0
    assert script.ndcg(found, grades) == pytest.approx(wanted)


def test_a_passage_that_is_not_found_counts_as_missed() -> None:
    assert script.ndcg([0, 1], [1, 1]) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert script.ndcg([], [1]) == 0.0
    assert script.ndcg([0, 0], [0, 0]) == 0.0


def test_bm25_finds_what_shares_rare_words_and_nothing_else() -> None:
    pytest.importorskip("bm25s")
    corpus = [f"the {animal} sleeps" for animal in ANIMALS] + ["owl owl"]
    owl, none, all_of_them = script.search(corpus, ["an owl", "the of", "sleeps"])
    assert {index for index, _ in owl} == {2, 12}
    assert none == []
    assert [index for index, _ in all_of_them] == list(range(10))  # equal scores: the corpus' order; ten at most
    assert owl[0][1] >= owl[1][1] > 0


def test_bm25_is_the_formula() -> None:
    """Robertson's BM25 with Lucene's idf, k1 1.5 and b 0.75, by hand."""
    pytest.importorskip("bm25s")
    corpus = ["red red blue", "blue green", "green yellow pink white"]
    (found,) = script.search(corpus, ["red blue"])

    def term(count: int, documents: int, length: int) -> float:
        idf = math.log(1 + (3 - documents + 0.5) / (documents + 0.5))
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * length / 3))

    assert [index for index, _ in found] == [0, 1]
    assert [score for _, score in found] == pytest.approx([term(2, 1, 3) + term(1, 2, 3), term(1, 2, 2)], rel=1e-5)


def test_rows_hold_what_was_found_and_how_good_it_is(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    settings = script.Settings(shown=2, words=4)
    told = script.build(source, tmp_path / "out", settings)
    train, dev, test = (read(tmp_path / "out" / f"{split}.jsonl.gz") for split in SPLITS)
    assert [row["qid"] for row in train + dev + test] == ["Q0", "Q1", "Q2", "Q3", "Q4", "Q5"]
    cat = train[0]
    assert cat["passages"][:3] == [f"Cat: the cat number {i} sleeps" for i in range(3)]
    assert cat["top"] == "Cat: the cat number | Cat: the cat number"
    assert cat["scores"] == sorted(cat["scores"], reverse=True)
    assert len(cat["passages"]) == len(cat["scores"]) <= 10
    assert cat["label"] == pytest.approx(1 / math.log2(3), abs=1e-6)  # the answer is the second of three equals
    assert [row["label"] for row in train[1:] + dev + test] == pytest.approx([0, 1, 0.5, 1, 0])
    assert told[0] == "corpus: 13 passages of 7 queries"
    assert told[1].startswith("train 2 queries (0 left out: nothing found), 1 of 2 have an answer, sha256 ")
    assert any(line.startswith("test  2 queries (1 left out: nothing found), 1 of 3 have an answer") for line in told)
    assert sum("BM25's best score as predictor" in line for line in told) == 3


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    told = [script.build(source, tmp_path / name, script.Settings()) for name in ("one", "two")]
    assert told[0] == told[1]
    assert all(
        (tmp_path / "one" / f"{split}.jsonl.gz").read_bytes() == (tmp_path / "two" / f"{split}.jsonl.gz").read_bytes()
        for split in SPLITS
    )


def test_chance_is_the_mean_over_random_orders() -> None:
    labels = np.array([0.0, 0.0, 0.5, 1.0, 0.0])
    random = np.random.default_rng(0)
    drawn = [ndcg_score([labels], [random.random(5)]) for _ in range(4000)]
    assert script.chance(labels) == pytest.approx(np.mean(drawn), abs=0.01)


GOOD = json.dumps(query(0, "where sleeps a cat", 0, 1))
BAD = {
    "not JSON": ("{", "dev.jsonl.gz:2: not a query with candidates: JSONDecodeError"),
    "no query": ('{"candidates": []}', "dev.jsonl.gz:2: not a query with candidates: KeyError('query')"),
    "a list": ("[]", "dev.jsonl.gz:2: not a query with candidates: TypeError"),
    "no candidates": ('{"query": "q", "candidates": []}', "dev.jsonl.gz:2: a query needs a text and at least one"),
    "empty query": (
        '{"query": " ", "candidates": [{"text": "t", "label": 0}]}',
        "dev.jsonl.gz:2: a query needs a text and at least one",
    ),
    "negative": (
        '{"query": "q", "candidates": [{"text": "t", "label": -1}]}',
        "dev.jsonl.gz:2: a label must be a grade from 0 to 100",
    ),
    "nan": (
        '{"query": "q", "candidates": [{"text": "t", "label": NaN}]}',
        "dev.jsonl.gz:2: a label must be a grade from 0 to 100",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_source_is_one_line_with_its_place(
    source: Path, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, wanted = BAD[mistake]
    (source / "dev.jsonl.gz").write_bytes(gzip.compress(f"{GOOD}\n{line}\n".encode()))
    arguments = ["--source", str(source), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["query_performance.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert str(caught.value.code).startswith(f"query_performance: {source / wanted}")
    assert "\n" not in str(caught.value.code)


def test_a_missing_split_is_reported(source: Path, tmp_path: Path) -> None:
    (source / "test.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"has no test\.jsonl\.gz or test\.jsonl"):
        script.build(source, tmp_path / "out", script.Settings())
