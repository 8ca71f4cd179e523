"""Recipes of SparseML and llm-compressor become stages that load, and nothing of them is dropped unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqat.cli import main
from sqat.errors import SqatError
from sqat.init.from_sparseml import make_stages, read_modifiers, to_globs, translate
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
      submodules: [bert.encoder]
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
        "(0|1)",
        f"line {line_of('TrainableParams')}: TrainableParamsModifier has no counterpart",
        "schedule cyclic_linear becomes linear",
    ]
    assert [text for text in wanted if not any(text in note for note in notes)] == []


def test_one_shot_recipes_of_llm_compressor(tmp_path: Path) -> None:
    made = translate(write_yaml(tmp_path, AT_ONCE))
    prune = made.stages["prune"]
    assert (prune["pattern"], prune["criterion"], prune["schedule"]["num_masks"]) == ("2:4", "sparsegpt", 1)
    assert prune["layers"] == {"exclude": ["*lm_head"]}
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
    ("modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n", "neither prunes nor quantizes"),
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
    with raises_code("unreadable-file"):
        translate(tmp_path / "missing.yaml")


@pytest.mark.parametrize(("name", "glob"), [
    ("re:bert.encoder.layer.*.output.dense.weight", "bert.encoder.layer*.output.dense"),
    (r"re:^bert\.encoder\.layer\.\d+\.output\.dense\.weight$", "bert.encoder.layer.*.output.dense"),
    (r"re:.*\.layer\.[0-9]+\.attention\..*", "*.layer.*.attention.*"),
    ("sections.0.0.conv1.weight", "sections.0.0.conv1"),
    ("lm_head", "lm_head"),
])  # fmt: skip
def test_names_become_globs(name: str, glob: str) -> None:
    from fnmatch import fnmatchcase

    notes: list[str] = []
    assert to_globs([name], notes) == [glob]
    assert notes == []
    assert to_globs([name, "re:.*weight"], notes) == [], "all layers"
    examples = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.11.output.dense",
                "a.layer.3.attention.self.key", "sections.0.0.conv1", "lm_head")  # fmt: skip
    assert any(fnmatchcase(example, glob) for example in examples)


def test_tags_never_make_objects(tmp_path: Path) -> None:
    """A tag that PyYAML's unsafe loaders would run is a name like any other."""
    text = "modifiers:\n  - !GMPruningModifier {end_epoch: 2}\n  - !!python/object/apply:os.getpid []\n"
    made = make_stages(read_modifiers(write_yaml(tmp_path, text)))
    assert list(made.stages) == ["train", "prune", "export"]
