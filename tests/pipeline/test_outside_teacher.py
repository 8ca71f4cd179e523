"""A teacher that is no stage: another model with its own tokenizer, or outputs in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from sqat.checkpoint.store import load_checkpoint
from sqat.cli import main
from sqat.data.batch import Batch
from sqat.data.pixels import ImageProcessor
from sqat.data.stored_outputs import parse_output
from sqat.evaluation.stored_outputs import format_outputs
from sqat.models.loading import load_pretrained
from sqat.pipeline.graph import resolve_graph
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import PruneConfig, row_grouping
from sqat.recipe.teacher import TeacherConfig
from sqat.stages.teacher import load_outside_teacher
from sqat.stages.training_batches import make_batches
from sqat.tasks.splits import Splits
from tests.errors import raises_code
from tests.tiny import BAD, CONFIGS, FILLER, GOOD, SPECIAL, classification_rows, relevance_rows, write_model, write_rows

pytestmark = pytest.mark.pipeline
OUTPUTS = "minilm_weight: 0, task_weight: 0, output_weight: 1"
LABELS = ("negative", "positive")


def write_teacher(folder: Path, labels: tuple[str, ...] = LABELS, turned: bool = False, **settings: Any) -> None:
    """Write a fine-tuned classifier of another width; ``turned``: its tokenizer numbers words the other way round."""
    words = (*GOOD, *BAD, *FILLER)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *(words[::-1] if turned else words)))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    torch.manual_seed(7)
    config = CONFIGS["bert"](vocab_size=len(vocabulary), **{"hidden_size": 48, "num_attention_heads": 4, **settings},
                             **names)  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", classification_rows(40, 0))
    write_rows(tmp_path / "dev.jsonl", classification_rows(12, 1))
    return tmp_path


def write_recipe(folder: Path, teacher: str, distill: str = OUTPUTS, task: str = "classification") -> Path:
    path = folder / "r.yaml"
    path.write_text(
        f"model: {{source: model, max_length: 24}}\ntask: {task}\ndata: {{train: train.jsonl, dev: dev.jsonl}}\n"
        f"stages: {{prune: {{steps: 3, batch_size: 8, distill: {{teacher: {teacher}, {distill}}}}}}}\n"
        f"output: {folder / 'runs'}\n"
    )
    return path


def batches_of(path: Path, kind: str = "texts") -> tuple[list[Batch], Any, Splits]:
    """All training batches of the prune stage, its teacher and the splits."""
    loaded = load_recipe(path)
    splits, config = Splits(loaded.recipe, path.parent), loaded.recipe.stages["prune"]
    assert isinstance(config, PruneConfig)
    assert config.distill is not None
    assert config.distill.teacher is not None
    _, processor = load_pretrained(kind, ModelConfig(source="model", max_length=24), path.parent,
                                   {"num_labels": splits.task.outputs, **splits.task.config_fields}, 0)  # fmt: skip
    teacher = load_outside_teacher(config.distill.teacher, config.distill, splits, processor)
    batches = make_batches(splits, processor, 8, 1, row_grouping(config), teacher)
    return [batches.collate(rows) for rows in batches.plan(0)], teacher, splits


def test_another_model_reads_the_texts_its_own_way_and_its_classes_go_by_name(folder: Path) -> None:
    write_teacher(folder / "teacher", labels=LABELS[::-1], turned=True)
    batches, teacher, splits = batches_of(write_recipe(folder, "./teacher"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    by_label = dict(zip(splits.rows("train")["text"][:], splits.rows("train")["label"][:], strict=True))
    student = AutoTokenizer.from_pretrained(folder / "model")
    texts = [student.decode(ids, skip_special_tokens=True) for batch in batches for ids in batch.inputs["input_ids"]]
    assert sorted(texts) == sorted(by_label)
    with torch.no_grad():
        found = torch.cat([teacher.model(**batch.teacher_inputs).logits for batch in batches])
        wanted = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(found, wanted.flip(1), atol=1e-5, rtol=1e-4)
    assert not torch.equal(batches[0].inputs["input_ids"], batches[0].teacher_inputs["input_ids"])


def test_a_recipe_learns_from_another_model_without_a_dense_stage(folder: Path, capsys: Any) -> None:
    write_teacher(folder / "teacher", turned=True)
    path = write_recipe(folder, "./teacher")
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "teacher of prune: ./teacher" in capsys.readouterr().out
    losses = []
    for steps in (1, 20):
        more = ["--set", f"stages.prune.steps={steps}", "--set", "stages.prune.learning_rate=2e-3"]
        assert main(["run", str(path), "-q", *more]) == 0
        losses.append(load_checkpoint(folder / "runs/r/01-prune").manifest.losses)
    assert losses[0].keys() == {"logits"}
    assert losses[1]["logits"] < losses[0]["logits"]


def test_relations_and_hidden_states_need_the_students_tokens(folder: Path) -> None:
    """A teacher without a head is enough for them; minilm-v2 allows another width, hidden states do not."""
    inner = "minilm_weight: 1, task_weight: 1, output_weight: 0"
    write_model(folder / "teacher", hidden_size=48, num_attention_heads=4)
    path = write_recipe(folder, "./teacher", inner)
    assert main(["run", str(path), "-q", "--set", "stages.prune.distill.loss.relation_heads=4"]) == 0
    assert load_checkpoint(folder / "runs/r/01-prune").manifest.losses.keys() == {"minilm", "task"}
    hidden = write_recipe(folder, "./teacher", "minilm_weight: 0, hidden_weight: 1")
    assert main(["run", str(hidden), "-q"]) == 2
    write_teacher(folder / "turned", turned=True)
    with raises_code("model-mismatch", match="other tokens"):
        batches_of(write_recipe(folder, "./turned", inner))


def digests(path: Path) -> str:
    return resolve_graph(load_recipe(path)).nodes["prune"].fingerprint


def test_a_change_of_the_teachers_files_is_another_fingerprint(folder: Path) -> None:
    write_teacher(folder / "teacher")
    path = write_recipe(folder, "./teacher")
    before = digests(path)
    assert digests(path) == before
    write_teacher(folder / "teacher", turned=True)
    assert digests(path) != before
    write_outputs(folder)
    stored = write_recipe(folder, "{column: output, file: stored.jsonl}")
    before = digests(stored)
    write_outputs(folder, scale=2)
    assert digests(stored) != before


def write_outputs(
    folder: Path, scale: float = 1.0, change: Callable[[list[dict[str, Any]]], Any] | None = None
) -> None:
    """Write outputs of the train rows, in another order, by label name."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][::-1]
    rows = [{**row, "output": {"positive": len(row["text"]) * scale, "negative": 1.0}} for row in rows]
    if change is not None:
        change(rows)
    write_rows(folder / "stored.jsonl", rows)


