"""Translate a recipe of SparseML or llm-compressor into stages.

Each modifier, argument and pattern of layers is translated, or a note names it with its line. A pattern that no glob
can say is an error: it never becomes all layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sqat.errors import SqatError, escape_control
from sqat.init.layer_patterns import EVERYTHING, to_globs
from sqat.init.sparseml_modifiers import (
    ARGUMENTS,
    DECAY,
    DISTILLING,
    KEEPS_MASKS,
    ONE_SHOT,
    PRUNING,
    QUANTIZING,
    RATES,
    SCHEMES,
    WITHOUT_COUNTERPART,
)
from sqat.init.sparseml_recipe import Modifier, read_modifiers

ALL = ["*"]
# Layers outside the encoder blocks, which sqat treats only where a recipe includes them.
OUTSIDE = re.compile(
    r"(re:)?[.*^\\\w]*?\b(lm_head|classifier|score|qa_outputs|pooler|embeddings|embed_tokens|cls)(\.weight)?[.*$\\]*"
)
Stage = dict[str, Any]


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
        SqatError: the file cannot be read, is no such recipe, or selects layers that no glob can select.
    """
    try:
        return make_stages(read_modifiers(path))
    except SqatError as error:
        place = error.place if error.place.startswith(str(path)) else f"{path}, {error.place}".removesuffix(", ")
        raise SqatError(error.problem, error.hint, place, code=error.code) from error


def make_stages(modifiers: Sequence[Modifier]) -> Translation:
    """Make the stages: train until pruning starts, prune until quantization starts, then calibrate and qat."""
    pruning = [each for each in modifiers if each.kind in PRUNING]
    quantizing = [each for each in modifiers if is_quantizing(each)]
    if not pruning and not quantizing:
        hint = "; ".join(without_counterpart(modifiers)) or "sqat init DATA_FILE writes a recipe without it"
        raise SqatError("neither prunes to N:M nor quantizes", hint, code="invalid-recipe")
    end = max(0.0, *(each.end() for each in modifiers))
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
    notes += [*rates.notes, *unused_arguments(modifiers), *without_counterpart(modifiers)]
    result.notes = [escape_control(note) for note in dict.fromkeys(notes)]
    return result


def is_quantizing(modifier: Modifier) -> bool:
    """Return whether a modifier quantizes; AWQ's does where it has a scheme."""
    return modifier.kind in QUANTIZING or (modifier.kind == "AWQModifier" and has_scheme(modifier))


def has_scheme(modifier: Modifier) -> bool:
    """Return whether a modifier says how layers are quantized."""
    return bool({"scheme", "config_groups", "quantize"} & set(modifier.values))


def without_counterpart(modifiers: Sequence[Modifier]) -> list[str]:
    """Return a note for each modifier that is not translated."""
    return [
        f"{each.label} has no counterpart and is skipped: "
        + WITHOUT_COUNTERPART.get(each.kind, "sqat does not know it; see what it does and do so before")
        for each in modifiers
        if each.kind in WITHOUT_COUNTERPART or each.kind not in ARGUMENTS
    ]


def unused_arguments(modifiers: Sequence[Modifier]) -> list[str]:
    """Return a note for each modifier with arguments that are not translated."""
    notes = []
    for each in modifiers:
        names = [name for name, value in each.values.items() if value is not None and name not in used_by(each)]
        if names and each.kind in ARGUMENTS:
            notes.append(f"{each.label}: not translated: {', '.join(names)}")
    return notes


def used_by(modifier: Modifier) -> tuple[str, ...]:
    """Return the arguments of a modifier that are translated; a rate that ends at 0 is sqat's linear schedule."""
    ends = ("final_lr",) if modifier.values.get("final_lr") == 0 else ()
    return (*ARGUMENTS.get(modifier.kind, ()), *ends)


def as_number(number: float) -> float:
    """Return whole numbers as int."""
    return int(number) if number == int(number) else round(number, 6)


def prune_stage(pruning: Sequence[Modifier], start: float, epochs: float, notes: list[str]) -> Stage:
    """Return patterns, criterion, schedule, layers and epochs of the modifiers that choose masks."""
    active = [each for each in pruning if each.kind != KEEPS_MASKS] or list(pruning)
    for each in pruning:
        if each.kind == KEEPS_MASKS:
            what = "becomes a stage that sets new masks" if each in active else "is skipped"
            notes.append(
                f"{each.label} {what}: sqat keeps the masks of its stages, not zeros that a model brings along"
            )
    patterns = [pattern_of(each, notes) for each in active]
    selections = [pruned_layers(each, notes) for each in active]
    widest = selections.index(ALL) if ALL in selections else 0
    stage: Stage = {"pattern": patterns[widest]}
    chosen = [(globs, pattern) for globs, pattern in zip(selections, patterns, strict=True) if globs != ALL]
    if others := {glob: pattern for globs, pattern in chosen for glob in globs if pattern != patterns[widest]}:
        stage["patterns"] = others
    criteria = list(dict.fromkeys(PRUNING[each.kind] for each in active))
    stage["criterion"] = criteria[0]
    if len(criteria) > 1:
        notes.append(f"prune: the criteria {', '.join(criteria)} become {criteria[0]} for all layers")
    if len({(each.start(), each.end()) for each in active}) > 1:
        notes.append("prune: modifiers of different epochs become one stage, from the first start to the last end")
    stage["schedule"] = {"name": "per-group", "num_masks": 2 if any(map(is_gradual, active)) else 1}
    if any(each.kind == "ACDCPruningModifier" for each in active):
        notes.append("prune: AC/DC's dense phases have no counterpart; schedule sr-ste also lets pruned weights return")
    stage |= layers_section("prune", active, selections, notes)
    if stage["schedule"]["num_masks"] > 1 and epochs > 0:
        last = max(each.end(start) for each in active)
        stage["recovery_fraction"] = round(min(max(1 - (last - start) / epochs, 0.2), 0.95), 3)
    stage["epochs"] = as_number(epochs) or 1
    if not epochs:
        notes.append("prune: one epoch of training after the masks; the SparseML recipe has none")
    return stage


