"""Settings of retrieval: search by embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class RetrievalTask(TaskSettings):
    """Search by a bi-encoder: queries and passages become vectors; labels are grades, 0 = not relevant."""

    name: Literal["retrieval"] = Field(default="retrieval", description="name of the task")
    relevant_from: float = Field(default=1.0, gt=0, description="lowest grade that makes a passage a positive")
    negatives: int = Field(default=1, ge=0, description="hard negatives of a query in its batch, drawn anew each epoch")
    temperature: float = Field(default=0.05, gt=0, le=10, description="divisor of the cosines in the loss")
    pooling: Literal["mean", "cls", "max"] | None = Field(
        default=None, description="how tokens become one vector; default: that of the source, else mean"
    )
    metric: Literal["ndcg@10", "recall@1", "recall@10", "mrr@10", "rerank-ndcg@10", "pnr"] = Field(
        default="ndcg@10", description="dev metric that selects the best step"
    )

    def rows_per_group(self) -> int:
        return 2 + self.negatives


RETRIEVAL = TaskSpec(
    RetrievalTask,
    "sqat.tasks.retrieval",
    columns=("query", "passage", "label", "group", "candidates"),
    output_losses=("cosine", "l2", "similarities"),
)
