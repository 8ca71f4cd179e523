"""Translate a recipe of SparseML or llm-compressor into stages.

It reads lists and mappings named ``...modifiers`` in YAML or in the front matter of Markdown, with variables and
``eval(num_epochs - 2)``. YAML tags create no objects, and ``eval`` knows four operations only. Every modifier without
a counterpart is listed in a note.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sqat.errors import SqatError
from sqat.recipe.yaml_nodes import Node, compose

MAX_CHARACTERS = 1_000_000
CRITERIA = {"sparsegpt": ("SparseGPT", "OBS", "MFAC"), "wanda": ("Wanda",), "taylor": ("Movement",)}
ONE_SHOT = ("Constant", "SparseGPT", "Wanda")
ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear", "re:.*weight")
RATES = ("SetLearningRateModifier", "LearningRateModifier", "LearningRateFunctionModifier")
DECAY = "SetWeightDecayModifier"
KNOWN = (*RATES, DECAY, "EpochRangeModifier", "LogTrackingModifier")
OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
Stage = dict[str, Any]


@dataclass(frozen=True)
class Modifier:
    """One modifier: class name, arguments, and line in the file."""

    kind: str
    values: Mapping[str, Any]
    line: int

    def number(self, name: str, default: float) -> float:
        """Return an argument that must be a number."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            problem = f"{self.kind}.{name} needs a number, got {value!r}"
            raise SqatError(problem, place=f"line {self.line}", code="invalid-recipe")
        return float(value)

    def start(self, default: float = 0.0) -> float:
        """Return the first epoch; SparseML writes values below 0 for the beginning."""
        return max(self.number("start_epoch", default), 0.0)


