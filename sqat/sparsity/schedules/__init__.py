"""How sparsity grows to N:M: one file a schedule, with its settings and its code.

A recipe, `sqat.api` and the reference page take their names from `SCHEDULES`.
"""

from __future__ import annotations

from sqat.sparsity.schedules.group_fraction import GroupFraction
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.sparsity.schedules.schedule import Schedule as Schedule
from sqat.sparsity.schedules.sr_ste import SrSte

SCHEDULES: tuple[type[Schedule], ...] = (PerGroup, GroupFraction, SrSte)
