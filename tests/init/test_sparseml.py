"""Recipes of SparseML and llm-compressor become stages that load, and nothing of them is dropped unseen."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from sqat.cli import main
from sqat.errors import SqatError
from sqat.init.from_sparseml import make_stages, translate
from sqat.init.layer_patterns import to_globs
from sqat.init.sparseml_modifiers import ARGUMENTS, WITHOUT_COUNTERPART
from sqat.init.sparseml_recipe import read_modifiers
from sqat.recipe.loader import load_recipe
from tests.errors import raises_code

GRADUAL = """\
<!-- a licence -->

---
num_epochs: &num_epochs 40
init_lr: 0.00005
pruning_start_epoch: &begin 2
quantization_start_epoch: 30.0

training_modifiers:
  - !EpochRangeModifier
    end_epoch: *num_epochs
    start_epoch: 0.0
  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: eval(quantization_start_epoch)
    lr_func: linear
    init_lr: eval(init_lr * 2)
    final_lr: 0.0
  - !LearningRateFunctionModifier
    start_epoch: eval(num_epochs - (20 / 2))
    end_epoch: *num_epochs
    lr_func: cyclic_linear
    init_lr: eval(init_lr)
    final_lr: 0.0

pruning_modifiers:
  - !GMPruningModifier
    params:
      - re:bert.encoder.layer.*.attention.self.query.weight
      - re:.*\\.output\\.dense\\.weight
      - re:bert\\.encoder\\.layer\\.(0|1)\\.output.dense.weight
    start_epoch: *begin
    end_epoch: 16
    init_sparsity: 0.0
    final_sparsity: 0.9
    mask_type: [1,4]

quantization_modifiers:
  - !QuantizationModifier
      start_epoch: eval(quantization_start_epoch)
      submodules: [bert.encoder, bert.pooler]
distillation_modifiers:
  - !DistillationModifier
     hardness: 0.75
     temperature: 5.5
regularization_modifiers:
  - !SetWeightDecayModifier
    start_epoch: 0.0
    weight_decay: 0.5
  - !TrainableParamsModifier
    params: __ALL__
---
# A title
"""
AT_ONCE = """\
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: [Linear], ignore: ["re:.*lm_head"]}
quantization_stage:
  quantization_modifiers:
    GPTQModifier: {ignore: ["re:.*layer\\\\.0\\\\..*", lm_head], scheme: W4A16}
