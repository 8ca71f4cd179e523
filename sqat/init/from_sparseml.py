"""SparseML's and llm-compressor's recipes as stages of ours: what their modifiers ask for, one after the other.

Read are lists and mappings called ``...modifiers``, in YAML or in the front matter of a Markdown file, with SparseML's
variables and sums (``eval(num_epochs - 2)``). A modifier without a counterpart is named with what was done instead:
nothing is dropped unseen. Tags are names here and never make objects; sums are read by a grammar of four operations.
Left out: modifiers of several stages for one layer, learning rates that rise again within a stage.
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

LARGEST = 1_000_000  # bytes of a recipe
CRITERIA = {"sparsegpt": ("SparseGPT", "OBS", "MFAC"), "wanda": ("Wanda",), "taylor": ("Movement",)}
AT_ONCE = ("Constant", "SparseGPT", "Wanda")
ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear", "re:.*weight")
RATES = ("SetLearningRateModifier", "LearningRateModifier", "LearningRateFunctionModifier")
DECAY = "SetWeightDecayModifier"
UNDERSTOOD = (*RATES, DECAY, "EpochRangeModifier", "LogTrackingModifier")
OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
Stage = dict[str, Any]


@dataclass(frozen=True)
class Modifier:
    """One modifier: its class's name, its arguments, and the line it stands on."""

    kind: str
    values: Mapping[str, Any]
    line: int

    def number(self, name: str, default: float) -> float:
        """An argument that is a number.

        Raises:
            SqatError: it is something else.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SqatError(f"{self.kind}.{name} needs a number, got {value!r}", place=f"line {self.line}")
        return float(value)

    def start(self, default: float = 0.0) -> float:
        """Epoch it begins at; below 0, as SparseML has it, is the beginning."""
        return max(self.number("start_epoch", default), 0.0)


@dataclass
class Translation:
    """Stages of a recipe, and in words what has no counterpart or became something else."""

    stages: dict[str, Stage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What comes out, as a row of a table is called."""
        return f"{'sparse' if 'prune' in self.stages else 'dense'} {'int8' if 'qat' in self.stages else 'fp16'}"

    def text(self) -> str:
        """The recipe's section ``stages``."""
        return yaml.safe_dump({"stages": self.stages}, sort_keys=False, width=110, default_flow_style=None)


def translate(path: Path) -> Translation:
    """Stages that do what a recipe of SparseML or llm-compressor asks for.

    Raises:
        SqatError: no such file, none of their recipes, or arguments that cannot be read.
    """
    try:
        return make_stages(read_modifiers(path))
    except SqatError as error:
        raise SqatError(error.problem, error.hint, str(path) + (f", {error.place}" if error.place else "")) from error


def read_modifiers(path: Path) -> list[Modifier]:
    """Every modifier of a file, in its order."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SqatError("cannot be read as text") from error
    if len(text) > LARGEST:
        raise SqatError(f"has {len(text)} characters, too many for a recipe")
    first = text.find("\n---\n") if path.suffix == ".md" else -1
    if path.suffix == ".md" and first < 0 and not text.startswith("---\n"):
        raise SqatError("has no front matter between two lines ---", "name the recipe's .yaml")
    before = "" if first < 0 or text.startswith("---\n") else text[: first + 1]
    body = text[len(before) :]
    if path.suffix == ".md":
        body = "---\n" + body.removeprefix("---\n").partition("\n---")[0] + "\n"
    tree = compose("\n" * before.count("\n") + body, path.name, tags=True)
    variables = {name: node.value for name, node in tree.value.items()} if isinstance(tree.value, dict) else {}
    found = list(modifiers_in(tree, variables))
    if not found:
        raise SqatError("holds no list or mapping called ...modifiers", "is it a recipe of SparseML?")
    return found


def modifiers_in(node: Node, variables: Mapping[str, Any]) -> Iterator[Modifier]:
    """Modifiers below a node: tagged ones in lists, and those of mappings, which llm-compressor writes."""
    if not isinstance(node.value, dict):
        return
    for name, child in node.value.items():
        if not name.endswith("modifiers"):
            yield from modifiers_in(child, variables)
        elif isinstance(child.value, list):
            for each in child.value:
                if each.tag.startswith("!"):
                    yield Modifier(each.tag[1:], arguments(each, variables), each.place.line)
        elif isinstance(child.value, dict):
            for kind, each in child.value.items():
                yield Modifier(kind, arguments(each, variables), each.place.line)


def arguments(node: Node, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a modifier, sums of variables worked out."""
    plain = node.plain()
    return {name: worked_out(value, variables) for name, value in plain.items()} if isinstance(plain, dict) else {}


