"""Tasks as a recipe names them: one file of settings a task; losses and metrics are in `sqat.tasks`.

The recipe's section ``task``, its checks and the reference page follow from `TASKS`.
"""

from __future__ import annotations

from typing import Annotated

from sqat.recipe.fields import OneOf
from sqat.recipe.tasks.classification import CLASSIFICATION, IMAGE_CLASSIFICATION
from sqat.recipe.tasks.classification import ClassificationTask as ClassificationTask
from sqat.recipe.tasks.query_performance import QUERY_PERFORMANCE
from sqat.recipe.tasks.query_performance import QueryPerformanceTask as QueryPerformanceTask
from sqat.recipe.tasks.regression import REGRESSION
from sqat.recipe.tasks.regression import RegressionTask as RegressionTask
from sqat.recipe.tasks.relevance import RELEVANCE
from sqat.recipe.tasks.relevance import RelevanceTask as RelevanceTask
from sqat.recipe.tasks.retrieval import RETRIEVAL
from sqat.recipe.tasks.retrieval import RetrievalTask as RetrievalTask
from sqat.recipe.tasks.spec import TaskSettings as TaskSettings
from sqat.recipe.tasks.spec import TaskSpec as TaskSpec
from sqat.recipe.tasks.text_to_image import TEXT_TO_IMAGE
from sqat.recipe.tasks.text_to_image import TextToImageTask as TextToImageTask

TASKS: dict[str, TaskSpec] = {
    "classification": CLASSIFICATION,
    "image-classification": IMAGE_CLASSIFICATION,
    "regression": REGRESSION,
    "query-performance": QUERY_PERFORMANCE,
    "relevance": RELEVANCE,
    "retrieval": RETRIEVAL,
    "text-to-image": TEXT_TO_IMAGE,
}

Task = Annotated[TaskSettings, OneOf(tuple(dict.fromkeys(spec.settings for spec in TASKS.values())))]