"""


@pytest.fixture
def gradual(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.md"
    path.write_text(GRADUAL)
    return path


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_epochs_follow_each_other(gradual: Path) -> None:
    made = translate(gradual)
    assert {name: stage.get("epochs") for name, stage in made.stages.items()} == {
        "train": 2, "prune": 28, "calibrate": None, "qat": 10, "export": None
    }  # fmt: skip
    assert made.stages["prune"]["recovery_fraction"] == 0.5, "the last mask at epoch 16 of 2 to 30"
    assert made.stages["prune"]["schedule"] == {"name": "per-group", "num_masks": 2}
    assert [made.stages[name]["learning_rate"] for name in ("train", "prune", "qat")] == [1e-4, 1e-4, 5e-5]
    assert {made.stages[name]["weight_decay"] for name in ("train", "prune", "qat")} == {0.5}
    assert made.stages["qat"]["distill"] == {"task_weight": 0.25, "output_weight": 0.75, "temperature": 5.5}


def test_every_modifier_without_counterpart_has_a_note(gradual: Path) -> None:
    lines = GRADUAL.splitlines()

    def line_of(text: str) -> int:
        return 1 + next(number for number, line in enumerate(lines) if text in line)

    notes = translate(gradual).notes
    wanted = [
        f"line {line_of('GMPruning')}: mask [1, 4] at 0.9 becomes 2:4",
        f"line {line_of('QuantizationModifier')}: QuantizationModifier: bert.pooler is outside the encoder blocks",
        f"line {line_of('TrainableParams')}: TrainableParamsModifier has no counterpart",
        "schedule cyclic_linear becomes linear",
    ]
    assert [text for text in wanted if not any(text in note for note in notes)] == []


def test_one_shot_recipes_of_llm_compressor(tmp_path: Path) -> None:
    made = translate(write_yaml(tmp_path, AT_ONCE))
    prune = made.stages["prune"]
    assert (prune["pattern"], prune["criterion"], prune["schedule"]["num_masks"]) == ("2:4", "sparsegpt", 1)
    assert "layers" not in prune
    assert sum("lm_head is outside the encoder blocks" in note for note in made.notes) == 2
    assert made.stages["calibrate"]["layers"] == {"exclude": ["*layer.0.*"]}
    assert made.stages["export"]["targets"] == ["onnx-int8"]
    assert any("scheme becomes int8" in note for note in made.notes)


@pytest.mark.parametrize(("text", "label", "stages"), [
    (GRADUAL, "sparse int8", ["train", "prune", "calibrate", "qat", "export"]),
    (AT_ONCE, "sparse int8", ["train", "prune", "calibrate", "qat", "export"]),
    ("modifiers:\n  - !ConstantPruningModifier {mask_type: '2:4'}\n", "sparse fp16", ["train", "prune", "export"]),
    ("modifiers:\n  - !GMPruningModifier {start_epoch: -1, end_epoch: -1.0}\n", "sparse fp16",
     ["train", "prune", "export"]),
    ("modifiers:\n  - !QuantizationModifier {start_epoch: 3, end_epoch: 4.5}\n", "dense int8",
     ["train", "calibrate", "qat", "export"]),
])  # fmt: skip
def test_the_recipe_loads(
    text: str, label: str, stages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"a few words {number}", "label": ("good", "bad")[number % 2]} for number in range(40)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = tmp_path / ("theirs.md" if text == GRADUAL else "theirs.yaml")
    theirs.write_text(text)
    output = tmp_path / "recipe.yaml"
    words = ["init", str(tmp_path / "train.jsonl"), "--from-sparseml", str(theirs), "--output", str(output)]
    assert main(words) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    recipe = load_recipe(output).recipe
    assert list(recipe.stages) == stages
    assert list(recipe.results) == ["dense fp32", label]
    for note in translate(theirs).notes:
        assert f"# {note}\n" in output.read_text()
        assert note.replace(" ", "") in shown.replace(" ", "")


@pytest.mark.parametrize(("text", "line"), [
    ("a: 1\n", "holds no list or mapping named ...modifiers"),
    ("modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n", "neither prunes to N:M nor quantizes"),
    ("modifiers:\n  - !GMPruningModifier {end_epoch: soon}\n",
     ", line 2: GMPruningModifier.end_epoch needs a number, got 'soon'"),
    ("modifiers:\n  - !GMPruningModifier {end_epoch: eval(later)}\n", "'eval(later)' is no expression of numbers"),
    ("modifiers:\n  - !GMPruningModifier {end_epoch: \"eval(__import__('os').getpid())\"}\n", "is no expression"),
    ("modifiers:\n  - !GMPruningModifier {end_epoch: eval(9 ** 9 ** 9)}\n", "is no expression"),
    ("modifiers:\n  - !GMPruningModifier {end_epoch: eval(1 / 0)}\n", "is no expression"),
    ("a: eval(b)\nb: eval(a)\nmodifiers:\n  - !GMPruningModifier {end_epoch: eval(a)}\n", "is no expression"),
    ("a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
     "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
     "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d]\n", "once its aliases are followed"),
    ("- [\n", "not valid YAML"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(SqatError) as caught:
        translate(write_yaml(tmp_path, text))
    assert line in str(caught.value)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_page_without_front_matter(tmp_path: Path) -> None:
    (tmp_path / "r.md").write_text("# no recipe\n")
    with raises_code("unreadable-file"):
        translate(tmp_path / "r.md")
    with raises_code("missing-file"):
        translate(tmp_path / "missing.yaml")


BLOCKS = {
    "bert.encoder.layer.": ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense",
                            "attention.output.dense", "output.dense"),
    "model.layers.": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.gate", "mlp.up_proj"),
}  # fmt: skip
LAYERS = [f"{block}{number}.{layer}" for block, layers in BLOCKS.items() for number in range(12) for layer in layers]
LAYERS += ["bert.pooler.dense", "classifier", "lm_head", "layer4.0.conv1", "layer4.1.downsample.0", "features.3.conv.0"]


@pytest.mark.parametrize("pattern", [
    "re:.*(query|key).weight", "re:.*(query|key)", "re:.*(?:query|key)$", "re:.*query.weight|.*key.weight",
    "re:bert.encoder.layer.*.output.dense.weight", r"re:^bert\.encoder\.layer\.\d+\.intermediate\.dense\.weight$",
    r"re:.*\.layer\.[0-9]+\.attention\..*", r"re:bert\.encoder\.layer\.(0|1)\.output.dense.weight", "re:.*weight",
    "re:.*", "re:.*lm_head", "re:.*mlp.gate$", r"re:.*mlp.*\.(gate_up|gate|up|down)_proj$", "re:model.layers.1.*",
    r"re:^model\.layers\.[0-2]\..*", r"re:model.layers.\d+.self_attn.(q|k|v|o)_proj$", "re:.*conv*", "re:.*[qk]_proj",
    "re:layer4.*.conv1.weight", "re:features.*.conv.*.weight", r"re:.*layer.(1|11)\..*dense", "re:.*_pro[^a-i]",
    r"re:.*layer\.\d{2}\..*", r"re:.*layer\.1?\d\.inter.*", "re:[bc].*", "re:.+dense", r"re:.*layer\.\d*\.attention.*",
])  # fmt: skip
def test_globs_select_what_the_expression_selects(pattern: str) -> None:
    """The oracle is Python's re, on the names of layers and of their weights."""
    expression, globs = re.compile(pattern.removeprefix("re:")), to_globs(pattern)
    expected = [name for name in LAYERS if expression.match(name) or expression.match(f"{name}.weight")]
    assert [name for name in LAYERS if any(fnmatchcase(name, glob) for glob in globs)] == expected
    assert expected


