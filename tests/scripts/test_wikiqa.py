"""scripts/data/wikiqa.py: what it writes, what it leaves out and says so, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "data" / "wikiqa.py"
Question = dict[str, Any]


def question(number: int, *candidates: tuple[str, int]) -> Question:
    listed = [{"id": f"D{number}-{i}", "text": text, "label": label} for i, (text, label) in enumerate(candidates)]
    return {"qid": f"Q{number}", "query": f"what is {number}?", "title": "of no use", "candidates": listed}


def write(folder: Path, questions: list[Question]) -> None:
    for split in ("train", "dev", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(q) + "\n" for q in questions)


def run(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(path: Path) -> tuple[list[Question], str]:
    content = gzip.decompress(path.read_bytes())
    return [json.loads(line) for line in content.decode().splitlines()], hashlib.sha256(content).hexdigest()


def test_it_writes_all_and_mixed_questions_and_says_what_it_skipped(tmp_path: Path) -> None:
    mixed = question(1, ("right", 1), ("wrong", 0), ("wrong", 0))
    unanswered = question(2, ("no", 0), ("nor this", 0), ("both", 1), ("both", 0))
    write(tmp_path, [mixed, unanswered])
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    questions, digest = read(tmp_path / "out" / "dev.jsonl.gz")
    assert [[c["text"] for c in q["candidates"]] for q in questions] == [["right", "wrong"], ["no", "nor this"]]
    assert set(questions[0]) == {"qid", "query", "candidates"}
    assert f"dev: 2 questions, 4 sentences, sha256 {digest}" in done.stdout
    only, digest = read(tmp_path / "out" / "dev-mixed.jsonl.gz")
    assert [q["qid"] for q in only] == ["Q1"]
    assert f"dev-mixed: 1 questions, 2 sentences, sha256 {digest}" in done.stdout
    assert "left out: 1 sentences that stand twice under one question" in done.stdout
    assert "left out: 2 sentences that are right and wrong for one question" in done.stdout
    assert "left out: 1 questions without a right and a wrong sentence" in done.stdout
    before = (tmp_path / "out" / "dev.jsonl.gz").read_bytes()
    run(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "dev.jsonl.gz").read_bytes() == before


def test_it_names_the_line_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    write(tmp_path, [question(1, ("right", 1)), question(2, ("half", 2))])
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert "train.jsonl.gz:2: a candidate has no text, or a label that is neither 0 nor 1" in done.stderr


def test_a_missing_split_is_reported(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert "train.jsonl.gz: no such file" in done.stderr
