"""The table of rules: every row is complete, and the README shows it."""

from __future__ import annotations

import pytest

from scripts.docs import lint_rules
from sqat.lint.rules.table import RULES, TARGETS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.id}: {rule.requirement}")
def test_a_row_is_complete(rule) -> None:
    assert len(rule.severities) == len(TARGETS)
    assert set(rule.severities) <= set("EW-")
    assert rule.requirement
    assert rule.advice
    assert rule.check.__doc__
    assert rule.check.__doc__.startswith(f"{rule.id}: ") or not rule.id[1:].isdecimal()


def test_repairs_have_an_order() -> None:
    orders = [rule.repair.order for rule in RULES if rule.repair is not None]
    assert sorted(orders) == list(range(1, len(orders) + 1))


def test_the_readme_shows_the_table() -> None:
    text = lint_rules.README.read_text(encoding="utf-8")
    assert text == lint_rules.page(text), "run python -m scripts.docs.lint_rules"
