"""Read the folders of runs into `schema.Application`.

A row counts if the recipe as it is now made its stage, from the checkpoints that are there, and it was measured after
that. What does not count is a line in ``missing``. Fingerprints are not compared: they need the data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from scripts.results.applications import display_of
from scripts.results.intervals import pair_intervals
from scripts.results.schema import Application, DataFile, Latency, Pictures, Row, RunRecord, Seed, Stage, read
from sqat.checkpoint.manifest import RECIPE, WEIGHTS, Manifest
from sqat.errors import SqatError
from sqat.files.read import try_read_object
from sqat.pipeline.bootstrap import Samples, read_samples
from sqat.pipeline.fingerprint import NOT_FINGERPRINTED, input_digests
from sqat.pipeline.graph import StageGraph, StageNode, resolve_graph
from sqat.pipeline.result_files import RESULTS_FILE, artifact_size, result_artifacts
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import LoadedRecipe

UNMEASURED = "not measured yet"
RECORD, LATENCY, PICTURES = "run.json", "latency.json", "pictures.json"


@dataclass(frozen=True)
class Run:
    """One seed of a recipe and where it lies, whether it has run or not."""

    recipe: Path
    seed: int
    output: str | None = None

    @property
    def overrides(self) -> list[str]:
        """What makes the recipe this run, as ``--set``."""
        place = [] if self.output is None else [f"output={self.output}"]
        return [f"seed={self.seed}", f"name={self.recipe.stem}-seed{self.seed}", *place]

    def load(self) -> LoadedRecipe:
        """The recipe with this seed."""
        return load_recipe(self.recipe, self.overrides)


def runs_of(recipe: Path, output: str | None) -> list[Run]:
    """The seeds of a recipe that have a folder, in order."""
    folder = Run(recipe, 0, output).load().run_directory.parent
    names = [path.name.removeprefix(f"{recipe.stem}-seed") for path in folder.glob(f"{recipe.stem}-seed*")]
    return [Run(recipe, seed, output) for seed in sorted(int(name) for name in names if name.isdecimal())]


def collect_seed(loaded: LoadedRecipe) -> tuple[Seed, dict[str, str]]:
    """What a run holds, and label -> why a row is not in it."""
    graph, folder = resolve_graph(loaded), loaded.run_directory
    measured, rows, skipped, digests = try_read_object(folder / RESULTS_FILE), {}, {}, set()
    for label, (node, artifact) in result_artifacts(graph).items():
        manifest, entry = node.manifest, measured.get(label)
        if reason := why_unsound(graph, node):
            skipped[label] = reason
        elif manifest is None or entry is None or not str(entry.get("key")).startswith(f"{manifest.sha256}/"):
            skipped[label] = UNMEASURED
        else:
            digests.add(entry["data"])
            made_by = loaded.recipe.results.get(label, node.name)
            rows[label] = Row(made_by=made_by, metrics=entry["metrics"], size_bytes=artifact_size(artifact),
                              packed_bytes=packed_bytes(node, artifact))  # fmt: skip
    if len(digests) > 1:
        raise SqatError(
            "rows were measured on different data",
            "run it once more",
            str(folder / RESULTS_FILE),
            code="stale-checkpoint",
        )
    found = {name: node.manifest for name, node in graph.nodes.items() if node.manifest is not None}
    stages = {name: Stage(kind=each.type, steps=each.steps, seconds=each.seconds) for name, each in found.items()}
    record = read(RunRecord, folder / RECORD)
    versions = dict(sorted(item for each in found.values() for item in each.versions.items()))
    return Seed(
        commit=record.commit if record else "",
        versions={**versions, **(record.versions if record else {})},
        data_digest=digests.pop() if digests else "",
        cpu=record.cpu if record else "",
        threads=record.threads if record else 0,
        rows=rows,
        stages=stages,
    ), skipped


def why_unsound(graph: StageGraph, node: StageNode) -> str:
    """Why a stage's checkpoint is not what the recipe would make now; "" where it is."""
    name, manifest = node.name, node.manifest
    if manifest is None:
        exists = node.directory.is_dir()
        return f"the checkpoint of stage {name} cannot be read" if exists else f"stage {name} has not run"
    if manifest.input_digests != input_digests(node.parent_manifest, node.teacher_manifest):
        return f"stage {name} was made from checkpoints that are no longer there"
    # whatever the words of its recipe, such as another path to the same data
    if not node.is_current and sections(graph.loaded, name) != sections(made_with(node.directory, manifest), name):
        return f"the recipe of stage {name} has changed since"
    before = [stage for stage in (node.parent, node.teacher) if stage is not None]
    return next((reason for stage in before if (reason := why_unsound(graph, stage))), "")


def made_with(directory: Path, manifest: Manifest) -> LoadedRecipe | None:
    """The recipe that a checkpoint was made with; None where this sqat cannot read it any more."""
    try:
        return load_recipe(directory / RECIPE, manifest.overrides)
    except SqatError:
        return None


def sections(loaded: LoadedRecipe | None, name: str) -> dict[str, Any]:
    """What of a recipe a stage itself depends on."""
    if loaded is None or name not in loaded.recipe.stages:
        return {}
    recipe = loaded.recipe
    whole = recipe.model_dump(include={"model", "task", "seed"}) | recipe.data.model_dump(exclude={"test"})
    return {**whole, "stage": recipe.stages[name].model_dump(exclude=NOT_FINGERPRINTED)}


