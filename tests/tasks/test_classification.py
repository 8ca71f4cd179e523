"""Classes: their order, their numbers, and what an unknown one says."""

from __future__ import annotations

import datasets
import pytest
import torch

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.errors import SqatError
from sqat.recipe.tasks import ClassificationTask
from sqat.tasks import build_task
from sqat.tasks.classification import Classification


def rows_of(*labels: str) -> Rows:
    texts = [f"t{i}" for i in range(len(labels))]
    places = [f"train.csv:{i + 2}" for i in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": list(labels), "place": places})


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (("b", "a", "b", "C"), ("C", "a", "b")),
        (("10", "9", "-1", "9"), ("-1", "9", "10")),
        (("10", "9", "x"), ("10", "9", "x")),
    ],
)
def test_classes_of_train_are_sorted(found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    assert build_task(ClassificationTask(), rows_of(*found)) == Classification(wanted)


def test_classes_of_the_recipe_keep_their_order() -> None:
    task = build_task(ClassificationTask(labels=("no", "yes", "maybe"), metric="f1"), rows_of("yes", "no"))
    assert task.outputs == 3
    assert task.metric == "f1"
    assert task.config_fields == {
        "id2label": {0: "no", 1: "yes", 2: "maybe"},
        "label2id": {"no": 0, "yes": 1, "maybe": 2},
        "problem_type": "single_label_classification",
    }


@pytest.mark.parametrize("labels", [("a",), ("a", "b", "a")])
def test_too_few_classes_or_one_twice_is_a_mistake(labels: tuple[str, ...]) -> None:
    with pytest.raises(SqatError, match=r"task\.labels is .*; give at least two, each once"):
        build_task(ClassificationTask(labels=labels), rows_of("a", "b"))


def test_encode_gives_numbers_and_leaves_the_rest() -> None:
    encoded = Classification(("no", "yes")).encode(rows_of("yes", "no", "yes"))
    assert encoded["label"][:] == [1, 0, 1]
    assert encoded["text"][:] == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("positve", 'train.csv:3: unknown class "positve"; did you mean "positive"?'),
        ("7", 'train.csv:3: unknown class "7"; train has "negative", "positive"'),
    ],
)
def test_an_unknown_class_is_told_with_its_place(name: str, line: str) -> None:
    with pytest.raises(SqatError) as caught:
        Classification(("negative", "positive")).encode(rows_of("positive", name))
    assert str(caught.value) == line


def test_units_are_the_rows_one_by_one() -> None:
    assert Classification(("a", "b")).training_groups(rows_of("a", "b", "a"), 0, 0) == [[0], [1], [2]]


def test_the_loss_is_the_mean_negative_log_probability() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.bfloat16, requires_grad=True)
    batch = Batch({}, torch.tensor([1, 0]), torch.tensor([-1, -1]))
    loss = Classification(("a", "b", "c")).loss(logits, batch)
    wanted = -(logits.detach().double().softmax(1)[[0, 1], [1, 0]].log()).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_metrics_and_decisions_follow_the_largest_logit() -> None:
    task = Classification(("a", "b"))
    rows = task.encode(rows_of("a", "b", "b", "a"))
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
    assert task.metrics(logits, rows) == pytest.approx({"accuracy": 0.75, "f1": (4 / 5 + 2 / 3) / 2})


def test_logits_that_are_not_finite_are_no_decision() -> None:
    task = Classification(("a", "b"))
    with pytest.raises(SqatError, match="1 of 4 outputs of the model are not finite"):
        task.metrics(torch.tensor([[0.0, torch.nan], [1.0, 0.0]]), task.encode(rows_of("a", "b")))


def test_another_class_agrees_only_where_the_reference_sees_a_tie() -> None:
    wanted = torch.tensor([[1.0, 0.0], [0.501, 0.5], [2.0, -2.0]])
    got = torch.tensor([[0.9, 0.1], [0.4, 0.5], [-1.0, 0.0]])
    rows = datasets.Dataset.from_dict({"label": [0, 0, 0]})
    assert Classification(("a", "b"), "accuracy").same_decision(wanted, got, rows).tolist() == [True, True, False]