WITHOUT_GLOB = [
    r"re:model\.layers\.(?!0\.).*", "re:^((?!dfl).)*$", r"re:bert\.encoder\.layer\.\d+\.output\.dense\.weight",
    r"re:(a|b)\1", "re:(query|key", "re:a)b", "re:.*bias", "re:(.|.)*x", "re:*", "re:[", "re:", "re:a$b", r"re:\Aquery",
    "re:" + "(a|b)" * 30, "re:(?i)QUERY", r"re:que\w+y", "", "a*",
]  # fmt: skip


@pytest.mark.parametrize("key", ["targets", "ignore"])
@pytest.mark.parametrize("pattern", WITHOUT_GLOB)
def test_a_pattern_without_a_glob_is_an_error_and_never_all(pattern: str, key: str, tmp_path: Path) -> None:
    text = json.dumps({"modifiers": {"SparseGPTModifier": {"targets": ["Linear"], key: [pattern]}}})
    with pytest.raises(SqatError) as caught:
        translate(write_yaml(tmp_path, text))
    assert (caught.value.code, repr(pattern) in caught.value.problem) == ("invalid-recipe", True)


@pytest.mark.parametrize(("name", "globs"), [
    ("sections.0.0.conv1.weight", ["sections.0.0.conv1"]), ("model.layers.3", ["model.layers.3.*"]),
    (r"re:model.layers.\d+$", ["model?layers?[0-9]*"]), (r"re:.*layers\.(0|1)$", ["*layers.0.*", "*layers.1.*"]),
    ("__ALL_PRUNABLE__", ["*"]), ("Linear", ["*"]),
])  # fmt: skip
def test_a_target_may_be_a_block(name: str, globs: list[str]) -> None:
    assert to_globs(name, of_blocks=True) == globs


def two(first: dict[str, object], second: dict[str, object], kind: str = "GMPruningModifier") -> str:
    """Return a recipe of two modifiers."""
    return "modifiers:\n" + "".join(f"  - !{kind} {json.dumps(values)}\n" for values in (first, second))


@pytest.mark.parametrize(("first", "second", "layers", "patterns"), [
    ({"params": "__ALL__"}, {"params": ["re:.*query.weight"]}, None, None),
    ({"params": ["re:.*query.weight"]}, {"params": "__ALL_PRUNABLE__"}, None, None),
    ({"params": ["a.weight"]}, {"params": ["b.weight"]}, {"include": ["a", "b"]}, None),
    ({"params": ["a.weight"]}, {"params": ["b.weight"], "mask_type": "1:4"}, {"include": ["a", "b"]}, {"b": "1:4"}),
    ({"params": "__ALL__"}, {"params": ["b.weight"], "mask_type": "4:8"}, None, {"b": "4:8"}),
    ({"params": ["b.weight"], "mask_type": "4:8"}, {"params": "__ALL__"}, None, {"b": "4:8"}),
])  # fmt: skip
def test_each_of_several_modifiers_keeps_its_layers(
    first: dict[str, object], second: dict[str, object], layers: object, patterns: object, tmp_path: Path
) -> None:
    shared = {"mask_type": "2:4", "start_epoch": 0, "end_epoch": 2}
    prune = translate(write_yaml(tmp_path, two({**shared, **first}, {**shared, **second}))).stages["prune"]
    assert (prune["pattern"], prune.get("layers"), prune.get("patterns")) == ("2:4", layers, patterns)