def is_gradual(modifier: Modifier) -> bool:
    """Return whether a modifier makes more than one mask: sparsity grows, in updates that its epochs hold."""
    if modifier.is_one_shot or modifier.kind in ONE_SHOT:
        return False
    if modifier.number("init_sparsity", 0.0) == modifier.number("final_sparsity", 1.0):
        return False
    return modifier.end() - modifier.start() > max(modifier.number("update_frequency", 0.0), 0.0)


def pattern_of(modifier: Modifier, notes: list[str]) -> str:
    """Return the N:M pattern, or 2:4 for patterns that no hardware supports."""
    mask = modifier.values.get("mask_type", modifier.values.get("mask_structure", "unstructured"))
    match = re.fullmatch(r"\s*([0-9]{1,2})\s*:\s*([0-9]{1,2})\s*", str(mask))
    if match and 1 <= int(match[1]) < int(match[2]) <= 32:
        return f"{int(match[1])}:{int(match[2])}"
    sparsity = modifier.values.get("final_sparsity", modifier.values.get("sparsity"))
    level = f" at {sparsity}" if isinstance(sparsity, int | float) else ""
    notes.append(f"line {modifier.line}: mask {mask}{level} becomes 2:4, half of the weights, which hardware can skip")
    return "2:4"


def calibrate_stage(quantizing: Sequence[Modifier], notes: list[str]) -> Stage:
    """Return the calibrate section; a note lists schemes other than int8 weights and inputs."""
    for each in quantizing:
        other = {name: each.values[name] for name in SCHEMES if name in each.values}
        if other and other != {"scheme": "W8A8"}:
            notes.append(f"{each.label} with {', '.join(other)} becomes int8 weights (per channel) and int8 inputs")
        if each.kind == "GPTQModifier":
            notes.append(
                f"{each.label} rounds weights one after the other; sqat rounds to nearest, and qat trains them"
            )
    # GPTQ's without a scheme rounds the layers to which another one gives a scheme.
    chosen = [each for each in quantizing if each.kind != "GPTQModifier" or has_scheme(each)] or list(quantizing)
    found = [(each, globs) for each in chosen if (globs := quantized_layers(each, notes))]
    if not found:
        nothing_selected(chosen[0])
    section = layers_section("calibrate", [each for each, _ in found], [globs for _, globs in found], notes)
    notes.append("calibrate: scales cover 99.99 % of the values of 512 rows and stay fixed in qat; "
                 "observers and their freezing need no settings")  # fmt: skip
    return {"method": "percentile", **section}


def pruned_layers(modifier: Modifier, notes: list[str]) -> list[str]:
    """Return the globs of the layers that a modifier prunes."""
    globs = union([*named_layers(modifier, "params", notes), *named_layers(modifier, "targets", notes)])
    return globs or nothing_selected(modifier)


def quantized_layers(modifier: Modifier, notes: list[str]) -> list[str]:
    """Return the globs of the layers that a modifier quantizes, by targets, submodules, scheme or config groups."""
    groups, scheme = modifier.values.get("config_groups"), modifier.values.get("scheme")
    selections = named_layers(modifier, "targets", notes)
    if submodules := names_of(modifier, "submodules"):
        selections.append([f"{name}.*" for name in submodules if not is_outside(modifier, name, notes)])
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        selections.append(globs_of(modifier, as_names(targets or "Linear"), notes))
    for targets in scheme.values() if isinstance(scheme, dict) else ():
        selections += [globs_of(modifier, as_names(targets), notes)] if isinstance(targets, list) else []
    return union(selections)


def union(selections: Sequence[list[str]]) -> list[str]:
    """Join the globs of selections; all layers where one of them is all, or where there is no selection."""
    globs = list(dict.fromkeys(glob for selection in selections for glob in selection))
    return ALL if "*" in globs or not selections else globs


