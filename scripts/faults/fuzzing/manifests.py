"""Manifests with changed bytes, or with other values and names and a digest that fits them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from scripts.faults.fuzzing.case import Action, cut, flip_bytes
from sqat.checkpoint.manifest import (
    MANIFEST,
    LayerRecord,
    Manifest,
    SiteRecord,
    load_manifest,
    manifest_digest,
    verify_files,
)

NAMES = (
    *("../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "a//b", "a\x00b", "./secret", "a/b/c/d", "\ud800"),
    *("x" * 5000, "a\\..\\b", "C:\\x", "secret\n", "~/x", "file:///etc/hostname", "a/../../../etc/hostname"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1.5, float("inf"), float("nan"), "", "x", "inf", "\ud800", [], {}, [1], [[]], {"a": 1}),
    *({"a": {}}, {"a": {"b": "c"}}, {"": None}, [{"a": "x"}], [{"a": [1]}], "prune", {"x": {"pattern": "2:4"}}),
)


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a changed manifest, and the file that the sound one names."""
    (folder / "config.json").write_bytes(b"{}")
    (folder / MANIFEST).write_bytes(change_manifest(draw))
    return [partial(read_named_files, folder)]


def read_named_files(folder: Path) -> None:
    """Read a manifest, and the files that it names."""
    verify_files(folder, load_manifest(folder))


def change_manifest(draw: random.Random) -> bytes:
    """Return a manifest with changed bytes, or with other values and names and its own digest."""
    sound = sound_manifest()
    if draw.random() < 0.3:
        raw = flip_bytes(draw, json.dumps(sound).encode())
        return cut(draw, raw) if draw.random() < 0.3 else raw
    changed = dict(sound)
    for _ in range(draw.randint(0, 3)):
        changed[draw.choice([*sound, "unknown"])] = draw.choice(VALUES)
    if draw.random() < 0.5:
        changed["files"] = {draw.choice(NAMES): draw.choice(("0" * 64, "", "x"))}
    changed["sha256"] = manifest_digest(changed)
    return json.dumps(changed).encode()


@cache
def sound_manifest() -> dict[str, Any]:
    """Return the content of a sound manifest, with something of every type."""
    manifest = Manifest(stage="p", type="prune", fingerprint="k", base_model="b", seed=0, versions={"torch": "2"},
                     notes=["n"], metrics={"dev": {"f1": 0.5, "pnr": float("inf")}}, history=[{"step": 1.0}],
                     losses={"task": 1.0},
                     layers={"a.b": LayerRecord(pattern="2:4")},
                     sites={"s": SiteRecord(shared_with="s", saturated=0.1)},
                     files={"config.json": sha256(b"{}").hexdigest()})  # fmt: skip
    raw = manifest.model_dump(mode="json")
    return {**raw, "sha256": manifest_digest(raw)}