def worked_out(value: Any, variables: Mapping[str, Any], depth: int = 0) -> Any:
    """A value, or the number that ``eval(...)`` stands for.

    Raises:
        SqatError: more than sums and products of numbers and variables.
    """
    found = re.fullmatch(r"\s*eval\((.*)\)\s*", value, re.DOTALL) if isinstance(value, str) else None
    if found is None:
        return value
    try:
        tree = ast.parse(found[1].strip()[:200], mode="eval").body
        return work_out(tree, variables, depth)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise SqatError(f"{value!r} is no sum of numbers and variables", "write the number") from error


def work_out(tree: ast.expr, variables: Mapping[str, Any], depth: int) -> float:
    """The number of a tree of four operations."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in variables and depth < 20:
        return float(worked_out(variables[tree.id], variables, depth + 1))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -work_out(tree.operand, variables, depth)
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATIONS:
        one, other = (work_out(part, variables, depth) for part in (tree.left, tree.right))
        return float(OPERATIONS[type(tree.op)](one, other))
    raise ValueError(ast.dump(tree))


def make_stages(modifiers: Sequence[Modifier]) -> Translation:
    """Train until pruning begins, prune until quantization begins, calibrate and train int8 until the end."""
    made = Translation()
    pruning = [each for each in modifiers if is_pruning(each)]
    rounding = [each for each in modifiers if "Quantization" in each.kind or each.kind == "GPTQModifier"]
    if not pruning and not rounding:
        raise SqatError("neither prunes nor quantizes", "sqat init DATA_FILE writes a recipe without it")
    total = max(0.0, *(each.number("end_epoch", 0) for each in modifiers))
    rounds = min((each.start(total) for each in rounding), default=total)
    begins = min((each.start() for each in pruning), default=rounds)
    rates, distill = Rates(modifiers), distillation(modifiers, made.notes)
    decays = [each.number("weight_decay", 0.01) for each in modifiers if each.kind == DECAY]
    shared: Stage = {"weight_decay": decays[-1]} if decays else {}
    made.stages["train"] = {"epochs": tidy(begins) or 1, **rates.at(0.0, 5e-5), **shared}
    if not begins:
        made.notes.append("train: one epoch first, so that there is a dense model to compare with and to learn from")
    if pruning:
        last = max(each.number("end_epoch", begins) for each in pruning)
        epochs = max(rounds - begins, 0)
        stage = prune_stage(pruning, made.notes)
        if stage["schedule"]["num_masks"] > 1 and epochs > 0:
            stage["recovery_fraction"] = round(min(max(1 - (last - begins) / epochs, 0.2), 0.95), 3)
        stage |= {"epochs": tidy(epochs) or 1, **rates.at(begins, 5e-5), **shared, "distill": dict(distill)}
        made.stages["prune"] = stage
        if not epochs:
            made.notes.append("prune: one epoch of training after the masks; SparseML's recipe gave none")
    if rounding:
        made.stages["calibrate"] = calibrate_stage(rounding, made.notes)
        made.stages["qat"] = {"epochs": tidy(max(total - rounds, 0)) or 1, **rates.at(rounds, 2e-5), **shared,
                              "distill": dict(distill)}  # fmt: skip
        if total <= rounds:
            made.notes.append("qat: one epoch; the recipe only calibrates. Delete the stage to do the same")
    made.stages["export"] = {"targets": ["onnx-int8" if rounding else "onnx-fp16"]}
    known = [*pruning, *rounding, *(each for each in modifiers if each.kind in UNDERSTOOD or is_distilling(each))]
    made.notes += [f"line {each.line}: {each.kind} has no counterpart and is left out" for each in modifiers
                   if each not in known]  # fmt: skip
    made.notes = list(dict.fromkeys([*made.notes, *rates.notes]))
    return made


def tidy(number: float) -> float:
    """A whole number without its point."""
    return int(number) if number == int(number) else round(number, 6)


def is_pruning(modifier: Modifier) -> bool:
    """Whether a modifier makes zeros."""
    return "Pruning" in modifier.kind or modifier.kind == "SparseGPTModifier"


def is_distilling(modifier: Modifier) -> bool:
    """Whether a modifier learns from a teacher."""
    return "Distillation" in modifier.kind


def prune_stage(pruning: Sequence[Modifier], notes: list[str]) -> Stage:
    """Pattern, criterion, schedule and layers; those of the first modifier, where there are several."""
    first = pruning[0]
    gradual = [each for each in pruning if not each.kind.startswith(AT_ONCE)]
    stage: Stage = {"pattern": pattern_of(first, notes)}
    criterion = next((name for name, starts in CRITERIA.items() if first.kind.startswith(starts)), "magnitude")
    stage["criterion"] = criterion
    stage["schedule"] = {"name": "per-group", "num_masks": 2 if gradual and has_steps(gradual) else 1}
    if "ACDC" in first.kind:
        notes.append("prune: AC/DC's dense phases have no counterpart; schedule sr-ste lets weights come back, too")
    named = [name for each in pruning for name in names_of(each, "params", "targets")]
    include = globs([name for name in named if name not in ALL], notes)
    if include:
        stage["layers"] = {"include": include}
    left = globs(names_of(first, "ignore"), notes)
    if left:
        stage.setdefault("layers", {})["exclude"] = left
    return stage


def has_steps(gradual: Sequence[Modifier]) -> bool:
    """Whether sparsity grows along the way."""
    return any(each.number("end_epoch", 0) > each.start() for each in gradual)


def pattern_of(modifier: Modifier, notes: list[str]) -> str:
    """The N:M pattern asked for; 2:4 for all that no hardware has kernels for."""
    asked = modifier.values.get("mask_type", modifier.values.get("mask_structure", "unstructured"))
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(asked))
    if found and 1 <= int(found[1]) < int(found[2]) <= 32:
        return f"{int(found[1])}:{int(found[2])}"
    sparsity = modifier.values.get("final_sparsity", modifier.values.get("sparsity"))
    wanted = f" at {sparsity}" if isinstance(sparsity, int | float) else ""
    notes.append(
        f"line {modifier.line}: mask {asked}{wanted} becomes 2:4, half of the weights, which hardware can skip"
    )
    return "2:4"


def calibrate_stage(rounding: Sequence[Modifier], notes: list[str]) -> Stage:
    """Scales from data; schemes other than int8 weights and inputs are named."""
    stage: Stage = {"method": "percentile"}
    for each in rounding:
        other = {name: each.values[name] for name in ("scheme", "config_groups", "num_bits", "strategy")
                 if name in each.values}  # fmt: skip
        if other and other != {"scheme": "W8A8"}:
            notes.append(f"line {each.line}: {each.kind} with {', '.join(other)} becomes int8 weights (per channel) "
                         "and int8 inputs")  # fmt: skip
    left = globs([name for name in names_of(rounding[0], "ignore") if "." in name or name.startswith("re:")], notes)
    if left:
        stage["layers"] = {"exclude": left}
    notes.append("calibrate: scales cover 99.99 % of the values of 512 rows and stay fixed in qat; "
                 "observers and their freezing need no settings")  # fmt: skip
    return stage


def distillation(modifiers: Sequence[Modifier], notes: list[str]) -> Stage:
    """Distillation of logits as asked for, with MiniLM's relations beside it."""
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
    """Names of layers or parameters, which may be one text or a list."""
    found: list[str] = []
    for key in keys:
        value = modifier.values.get(key) or []
        found += [str(each) for each in ([value] if isinstance(value, str) else value)]
    return found


