"""Settings of query performance prediction."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class QueryPerformanceTask(TaskSettings):
    """Prediction of a ranker's quality on a query, from the query and its top passages; labels from 0 to 1."""

    name: Literal["query-performance"] = Field(default="query-performance", description="name of the task")
    loss: Literal["mse", "pairwise"] = Field(
        default="mse", description="mse: to the label; pairwise: over the order of a batch's queries"
    )
    metric: Literal["ndcg", "kendall", "spearman"] = Field(
        default="ndcg", description="dev metric that selects the best step"
    )


QUERY_PERFORMANCE = TaskSpec(
    QueryPerformanceTask,
    "sqat.tasks.query_performance",
    columns=("text", "text_pair", "label"),
    output_losses=("mse",),
    streamable=True,
)
