"""The tasks of a recipe: what a model learns, with which loss, and which dev metric counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from sqat.recipe.fields import STRICT, Short


class ClassificationTask(BaseModel):
    """Classification of one or two texts, or of images."""

    model_config = STRICT

    name: Literal["classification", "image-classification"] = Field(
        default="classification", description="name of the task"
    )
    labels: tuple[str, ...] | None = Field(
        default=None, description="label names in order; default: sorted, from train"
    )
    metric: Literal["accuracy", "f1"] = Field(default="accuracy", description="dev metric that selects the best step")


class RegressionTask(BaseModel):
    """Regression from one or two texts."""

    model_config = STRICT

    name: Literal["regression"] = Field(default="regression", description="name of the task")
    metric: Literal["spearman", "pearson"] = Field(
        default="spearman", description="dev metric that selects the best step"
    )


class QueryPerformanceTask(BaseModel):
    """Prediction of a ranker's quality on a query, from the query and its top passages; labels from 0 to 1."""

    model_config = STRICT

    name: Literal["query-performance"] = Field(default="query-performance", description="name of the task")
    loss: Literal["mse", "pairwise"] = Field(
        default="mse", description="mse: to the label; pairwise: over the order of a batch's queries"
    )
    metric: Literal["ndcg", "kendall", "spearman"] = Field(
        default="ndcg", description="dev metric that selects the best step"
    )


class RelevanceTask(BaseModel):
    """Ranking of passages for a query by a cross-encoder; labels are grades, 0 = not relevant."""

    model_config = STRICT

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


class RetrievalTask(BaseModel):
    """Search by a bi-encoder: queries and passages become vectors; labels are grades, 0 = not relevant."""

    model_config = STRICT

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


class TextToImageTask(BaseModel):
    """Image generation from captions by rectified flow; data.columns.text is the caption."""

    model_config = STRICT

    name: Literal["text-to-image"] = Field(default="text-to-image", description="name of the task")
    metric: Literal["explained"] = Field(default="explained", description="dev metric that selects the best step")


Task = Annotated[
    ClassificationTask | RegressionTask | QueryPerformanceTask | RelevanceTask | RetrievalTask | TextToImageTask,
    Field(discriminator="name"),
    Short("name"),
]