def globs(names: Sequence[str], notes: list[str]) -> list[str]:
    """Names and simple regular expressions of layers or their weights as globs of layers; all layers give none."""
    found = []
    for name in names:
        text = name.removeprefix("re:").removeprefix("^").removesuffix("$").replace("\\.", ".")
        if name.startswith("re:"):
            text = re.sub(r"\.[*+]|\[0-9\]\+|\\d\+", "*", text)
        text = re.sub(r"\.?weight$", "", text)
        if re.search(r"[()|\[\]{}+?^$\\]", text):
            notes.append(f"layers: {name!r} is more than a glob can say and is left out")
        elif text and text not in found:
            found.append(text)
    return [] if "*" in found else found


class Rates:
    """Learning rates along the epochs."""

    def __init__(self, modifiers: Sequence[Modifier]) -> None:
        self.notes: list[str] = []
        self.known = [each for each in modifiers if each.kind in RATES]

    def at(self, epoch: float, default: float) -> Stage:
        """Learning rate and its fall in a stage that begins with an epoch."""
        before = [each for each in self.known if each.start() <= epoch]
        if not before:
            return {"learning_rate": default}
        chosen = max(before, key=Modifier.start)
        steady = "constant" if chosen.kind == "SetLearningRateModifier" else "linear"
        asked = str(chosen.values.get("lr_func", chosen.values.get("lr_class", steady)))
        name = asked if asked in ("linear", "cosine", "constant") else "linear"
        if name != asked:
            self.notes.append(f"line {chosen.line}: a learning rate that goes by {asked} falls linearly in each stage")
        rate = chosen.number("init_lr", chosen.number("learning_rate", default))
        return {"learning_rate": rate, "lr_schedule": name}