def named_layers(modifier: Modifier, key: str, notes: list[str]) -> list[list[str]]:
    """Return the selection of an argument, if it is given; targets may be blocks, which stand for their layers."""
    names = names_of(modifier, key)
    return [globs_of(modifier, names, notes, of_blocks=key == "targets")] if names else []


def nothing_selected(modifier: Modifier) -> NoReturn:
    """Refuse a modifier that selects nothing that sqat treats."""
    raise SqatError(f"{modifier.kind} selects no linear layer", "remove it, or name layers", f"line {modifier.line}",
                    code="invalid-recipe")  # fmt: skip


def globs_of(modifier: Modifier, names: Sequence[str], notes: list[str], *, of_blocks: bool = False) -> list[str]:
    """Return the globs of names, expressions and classes of modules.

    Raises:
        SqatError: no glob selects the same.
    """
    globs: list[str] = []
    for name in names:
        if is_class(name) and name.endswith(("Layer", "Block")):
            notes.append(f"{modifier.label}: {name} becomes all encoder blocks")
            globs += ALL
        elif is_class(name) and "Embedding" in name:
            notes.append(f"{modifier.label}: {name} stays float here; export.embeddings can store it as int8")
        elif is_class(name):
            raise SqatError(f"{modifier.kind}: no glob selects the class {name}", "name the layers",
                            f"line {modifier.line}", code="invalid-recipe")  # fmt: skip
        else:
            with place_of(modifier):
                globs += to_globs(name, of_blocks=of_blocks)
    return globs


def layers_section(
    stage: str, modifiers: Sequence[Modifier], selections: Sequence[list[str]], notes: list[str]
) -> Stage:
    """Return the section ``layers`` of a stage: what any of the modifiers selects and none of them ignores.

    Raises:
        SqatError: one modifier ignores what another may select.
    """
    include = union(selections)
    ignored = [ignored_layers(each, notes, may_be_outside=include == ALL) for each in modifiers]
    differ = next((each for each, globs in zip(modifiers, ignored, strict=True) if set(globs) != set(ignored[0])), None)
    if differ is not None:
        problem = f"{differ.kind} ignores other layers than the modifier on line {modifiers[0].line}"
        hint = f"one {stage} stage ignores the same layers everywhere: give both the same list"
        raise SqatError(problem, hint, f"line {differ.line}", code="invalid-recipe")
    layers = {"include": [] if include == ALL else include, "exclude": ignored[0]}
    layers = {key: globs for key, globs in layers.items() if globs}
    return {"layers": layers} if layers else {}


def ignored_layers(modifier: Modifier, notes: list[str], *, may_be_outside: bool) -> list[str]:
    """Return the globs of the layers that a modifier leaves alone."""
    globs: list[str] = []
    for name in names_of(modifier, "ignore", "exclude_module_types"):
        if is_class(name):
            notes.append(f"{modifier.label}: {name} is no linear layer and stays as it is anyway")
            continue
        if may_be_outside and is_outside(modifier, name, notes):
            continue
        with place_of(modifier):
            found = to_globs(name, by_prefix=modifier.is_tagged)
        if "*" in found:
            raise SqatError(f"{modifier.kind} ignores all layers", "remove the modifier, or the pattern",
                            f"line {modifier.line}", code="invalid-recipe")  # fmt: skip
        globs += found
    return list(dict.fromkeys(globs))


def is_class(name: str) -> bool:
    """Return whether a name is that of a class of modules other than linear layers."""
    return re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) is not None and name not in EVERYTHING


def is_outside(modifier: Modifier, name: str, notes: list[str]) -> bool:
    """Return whether a name is that of a layer outside the encoder blocks, and note that it stays as it is."""
    if OUTSIDE.fullmatch(name) is None:
        return False
    notes.append(f"{modifier.label}: {name} is outside the encoder blocks, which alone sqat treats by default")
    return True


@contextmanager
def place_of(modifier: Modifier) -> Iterator[None]:
    """Add the line of a modifier to an error."""
    try:
        yield
    except SqatError as error:
        raise SqatError(
            f"{modifier.kind}: {error.problem}", error.hint, f"line {modifier.line}", code=error.code
        ) from None


def distill_section(modifiers: Sequence[Modifier], notes: list[str]) -> Stage:
    """Return the distill section: output distillation as in the recipe, beside MiniLM's relations."""
    section: Stage = {}
    for each in modifiers:
        if each.kind == "DistillationModifier" and not section:
            hardness = min(max(each.number("hardness", 0.5), 0.0), 1.0)
            section["task_weight"] = round(1 - hardness, 6)
            section["output_weight"] = hardness
            section["temperature"] = each.number("temperature", 2.0)
        elif each.kind in DISTILLING:
            notes.append(f"{each.label} becomes MiniLM's relations of the last layer")
    return section


def names_of(modifier: Modifier, *keys: str) -> list[str]:
    """Return names of layers or parameters, given as one text or a list."""
    return [name for key in keys for name in as_names(modifier.values.get(key))]


def as_names(value: Any) -> list[str]:
    """Return one text, or a list of texts."""
    return [str(each) for each in ([value] if isinstance(value, str) else value or [])]


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
