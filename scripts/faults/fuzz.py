"""Wrong recipes and manifests by the thousand: each loads or is refused in one line.

    scripts/faults/fuzz --inputs 100000 --json FILE

Inputs are seeded changes of small recipes (tags, anchors, broken YAML, odd numbers, swapped keys) and of a manifest
(changed bytes, changed values with a new digest). Exit code 1 and the seed where anything else happens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqat.checkpoint.manifest import (
    MANIFEST,
    LayerRecord,
    Manifest,
    SiteRecord,
    load_manifest,
    manifest_digest,
    verify_files,
)
from sqat.errors import SqatError
from sqat.recipe.loader import load_recipe

RECIPES = (
    """\
model: {source: x}
task: relevance
data: {train: a.csv, dev: b.csv}
stages:
  train: {steps: 2}
  prune:
    pattern: '2:4'
    schedule: {name: per-group, num_masks: 2}
  calibrate: {method: mse}
  qat:
    epochs: 1.5
""",
    """\
name: a
seed: 3
model:
  source: package:m/f
  max_length: 64
task: {name: classification, labels: [x, y]}
data:
  train: {path: 's/*.parquet', streaming: true}
  dev: {hub: h, split: s}
stages:
  train: &a {epochs: 1}
  again: {type: train, <<: *a}
  export: {targets: [onnx-fp32], gates: {f1: {min: 0.5}}}
results: {r: train}
""",
)
PIECES = (
    *("&a ", "*a", "*b", "<<: *a", "!!python/object/apply:os.system [id]", "!x ", "!!binary ", "{", "}", "[", "]"),
    *(": ", "- ", "? ", "\n", "\t", "'", '"', "|\n", ">-\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "\x00"),
    *("\x85", "\u2028", "\ud800", "\ufeff", "\uffff", "𝄞", "é", "null", "~", "1e999", "-1", ".nan", ".inf", "#", "\r"),
    *("0o7", "0x" + "f" * 400, "9" * 400, "1" * 5000, "[" * 60, "{a: " * 60, "- " * 60, "  ", "true", "yes", "2:4"),
    *("stages", "train", "prune", "distill: {}", "gates: {f1: {min: ", "retry: {times: 3}", "from: train", "path: /"),
    *("../../x", "a: [&b [*b]]", "x: &x [" + "*x, " * 9 + "]", "streaming: true", "buffer: 0", "task: ", "[1]", "''"),
)
OUTSIDE = ("secret", "hostname")  # files that lie beside and far from the folder of a manifest
NAMES = (
    *("../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "a//b", "a\x00b", "./secret", "a/b/c/d", "\ud800"),
    *("x" * 5000, "a\\..\\b", "C:\\x", "secret\n", "~/x", "file:///etc/hostname", "a/../../../etc/hostname"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1.5, float("inf"), float("nan"), "", "x", "inf", "\ud800", [], {}, [1], [[]], {"a": 1}),
    *({"a": {}}, {"a": {"b": "c"}}, {"": None}, [{"a": "x"}], [{"a": [1]}], "prune", {"x": {"pattern": "2:4"}}),
)


def fuzzed_recipe(draw: random.Random) -> bytes:
    """A recipe with up to five pieces put in or cut out."""
    text = draw.choice(RECIPES) if draw.random() < 0.95 else ""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 5))):
        start = draw.randint(0, len(text))
        new = draw.choice(PIECES) if draw.random() < 0.7 else moved(draw, text)
        text = text[:start] + new + text[start + draw.choice((0, 0, 1, 3, 30)) :]
    raw = text.encode("utf-8", "surrogatepass")
    return raw if draw.random() < 0.9 else flipped(draw, raw)


def moved(draw: random.Random, text: str) -> str:
    """A part of the text itself."""
    start = draw.randint(0, len(text))
    return text[start : start + draw.randint(0, 40)]


def flipped(draw: random.Random, raw: bytes) -> bytes:
    """The same bytes, with a few of them others."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 3) if raw else 0):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def fuzzed_manifest(draw: random.Random, sound: dict[str, Any]) -> bytes:
    """A manifest with bytes changed, or with other values and names and its own digest."""
    if draw.random() < 0.3:
        raw = flipped(draw, json.dumps(sound).encode())
        return raw[: draw.randint(0, len(raw))] if draw.random() < 0.3 else raw
    changed = dict(sound)
    for _ in range(draw.randint(0, 3)):
        changed[draw.choice([*sound, "unknown"])] = draw.choice(VALUES)
    if draw.random() < 0.5:
        changed["files"] = {draw.choice(NAMES): draw.choice(("0" * 64, "", "x"))}
    changed["sha256"] = manifest_digest(changed)
    return json.dumps(changed).encode()


def sound_manifest() -> dict[str, Any]:
    """What a manifest holds, with something of every kind."""
    found = Manifest(stage="p", type="prune", fingerprint="k", base_model="b", seed=0, versions={"torch": "2"},
                     notes=["n"], metrics={"dev": {"f1": 0.5, "pnr": float("inf")}}, history=[{"step": 1.0}],
                     losses={"task": 1.0},
                     layers={"a.b": LayerRecord(pattern="2:4")},
                     sites={"s": SiteRecord(shared_with="s", saturated=0.1)},
                     files={"config.json": sha256(b"{}").hexdigest()})  # fmt: skip
    raw = found.model_dump(mode="json")
    return {**raw, "sha256": manifest_digest(raw)}


def read_named(folder: Path) -> None:
    """A manifest, and the files that it names."""
    verify_files(folder, load_manifest(folder))


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """``read``, ``refused``, or what else became of an input."""
    try:
        read(path)
    except SqatError as error:
        return "refused" if "\n" not in str(error) and error.exit_code == 2 else f"not one line: {error!r}"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "read"


def fuzz(inputs: int, folder: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How inputs of both kinds, half of each, came out; and those that led to anything else, with their numbers."""
    counts, wrong, sound = Counter[str](), list[str](), sound_manifest()
    inside, opened = folder / "inside", list[str]()
    inside.mkdir()
    (inside / "config.json").write_bytes(b"{}")
    (folder / "secret").write_bytes(b"")
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    for number in range(inputs):
        draw, kind = random.Random(f"{seed} {number}"), ("recipe", "manifest")[number % 2]
        path = inside / ("recipe.yaml" if kind == "recipe" else MANIFEST)
        path.write_bytes(fuzzed_recipe(draw) if kind == "recipe" else fuzzed_manifest(draw, sound))
        opened.clear()
        found = outcome(load_recipe, path) if kind == "recipe" else outcome(read_named, inside)
        found = next((f"opened {name}" for name in opened if name.endswith(OUTSIDE)), found)
        counts[f"{kind} {found if found in ('read', 'refused') else 'wrong'}"] += 1
        if found not in ("read", "refused"):
            wrong.append(f"seed {seed} number {number}: {found}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(given.inputs, Path(folder), given.seed)
    seconds = round(time.process_time() - begun, 1)
    figures: dict[str, Any] = {
        "inputs": given.inputs,
        "seed": given.seed,
        "cpu_seconds": seconds,
        **dict(sorted(counts.items())),
        "wrong": wrong,
    }
    print(json.dumps(figures, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
