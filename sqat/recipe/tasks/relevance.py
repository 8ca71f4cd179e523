"""Settings of relevance: ranking passages for a query."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class RelevanceTask(TaskSettings):
    """Ranking of passages for a query by a cross-encoder; labels are grades, 0 = not relevant."""

    name: Literal["relevance"] = Field(default="relevance", description="name of the task")
    loss: Literal["pointwise", "pairwise"] = Field(
        default="pairwise", description="pointwise: each pair alone; pairwise: over the passages of a query"
    )
    relevant_from: float = Field(default=1.0, gt=0, description="lowest grade that counts as relevant")
    candidates: int | None = Field(default=None, ge=2, description="candidates of a query used per training epoch")
    highest: float | None = Field(
        default=None, gt=0, le=100, description="highest possible grade; default: the highest of train"
    )
    metric: Literal["ndcg@10", "pnr", "mrr", "accuracy", "auc", "pair-accuracy"] = Field(
        default="ndcg@10", description="dev metric that selects the best step"
    )

    @model_validator(mode="after")
    def check_metric_and_grades(self) -> RelevanceTask:
        if self.metric == "pair-accuracy" and self.loss == "pairwise":
            raise ValueError("metric pair-accuracy needs loss pointwise: a pairwise loss fixes no zero of the logit")
        if self.highest is not None and self.relevant_from > self.highest:
            raise ValueError("relevant_from is above highest, so nothing could be relevant")
        return self

    def metric_names(self) -> list[str]:
        names = super().metric_names()
        return names if self.loss == "pointwise" else [name for name in names if name != "pair-accuracy"]


RELEVANCE = TaskSpec(
    RelevanceTask,
    "sqat.tasks.relevance",
    columns=("query", "passage", "label", "group", "candidates"),
    output_losses=("mse", "listwise", "margin-mse"),
)