def test_stored_outputs_are_found_by_text_and_label(folder: Path) -> None:
    write_outputs(folder)
    batches, teacher, splits = batches_of(write_recipe(folder, "{column: output, file: stored.jsonl}"))
    assert teacher.model is None
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for batch in batches:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.inputs["input_ids"]]
        assert batch.teacher_outputs.tolist() == [[1.0, float(len(text))] for text in texts]
    assert sum(map(len, batches)) == 40
    assert splits.task.labels == LABELS


def test_a_recipe_learns_from_stored_outputs(folder: Path, capsys: Any) -> None:
    write_outputs(folder, 0.1)
    path = write_recipe(folder, "{column: output, file: stored.jsonl}")
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "teacher of prune: column 'output' of stored.jsonl" in " ".join(capsys.readouterr().out.split())
    assert main(["run", str(path), "-q"]) == 0
    assert load_checkpoint(folder / "runs/r/01-prune").manifest.losses.keys() == {"logits"}


BROKEN: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no score": (lambda rows: rows.pop(3), r"train\.jsonl:\d+: the text .* has no stored output"),
    "another label": (
        lambda rows: rows[2].update(output={"positive": 1, "neutral": 2}),
        r"stored\.jsonl:3: .*negative",
    ),
    "too few": (
        lambda rows: rows[1].update(output=[1.0]),
        r"stored\.jsonl:2: .* a list of 2 finite numbers.* a list of 1",
    ),
    "not a number": (lambda rows: rows[0].update(output=[1.0, float("nan")]), r"stored\.jsonl:1"),
    "no column": (lambda rows: rows[5].pop("output"), r"stored\.jsonl:6: no column"),
    "two": (lambda rows: rows.append({**rows[0], "output": [1.0, 2.0]}), r"stored\.jsonl:41: .* has two outputs"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_output_is_refused_with_its_row_before_training(case: str, folder: Path) -> None:
    change, told = BROKEN[case]
    write_outputs(folder, change=change)
    with raises_code("invalid-data", match=told):
        batches_of(write_recipe(folder, "{column: output, file: stored.jsonl}"))
    assert main(["run", str(folder / "r.yaml"), "-q"]) == 2
    assert not (folder / "runs/r/01-prune").exists()


def test_nested_passages_hold_their_scores(folder: Path) -> None:
    rows = relevance_rows(6, 0)
    for row in rows:
        for number, candidate in enumerate(row["candidates"]):
            candidate["score"] = number / 4
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", relevance_rows(4, 1))
    path = write_recipe(folder, "{column: score}", f"{OUTPUTS}, output_loss: listwise", "relevance")
    columns = "dev: dev.jsonl, columns: {group: qid, candidates: candidates}"
    path.write_text(path.read_text().replace("dev: dev.jsonl", columns))
    batches, *_ = batches_of(path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    expected = {f"{row['query']} {each['text']}": each["score"] for row in rows for each in row["candidates"]}
    found = {}
    for batch in batches:
        for ids, score in zip(batch.inputs["input_ids"], batch.teacher_outputs, strict=True):  # type: ignore[arg-type]
            found[tokenizer.decode(ids, skip_special_tokens=True)] = score.item()
    assert found == expected
    assert main(["run", str(path), "-q", "--no-rehearsal"]) == 0


@pytest.mark.parametrize("teacher", ["{}", "{source: a/b, column: c}", "{column: c, max_length: 8}", "{colum: c}"])
def test_a_wrong_teacher_is_refused(teacher: str, folder: Path) -> None:
    with raises_code("invalid-recipe", match="r.yaml:4: "):
        load_recipe(write_recipe(folder, teacher))


@pytest.mark.parametrize("teacher", ["dense", "{stage: dense}"])
def test_a_name_that_is_no_stage_is_refused_with_how_to_name_a_model(teacher: str, folder: Path) -> None:
    with raises_code("recipe-conflict", match="'dense' of stage 'prune' is no stage.*source: NAME"):
        load_recipe(write_recipe(folder, teacher))


def test_stored_outputs_teach_outputs_alone(folder: Path) -> None:
    for distill in ("minilm_weight: 1, output_weight: 1", "minilm_weight: 0, hidden_weight: 1, output_weight: 1",
                    "minilm_weight: 0, task_weight: 1"):  # fmt: skip
        with raises_code("recipe-conflict", match="outputs alone"):
            load_recipe(write_recipe(folder, "{column: output}", distill))


def test_a_teacher_with_another_head_or_none_is_refused(folder: Path) -> None:
    write_teacher(folder / "three", labels=("a", "b", "c"))
    write_teacher(folder / "other", labels=("a", "b"))
    write_model(folder / "headless")
    for name, told in {"three": "3 outputs", "other": "negative, positive", "headless": "no head"}.items():
        with raises_code("model-mismatch", match=f"distill.teacher.*{told}"):
            batches_of(write_recipe(folder, f"./{name}"))
    with raises_code("missing-file", match="distill.teacher.source"):
        resolve_graph(load_recipe(write_recipe(folder, "./absent"))).nodes["prune"].fingerprint  # noqa: B018


def test_a_bare_text_is_a_stage_or_a_source() -> None:
    texts = {"train": ("train", None), "./t": (None, "./t"), "a/b": (None, "a/b"), "package:p/f": (None, "package:p/f")}
    for text, (stage, source) in texts.items():
        config = PruneConfig.model_validate({"distill": {"teacher": text}})
        assert config.distill is not None
        assert config.distill.teacher == TeacherConfig(stage=stage, source=source)


@pytest.mark.parametrize("mean", [0.5, 0.4])
def test_a_teacher_of_images_scales_them_as_the_student_does(mean: float, tmp_path: Path) -> None:
    labels = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    for name, width, scale in (("model", 16, 0.5), ("teacher", 32, mean)):
        config = ViTConfig(image_size=8, patch_size=4, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, **labels)  # fmt: skip
        ViTForImageClassification(config).save_pretrained(tmp_path / name)
        ImageProcessor(8, 8, (scale,) * 3, (0.5,) * 3).save(tmp_path / name)
    pictures = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "train.npz", image=pictures, label=np.arange(8) % 2)
    path = write_recipe(tmp_path, "./teacher", task="image-classification")
    path.write_text(path.read_text().replace(".jsonl", ".npz"))
    if mean != 0.5:
        with raises_code("model-mismatch", match="scales images in another way"):
            batches_of(path, "images")
        return
    batches, teacher, _ = batches_of(path, "images")
    assert batches[0].teacher_inputs is None
    assert teacher.model(**batches[0].inputs).logits.shape == (8, 2)


def text_recipe(folder: Path, task: str, columns: str = "") -> Path:
    """Write a recipe whose second student learns from stored outputs of the first one's teacher."""
    distill = f"{{steps: 4, batch_size: 8, learning_rate: 1.0e-3, from: train, type: prune, distill: {{{OUTPUTS}, "
    path = folder / "r.yaml"
    path.write_text(
        f"model: {{source: model, max_length: 24}}\ntask: {task}\n"
        f"data: {{train: train.jsonl, dev: dev.jsonl{columns}}}\noutput: {folder / 'runs'}\nstages:\n"
        f"  train: {{steps: 4, batch_size: 8, learning_rate: 1.0e-3}}\n  live: {distill}teacher: train}}}}\n"
        f"  stored: {distill}teacher: {{column: output, file: made/stored.jsonl}}}}}}\n"
    )
    return path


@pytest.mark.parametrize("task", ["classification", "relevance", "retrieval"])
def test_stored_outputs_teach_what_the_model_itself_does(task: str, folder: Path, capsys: Any) -> None:
    columns = ""
    if task != "classification":
        write_rows(folder / "train.jsonl", relevance_rows(6, 0))
        write_rows(folder / "dev.jsonl", relevance_rows(4, 1))
        columns = ", columns: {group: qid, candidates: candidates}"
    path = text_recipe(folder, task, columns)
    assert main(["run", str(path), "-q", "--no-rehearsal", "--to", "live"]) == 0
    dense, stored = str(folder / "runs/r/01-train"), folder / "made/stored.jsonl"
    assert main(["evaluate", str(path), dense, "--split", "train", "--write-outputs", str(stored)]) == 0
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    keys = {"classification": ["text", "label", "output"], "relevance": ["query", "text", "label", "output"],
            "retrieval": ["text", "output"]}  # fmt: skip
    assert [*lines[0]] == keys[task]
    assert "rows of train" in "".join(capsys.readouterr())
    assert main(["run", str(path), "-q", "--no-rehearsal"]) == 0
    live, taught = (load_checkpoint(folder / "runs/r" / name) for name in ("02-live", "03-stored"))
    assert taught.manifest.losses == pytest.approx(live.manifest.losses, rel=1e-3)
    assert all(torch.allclose(taught.weights[name], weight, atol=1e-4) for name, weight in live.weights.items())


def test_wrong_options_of_write_outputs_are_refused(folder: Path) -> None:
    path = write_recipe(folder, "./teacher")
    (folder / "runs").mkdir()
    for options in (["--split", "train"], ["--split", "dev", "--write-outputs", "a.csv"], ["--split", "all"]):
        assert main(["evaluate", str(path), str(folder / "runs"), *options]) == 2


def test_outputs_replace_no_file(folder: Path, capsys: Any) -> None:
    path, train = write_recipe(folder, "./teacher"), folder / "train.jsonl"
    before = train.read_bytes()
    assert main(["evaluate", str(path), str(folder / "model"), "--write-outputs", str(train), "--split", "dev"]) == 2
    assert "train.jsonl: exists" in " ".join(capsys.readouterr().err.split())
    assert train.read_bytes() == before


def test_one_text_has_one_output_whatever_the_rounding(folder: Path) -> None:
    rows = classification_rows(10, 0)
    write_rows(folder / "train.jsonl", [*rows, *rows])
    path = write_recipe(folder, "{column: output, file: stored.jsonl}")
    loaded = load_recipe(path)
    splits = Splits(loaded.recipe, folder)
    encoded = splits.task.encode(splits.rows("train"))
    outputs = torch.arange(40.0).reshape(20, 2)
    (folder / "stored.jsonl").write_bytes(format_outputs(loaded.recipe, splits.task, outputs, encoded))
    found = torch.cat([batch.teacher_outputs for batch in batches_of(path)[0] if batch.teacher_outputs is not None])
    assert sorted(found[:, 0].tolist()) == sorted([*range(0, 20, 2), *range(0, 20, 2)])


def test_a_text_of_many_brackets_is_no_output() -> None:
    assert parse_output("[" * 100_000, ()) == []
    assert parse_output('{"b": 1, "a": 2}', ("a", "b")) == [2.0, 1.0]
