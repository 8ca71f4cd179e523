"""The applications of the page: their rows, metrics, goals and input sizes.

A goal compares the last row that was run with a dense one, seed by seed. A point is 0.01 of a metric between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE = "dense fp32"
FLOOR = 0.005  # no column that is a share may end further below the dense fp32 model
RATIOS = frozenset({"pnr"})  # columns that are no share of 1, and so have no points


def rows_of(low: str) -> tuple[str, ...]:
    """The rows of an application whose small models are ``low`` (int8 or fp16)."""
    ways = ("one-shot", "progressive", "progressive + distillation")
    return (DENSE, f"dense {low}", *(f"sparse {low} ({way})" for way in ways))


@dataclass(frozen=True)
class Goal:
    """The last row's metric is to be at or above that of the row ``against``."""

    metric: str
    against: str = DENSE


@dataclass(frozen=True)
class Display:
    """How a recipe is shown.

    Attributes:
        rows: those wanted, in order; more that a run has come after them.
        metrics: the columns, in order; none: all that a run has. What else was measured is in results.json.
        sizes: (batch, tokens) that latency is measured at; None where the input has no tokens.
    """

    title: str
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    sizes: tuple[tuple[int, int | None], ...] = ((8, 64),)


def display_of(name: str) -> Display:
    """How to show a recipe; one that is no application is shown as it is, without goals."""
    return APPLICATIONS.get(name, Display(name, (), ()))


def title(metric: str) -> str:
    """A metric as the page calls it."""
    return TITLES.get(metric, metric)


TITLES = {
    "pnr": "PNR",
    "ndcg": "NDCG",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "mrr@10": "MRR@10",
    "auc": "AUC",
    "kendall": "Kendall's tau",
    "recall@1": "Recall@1",
    "recall@10": "Recall@10",
    "explained": "variance explained",
}
INT8, FP16 = rows_of("int8"), rows_of("fp16")
PNR = Goal("pnr", "dense int8")
RANKING = ("pnr", "ndcg@10", "mrr", "auc")
FOUND = ("recall@1", "recall@10", "ndcg@10", "mrr@10", "pnr")
APPLICATIONS: dict[str, Display] = {
    "relevance-pnr": Display("Relevance, judged by PNR", INT8, RANKING, (PNR, Goal("ndcg@10"))),
    "relevance-accuracy": Display(
        "Relevance, judged by accuracy", INT8, ("accuracy", "auc", "ndcg@10"), (Goal("accuracy"), Goal("ndcg@10"))
    ),
    "query-performance": Display(
        "Query performance prediction", FP16, ("ndcg", "kendall"), (Goal("ndcg"),), ((8, 96),)
    ),
    "retrieval": Display("Document retrieval", INT8, FOUND, (Goal("recall@10"), Goal("ndcg@10"), PNR)),
    "text-to-image": Display("Text to image", FP16, ("explained",), (Goal("explained"),), ((1, None), (8, None))),
    "digits": Display("Digits, a convolutional net", INT8, ("accuracy",), (Goal("accuracy"),), ((8, None),)),
    "emoji-vit": Display("Emoji, a vision transformer", INT8, ("accuracy",), (Goal("accuracy"),), ((8, None),)),
}