def test_the_layers_of_config_groups_are_kept(tmp_path: Path) -> None:
    groups = {"a": {"targets": ["re:.*q_proj$"]}, "b": {"targets": ["re:.*k_proj$"]}}
    text = json.dumps({"modifiers": {"QuantizationModifier": {"config_groups": groups, "ignore": ["re:.*0.q_proj"]}}})
    layers = translate(write_yaml(tmp_path, text)).stages["calibrate"]["layers"]
    assert layers == {"include": ["*q_proj", "*k_proj"], "exclude": ["*0?q_proj*"]}


def test_what_one_modifier_ignores_another_must_ignore(tmp_path: Path) -> None:
    with raises_code("invalid-recipe"):
        translate(write_yaml(tmp_path, two({"ignore": ["a"]}, {"ignore": ["b"]}, "SparseGPTModifier")))


@pytest.mark.parametrize("kind", sorted({*ARGUMENTS, *WITHOUT_COUNTERPART, "NobodyKnowsModifier"}))
@pytest.mark.parametrize("style", ["tagged", "mapping"])
def test_each_modifier_is_translated_or_named(kind: str, style: str, tmp_path: Path) -> None:
    """A note names what is skipped, and each argument that is not translated."""
    entry = f"{kind} {{strange: 3}}" if style == "tagged" else f"{kind}: {{strange: 3}}"
    listed = f"modifiers:\n  - !{entry}\n" if style == "tagged" else f"modifiers:\n  {entry}\n"
    made = translate(write_yaml(tmp_path, f"{listed}more_modifiers:\n  - !ConstantPruningModifier {{}}\n"))
    notes = [note for note in made.notes if note.startswith(f"line 2: {kind}")]
    is_translated = kind in ARGUMENTS and kind not in WITHOUT_COUNTERPART
    assert any("strange" in note if is_translated else "has no counterpart" in note for note in notes)


@pytest.mark.parametrize(("text", "masks"), [
    ("modifiers: {SparseGPTModifier: {sparsity: 0.5}}", 1),
    ("modifiers: [!GMPruningModifier {start_epoch: 0, end_epoch: 1, update_frequency: 1}]", 1),
    ("modifiers: [!GMPruningModifier {start_epoch: 0, end_epoch: 1, update_frequency: 0.1}]", 2),
    ("modifiers: [!GMPruningModifier {init_sparsity: 0.5, final_sparsity: 0.5, end_epoch: 9}]", 1),
    ("a_stage: {run_type: oneshot, modifiers: {MagnitudePruningModifier: {start: 0, end: 5}}}", 1),
    ("a_stage: {run_type: train, modifiers: {MagnitudePruningModifier: {start: 0, end: 5}}}", 2),
    ("modifiers: [!ConstantPruningModifier {end_epoch: 4}]", 1),
])  # fmt: skip
def test_one_shot_is_one_mask(text: str, masks: int, tmp_path: Path) -> None:
    assert translate(write_yaml(tmp_path, text)).stages["prune"]["schedule"]["num_masks"] == masks


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["r.md", "r.yaml"])
def test_byte_order_marks_and_line_ends(mark: str, end: str, name: str, tmp_path: Path) -> None:
    text = "---\nmodifiers:\n  - !ConstantPruningModifier {mask_type: '1:4'}\n---\n".replace("\n", end)
    (tmp_path / name).write_bytes((mark + (text if name == "r.md" else text[: text.rindex("---")])).encode())
    assert translate(tmp_path / name).stages["prune"]["pattern"] == "1:4"


@pytest.mark.parametrize("entry", ["GMPruningModifier", "3", "[a]", "{a: {}, b: {}}"])
def test_an_entry_that_is_no_modifier_is_an_error(entry: str, tmp_path: Path) -> None:
    with raises_code("invalid-recipe"):
        translate(write_yaml(tmp_path, f"modifiers:\n  - !ConstantPruningModifier {{}}\n  - {entry}\n"))


def test_tags_never_make_objects(tmp_path: Path) -> None:
    """A tag that PyYAML's unsafe loaders would run is a name like any other."""
    text = "modifiers:\n  - !GMPruningModifier {end_epoch: 2}\n  - !!python/object/apply:os.getpid []\n"
    made = make_stages(read_modifiers(write_yaml(tmp_path, text)))
    assert list(made.stages) == ["train", "prune", "export"]
