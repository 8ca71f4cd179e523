"""Recipe files, overrides by ``--set`` and flags, and stages chosen by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.recipe.loader import distill_override, load_recipe
from sqat.recipe.selection import pick_stage, stage_range
from sqat.recipe.stages import DenseTrainConfig, PruneConfig
from sqat.sparsity.schedules.group_fraction import GroupFraction
from tests.recipe.test_yaml_nodes import JSON_VALUES
from tests.recipe.valid_recipe import GOOD, error_of, load


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


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "relevance.yaml").write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_100_000)
    cases = [
        (tmp_path / "relevanse.yaml", "missing-file", f"did you mean {tmp_path}/relevance.yaml?"),
        (tmp_path / "x.yaml", "missing-file", "x.yaml"),
        (tmp_path / "gone" / "r.yaml", "missing-file", f"there is no folder {tmp_path}/gone"),
        (tmp_path, "unreadable-file", "relevance.yaml"),
        (tmp_path / "latin.yaml", "unreadable-file", "latin.yaml:2"),
        (tmp_path / "big.yaml", "unreadable-file", "1 MB"),
    ]
    for path, code, part in cases:
        with pytest.raises(SqatError, match=re.escape(part)) as caught:
            load_recipe(path)
        assert caught.value.code == code


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my recipe (2).yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe.name == "my-recipe-2-"


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


# --set, the code of its error, and what its message must hold
BAD_OVERRIDES = [
    ("seed", "usage", "needs"),
    ("=3", "usage", "needs"),
    ("seed=x", "invalid-recipe", "got 'x'"),
    ("seed.x=1", "invalid-recipe", "seed"),
    ("dta.train.limit=3", "invalid-recipe", "'data'"),
    ("stages.qta.epochs=1", "invalid-recipe", "'qat'"),
    ("stages.qat.layers={}", "invalid-recipe", "'layers'"),
    ("stages.calibrate.method.percentil=1", "invalid-recipe", "'percentile'"),
    ("stages.prune.schedule.num_masks.7=1", "invalid-recipe", "7"),
    ("stages.prune.schedule.num_masks.x=1", "invalid-recipe", "'x'"),
    ("model.max_length=[", "invalid-recipe", "'{'"),
    ("stages.qat.from=train", "recipe-conflict", "'qat'"),
]


@pytest.mark.parametrize(("override", "code", "part"), BAD_OVERRIDES)
def test_a_bad_override_is_refused_with_its_flag(tmp_path: Path, override: str, code: str, part: str) -> None:
    error = error_of(tmp_path, GOOD, override)
    assert (error.place, error.code) == (f"--set {override.partition('=')[0] or override}", code)
    assert part in str(error)


PATHS = [
    path
    for override, *_ in (*GOOD_OVERRIDES, *BAD_OVERRIDES)
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


def test_missing_data_files_are_refused_only_when_asked(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "dev.json").touch()
    with pytest.raises(SqatError) as caught:
        load_recipe(tmp_path / "r.yaml", check_files=True)
    assert (caught.value.place, caught.value.code) == ("r.yaml:5", "missing-file")
    assert caught.value.hint == f"did you mean {tmp_path}/dev.json?"


def test_stages_are_picked_by_type_and_name(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD.replace("  qat:\n", "  qat:\n  qat-2: {type: qat}\n")).recipe
    assert pick_stage(recipe, "prune", None) == "prune"
    assert pick_stage(recipe, "qat", "qat-2") == "qat-2"
    for name, code in ((None, "usage"), ("qat-3", "unknown-name")):
        with pytest.raises(SqatError) as caught:
            pick_stage(recipe, "qat", name)
        assert caught.value.code == code


def test_a_range_of_stages_goes_in_their_order(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD).recipe
    assert stage_range(recipe, "prune", "qat") == ["prune", "calibrate", "qat"]
    for first, last, code in (("qat", "prune", "usage"), ("qta", None, "unknown-name"), (None, "qta", "unknown-name")):
        with pytest.raises(SqatError) as caught:
            stage_range(recipe, first, last)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("stage_type", "distill", "expected"),
    [("qat", None, []), ("qat", True, []), ("qat", False, ["stages.qat.distill=null"]),
     ("prune", True, ["stages.prune.distill={}"]), ("prune", False, ["stages.prune.distill=null"]),
     ("train", True, [])],
)  # fmt: skip
def test_distill_flags_are_overrides(
    tmp_path: Path, stage_type: str, distill: bool | None, expected: list[str]
) -> None:
    load(tmp_path, GOOD)
    without_stage = GOOD.replace("  train: {learning_rate: 1e-5}\n", "") if stage_type == "train" else GOOD
    (tmp_path / "r.yaml").write_text(without_stage)
    assert distill_override(tmp_path / "r.yaml", stage_type, None, (), distill) == expected
