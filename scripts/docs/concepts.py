"""Draw recipes/figures: what 2:4 is, how sparsity grows, the paths through the stages; by sqat's own masks and steps.

python scripts/docs/concepts.py      # needs matplotlib: pip install "sqat[report]"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch

from sqat.recipe.stages import PruneConfig
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules.group_fraction import GroupFraction
from sqat.sparsity.schedules.per_group import PerGroup

FOLDER = Path(__file__).parents[2] / "recipes" / "figures"
INK, STAYS, GOES, TEACHES = "#30363d", "#e08214", "#f2f2f2", "#2c7bb6"
STEPS = 300


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "sqat", "font.size": 9, "text.color": INK, "axes.labelcolor": INK}
    FOLDER.mkdir(exist_ok=True)
    for name, draw in {"pattern": draw_pattern, "schedules": draw_schedules, "paths": draw_paths}.items():
        draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def pattern_parts() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [8,16] and the mask that magnitude gives them."""
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    return weights, nm_mask(weights.abs(), parse_pattern("2:4"))


def draw_pattern() -> Any:
    """A weight, its 2:4 mask, and what is stored of it: half of the values and where they stood."""
    weights, mask = pattern_parts()
    stays = weights[mask].view(8, 8)
    places = (torch.arange(16).expand(8, 16)[mask] % 4).view(8, 8)
    figure = new_figure(9, 2.5)
    panels = figure.subplots(1, 4, width_ratios=[16, 16, 8, 8])
    limits = {"cmap": "PuOr_r", "vmin": -2.5, "vmax": 2.5, "edgecolors": "white", "linewidth": 1}
    panels[0].pcolormesh(weights, **limits)
    panels[1].pcolormesh(weights.where(mask, torch.tensor(float("nan"))), **limits)
    panels[2].pcolormesh(stays, **limits)
    panels[3].pcolormesh(torch.zeros(8, 8), **{**limits, "cmap": "Greys", "vmin": -0.1, "vmax": 1.0})
    for row in range(8):
        for column in range(8):
            panels[3].text(column + 0.5, row + 0.5, int(places[row, column]), ha="center", va="center", fontsize=8)
    titles = ("a weight [outputs, inputs]", "2:4: two of four neighbours stay", "the values", "and their places")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.invert_yaxis()
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    for panel in panels[:2]:
        for group in range(4, 16, 4):
            panel.axvline(group, color=INK, linewidth=0.8)
    return figure


def growth(config: PruneConfig) -> tuple[list[int], list[float]]:
    """Steps and the sparsity from each on, to the end."""
    sparsities = config.schedule.sparsities(parse_pattern(config.pattern))
    moments = sorted(config.schedule.mask_steps(STEPS, config.recovery_fraction).items())
    return [0, *(step for step, _ in moments), STEPS], [0.0, *(sparsities[index] for _, index in moments), 0.5]


def draw_schedules() -> Any:
    """Sparsity over the steps of a prune stage, for the schedules of a recipe."""
    shown: Mapping[str, PruneConfig] = {
        "per-group, num_masks: 1 (one-shot)": PruneConfig(schedule=PerGroup(num_masks=1)),
        "per-group, num_masks: 2, recovery_fraction: 0.8": PruneConfig(schedule=PerGroup(num_masks=2)),
        "per-group, num_masks: 2, recovery_fraction: 0.5": PruneConfig(
            schedule=PerGroup(num_masks=2), recovery_fraction=0.5
        ),
        "group-fraction, num_masks: 4, recovery_fraction: 0.5": PruneConfig(
            schedule=GroupFraction(num_masks=4), recovery_fraction=0.5
        ),
    }
    figure = new_figure(6, 2.5)
    panel = figure.subplots()
    for (label, config), colour in zip(shown.items(), ("#999999", STAYS, TEACHES, "#5aae61"), strict=True):
        steps, sparsities = growth(config)
        panel.step(steps, [100 * each for each in sparsities], where="post", label=label, color=colour, linewidth=1.6)
    panel.set_xlabel(f"step of {STEPS}")
    panel.set_ylabel("zeros, %")
    panel.set_ylim(0, 55)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_paths() -> Any:
    """Three ways from a pretrained model to a file, in one recipe: dense int8, sparse int8, and sparse with QAT."""
    figure = new_figure(9, 2.7)
    panel = figure.subplots()
    boxes = {
        "pretrained": (0, 1), "train": (1.35, 1), "calibrate": (4.05, 2), "export: dense int8": (6.9, 2),
        "prune": (2.7, 0.5), "calibrate ": (4.05, 1), "export: sparse int8": (6.9, 1),
        "calibrate  ": (4.05, 0), "qat": (5.4, 0), "export: sparse int8 by QAT": (6.9, 0),
    }  # fmt: skip
    arrows = [("pretrained", "train"), ("train", "calibrate"), ("calibrate", "export: dense int8"), ("train", "prune"),
              ("prune", "calibrate "), ("calibrate ", "export: sparse int8"), ("prune", "calibrate  "),
              ("calibrate  ", "qat"), ("qat", "export: sparse int8 by QAT")]  # fmt: skip
    wide = {name: 2.0 if name.startswith("export") else 1.0 for name in boxes}
    for name, (x, y) in boxes.items():
        sparse = name.startswith(("prune", "qat")) or "sparse" in name or name.endswith(" ")
        style: dict[str, Any] = {
            "boxstyle": "round,pad=0.02",
            "facecolor": "#fdf0e0" if sparse else GOES,
            "edgecolor": INK,
        }
        patch = matplotlib.patches.FancyBboxPatch((x, y - 0.2), wide[name], 0.4, linewidth=0.8, **style)
        panel.add_patch(patch)
        panel.text(x + wide[name] / 2, y, name.strip(), ha="center", va="center", fontsize=8.5)
    for start, end in arrows:
        tail, head = (boxes[start][0] + wide[start] + 0.03, boxes[start][1]), (boxes[end][0] - 0.03, boxes[end][1])
        panel.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.9})
    for end, bend in (("prune", 0.35), ("qat", 0.28)):
        head = (boxes[end][0] + 0.5, boxes[end][1] - 0.23)
        line = {"arrowstyle": "->", "color": TEACHES, "linestyle": "--", "linewidth": 1.1,
                "connectionstyle": f"arc3,rad={bend}"}  # fmt: skip
        panel.annotate("", head, (boxes["train"][0] + 0.5, boxes["train"][1] - 0.23), arrowprops=line)
    panel.text(0, -0.6, "dashed: the dense model teaches (MiniLM)", color=TEACHES, fontsize=8.5)
    panel.set_xlim(-0.1, 9)
    panel.set_ylim(-0.75, 2.35)
    panel.axis("off")
    return figure


if __name__ == "__main__":
    main()
