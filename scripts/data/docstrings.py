"""Build a search-relevance corpus from the docstrings of this machine's Python packages.

    python scripts/data/docstrings.py OUTPUT_DIR [--queries N] [--seed 0]

A query is the first sentence of a docstring, its relevant passage the rest. Other candidates are the nearest passages
by TF-IDF and random ones. It is a known-item task, not human relevance. Test is the standard library, dev is numpy,
train is the other packages.
"""

# Splits are whole packages, since copies inside one package would leak. The corpus changes with the installed versions;
# the sha256 of each split says which corpus a metric belongs to. Sources are read with `ast`, never imported.

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

TESTS = {"tests", "test", "testing", "_pytest", "conftest", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
COPIES = {"_vendor", "vendored", "externals", "site-packages", "dist-packages"}
NOT_TRAIN = {"numpy", "sqat", "pip", "setuptools"}
DROPPED_SECTIONS = {"see also", "seealso", "references", "examples", "example"}
BOILERPLATE = re.compile(r"deprecated|all rights reserved|help\(type\(self\)\)|auto-?generated", re.IGNORECASE)
FENCED = re.compile(r"```.*?(```|\Z)", re.DOTALL)
SENTENCE = re.compile(r".{15,}?(?<!i\.e)(?<!e\.g)(?<!etc)[.!?](?=\s|$)")


class Record(NamedTuple):
    """One docstring, split: the sentence to search with, and the passage to find."""

    name: str
    query: str
    passage: str


class Settings(NamedTuple):
    """What shapes a corpus, beside the installed packages."""

    queries: int = 2000
    seed: int = 0
    hard: int = 4
    random: int = 4
    characters: int = 320


def source_files(root: Path, without: set[str], seed: int) -> list[Path]:
    """Python files under a folder in an order drawn by the seed; no tests, no copies of other packages.

    Args:
        without: names right under the folder to leave out.
    """
    found: list[tuple[bytes, Path]] = []
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        parts = [part.removesuffix(".py") for part in place.parts]
        if parts[0] not in without and not (TESTS | COPIES).intersection(parts):
            found.append((hashlib.sha256(f"{seed}:{place.as_posix()}".encode()).digest(), path))
    return [path for _, path in sorted(found)]


def docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module and its public classes and functions, if it can be parsed."""
    source = path.read_bytes()
    if b'"""' not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    pending: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]
    pending = [(module, tree)]
    while pending:
        name, node = pending.pop()
        text = ast.get_docstring(node)
        if text:
            yield name, text
        pending += [
            (f"{name}.{child.name}", child)
            for child in reversed(node.body)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and not child.name.startswith("_")
            and isinstance(node, (ast.Module, ast.ClassDef))
        ]


def split_docstring(text: str, characters: int) -> tuple[str, str] | None:
    """Split a docstring into its summary sentence and the beginning of the rest; None if either says too little.

    The summary is cut out of the rest wherever it is repeated, or it could be found by its own words.
    """
    first, _, rest = text.strip().partition("\n\n")
    first = _plain(first)
    sentence = SENTENCE.match(first)
    query = sentence.group() if sentence else first
    body = _plain(f"{first[len(query) :]} {prose(rest)}")
    query = query.rstrip(" .:")
    body = re.sub(re.escape(query), " ", body, flags=re.IGNORECASE)
    passage = _beginning(" ".join(body.split()).lstrip(" .:;,-"), characters)
    if not 4 <= len(query.split()) <= 25 or len(passage.split()) < 12:
        return None
    if BOILERPLATE.search(query) or BOILERPLATE.search(passage) or not _is_prose(passage):
        return None
    return query, passage


def _is_prose(text: str) -> bool:
    """Whether most of it is words: tables, diagrams and option lists are not."""
    words = text.split()
    return sum(word.strip(".,:;()'\"").isalpha() for word in words) >= 0.6 * len(words)


def prose(text: str) -> str:
    """The lines of a docstring without doctests, directives, rulers, See Also, Examples and References."""
    kept: list[str] = []
    skipping = ""  # "block": until a blank line; "section": until the next heading
    lines = FENCED.sub("", text).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        bare = line.strip()
        heading = bare.rstrip(":").lower()
        if re.fullmatch(r"[-=~^]{3,}", following.strip()):
            skipping = "section" if heading in DROPPED_SECTIONS else ""
        elif heading.startswith("see also") or (heading in DROPPED_SECTIONS and bare.endswith(":")):
            skipping = "block"
        elif bare.startswith((">>>", ".. ", "@")):
            skipping = skipping or "block"
        elif not bare and skipping == "block":
            skipping = ""
        if not skipping and not re.fullmatch(r"[-=~^*+|# ]*", bare):
            kept.append(line)
    return "\n".join(kept)


def _plain(text: str) -> str:
    """Text on one line, without the marks of reStructuredText and Markdown."""
    text = re.sub(r":[a-z:]+:`~?([^`<]*)[^`]*`", r"\1", text)
    text = re.sub(r"`{1,2}~?([^`]*)`{1,2}_*", r"\1", text)
    text = re.sub(r"\*\*?([\w. ]+)\*\*?", r"\1", text)
    return " ".join(text.split())


def _beginning(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters].rsplit(" ", 1)[0]


def collect(root: Path, prefix: str, without: set[str], seen: set[str], settings: Settings) -> list[Record]:
    """Records of the files under a folder, at most ``settings.queries``.

    Args:
        prefix: package the folder is; empty for a folder of packages.
        without: names right under the folder to leave out.
        seen: keys of queries and passages found so far, in all splits; a record that repeats one is left out.
    """
    records: list[Record] = []
    for path in source_files(root, without, settings.seed):
        parts = [prefix, *path.relative_to(root).with_suffix("").parts]
        module = ".".join(part for part in parts if part not in ("", "__init__"))
        for name, text in docstrings(path, module):
            pair = split_docstring(text, settings.characters)
            keys = set(map(_key, pair)) if pair else seen
            if pair and not keys & seen:
                seen |= keys
                records.append(Record(name, *pair))
        if len(records) >= settings.queries:
            break
    return records[: settings.queries]


def _key(text: str) -> str:
    """What two copies share: the first 12 words that are no names, so that a renamed copy counts as one."""
    return " ".join(re.findall(r"\b[a-z]+\b", text[:1].lower() + text[1:])[:12])


def with_negatives(records: list[Record], settings: Settings) -> tuple[list[list[int]], float]:
    """Candidates of every query, its own passage first, and the NDCG@10 that TF-IDF reaches on them.

    Passages nearly like the right one (cosine over 0.7) are never taken: they may answer the query as well.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[A-Za-z]{2,}")
    passages = vectorizer.fit_transform([record.passage for record in records])
    queries = vectorizer.transform([record.query for record in records])
    random = np.random.default_rng((settings.seed, 0))
    chosen: list[list[int]] = []
    gain = 0.0
    for start in range(0, len(records), 256):
        near = np.round((queries[start : start + 256] @ passages.T).toarray(), 6)  # rounded: the same everywhere
        copies = (passages[start : start + 256] @ passages.T).toarray() > 0.7
        for row, (likeness, copied) in enumerate(zip(near, copies, strict=True), start):
            copied[row] = True
            allowed = np.flatnonzero(~copied)
            ranked = allowed[np.argsort(-likeness[allowed], kind="stable")]
            hard, others = ranked[: settings.hard], ranked[settings.hard :]
            drawn = random.choice(others, min(settings.random, len(others)), replace=False)
            chosen.append([row, *hard.tolist(), *drawn.tolist()])
            rank = 1 + int((likeness[chosen[-1][1:]] >= likeness[row]).sum())
            gain += 1 / math.log2(1 + rank) if rank <= 10 else 0
    return chosen, gain / len(records)


def to_lines(records: list[Record], candidates: list[list[int]], split: str, seed: int) -> bytes:
    """JSON lines of a split: queries, and candidates within each, in an order drawn by the seed."""
    random = np.random.default_rng((seed, 1))
    lines: list[str] = []
    for number, row in enumerate(random.permutation(len(records)).tolist()):
        listed = [
            {"id": records[other].name, "text": records[other].passage, "label": int(other == row)}
            for other in random.permutation(candidates[row]).tolist()
        ]
        query = {"qid": f"{split}-{number}", "query": records[row].query, "candidates": listed}
        lines.append(json.dumps(query, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def write(content: bytes, path: Path) -> None:
    """Write gzip beside the final name and rename it; equal content gives equal bytes."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(gzip.compress(content, mtime=0))
    os.replace(beside, path)


def build(standard_library: Path, installed: Path, output: Path, settings: Settings) -> list[str]:
    """Write train, dev and test into a folder.

    Args:
        standard_library: folder whose files are the test split.
        installed: folder of installed packages; numpy is the dev split, the others are the train split.

    Returns:
        A line per split: counts, NDCG@10 of TF-IDF, sha256 of the content.

    Raises:
        ValueError: a split has fewer than two records.
    """
    seen: set[str] = set()
    splits = {
        "test": collect(standard_library, "", set(), seen, settings),
        "dev": collect(installed / "numpy", "numpy", set(), seen, settings),
        "train": collect(installed, "", NOT_TRAIN, seen, settings),
    }
    output.mkdir(parents=True, exist_ok=True)
    summary: list[str] = []
    for split, records in reversed(splits.items()):
        if len(records) < 2:
            raise ValueError(f"{split} has {len(records)} usable docstrings, needs at least 2")
        candidates, baseline = with_negatives(records, settings)
        content = to_lines(records, candidates, split, settings.seed)
        write(content, output / f"{split}.jsonl.gz")
        pairs, packages = sum(map(len, candidates)), len({record.name.split(".")[0] for record in records})
        summary.append(
            f"{split:5} {len(records)} queries, {pairs} pairs, {packages} packages, "
            f"TF-IDF ndcg@10 {baseline:.3f}, sha256 {hashlib.sha256(content).hexdigest()}"
        )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for {train,dev,test}.jsonl.gz")
    for name, value in Settings()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{HELP[name]} (default {value})")
    knobs = vars(parser.parse_args())
    output = knobs.pop("output")
    folders = sysconfig.get_paths()
    try:
        summary = build(Path(folders["stdlib"]), Path(folders["purelib"]), output, Settings(**knobs))
    except (OSError, ValueError) as error:
        sys.exit(f"docstring_corpus: {error}")
    print("\n".join(summary))


HELP = {
    "queries": "most queries of a split",
    "seed": "draws the files, negatives and orders",
    "hard": "candidates of a query that are its nearest by TF-IDF",
    "random": "candidates of a query that are random",
    "characters": "length a passage is cut to",
}

if __name__ == "__main__":
    main()
