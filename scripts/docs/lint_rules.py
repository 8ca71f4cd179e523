"""Write the rule table of sqat/lint/README.md from the rules themselves.

python scripts/docs/lint_rules.py
"""

from __future__ import annotations

from pathlib import Path

from sqat.lint.rules.table import RULES, TARGETS, Rule

README = Path(__file__).parents[2] / "sqat" / "lint" / "README.md"
START, END = "<!-- rules -->\n", "<!-- end of rules -->\n"
SEVERITIES = {"E": "error", "W": "warning", "-": ""}


def main() -> None:
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(README)


def page(text: str) -> str:
    """The page with today's table."""
    head, _, rest = text.partition(START)
    return f"{head}{START}{table()}{END}{rest.partition(END)[2]}"


def table() -> str:
    """A row per rule."""
    columns = ["rule", "a file must have", *TARGETS, "what to do", "file"]
    lines = [columns, ["---"] * len(columns), *(row(rule) for rule in RULES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row(rule: Rule) -> list[str]:
    """The cells of one rule."""
    file = f"{rule.check.__module__.rpartition('.')[2]}.py"
    advice = rule.advice.replace("--fix", "`--fix`")
    return [rule.id, rule.requirement, *(SEVERITIES[severity] for severity in rule.severities), advice,
            f"[{file}](rules/{file})"]  # fmt: skip


if __name__ == "__main__":
    main()
