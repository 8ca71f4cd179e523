"""Write recipes/FAMILIES.md, what works with which family of models, from recipes/families.json.

python -m scripts.docs.families

`scripts/families/table` measures that file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.docs.blocks import table
from scripts.families.expected import Refusal, expected_refusal
from scripts.families.registry import FAMILIES, SECTIONS
from scripts.families.trial import fits
from scripts.families.verdicts import failures, unexpected
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.targets import TARGETS

RECIPES = Path(__file__).parents[2] / "recipes"
PAGE, RECORDS = RECIPES / "FAMILIES.md", RECIPES / "families.json"
HEAD = """\
# Families of models

Made by `scripts/docs/families.py` from `recipes/families.json`, which `scripts/families/table` measures; do not edit.

Each family of transformers {transformers} is built tiny, from a configuration with random weights. `sqat run` takes it
through train, prune, calibrate, qat and export, once with each placement and each target that goes with it. Each
exported file passes its rules and agrees with torch in ONNX Runtime. {counts}

- **works**: every target of the placement works ({targets}).
- **not** a target: `sqat run` refuses it in one line before the first step. The number leads to the reason.
- **fault**: it should work, or be refused earlier; the last table says how it ends.
- distillation: qat learns by MiniLM, the default; *outputs* where the model has no q, k and v that can be compared:
  set `distill: {{minilm_weight: 0, output_weight: 1}}`.
- left in float: linears and convolutions that stay float by default, of all, and sites of the placement `tensorrt`
  where attention stays float. The reasons stand in each checkpoint's `sqat.json`.
"""
COLUMNS = ("family", *PLACEMENTS, "distillation", "left in float")
OUTSIDE = "outside the encoder blocks (rule B8)"  # true of every transformer: poolers and heads
LONGEST = 240  # of a line about a fault
Entry = Mapping[str, Any]


def main() -> None:
    PAGE.write_text(page(json.loads(RECORDS.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE)


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report."""
    entries, notes = {entry["name"]: entry for entry in report["families"]}, list[str]()
    parts = [HEAD.format(transformers=report["transformers"], counts=counts(entries), targets=targets_of_placements())]
    for title, families in SECTIONS.items():
        rows = [row(entries[family.name], notes) for family in families if family.name in entries]
        if rows:
            parts += [f"## {title}", table(COLUMNS, rows)]
    if notes:
        parts += ["## Reasons", "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))]
    if faults := [[name, line[:LONGEST]] for name, entry in entries.items() for line in failures(entry)]:
        parts += ["## Faults", table(("family", "how it ends"), faults)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def counts(entries: Mapping[str, Entry]) -> str:
    """Say how many families there are, how many have a fault, and of which commits."""
    kinds = [FAMILIES[name].kind for name in entries]
    bad = sum(bool(failures(entry)) for entry in entries.values())
    commits = ", ".join(dict.fromkeys(f"`{entry['commit']}`" for entry in entries.values()))
    missing = ", ".join(name for name in FAMILIES if name not in entries)
    return (
        f"{kinds.count('text')} families read texts and {kinds.count('image')} images; {bad or 'none'} of them "
        f"{'have' if bad != 1 else 'has'} a fault. Measured at commit {commits}."
        f"{f' Not measured yet: {missing}.' if missing else ''}"
    )


def targets_of_placements() -> str:
    """Say which targets are tried with which placement."""
    return "; ".join(
        f"{placement}: {', '.join(f'`{target}`' for target in TARGETS if fits(target, placement))}"
        for placement in PLACEMENTS
    )


def row(entry: Entry, notes: list[str]) -> list[str]:
    """Return the cells of one family; new reasons are added to the notes."""
    name = entry["name"]
    title = name if entry.get("model_type", name) == name else f"{name} (`{entry['model_type']}`)"
    if "died" in entry:
        return [title, *["**fault**"] * len(PLACEMENTS), "", ""]
    cells = [placement_cell(name, placement, entry["placements"].get(placement, {}), notes) for placement in PLACEMENTS]
    return [title, *cells, distillation_cell(entry, notes), "; ".join(left_in_float(entry))]


def placement_cell(name: str, placement: str, result: Mapping[str, Any], notes: list[str]) -> str:
    """Say which targets of a placement work."""
    ends = result.get("targets", {})
    refused, faulty = dict[int, list[str]](), list[str]()
    for target, outcome in ends.items():
        refusal = expected_refusal(name, placement, target)
        if unexpected(outcome, refusal):
            faulty.append(target)
        elif refusal:
            refused.setdefault(note_of(refusal, notes), []).append(target)
    parts = ["**fault**" if len(faulty) == len(ends) else f"**fault**: {', '.join(faulty)}"] if faulty else []
    for number, targets in refused.items():
        parts.append(f"refused ({number})" if len(targets) == len(ends) else f"not {', '.join(targets)} ({number})")
    return "; ".join(parts) or ("works" if ends else "")


def note_of(refusal: Refusal, notes: list[str]) -> int:
    """Return the number of the reason of a refusal."""
    if refusal.reason not in notes:
        notes.append(refusal.reason)
    return notes.index(refusal.reason) + 1


def distillation_cell(entry: Entry, notes: list[str]) -> str:
    """Say what qat learns from the dense model; nothing where it is never reached."""
    outcome, refusal = entry["distillation"], expected_refusal(entry["name"], "qat", "distillation")
    if not any("float" in result for result in entry["placements"].values()):
        return ""
    if unexpected(outcome, refusal):
        return "**fault**"
    return f"outputs ({note_of(refusal, notes)})" if refusal else "MiniLM"


def left_in_float(entry: Entry) -> Iterator[str]:
    """Yield what stays float beside poolers and heads, as the first placement that was calibrated says."""
    calibrated = [result for result in entry["placements"].values() if "float" in result]
    reasons: Mapping[str, int] = calibrated[0]["float"] if calibrated else {}
    if reasons:
        yield f"{sum(reasons.values())} of {entry['layers']} layers"
    yield from (f"{count} {reason}" for reason, count in reasons.items() if reason != OUTSIDE)
    if any("no attention interface" in note for result in calibrated for note in result["notes"]):
        yield "attention products"


if __name__ == "__main__":
    main()
