"""Tokens, padding and plans of batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sqat.data.batch import ordered_batches, plan_batches
from sqat.data.rows import Rows
from sqat.data.tokens import collate, tokenize
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns
from tests.data.files import CLASSES, TEXTS, jsonl, read


# Tokens.
def small_tokenizer(side: str = "right", types: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", padding_side=side, model_input_names=names, pad_token_type_id=7
    )


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def pair_rows(*sizes: tuple[int, int]) -> Rows:
    return datasets.Dataset.from_dict(
        {
            "text": [words(first) for first, _ in sizes],
            "text_pair": [words(second) for _, second in sizes],
            "label": [float(i) for i in range(len(sizes))],
            "group": list(range(len(sizes))),
        }
    )


def test_tokens_are_those_of_the_tokenizer_unpadded() -> None:
    rows = pair_rows((2, 5), (1, 1), (3, 0))
    found = tokenize(rows, small_tokenizer(), 32)
    wanted = small_tokenizer()(rows["text"][:], rows["text_pair"][:])
    assert found["input_ids"][:] == wanted["input_ids"]
    assert found["token_type_ids"][:] == wanted["token_type_ids"]
    assert found["length"][:] == [10, 5, 6]
    assert found["text"][:] == rows["text"][:]


def test_no_token_types_where_the_tokenizer_has_none() -> None:
    found = tokenize(pair_rows((2, 5)).remove_columns("text_pair"), small_tokenizer(types=False), 32)
    assert "token_type_ids" not in found.column_names
    assert found["length"][:] == [4]


@pytest.mark.parametrize(("sizes", "kept"), [((3, 40), (3, 10)), ((40, 40), (6, 7)), ((40, 3), (10, 3))])
def test_the_longer_text_is_cut_first(sizes: tuple[int, int], kept: tuple[int, int]) -> None:
    found = tokenize(pair_rows(sizes), small_tokenizer(), 16)
    types = found["token_type_ids"][0]
    assert found["length"][0] == 16
    assert (types.count(0) - 2, types.count(1) - 1) == kept


def test_a_tokenizer_that_cannot_pad_is_a_mistake() -> None:
    tokenizer = small_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(SqatError, match="the tokenizer has no padding token"):
        tokenize(pair_rows((1, 1)), tokenizer, 16)


def test_tokenizing_leaves_no_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*TEXTS))
    tokenize(read(path, Columns(), CLASSES), small_tokenizer(), 16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("types", [True, False])
def test_padding_is_that_of_the_tokenizer(side: str, types: bool) -> None:
    tokenizer = small_tokenizer(side, types)
    rows = tokenize(pair_rows((2, 5), (9, 9), (1, 1), (3, 4)), tokenizer, 32)
    indices = [3, 0, 2]
    batch = collate(rows, indices, tokenizer)
    names = [name for name in ("input_ids", "token_type_ids") if name in rows.column_names]
    wanted = tokenizer.pad({name: [rows[i][name] for i in indices] for name in names}, return_tensors="pt")
    assert set(batch.inputs) == set(wanted)
    for name, value in wanted.items():
        assert batch.inputs[name].dtype == torch.int64
        assert torch.equal(batch.inputs[name], value), name
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [3.0, 0.0, 2.0]
    assert batch.groups.tolist() == indices
    assert len(batch) == 3


def test_classes_stay_whole_and_rows_without_queries_have_no_group() -> None:
    rows = pair_rows((1, 1), (2, 2)).remove_columns(["label", "group"]).add_column("label", [4, 2])
    batch = collate(tokenize(rows, small_tokenizer(), 16), [0, 1], small_tokenizer())
    assert batch.labels.dtype == torch.int64
    assert batch.groups.tolist() == [-1, -1]


def test_a_batch_moves_as_a_whole() -> None:
    rows = tokenize(pair_rows((1, 1)), small_tokenizer(), 16)
    moved = collate(rows, [0], small_tokenizer()).to("meta")
    assert {value.device.type for value in (*moved.inputs.values(), moved.labels, moved.groups)} == {"meta"}


# Plans of batches.
@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    """Lengths, units of neighbouring rows, and a batch size no unit exceeds."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=60))
    starts = np.cumsum([0, *sizes])
    units = [list(range(start, start + size)) for start, size in zip(starts.tolist(), sizes, strict=False)]
    lengths = draw(st.lists(st.integers(3, 128), min_size=sum(sizes), max_size=sum(sizes)))
    return lengths, units, draw(st.integers(5, 16))


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_a_plan_has_every_row_once_units_whole_and_batches_within_size(
    plan: tuple[list[int], list[list[int]], int], seed: int, epoch: int
) -> None:
    lengths, units, size = plan
    batches = plan_batches(lengths, units, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)
    batch_of = {row: number for number, batch in enumerate(batches) for row in batch}
    assert all(len({batch_of[row] for row in unit}) == 1 for unit in units)
    assert batches == plan_batches(lengths, units, size, seed, epoch)


def test_plans_differ_by_seed_and_epoch() -> None:
    lengths, units = [5] * 100, [[i] for i in range(100)]
    found = {str(plan_batches(lengths, units, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(found) == 9


def test_batches_of_single_rows_are_full_but_for_one() -> None:
    batches = plan_batches(list(range(1001)), [[i] for i in range(1001)], 8, 0, 0)
    assert Counter(map(len, batches)) == {8: 125, 1: 1}


def test_bucketing_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 128, 4000).tolist()

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    plain = [list(range(start, start + 32)) for start in range(0, 4000, 32)]
    planned = plan_batches(lengths, [[i] for i in range(4000)], 32, 0, 0)
    assert padded(planned) < 1.05 * sum(lengths)
    assert padded(plain) > 1.7 * sum(lengths)


def test_a_query_larger_than_a_batch_is_a_mistake() -> None:
    with pytest.raises(SqatError) as caught:
        plan_batches([5] * 9, [[0, 1], list(range(2, 9))], 4, 0, 0)
    assert str(caught.value) == (
        "a query has 7 passages, which must share a batch, but batch_size is 4; "
        "set task.candidates to 4 or less, or batch_size to 7 or more"
    )


def test_no_units_make_no_batches() -> None:
    assert plan_batches([], [], 4, 0, 0) == []


@given(st.lists(st.integers(1, 99), max_size=50), st.integers(1, 9))
def test_ordered_batches_have_every_row_once_by_length(lengths: list[int], size: int) -> None:
    rows = [row for batch in ordered_batches(lengths, size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert rows == sorted(rows, key=lambda row: (lengths[row], row))
