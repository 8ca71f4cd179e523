"""Recipes: every mistake is told at its line with what was got and what is allowed; overrides meet the same checks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.recipe.cross_checks import pick_stage
from sqat.recipe.json_schema import recipe_schema
from sqat.recipe.loader import distill_override, load_recipe
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import DenseTrainConfig, PruneConfig, QatConfig
from sqat.recipe.yaml_nodes import Place, compose, resolve_scalar
from sqat.sparsity.schedules.group_fraction import GroupFraction

TARGETS = "onnx-int8, onnx-fp32, onnx-fp16, tensorrt, cpu-sparse, torch-semi-structured, compressed-tensors"
GOOD = """\
model: {source: tiny}
task: classification
data:
  train: train.jsonl
  dev: dev.jsonl
  columns: {text: body}
stages:
  train: {learning_rate: 1e-5}
  prune:
    pattern: 2:4
    schedule: {name: group-fraction, num_masks: [0.2, 0.5]}
  calibrate:
    method: percentile
  qat:
  export:
    targets: [onnx-int8, onnx-fp32]
results:
  ours: export/onnx-int8
"""

STAGE_KEYS = (
    "from, gates, epochs, steps, batch_size, gradient_accumulation, optimizer, learning_rate, lr_schedule, warmup, "
    "weight_decay, max_grad_norm, precision, evaluate_every, early_stopping, keep_checkpoint, save_every, "
    "retry, type"
)
KINDS = "calibrate, export, prune, qat, train"


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SqatError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def test_a_good_recipe_is_read_with_its_types(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    prune = loaded.recipe.stages["prune"]
    assert isinstance(prune, PruneConfig)
    assert prune.pattern == "2:4"
    assert prune.schedule == GroupFraction(num_masks=(0.2, 0.5))
    train = loaded.recipe.stages["train"]
    assert isinstance(train, DenseTrainConfig)
    assert train.learning_rate == 1e-5
    assert loaded.recipe.data.train.path == "train.jsonl"
    assert loaded.recipe.name == "r"
    assert loaded.text == GOOD
    assert loaded.run_directory == Path("runs/r")
    assert list(loaded.recipe.stages) == ["train", "prune", "calibrate", "qat", "export"]


# what is replaced, by what, and the whole line that must come of it
BAD_RECIPES = [
    ("learning_rate: 1e-5", "gates: {acuracy: {min: 0.5}}",
     "r.yaml:8: no metric 'acuracy' of the task classification; did you mean 'accuracy'? allowed: accuracy, f1"),
    ("learning_rate: 1e-5", "gates: {f1: {}}", "r.yaml:8: stages.train.gates.f1: a gate needs min, max_drop or both"),
    ("learning_rate: 1e-5", "gates: {f1: {max_drop: 0.1}}", "r.yaml:8: stage 'train' starts from the pretrained model, "
     "which has no figures to compare with; give min instead"),
    ("learning_rate: 1e-5", "gates: {f1: {max_drop: 0.1, against: qat}}",
     "r.yaml:8: the gate of stage 'train' compares with 'qat', which is no stage before it"),
    ("learning_rate: 1e-5", "gates: {f1: {min: 0.1, against: qat}}",
     "r.yaml:8: stages.train.gates.f1: against belongs to max_drop, which is not given"),
    ("learning_rate: 1e-5", "retry: {times: 2}",
     "r.yaml:8: stages.train: retry needs gates, which say when to try again"),
    ("learning_rate: 1e-5", "retry: {steps_multiplier: 1}", 
     "r.yaml:8: stages.train.retry.steps_multiplier needs a number above 1 and at most 100, got 1"),
    ("    method: percentile", "    gates: {f1: {max_drop: -1}}",
     "r.yaml:13: stages.calibrate.gates.f1.max_drop needs a number of at least 0 or null, got -1"),
    ("    method: percentile", "    retry: {}", "r.yaml:13: unknown key 'retry' in stages.calibrate; allowed: from, "
     "gates, type, method, placement, split, samples, batch_size, layers"),
    ("learning_rate: 1e-5", "learning_rat: 1e-5",
     f"r.yaml:8: unknown key 'learning_rat' in stages.train; did you mean 'learning_rate'? allowed: {STAGE_KEYS}"),
    ("learning_rate: 1e-5", "parent: x", f"r.yaml:8: unknown key 'parent' in stages.train; allowed: {STAGE_KEYS}"),
    ("1e-5", "yes", "r.yaml:8: stages.train.learning_rate needs a number above 0, got 'yes'"),
    ("1e-5", "'3'", "r.yaml:8: stages.train.learning_rate needs a number above 0, got '3'; remove the quotation marks"),
    ("1e-5", "0", "r.yaml:8: stages.train.learning_rate needs a number above 0, got 0"),
    ("1e-5", "true", "r.yaml:8: stages.train.learning_rate needs a number above 0, got true"),
    ("1e-5", "", "r.yaml:8: stages.train.learning_rate needs a number above 0, got nothing"),
    ("1e-5", ".inf", "r.yaml:8: got .inf, which is not a finite number"),
    ("1e-5", "1e999", "r.yaml:8: got 1e999, which is not a finite number"),
    ("learning_rate: 1e-5", "batch_size: 2.5",
     "r.yaml:8: stages.train.batch_size needs a whole number of at least 1, got 2.5"),
    ("learning_rate: 1e-5", "warmup: 1",
     "r.yaml:8: stages.train.warmup needs a number of at least 0 and below 1, got 1"),
    ("learning_rate: 1e-5", "optimizer: adam",
     "r.yaml:8: stages.train.optimizer needs one of adamw, sgd, got 'adam'; did you mean 'adamw'?"),
    ("learning_rate: 1e-5", "steps: 3, epochs: 1",
     "r.yaml:8: stages.train: steps and epochs exclude each other: give one of them (null for the other)"),
    ("learning_rate: 1e-5", "early_stopping: 3",
     "r.yaml:8: stages.train: early_stopping needs evaluate_every, the steps between two evaluations"),
    ("2:4", "4:2", "r.yaml:10: stages.prune.pattern: pattern 4:2 must keep N of M with 1 <= N < M <= 32"),
    ("2:4", "[2, 4]", "r.yaml:10: stages.prune.pattern needs a text, got a list"),
    ("group-fraction", "group-fractions",
     "r.yaml:11: stages.prune.schedule.name: unknown name 'group-fractions'; did you mean 'group-fraction'? "
     "allowed: group-fraction, per-group, sr-ste"),
    ("name: group-fraction, ", "",
     "r.yaml:11: stages.prune.schedule needs the key 'name'; allowed: group-fraction, per-group, sr-ste"),
    ("[0.2, 0.5]", "[0.2, x]", "r.yaml:11: stages.prune.schedule.num_masks.1 needs a number, got 'x'"),
    ("[0.2, 0.5]", "many",
     "r.yaml:11: stages.prune.schedule.num_masks needs a whole number or a list of numbers, got 'many'"),
    ("[0.2, 0.5]", "[0.5, 0.2]",
     "r.yaml:11: stages.prune.schedule: num_masks must be growing fractions between 0 and 1, got [0.5, 0.2]"),
    ("[0.2, 0.5]", "[0.2, 0.7]",
     "r.yaml:11: stages.prune.schedule: num_masks must end at 0.5, the sparsity of 2:4, got 0.7"),
    ("[0.2, 0.5]}", "3, regrow: yes}",
     "r.yaml:11: stages.prune.schedule.regrow needs true or false, got 'yes'; write true"),
    ("method: percentile", "method: percentil",
     "r.yaml:13: stages.calibrate.method: unknown name 'percentil'; did you mean 'percentile'? "
     "allowed: entropy, max, mse, percentile"),
    ("method: percentile", "method: {name: percentile, percent: 99}",
     "r.yaml:13: unknown key 'percent' in stages.calibrate.method; did you mean 'percentile'? "
     "allowed: name, percentile"),
    ("method: percentile", "method:\n      name: percentile\n      percentile: 101",
     "r.yaml:15: stages.calibrate.method: percentile must lie in (0, 100], got 101.0"),
    ("method: percentile", "method: {name: percentile, percentile: 99, percent: 9}",
     "r.yaml:13: unknown key 'percent' in stages.calibrate.method; did you mean 'percentile'? "
     "allowed: name, percentile"),
    ("learning_rate: 1e-5", "keep: best",
     f"r.yaml:8: unknown key 'keep' in stages.train; did you mean 'keep_checkpoint'? allowed: {STAGE_KEYS}"),
    ("method: percentile", "method: [percentile]",
     "r.yaml:13: stages.calibrate.method needs one of entropy, max, mse, percentile, got a list"),
    ("  prune:\n", "  prunee:\n",
     f"r.yaml:9: stages.prunee needs the key 'type'; did you mean 'prune'? allowed: {KINDS}"),
    ("  prune:\n", "  second:\n    type: prun\n",
     f"r.yaml:10: stages.second.type: unknown name 'prun'; did you mean 'prune'? allowed: {KINDS}"),
    ("  prune:\n", "  Pruned_1:\n    type: prune\n",
     "r.yaml:9: the name 'Pruned_1' may only hold lower-case letters, digits and -, a letter or digit first"),
    ("task: classification", "task: clasification",
     "r.yaml:2: task: unknown name 'clasification'; did you mean 'classification'? "
     "allowed: classification, image-classification, query-performance, regression, relevance, retrieval, "
     "text-to-image"),
    ("task: classification", "task: {name: classification, metric: f2}",
     "r.yaml:2: task.metric needs one of accuracy, f1, got 'f2'; did you mean 'f1'?"),
    ("task: classification\n", "",
     "r.yaml:1: a recipe needs the key 'task'; task: what the model learns; a bare text is its name"),
    ("  dev: dev.jsonl\n", "", "r.yaml:3: data needs the key 'dev'; dev: rows measured after every stage"),
    ("dev: dev.jsonl", "dev: {path: a, hub: b}",
     "r.yaml:5: data.dev: path and hub exclude each other: give exactly one of them"),
    ("dev: dev.jsonl", "dev: {path: a, split: b}", "r.yaml:5: data.dev: split belongs to hub, not to path"),
    ("dev: dev.jsonl", "dev: 3", "r.yaml:5: data.dev needs a text or a mapping with the key 'path', got 3; "
     "quote it if it is a text"),
    ("columns: {text: body}", "columns: {query: q}",
     "r.yaml:6: the column 'query' means nothing to the task classification; its columns are text, text_pair, label"),
    ("task: classification", "task: relevance",
     "r.yaml:6: the column 'text' means nothing to the task relevance; "
     "its columns are query, passage, label, group, candidates"),
    ("model: {source: tiny}", "model: '3'", "r.yaml:1: model needs a mapping, got '3'"),
    ("model: {source: tiny}", "model: tiny", "r.yaml:1: model needs a mapping, got 'tiny'"),
    ("{source: tiny}", "{source: tiny, max_length: 9000}",
     "r.yaml:1: model.max_length needs a whole number from 4 to 8192, got 9000"),
    ("{source: tiny}", "{source: tiny, sha256: abc}",
     "r.yaml:1: model.sha256 needs a text of 64 lower-case hexadecimal digits or null, got 'abc'"),
    ("model:", "name: ../up\nmodel:", "r.yaml:1: name needs a text of letters, digits and . _ -, got '../up'"),
    ("model:", "seed: -1\nmodel:", "r.yaml:1: seed needs a whole number from 0 to 4294967295, got -1"),
    ("  calibrate:\n    method: percentile\n", "",
     "r.yaml:12: stage 'qat' needs a calibrate stage among those it starts from, (prune <- train); "
     "add a calibrate stage before it"),
    ("  train: {learning_rate: 1e-5}\n", "",
     "r.yaml:13: stage 'qat' distils, but none of the stages it starts from, (calibrate <- prune), is a train stage; "
     "add a train stage before it to teach, or set distill: null"),
    ("  calibrate:\n    method: percentile\n  qat:\n", "",
     "r.yaml:13: target onnx-int8 needs activation scales, and stage 'export' starts from (prune <- train); "
     "add a calibrate stage before it, or export onnx-fp32"),
    ("targets: [onnx-int8, onnx-fp32]", "targets: [tensorrt, onnx-int8]",
     "r.yaml:16: target tensorrt needs activation placement tensorrt or tensorrt-full, and the model is calibrated "
     "with linear, and stage 'export' starts from (qat <- calibrate <- prune <- train); "
     "set the calibrate stage's placement to tensorrt, or export onnx-int8"),
    ("targets: [onnx-int8, onnx-fp32]", "targets: [onnx-int8]\n    batch_range: [4, 2, 8]",
     "r.yaml:17: stages.export.batch_range: needs three sizes from 1 on, "
     "none smaller than the one before it, got 4, 2, 8"),
    (GOOD[GOOD.index("  prune:"):GOOD.index("results:")], "  export: {targets: [torch-semi-structured]}\n",
     "r.yaml:9: target torch-semi-structured needs a pruned model, and stage 'export' starts from "
     "(train) (and 1 more); add a prune stage before it"),
    ("  qat:\n", "  again: {type: train}\n  qat:\n",
     "r.yaml:14: stage 'again' would undo what 'calibrate' did, (calibrate <- prune <- train); "
     "the order is train, prune, calibrate, qat, export"),
    ("  qat:\n", "  qat:\n    from: export\n",
     "r.yaml:15: stage 'qat' starts from 'export', which is not a stage before it; allowed: train, prune, calibrate"),
    ("  qat:\n", "  qat:\n    from: calibrat\n",
     "r.yaml:15: stage 'qat' starts from 'calibrat', which is no stage; did you mean 'calibrate'? "
     "allowed: train, prune, calibrate"),
    ("results:", "  again:\n    type: train\n    from: export\nresults:",
     "r.yaml:19: stage 'again' starts from 'export', an export, which holds no model to go on with; "
     "allowed: train, prune, calibrate, qat"),
    ("  qat:\n", "  qat: {distill: {teacher: prune}}\n",
     "r.yaml:14: the teacher 'prune' of stage 'qat' is not dense and among those it starts from; allowed: train"),
    ("  train: {learning_rate: 1e-5}\n  prune:\n", "  prune:\n    distill: {}\n",
     "r.yaml:9: stage 'prune' distils, but none of the stages it starts from, "
     "(none: it starts from the pretrained model), is a train stage (and 1 more); "
     "add a train stage before it to teach, or set distill: null"),
    ("[onnx-int8, onnx-fp32]", "[onnx]",
     f"r.yaml:16: stages.export.targets.0 needs one of {TARGETS}, got 'onnx'; did you mean 'onnx-int8'?"),
    ("[onnx-int8, onnx-fp32]", "[]",
     f"r.yaml:16: stages.export.targets needs a list with at least 1 entry, each one of {TARGETS}, got an empty list"),
    ("targets: [onnx-int8, onnx-fp32]", "batch_range: 8",
     "r.yaml:16: stages.export.batch_range needs a list of 3 whole numbers, got 8"),
    ("targets: [onnx-int8, onnx-fp32]", "sequence_range: [8, 64]",
     "r.yaml:16: stages.export.sequence_range needs a list of 3 whole numbers or null, got a list"),
    ("targets: [onnx-int8, onnx-fp32]", "sequence_range: [8, 64, long]",
     "r.yaml:16: stages.export.sequence_range.2 needs a whole number, got 'long'"),
    ("export/onnx-int8", "export/onnx-int4",
     "r.yaml:18: stage 'export' has no target 'onnx-int4'; did you mean 'onnx-int8'? allowed: onnx-int8, onnx-fp32"),
    ("export/onnx-int8", "export",
     "r.yaml:18: stage 'export' writes 2 files: say which; write export/onnx-int8 or export/onnx-fp32"),
    ("export/onnx-int8", "qat/x", "r.yaml:18: stage 'qat' has no target 'x'; write qat"),
    ("export/onnx-int8", "exprt",
     "r.yaml:18: 'exprt' is no stage; did you mean 'export'? allowed: train, prune, calibrate, qat, export"),
    ("ours: export/onnx-int8", "ours: 3", "r.yaml:18: results.ours needs a text, got 3; quote it if it is a text"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), BAD_RECIPES, ids=[case[2][:60] for case in BAD_RECIPES])
def test_a_bad_recipe_is_told_in_one_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1 or old == "model:", "the case must change the recipe in one place"
    assert error_of(tmp_path, GOOD.replace(old, new, 1)) == expected


BAD_TEXTS = [
    ("", "r.yaml:1: a recipe is a mapping of keys, got nothing; sqat init writes one"),
    ("# only a comment\n", "r.yaml:1: a recipe is a mapping of keys, got nothing; sqat init writes one"),
    ("- a\n", "r.yaml:1: a recipe is a mapping of keys, got a list; sqat init writes one"),
    ("just text\n", "r.yaml:1: a recipe is a mapping of keys, got 'just text'; sqat init writes one"),
    ("a: 1\nb: 2\na: 3\n", "r.yaml:3: the key 'a' is given twice; first on r.yaml:1"),
    ("a: 1\n---\nb: 1\n", "r.yaml:2: a second document starts here; a recipe is one document: remove the '---'"),
    ("a:\n\tb: 1\n", "r.yaml:2: not valid YAML: a tab where YAML wants spaces; indent with spaces"),
    ("a: b: c\n", "r.yaml:1: not valid YAML: a second ': ' on one line; quote the value if it holds ': '"),
    ("a: [1, 2\n", "r.yaml:2: not valid YAML: a '[' is never closed, or a comma is missing in its list"),
    ("a: {b: 1\n", "r.yaml:2: not valid YAML: a '{' is never closed, or a comma is missing in its mapping"),
    ("a: 'x\n", "r.yaml:2: not valid YAML: a quotation mark is never closed; close it, or double it inside a text"),
    ("a: 1\nb\n", "r.yaml:3: not valid YAML: a line that is neither 'key: value' nor part of a value; add the ':'"),
    ("a: @x\n", "r.yaml:1: not valid YAML: a value cannot start with this character; quote the value"),
    ("a:\n  - 1\n b: 2\n",
     "r.yaml:3: not valid YAML: does not fit the indentation of the lines above; align it with its neighbours"),
    ("a: !!python/name:os.system 1\n",
     "r.yaml:1: the tag tag:yaml.org,2002:python/name:os.system is not allowed; a recipe is plain YAML without tags"),
    ("a: *b\n", "r.yaml:1: the alias *b has no anchor &b above it; quote the value if it is meant to start with *"),
    ("a: &x [*x]\n",
     "r.yaml:1: the alias *x has no anchor &x above it; quote the value if it is meant to start with *"),
    ("[1]: a\n", "r.yaml:1: a key must be a plain text, not a list, mapping or alias"),
    ("'': a\n", "r.yaml:1: a key is empty"),
    ("a: 1\nb: \x07\n", "r.yaml:2: the character U+0007 is not allowed in YAML"),
    ('a: "\\ud800"\n', "r.yaml:1: holds half of a surrogate pair, which is no character"),
    ("a: " + "[" * 50 + "]" * 50, "r.yaml:1: nested deeper than 40 levels"),
    ("a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n", "r.yaml:4: holds more than 10000 values once its aliases are followed"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BAD_TEXTS, ids=[case[1][:60] for case in BAD_TEXTS])
def test_bad_yaml_is_told_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text) == expected


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "relevance.yaml").write_text(GOOD)
    with pytest.raises(SqatError, match=re.escape(f"no such recipe; did you mean {tmp_path}/relevance.yaml?")):
        load_recipe(tmp_path / "relevanse.yaml")
    with pytest.raises(SqatError, match=re.escape(f"no such recipe; {tmp_path} holds relevance.yaml")):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(SqatError, match=r"is a folder, not a recipe; name a file in it: relevance\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(SqatError, match=r"there is no folder .*/gone"):
        load_recipe(tmp_path / "gone" / "r.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(SqatError, match=r"latin\.yaml:2: is not UTF-8 text; save it as UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(SqatError, match="is larger than 1 MB, which no recipe is"):
        load_recipe(tmp_path / "big.yaml")


def test_the_first_of_several_problems_by_line_is_told(tmp_path: Path) -> None:
    text = GOOD.replace("source: tiny", "source: 3").replace("1e-5", "-1").replace("percentile", "mean")
    assert error_of(tmp_path, text) == (
        "r.yaml:1: model.source needs a text or null, got 3 (and 2 more); quote it if it is a text"
    )


def test_no_pydantic_words_reach_the_user(tmp_path: Path) -> None:
    for old, new, _ in BAD_RECIPES:
        message = error_of(tmp_path, GOOD.replace(old, new, 1)).lower()
        assert not re.search(r"input should|pydantic|validation|https?:|literal|union|\btag\b|dict\b|tuple", message)


def test_anchors_and_merge_keys_are_followed(tmp_path: Path) -> None:
    text = GOOD.replace("train: {learning_rate: 1e-5}", "train: &fit {learning_rate: 1e-5, epochs: 2}")
    text = text.replace("  qat:\n", "  qat:\n    <<: *fit\n    epochs: 3\n")
    qat = load(tmp_path, text).recipe.stages["qat"]
    assert isinstance(qat, QatConfig)
    assert (qat.learning_rate, qat.epochs) == (1e-5, 3)


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my recipe (2).yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe.name == "my-recipe-2-"


@pytest.mark.parametrize(
    ("text", "value"),
    [("2:4", "2:4"), ("1e-5", 1e-5), ("on", "on"), ("no", "no"), ("y", "y"), ("12:30:45", "12:30:45"), ("010", 10),
     ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("2001-01-01", "2001-01-01"), ("~", None), ("True", True),
     ("+.5", 0.5), ("1.", 1.0), (".", "."), ("-", "-"), ("1e5", 1e5), ("=", "="), ("0b1", "0b1")],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = resolve_scalar(text, Place("x"))
    assert got == value
    assert type(got) is type(value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_json_is_read_as_json_reads_it(value: object) -> None:
    assert compose(json.dumps(value), "x").plain() == value


# --set, and the attribute that must then hold the value
GOOD_OVERRIDES = [
    ("seed=7", lambda r: r.seed == 7),
    ("name=other", lambda r: r.name == "other"),
    ("stages.prune.schedule.num_masks.0=0.1", lambda r: r.stages["prune"].schedule.num_masks == (0.1, 0.5)),
    ("stages.prune.schedule.num_masks=5", lambda r: r.stages["prune"].schedule.num_masks == 5),
    ("stages.prune.distill.minilm_weight=2", lambda r: r.stages["prune"].distill.minilm_weight == 2),
    ("stages.prune.pattern=2:4", lambda r: r.stages["prune"].pattern == "2:4"),
    ("stages.train.learning_rate=1e-4", lambda r: r.stages["train"].learning_rate == 1e-4),
    ("stages.qat.distill.loss.relation_heads=3", lambda r: r.stages["qat"].distill.loss.relation_heads == 3),
    ("stages.qat.distill=null", lambda r: r.stages["qat"].distill is None),
    ("stages.qat.epochs=", lambda r: r.stages["qat"].epochs is None),
    ("stages.calibrate.method.percentile=99", lambda r: r.stages["calibrate"].method.percentile == 99),
    ("data.train.limit=5", lambda r: (r.data.train.path, r.data.train.limit) == ("train.jsonl", 5)),
    ("data.test=test.csv", lambda r: r.data.test.path == "test.csv"),
    ("results.dense=train", lambda r: r.results["dense"] == "train"),
    ("stages.export.targets=[onnx-int8]", lambda r: r.stages["export"].targets == ("onnx-int8",)),
]


@pytest.mark.parametrize(("override", "holds"), GOOD_OVERRIDES, ids=[case[0] for case in GOOD_OVERRIDES])
def test_an_override_changes_one_key(tmp_path: Path, override: str, holds) -> None:  # type: ignore[no-untyped-def]
    loaded = load(tmp_path, GOOD, override)
    assert holds(loaded.recipe)
    assert loaded.overrides == (override,)
    assert loaded.text == GOOD


BAD_OVERRIDES = [
    ("seed", "--set seed: needs key.key=value; for example --set stages.qat.epochs=2"),
    ("=3", "--set =3: needs key.key=value; for example --set stages.qat.epochs=2"),
    ("seed=x", "--set seed: seed needs a whole number from 0 to 4294967295, got 'x'"),
    ("seed.x=1", "--set seed.x: seed is a whole number from 0 to 4294967295 and holds no keys"),
    ("dta.train.limit=3",
     "--set dta.train.limit: unknown key 'dta'; did you mean 'data'? "
     "allowed: name, seed, output, trackers, model, task, data, stages, results"),
    ("stages.qta.epochs=1",
     "--set stages.qta.epochs: unknown key 'qta' in stages; did you mean 'qat'? "
     "allowed: train, prune, calibrate, qat, export"),
    ("stages.qat.layers={}",
     f"--set stages.qat.layers: unknown key 'layers' in stages.qat; allowed: {STAGE_KEYS}, activation_scales, distill"),
    ("stages.calibrate.method.percentil=1",
     "--set stages.calibrate.method.percentil: unknown key 'percentil' in stages.calibrate.method; "
     "did you mean 'percentile'? allowed: name, percentile"),
    ("stages.prune.schedule.num_masks.7=1",
     "--set stages.prune.schedule.num_masks.7: 7 is no index of a list of 2; allowed: 0 to 1"),
    ("stages.prune.schedule.num_masks.x=1",
     "--set stages.prune.schedule.num_masks.x: 'x' is no index of a list of 2; allowed: 0 to 1"),
    ("model.max_length=[",
     "--set model.max_length: not valid YAML: a '[' or '{' is never closed"),
    ("stages.qat.from=train",
     "--set stages.qat.from: stage 'qat' needs a calibrate stage among those it starts from, (train); "
     "add a calibrate stage before it"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES, ids=[case[0] for case in BAD_OVERRIDES])
def test_a_bad_override_is_told_with_its_flag(tmp_path: Path, override: str, expected: str) -> None:
    assert error_of(tmp_path, GOOD, override) == expected


PATHS = [
    path
    for override, _ in (*GOOD_OVERRIDES, *BAD_OVERRIDES)
    for parts in [override.partition("=")[0].split(".")]
    for path in (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    if path
]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(sorted(set(PATHS))), JSON_VALUES), min_size=1, max_size=3))
def test_whatever_is_set_is_a_recipe_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, object]]
) -> None:
    place = "r.yaml:1"
    try:
        load(tmp_path_factory.getbasetemp(), GOOD, *(f"{path}={json.dumps(value)}" for path, value in changes))
    except SqatError as error:
        place, line = error.place, str(error)
        assert "\n" not in line and "pydantic" not in line  # noqa: PT018
    assert place.startswith(("--set ", "r.yaml:"))


def test_later_overrides_see_earlier_ones(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD, "stages.prune.schedule=per-group", "stages.prune.schedule.num_masks=3")
    prune = loaded.recipe.stages["prune"]
    assert isinstance(prune, PruneConfig)
    assert (prune.schedule.name, prune.schedule.num_masks) == ("per-group", 3)


def test_missing_data_files_are_told_only_when_asked(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "dev.json").touch()
    with pytest.raises(SqatError) as caught:
        load_recipe(tmp_path / "r.yaml", check_files=True)
    assert str(caught.value) == f"r.yaml:5: data.dev: no file dev.jsonl; did you mean {tmp_path}/dev.json?"


def test_the_default_parent_skips_exports(tmp_path: Path) -> None:
    text = GOOD.replace("  prune:\n", "  early:\n    type: export\n    targets: [onnx-fp32]\n  prune:\n")
    recipe = load(tmp_path, text).recipe
    assert recipe.parent_of("early") == recipe.parent_of("prune") == "train"
    assert recipe.ancestors_of("export") == ["qat", "calibrate", "prune", "train"]


def test_pick_stage(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD.replace("  qat:\n", "  qat:\n  qat-2: {type: qat}\n")).recipe
    assert pick_stage(recipe, "prune", None) == "prune"
    assert pick_stage(recipe, "qat", "qat-2") == "qat-2"
    with pytest.raises(SqatError, match=r"r: the recipe has 2 qat stages: qat, qat-2; choose one, e\.g\. --stage qat"):
        pick_stage(recipe, "qat", None)
    with pytest.raises(SqatError, match=r"--stage: no qat stage 'qat-3'; did you mean 'qat-2'\? allowed: qat, qat-2"):
        pick_stage(recipe, "qat", "qat-3")


@pytest.mark.parametrize(
    ("kind", "distill", "expected"),
    [("qat", None, []), ("qat", True, []), ("qat", False, ["stages.qat.distill=null"]),
     ("prune", True, ["stages.prune.distill={}"]), ("prune", False, ["stages.prune.distill=null"]),
     ("train", True, [])],
)  # fmt: skip
def test_distill_flags_are_overrides(tmp_path: Path, kind: str, distill: bool | None, expected: list[str]) -> None:
    load(tmp_path, GOOD)
    without_stage = GOOD.replace("  train: {learning_rate: 1e-5}\n", "") if kind == "train" else GOOD
    (tmp_path / "r.yaml").write_text(without_stage)
    assert distill_override(tmp_path / "r.yaml", kind, None, (), distill) == expected


def test_the_json_schema_describes_every_key() -> None:
    schema = recipe_schema()
    components = {"Magnitude", "Percentile", "Maximum", "MeanSquaredError", "Entropy", "PerGroup", "GroupFraction"}
    components |= {"Wanda", "Taylor", "SparseGPT", "SrSte"}
    own = {name for name in schema["$defs"] if name not in components and not name.startswith("MiniLM")}
    undescribed = {
        (name, key)
        for name in own
        for key, part in schema["$defs"][name]["properties"].items()
        if "description" not in part
    }
    assert not undescribed
    assert schema["required"] == ["model", "task", "data", "stages"]
    assert schema["$defs"]["DenseTrainConfig"]["properties"]["batch_size"]["default"] == 32
