"""Build a corpus for query performance prediction: how well does BM25 answer each query?

    python scripts/data/query_performance.py --source FOLDER --output runs/query-performance

FOLDER holds {train,dev,test}.jsonl.gz (or .jsonl), a query a line: ``{"query", "title", "candidates": [{"text",
"label"}]}``. A written row holds ``qid, query, title, passages, scores, label, top``: ``top`` joins the beginnings of
the first passages.
"""

# The engine is BM25 over one corpus for all splits: each candidate of each query, with its page's title. Ranking only
# a query's own candidates would give BM25 the right page; a corpus for each split would make small splits easier.
# The label is NDCG@10 of the first ten passages, gain 2^grade - 1, with the ideal of all the query's candidates. A
# query without an answer has label 0. A query without a word of the corpus is skipped and counted.

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "dev", "test")
DEPTH = 10
BINS = ("0", "0-.2", ".2-.4", ".4-.6", ".6-.8", ".8-1", "1")
EDGES = (0.0, 1e-9, 0.2, 0.4, 0.6, 0.8, 1.0 - 1e-9, 1.0)


class Query(NamedTuple):
    """A query and the grade of every passage that was judged for it."""

    qid: str
    text: str
    title: str
    grades: dict[str, float]


class Settings(NamedTuple):
    """What a predictor gets to read."""

    shown: int = 3
    words: int = 32


def read_split(folder: Path, split: str) -> list[Query]:
    """Queries of a split, in the order of the file.

    Raises:
        ValueError: no such file, or a line in it is not as the module says.
    """
    names = (f"{split}.jsonl.gz", f"{split}.jsonl")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {' or '.join(names)}")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [query_of(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]


def query_of(line: str, place: str) -> Query:
    """A query out of its line; a passage given twice has the higher of its grades.

    Raises:
        ValueError: with the place.
    """
    try:
        row = json.loads(line)
        text, title = row["query"], row.get("title", "")
        grades: dict[str, float] = {}
        for candidate in row["candidates"]:
            passage, grade = passage_of(title, candidate["text"]), float(candidate["label"])
            grades[passage] = max(grade, grades.get(passage, grade))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: not a query with candidates: {error!r}") from None
    if not isinstance(text, str) or not text.strip() or not grades:
        raise ValueError(f"{place}: a query needs a text and at least one candidate")
    if not all(0 <= grade <= 100 for grade in grades.values()):
        raise ValueError(f"{place}: a label must be a grade from 0 to 100")
    return Query(str(row.get("qid", place)), text, title, grades)


def passage_of(title: str, text: str) -> str:
    return f"{title}: {text}" if title else text


def search(corpus: list[str], queries: list[str]) -> Iterator[list[tuple[int, float]]]:
    """The best passages of each query with their BM25 scores, at most `DEPTH`; only those that share a word with it.

    Equal scores keep the corpus' order.
    """
    import bm25s

    def words(texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)

    engine = bm25s.BM25()
    engine.index(words(corpus), show_progress=False)
    for tokens in words(queries):
        scores = engine.get_scores(tokens) if tokens else np.zeros(len(corpus))
        best = np.argsort(-scores, kind="stable")[:DEPTH]
        yield [(int(index), float(scores[index])) for index in best if scores[index] > 0]


def ndcg(found: list[float], judged: list[float]) -> float:
    """NDCG of the grades found, in their order, against the best order of all judged ones; 0 where none is above 0."""
    best = _discounted(sorted(judged, reverse=True)[:DEPTH])
    return _discounted(found[:DEPTH]) / best if best else 0.0


def _discounted(grades: list[float]) -> float:
    return float(sum((2.0**grade - 1) / np.log2(rank + 2) for rank, grade in enumerate(grades)))


def beginning(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def rows_of(queries: list[Query], corpus: list[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """A labelled row for each query that finds something."""
    results = search(corpus, [query.text for query in queries])
    for query, result in zip(queries, results, strict=True):
        passages = [corpus[index] for index, _ in result]
        if passages:
            grades = [query.grades.get(passage, 0.0) for passage in passages]
            yield {
                "qid": query.qid,
                "query": query.text,
                "title": query.title,
                "passages": passages,
                "scores": [round(score, 4) for _, score in result],
                "top": " | ".join(beginning(passage, settings.words) for passage in passages[: settings.shown]),
                "label": round(ndcg(grades, list(query.grades.values())), 6),
            }


def summary(split: str, queries: list[Query], rows: list[dict[str, Any]], content: bytes) -> list[str]:
    """What the labels of a split are, and what predicts them for nothing."""
    from sqat.tasks import metrics

    labels = np.array([row["label"] for row in rows])
    answered = sum(any(query.grades.values()) for query in queries)
    counts = ", ".join(f"{name}: {n}" for name, n in zip(BINS, np.histogram(labels, EDGES)[0], strict=True))
    lines = [
        f"{split:5} {len(rows)} queries ({len(queries) - len(rows)} left out: nothing found), {answered} of "
        f"{len(queries)} have an answer, sha256 {hashlib.sha256(content).hexdigest()}",
        f"      label mean {labels.mean():.3f}; {counts}",
    ]
    if np.ptp(labels) > 0:
        found = metrics.performance(labels, [row["scores"][0] for row in rows]).values()
        told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        lines.append(f"      chance: ndcg {chance(labels):.3f}; BM25's best score as predictor: {told}")
    return lines


def chance(labels: np.ndarray) -> float:
    """Mean NDCG of queries [N] in a random order."""
    discount = 1 / np.log2(np.arange(len(labels)) + 2)
    return float(labels.mean() * discount.sum() / (np.sort(labels)[::-1] @ discount))


def build(source: Path, output: Path, settings: Settings) -> list[str]:
    """Write the three splits and return what to tell about them.

    Raises:
        ValueError: the source is not as the module says.
        OSError: it cannot be read, or the output cannot be written.
    """
    splits = {split: read_split(source, split) for split in SPLITS}
    corpus = list(dict.fromkeys(text for queries in splits.values() for query in queries for text in query.grades))
    told = [f"corpus: {len(corpus)} passages of {sum(map(len, splits.values()))} queries"]
    output.mkdir(parents=True, exist_ok=True)
    for split, queries in splits.items():
        rows = list(rows_of(queries, corpus, settings))
        if not rows:
            raise ValueError(f"no query of {split} shares a word with the corpus")
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (output / f"{split}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        told += summary(split, queries, rows, content)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with {train,dev,test}.jsonl.gz of WikiQA")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/query-performance"), help="folder to write the three splits to"
    )
    parser.add_argument("--shown", type=int, default=Settings().shown, help="passages in the column top (default 3)")
    parser.add_argument("--words", type=int, default=Settings().words, help="words of each of them (default 32)")
    arguments = parser.parse_args()
    try:
        told = build(arguments.source, arguments.output, Settings(arguments.shown, arguments.words))
    except (OSError, ValueError) as error:
        sys.exit(f"query_performance: {error}")
    except ImportError as error:
        sys.exit(f"query_performance: {error}; pip install 'sqat[bm25]'")
    print("\n".join(told))


if __name__ == "__main__":
    main()
