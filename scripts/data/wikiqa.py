"""Turn a folder of WikiQA files into what the recipes read: questions with the sentences of one article.

    python scripts/data/wikiqa.py --source FOLDER [--output runs/wikiqa]

FOLDER holds ``{train,dev,test}.jsonl.gz``, a question a line: ``{"qid", "query", "candidates": [{"id", "text",
"label"}]}``. ``NAME.jsonl.gz`` gets all questions, ``NAME-mixed.jsonl.gz`` those with a right and a wrong sentence.
"""

# A sentence that a question holds twice is written once, and skipped where its labels differ. WikiQA (Yang, Yih and
# Meek, 2015) may be used for research only; it is not shipped.

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SPLITS = ("train", "dev", "test")
Question = dict[str, Any]


def read_questions(path: Path) -> Iterator[Question]:
    """Yield a file's questions; the first that is not as it should be ends the program."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            question = json.loads(line)
            for candidate in question["candidates"]:
                if candidate["label"] not in (0, 1) or not candidate["text"].strip():
                    sys.exit(f"{path}:{number}: a candidate has no text, or a label that is neither 0 nor 1")
            yield question


def clean(question: Question, left_out: Counter[str]) -> Question:
    """The question with every sentence once; those with two labels are dropped."""
    labels: dict[str, set[int]] = {}
    for candidate in question["candidates"]:
        labels.setdefault(candidate["text"], set()).add(candidate["label"])
    kept: dict[str, dict[str, Any]] = {}
    for candidate in question["candidates"]:
        if len(labels[candidate["text"]]) > 1:
            left_out["sentences that are right and wrong for one question"] += 1
        elif candidate["text"] in kept:
            left_out["sentences that stand twice under one question"] += 1
        else:
            kept[candidate["text"]] = {name: candidate[name] for name in ("id", "text", "label")}
    return {"qid": question["qid"], "query": question["query"], "candidates": list(kept.values())}


def mixed(question: Question) -> bool:
    """Whether a question has a right and a wrong sentence."""
    return len({candidate["label"] for candidate in question["candidates"]}) == len((0, 1))


def write_questions(path: Path, questions: Iterable[Question]) -> str:
    """Write a file that depends on nothing but its content, and return the content's sha256."""
    content = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions).encode()
    with path.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(content)
    return hashlib.sha256(content).hexdigest()


def convert(source: Path, output: Path) -> None:
    """Write both files of every split and print what is in them."""
    for split in SPLITS:
        path = source / f"{split}.jsonl.gz"
        if not path.is_file():
            sys.exit(f"{path}: no such file; --source must hold {', '.join(SPLITS)} as .jsonl.gz")
        left_out: Counter[str] = Counter()
        questions = [clean(question, left_out) for question in read_questions(path)]
        output.mkdir(parents=True, exist_ok=True)
        for name, chosen in ((split, questions), (f"{split}-mixed", [q for q in questions if mixed(q)])):
            digest = write_questions(output / f"{name}.jsonl.gz", chosen)
            sentences = sum(len(question["candidates"]) for question in chosen)
            print(f"{name}: {len(chosen)} questions, {sentences} sentences, sha256 {digest}")
        left_out["questions without a right and a wrong sentence, from the mixed file"] = sum(
            not mixed(question) for question in questions
        )
        for reason, count in left_out.items():
            print(f"  left out: {count} {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with train, dev and test.jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path("runs/wikiqa"), help="folder to write (runs/wikiqa)")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.output)


if __name__ == "__main__":
    main()
