"""The plan cache against a list that is searched from the end, and under threads."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqat.torch_sparse.plans import Plan, PlanCache, PlanKey, PlanStatistics, padded_tokens, plan_index


def key(tokens: int) -> PlanKey:
    return PlanKey(64, 32, tokens, torch.int8, torch.int32, "none", "cpu")


@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (15, 0), (16, 0), (17, 1), (32, 1), (33, 2), (4096, 255)])
def test_index_is_the_sources(tokens: int, index: int) -> None:
    assert plan_index(tokens) == index == (tokens + 15) // 16 - 1


@given(st.integers(1, 10_000))
def test_tokens_are_padded_to_the_next_multiple_of_16(tokens: int) -> None:
    size = padded_tokens(tokens)
    assert size % 16 == 0
    assert 0 <= size - tokens < 16


@pytest.mark.parametrize("tokens", [0, -1])
def test_no_token_has_no_plan(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"at least one token, got {tokens}"):
        plan_index(tokens)


@given(st.integers(1, 5), st.lists(st.integers(1, 8), max_size=60))
def test_the_one_unused_longest_goes(capacity: int, asked: list[int]) -> None:
    cache = PlanCache(capacity)
    model: list[int] = []
    hits = evictions = 0
    for number in asked:
        made: list[PlanKey] = []

        def make(wanted: PlanKey, made: list[PlanKey] = made) -> Plan:
            made.append(wanted)
            return Plan(wanted, wanted.tokens)

        plan = cache.get(key(16 * number), make)
        assert plan == Plan(key(16 * number), 16 * number)
        hits += number in model
        assert len(made) == (number not in model)
        model = [n for n in model if n != number] + [number]
        evictions += len(model) > capacity
        model = model[-capacity:]
        assert cache.keys() == [key(16 * n) for n in model]
    assert cache.statistics == PlanStatistics(hits, len(asked) - hits, evictions, len(model), capacity)


def test_keys_differ_in_every_entry() -> None:
    first = key(16)
    changes = {"outputs": 1, "inputs": 1, "tokens": 32, "input_dtype": torch.half, "output_dtype": torch.half}
    changes |= {"epilogue": "scale", "device": "cuda:1"}
    others = [first._replace(**{name: value}) for name, value in changes.items()]
    assert set(changes) == set(PlanKey._fields)
    assert len({first, *others}) == len(others) + 1


def test_a_failure_keeps_nothing_and_the_next_try_counts() -> None:
    cache = PlanCache(2)

    def fail(_: PlanKey) -> Plan:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        cache.get(key(16), fail)
    assert cache.keys() == []
    assert cache.get(key(16), Plan) == Plan(key(16))
    assert cache.statistics.misses == 2


def test_threads_make_each_plan_once() -> None:
    cache = PlanCache(64)
    made: Counter[PlanKey] = Counter()
    ready = threading.Barrier(8)

    def make(wanted: PlanKey) -> Plan:
        made[wanted] += 1
        time.sleep(0.0005)  # others come meanwhile
        return Plan(wanted)

    def work(seed: int) -> None:
        ready.wait()
        for step in range(300):
            number = (step * (seed + 1)) % 40 + 1
            assert cache.get(key(16 * number), make).key.tokens == 16 * number

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = cache.statistics
    assert set(made.values()) == {1}
    assert found.misses == len(made) == found.size
    assert found.hits == 8 * 300 - found.misses


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_empty_and_as_large(copied) -> None:
    cache = PlanCache(3)
    cache.get(key(16), Plan)
    assert copied(cache).statistics == PlanStatistics(0, 0, 0, 0, 3)


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room for one plan, got 0"):
        PlanCache(0)
