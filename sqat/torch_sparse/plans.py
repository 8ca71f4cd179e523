"""Plans: what a product's size decides once, kept for the next product of that size (rule C24).

A serving process sees many input sizes. As in the source (one descriptor and plan for each 16 tokens, chosen at run
time by ``idx = (m + 15) / 16 - 1``), the tokens of a product are padded to the next multiple of 16, so that sizes
repeat, and what was found for a size is looked up. cuSPARSELt's own handle of a plan is out of reach from Python:
torch makes it in the call, and its later versions keep it by the same sizes, so that padding serves that cache too.
What is kept here is the outcome of cuSPARSELt's search for the fastest kernel, which costs far more than a plan.

Left out: a workspace shared by all plans. torch's caching allocator already hands the same block out again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

STEP = 16


def plan_index(tokens: int) -> int:
    """Which of the sizes 16, 32, 48, ... holds ``tokens``, from 0; ValueError below one token."""
    if tokens < 1:
        raise ValueError(f"a product needs at least one token, got {tokens}")
    return (tokens + STEP - 1) // STEP - 1


def padded_tokens(tokens: int) -> int:
    """The plan's size: ``tokens`` rounded up to a multiple of 16."""
    return STEP * (plan_index(tokens) + 1)


class PlanKey(NamedTuple):
    """What decides a plan: a weight [N,K] times T tokens, with T a multiple of 16."""

    outputs: int
    inputs: int
    tokens: int
    taken: torch.dtype
    given: torch.dtype
    epilogue: str
    device: str


class Plan(NamedTuple):
    """A size and the kernel to run it with.

    Attributes:
        algorithm: cuSPARSELt's number of the kernel; 0 is its default, and all that other backends know.
    """

    key: PlanKey
    algorithm: int = 0


@dataclass(frozen=True)
class PlanStatistics:
    """How a cache did so far; ``size`` plans of at most ``capacity`` are in it."""

    hits: int
    misses: int
    evictions: int
    size: int
    capacity: int


class PlanCache:
    """The plans used last, at most ``capacity`` of them; several threads may share it.

    A plan is made with the cache locked: a search measures kernels, which others should not run beside, and no plan
    is made twice. Copying or pickling a cache gives an empty one of the same capacity.
    """

    def __init__(self, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"a plan cache needs room for one plan, got {capacity}")
        self.capacity = capacity
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0

    def get(self, key: PlanKey, make: Callable[[PlanKey], Plan]) -> Plan:
        """The plan of a key; made on the first call, and again after it was the one unused longest in a full cache.

        What ``make`` raises is passed on, and nothing is kept.
        """
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._hits += 1
                self._plans.move_to_end(key)
                return plan
            self._misses += 1
            plan = self._plans[key] = make(key)
            if len(self._plans) > self.capacity:
                self._plans.popitem(last=False)
                self._evictions += 1
            return plan

    def keys(self) -> list[PlanKey]:
        """Keys of the plans in the cache, the one unused longest first."""
        with self._lock:
            return list(self._plans)

    @property
    def statistics(self) -> PlanStatistics:
        with self._lock:
            return PlanStatistics(self._hits, self._misses, self._evictions, len(self._plans), self.capacity)

    def __reduce__(self) -> tuple[type[PlanCache], tuple[int]]:
        return type(self), (self.capacity,)