@dataclass
class Translation:
    """Stages of a recipe, and notes on what is missing or different in them."""

    stages: dict[str, Stage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Label of the result in the results table."""
        return f"{'sparse' if 'prune' in self.stages else 'dense'} {'int8' if 'qat' in self.stages else 'fp16'}"

    def text(self) -> str:
        """Return the recipe's section ``stages``."""
        return yaml.safe_dump({"stages": self.stages}, sort_keys=False, width=110, default_flow_style=None)


def translate(path: Path) -> Translation:
    """Translate a recipe of SparseML or llm-compressor.

    Raises:
        SqatError: the file cannot be read, or is no such recipe.
    """
    try:
        return make_stages(read_modifiers(path))
    except SqatError as error:
        place = str(path) + (f", {error.place}" if error.place else "")
        raise SqatError(error.problem, error.hint, place, code=error.code) from error


def read_modifiers(path: Path) -> list[Modifier]:
    """Read every modifier of a file, in order."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SqatError("cannot be read as text", code="unreadable-file") from error
    if len(text) > MAX_CHARACTERS:
        raise SqatError(f"has {len(text)} characters, too many for a recipe", code="unreadable-file")
    first = text.find("\n---\n") if path.suffix == ".md" else -1
    if path.suffix == ".md" and first < 0 and not text.startswith("---\n"):
        hint = "name the recipe's .yaml"
        raise SqatError("has no front matter between two lines ---", hint, code="unreadable-file")
    before = "" if first < 0 or text.startswith("---\n") else text[: first + 1]
    body = text[len(before) :]
    if path.suffix == ".md":
        body = "---\n" + body.removeprefix("---\n").partition("\n---")[0] + "\n"
    tree = compose("\n" * before.count("\n") + body, path.name, tags=True)
    variables = {name: node.value for name, node in tree.value.items()} if isinstance(tree.value, dict) else {}
    modifiers = list(find_modifiers(tree, variables))
    if not modifiers:
        problem = "holds no list or mapping named ...modifiers"
        raise SqatError(problem, "is it a recipe of SparseML?", code="invalid-recipe")
    return modifiers


def find_modifiers(node: Node, variables: Mapping[str, Any]) -> Iterator[Modifier]:
    """Yield the modifiers below a node: tagged ones in lists (SparseML) and entries of mappings (llm-compressor)."""
    if not isinstance(node.value, dict):
        return
    for name, child in node.value.items():
        if not name.endswith("modifiers"):
            yield from find_modifiers(child, variables)
        elif isinstance(child.value, list):
            for each in child.value:
                if each.tag.startswith("!"):
                    yield Modifier(each.tag[1:], arguments(each, variables), each.place.line)
        elif isinstance(child.value, dict):
            for kind, each in child.value.items():
                yield Modifier(kind, arguments(each, variables), each.place.line)


def arguments(node: Node, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a modifier, with ``eval(...)`` computed."""
    plain = node.plain()
    return {name: evaluate(value, variables) for name, value in plain.items()} if isinstance(plain, dict) else {}


def evaluate(value: Any, variables: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a value, or the number of an ``eval(...)``."""
    match = re.fullmatch(r"\s*eval\((.*)\)\s*", value, re.DOTALL) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        tree = ast.parse(match[1].strip()[:200], mode="eval").body
        return compute(tree, variables, depth)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        problem = f"{value!r} is no expression of numbers and variables"
        raise SqatError(problem, "write the number", code="invalid-recipe") from error


def compute(tree: ast.expr, variables: Mapping[str, Any], depth: int) -> float:
    """Compute an expression of four operations."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in variables and depth < 20:
        return float(evaluate(variables[tree.id], variables, depth + 1))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -compute(tree.operand, variables, depth)
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATIONS:
        left, right = (compute(part, variables, depth) for part in (tree.left, tree.right))
        return float(OPERATIONS[type(tree.op)](left, right))
    raise ValueError(ast.dump(tree))


def make_stages(modifiers: Sequence[Modifier]) -> Translation:
    """Make the stages: train until pruning starts, prune until quantization starts, then calibrate and qat."""
    pruning = [each for each in modifiers if is_pruning(each)]
    quantizing = [each for each in modifiers if "Quantization" in each.kind or each.kind == "GPTQModifier"]
    if not pruning and not quantizing:
        hint = "sqat init DATA_FILE writes a recipe without it"
        raise SqatError("neither prunes nor quantizes", hint, code="invalid-recipe")
    end = max(0.0, *(each.number("end_epoch", 0) for each in modifiers))
    quantize_epoch = min((each.start(end) for each in quantizing), default=end)
    prune_epoch = min((each.start() for each in pruning), default=quantize_epoch)
    result, rates = Translation(), Rates(modifiers)
    stages, notes = result.stages, result.notes
    distill = distill_section(modifiers, notes)
    decays = [each.number("weight_decay", 0.01) for each in modifiers if each.kind == DECAY]
    shared: Stage = {"weight_decay": decays[-1]} if decays else {}
    stages["train"] = {"epochs": as_number(prune_epoch) or 1, **rates.at(0.0, 5e-5), **shared}
    if not prune_epoch:
        notes.append("train: one epoch before pruning gives a dense model as teacher and baseline")
    if pruning:
        epochs = max(quantize_epoch - prune_epoch, 0)
        stages["prune"] = prune_stage(pruning, prune_epoch, epochs, notes)
        stages["prune"] |= {**rates.at(prune_epoch, 5e-5), **shared, "distill": dict(distill)}
    if quantizing:
        stages["calibrate"] = calibrate_stage(quantizing, notes)
        epochs = as_number(max(end - quantize_epoch, 0)) or 1
        stages["qat"] = {"epochs": epochs, **rates.at(quantize_epoch, 2e-5), **shared, "distill": dict(distill)}
        if end <= quantize_epoch:
            notes.append("qat: one epoch; the recipe only calibrates. Delete the stage to do the same")
    stages["export"] = {"targets": ["onnx-int8" if quantizing else "onnx-fp16"]}
    translated = [*pruning, *quantizing, *(each for each in modifiers if each.kind in KNOWN or is_distilling(each))]
    notes += [f"line {each.line}: {each.kind} has no counterpart and is skipped"
              for each in modifiers if each not in translated]  # fmt: skip
    result.notes = list(dict.fromkeys([*notes, *rates.notes]))
    return result


def as_number(number: float) -> float:
    """Return whole numbers as int."""
    return int(number) if number == int(number) else round(number, 6)


def is_pruning(modifier: Modifier) -> bool:
    """Return whether a modifier prunes."""
    return "Pruning" in modifier.kind or modifier.kind == "SparseGPTModifier"


def is_distilling(modifier: Modifier) -> bool:
    """Return whether a modifier distils."""
    return "Distillation" in modifier.kind


def prune_stage(pruning: Sequence[Modifier], start: float, epochs: float, notes: list[str]) -> Stage:
    """Return pattern, criterion, schedule, layers and epochs; of several modifiers, the first counts."""
    first = pruning[0]
    gradual = [each for each in pruning if not each.kind.startswith(ONE_SHOT)]
    stage: Stage = {"pattern": pattern_of(first, notes)}
    criterion = next((name for name, starts in CRITERIA.items() if first.kind.startswith(starts)), "magnitude")
    stage["criterion"] = criterion
    stage["schedule"] = {"name": "per-group", "num_masks": 2 if gradual and has_steps(gradual) else 1}
    if "ACDC" in first.kind:
        notes.append("prune: AC/DC's dense phases have no counterpart; schedule sr-ste also lets pruned weights return")
    names = [name for each in pruning for name in names_of(each, "params", "targets")]
    include = to_globs([name for name in names if name not in ALL], notes)
    if include:
        stage["layers"] = {"include": include}
    exclude = to_globs(names_of(first, "ignore"), notes)
    if exclude:
        stage.setdefault("layers", {})["exclude"] = exclude
    if stage["schedule"]["num_masks"] > 1 and epochs > 0:
        last = max(each.number("end_epoch", start) for each in pruning)
        stage["recovery_fraction"] = round(min(max(1 - (last - start) / epochs, 0.2), 0.95), 3)
    stage["epochs"] = as_number(epochs) or 1
    if not epochs:
        notes.append("prune: one epoch of training after the masks; the SparseML recipe has none")
    return stage


def has_steps(gradual: Sequence[Modifier]) -> bool:
    """Return whether sparsity grows over several steps."""
    return any(each.number("end_epoch", 0) > each.start() for each in gradual)


def pattern_of(modifier: Modifier, notes: list[str]) -> str:
    """Return the N:M pattern, or 2:4 for patterns that no hardware supports."""
    mask = modifier.values.get("mask_type", modifier.values.get("mask_structure", "unstructured"))
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(mask))
    if match and 1 <= int(match[1]) < int(match[2]) <= 32:
        return f"{int(match[1])}:{int(match[2])}"
    sparsity = modifier.values.get("final_sparsity", modifier.values.get("sparsity"))
    level = f" at {sparsity}" if isinstance(sparsity, int | float) else ""
    notes.append(f"line {modifier.line}: mask {mask}{level} becomes 2:4, half of the weights, which hardware can skip")
    return "2:4"


def calibrate_stage(quantizing: Sequence[Modifier], notes: list[str]) -> Stage:
    """Return the calibrate section; a note lists schemes other than int8 weights and inputs."""
    stage: Stage = {"method": "percentile"}
    for each in quantizing:
        other = {name: each.values[name] for name in ("scheme", "config_groups", "num_bits", "strategy")
                 if name in each.values}  # fmt: skip
        if other and other != {"scheme": "W8A8"}:
            notes.append(f"line {each.line}: {each.kind} with {', '.join(other)} becomes int8 weights (per channel) "
                         "and int8 inputs")  # fmt: skip
    exclude = to_globs(
        [name for name in names_of(quantizing[0], "ignore") if "." in name or name.startswith("re:")], notes
    )
    if exclude:
        stage["layers"] = {"exclude": exclude}
    notes.append("calibrate: scales cover 99.99 % of the values of 512 rows and stay fixed in qat; "
                 "observers and their freezing need no settings")  # fmt: skip
    return stage


def distill_section(modifiers: Sequence[Modifier], notes: list[str]) -> Stage:
    """Return the distill section: output distillation as in the recipe, beside MiniLM's relations."""
    for each in modifiers:
        if each.kind == "DistillationModifier":
            hardness = min(max(each.number("hardness", 0.5), 0.0), 1.0)
            return {
                "task_weight": round(1 - hardness, 6),
                "output_weight": hardness,
                "temperature": each.number("temperature", 2.0),
            }
        if is_distilling(each):
            notes.append(f"line {each.line}: {each.kind} becomes MiniLM's relations of the last layer")
    return {}


def names_of(modifier: Modifier, *keys: str) -> list[str]:
    """Return names of layers or parameters, given as one text or a list."""
    names: list[str] = []
    for key in keys:
        value = modifier.values.get(key) or []
        names += [str(each) for each in ([value] if isinstance(value, str) else value)]
    return names


def to_globs(names: Sequence[str], notes: list[str]) -> list[str]:
    """Translate names and simple regular expressions of layers into globs; empty for all layers."""
    globs: list[str] = []
    for name in names:
        text = name.removeprefix("re:").removeprefix("^").removesuffix("$").replace("\\.", ".")
        if name.startswith("re:"):
            text = re.sub(r"\.[*+]|\[0-9\]\+|\\d\+", "*", text)
        text = re.sub(r"\.?weight$", "", text)
        if re.search(r"[()|\[\]{}+?^$\\]", text):
            notes.append(f"layers: {name!r} has no equivalent glob and is skipped")
        elif text and text not in globs:
            globs.append(text)
    return [] if "*" in globs else globs


class Rates:
    """The learning-rate modifiers of a recipe."""

    def __init__(self, modifiers: Sequence[Modifier]) -> None:
        self.notes: list[str] = []
        self.modifiers = [each for each in modifiers if each.kind in RATES]

    def at(self, epoch: float, default: float) -> Stage:
        """Return learning rate and schedule of a stage that starts at an epoch."""
        before = [each for each in self.modifiers if each.start() <= epoch]
        if not before:
            return {"learning_rate": default}
        last = max(before, key=Modifier.start)
        steady = "constant" if last.kind == "SetLearningRateModifier" else "linear"
        schedule = str(last.values.get("lr_func", last.values.get("lr_class", steady)))
        name = schedule if schedule in ("linear", "cosine", "constant") else "linear"
        if name != schedule:
            self.notes.append(f"line {last.line}: learning-rate schedule {schedule} becomes linear in each stage")
        rate = last.number("init_lr", last.number("learning_rate", default))
        return {"learning_rate": rate, "lr_schedule": name}
