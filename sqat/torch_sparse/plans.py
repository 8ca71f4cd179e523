"""Plans: what the size of a product decides once, kept for the next product of that size (rule C24).

Tokens are padded to a multiple of 16, so that sizes repeat. torch keeps cuSPARSELt's own plans out of reach; a plan
here is the outcome of cuSPARSELt's search for the fastest kernel.
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
    """Find which of the sizes 16, 32, 48, ... holds ``tokens``, from 0; ValueError below one token."""
    if tokens < 1:
        raise ValueError(f"a product needs at least one token, got {tokens}")
    return (tokens + STEP - 1) // STEP - 1


def padded_tokens(tokens: int) -> int:
    """Round ``tokens`` up to a multiple of 16."""
    return STEP * (plan_index(tokens) + 1)


class PlanKey(NamedTuple):
    """What decides a plan: a weight [N,K] times T tokens, T a multiple of 16."""

    outputs: int
    inputs: int
    tokens: int
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    epilogue: str
    device: str


class Plan(NamedTuple):
    """A size and its kernel.

    Attributes:
        algorithm: cuSPARSELt's number of the kernel; 0 is the default, and the only one of other backends.
    """

    key: PlanKey
    algorithm: int = 0


@dataclass(frozen=True)
class PlanStatistics:
    """Counts of a cache, which holds ``size`` plans of at most ``capacity``."""

    hits: int
    misses: int
    evictions: int
    size: int
    capacity: int


class PlanCache:
    """The plans used last, at most ``capacity`` of them; several threads may share a cache.

    Copying or pickling a cache gives an empty one of the same capacity.
    """

    def __init__(self, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"a plan cache needs room for one plan, got {capacity}")
        self.capacity = capacity
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0

    def get(self, key: PlanKey, make: Callable[[PlanKey], Plan]) -> Plan:
        """Get the plan of a key; make it if it is not in the cache. What ``make`` raises is passed on."""
        with self._lock:  # also while a search measures kernels, which other work would disturb
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
        """List the keys of the plans in the cache, the longest unused first."""
        with self._lock:
            return list(self._plans)

    @property
    def statistics(self) -> PlanStatistics:
        with self._lock:
            return PlanStatistics(self._hits, self._misses, self._evictions, len(self._plans), self.capacity)

    def __reduce__(self) -> tuple[type[PlanCache], tuple[int]]:
        return type(self), (self.capacity,)