def packed_bytes(node: StageNode, artifact: Path) -> int | None:
    """Bytes of an int8 or fp16 file if its 2:4 weights were packed as sparse tensor cores read them.

    None where nothing is packed: float32 has no such form, and a file of target cpu-sparse is packed as it is.
    """
    manifest, parent = node.manifest, node.parent
    if manifest is None or parent is None or artifact.suffix != ".onnx":
        return None
    half = ".fp16." in artifact.name
    saved = 0
    with safe_open(parent.directory / WEIGHTS, "np") as weights:
        for name, layer in manifest.layers.items():
            if layer.pattern == "2:4" and (half or (".int8." in artifact.name and layer.quantized)):
                saved += packing_saves(math.prod(weights.get_slice(f"{name}.weight").get_shape()), 2 if half else 1)
    return artifact_size(artifact) - saved if saved else None


def packing_saves(weights: int, bytes_each: int) -> int:
    """Bytes that packing saves of 2:4 weights: half of them go, and four bits come to each group of four."""
    return weights * bytes_each // 2 - weights // 8


def collect(runs: list[Run]) -> Application:
    """All seeds of one recipe.

    Args:
        runs: of one recipe; those without any row are told as missing.
    """
    first = runs[0].load()
    recipe, display = first.recipe, display_of(runs[0].recipe.stem)
    seeds, missing = dict[int, Seed](), list[str]()
    for run in runs:
        seed, skipped = collect_seed(run.load())
        if seed.rows:
            seeds[run.seed] = seed
            missing += [f"seed {run.seed}, {label}: {reason}" for label, reason in skipped.items()]
        else:
            reasons = [reason for reason in skipped.values() if reason != UNMEASURED]
            missing.append(f"seed {run.seed}: no row ({[*reasons, UNMEASURED][0]})")
    if len({seed.data_digest for seed in seeds.values()}) > 1:
        raise SqatError(
            "seeds were measured on different data", "run them once more", runs[0].recipe.name, code="stale-checkpoint"
        )
    labels = result_artifacts(resolve_graph(first))
    missing += [f"the recipe has no row {label!r}" for label in display.rows if label not in labels]
    known = {metric for seed in seeds.values() for row in seed.rows.values() for metric in row.metrics}
    missing += [f"no run has measured {metric}" for metric in display.metrics if known and metric not in known]
    pictures = read(Pictures, runs[0].recipe.with_suffix(f".{PICTURES}"))
    samples = {run.seed: samples_of(run.load(), seeds[run.seed]) for run in runs if run.seed in seeds}
    latency = [found for run in runs if (found := latency_of(run.load()))]
    if not latency:
        missing.append("latency has not been measured, or of files that are no longer there")
    return Application(
        recipe=shown_path(runs[0].recipe),
        about=head_comment(first.text),
        model=recipe.model.source or "random weights",
        split="dev" if recipe.data.test is None else "test",
        labels=list(labels),
        commands=commands(runs, pictures is not None),
        data=data_files(first),
        seeds=seeds,
        intervals=pair_intervals(samples, list(labels)),
        latency=latency[0] if latency else None,
        pictures=pictures,
        missing=missing,
    )


def samples_of(loaded: LoadedRecipe, seed: Seed) -> dict[str, Samples]:
    """Row -> its metrics on the bootstrap samples of the split, for the rows of a seed that have them."""
    measured, known = try_read_object(loaded.run_directory / RESULTS_FILE), read_samples(loaded.run_directory)
    return {label: known[key] for label in seed.rows if (key := str(measured[label].get("key"))) in known}


def latency_of(loaded: LoadedRecipe) -> Latency | None:
    """What was measured of a run's files; None where that is nothing, or one of them has changed since."""
    latency = read(Latency, loaded.run_directory / LATENCY)
    return latency if latency is not None and latency.made_from == digests(loaded, latency.made_from) else None


def digests(loaded: LoadedRecipe, labels: Iterable[str]) -> dict[str, str]:
    """Row -> digest of the manifest of its stage, for the rows that are there."""
    nodes = {label: node for label, (node, _) in result_artifacts(resolve_graph(loaded)).items()}
    manifests = {label: nodes[label].manifest for label in labels if label in nodes}
    return {label: manifest.sha256 for label, manifest in manifests.items() if manifest is not None}


def commands(runs: list[Run], has_pictures: bool) -> list[str]:
    """What to type, for all seeds by the script and for one by sqat itself; and what draws its pictures."""
    recipe = shown_path(runs[0].recipe)
    seeds = " ".join(str(run.seed) for run in runs)
    overrides = Run(runs[0].recipe, runs[0].seed).overrides
    lines = [
        f"scripts/results/make run {recipe} --seeds {seeds}",
        f"scripts/results/make latency {recipe}",
        f"sqat run {recipe} {' '.join(f'--set {override}' for override in overrides)}",
    ]
    pictures = f"python scripts/results/pictures.py {recipe} --set {' '.join(overrides)}"
    return [*lines, pictures] if has_pictures else lines


def shown_path(recipe: Path) -> str:
    """A recipe's path below the working folder; only its name where it lies elsewhere."""
    path = recipe.resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def head_comment(text: str) -> str:
    """The comment at the head of a recipe as one text."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server:"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def data_files(loaded: LoadedRecipe) -> dict[str, DataFile]:
    """What the splits were read from; a hub's data set is named with its revision instead of a digest."""
    found, data = {}, loaded.recipe.data
    for name, split in (("train", data.train), ("dev", data.dev), ("test", data.test)):
        if split is None:
            continue
        if split.path is None:
            revision = split.revision or "revision not fixed"
            found[name] = DataFile(file=f"{split.hub}[{split.split or name}]", sha256=revision, limit=split.limit)
            continue
        file = loaded.path.parent / split.path
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "not here"
        found[name] = DataFile(file=file.name, sha256=digest, limit=split.limit)
    return found
