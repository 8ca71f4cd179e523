"""Write the rule table of sqat/lint/README.md from the rules themselves.

python -m scripts.docs.lint_rules
"""

from __future__ import annotations

from pathlib import Path

from scripts.docs.blocks import replace_block, table
from sqat.lint.rules.table import RULES, TARGETS, Rule

README = Path(__file__).parents[2] / "sqat" / "lint" / "README.md"
SEVERITIES = {"E": "error", "W": "warning", "-": ""}


def main() -> None:
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(README)


def page(text: str) -> str:
    """Return the page with today's table, a row for each rule."""
    columns = ["rule", "a file must have", *TARGETS, "what to do", "file"]
    return replace_block(text, "rules", table(columns, [row(rule) for rule in RULES]) + "\n")


def row(rule: Rule) -> list[str]:
    """Return the cells of one rule."""
    file = f"{rule.check.__module__.rpartition('.')[2]}.py"
    advice = rule.advice.replace("--fix", "`--fix`")
    return [rule.id, rule.requirement, *(SEVERITIES[severity] for severity in rule.severities), advice,
            f"[{file}](rules/{file})"]  # fmt: skip


if __name__ == "__main__":
    main()
