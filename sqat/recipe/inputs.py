"""What a recipe starts from: the model, the files of its splits and their columns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from sqat.recipe.fields import STRICT, Sha256, Short


class ModelConfig(BaseModel):
    """The model to start from: pretrained weights, or a configuration with random weights."""

    model_config = STRICT

    source: str | None = Field(default=None, description="a folder, a hub name, or package:NAME/FOLDER")
    config: dict[str, Any] | None = Field(default=None, description="library configuration; the weights are random")
    text_encoder: str | None = Field(default=None, description="encoder of captions; a source like model.source")
    revision: str | None = Field(default=None, description="hub revision; a commit makes the run repeatable")
    sha256: Sha256 | None = Field(default=None, description="digest that the weights file must have")
    max_length: int = Field(default=128, ge=4, le=8192, description="tokens to which a text (or pair) is truncated")
    head: Literal["by-name", "in-order", "new"] = Field(
        default="by-name",
        description="a classifier's outputs go to the labels of their names; in-order: to the labels in their order; "
        "new: the head starts afresh",
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="replaces every dropout rate of the model")

    @model_validator(mode="after")
    def check_one_start(self) -> ModelConfig:
        if (self.source is None) == (self.config is None):
            raise ValueError("source and config exclude each other: give exactly one of them")
        return self

    @property
    def label(self) -> str:
        """Name of the model in a checkpoint: its source, or the type that its config names."""
        config = self.config or {}
        return self.source or str(config.get("model_type") or config.get("_class_name") or "config")


class SplitConfig(BaseModel):
    """One split: a local file (JSONL, CSV, Parquet, Arrow, optionally .gz) or a split of a hub data set."""

    model_config = STRICT

    path: str | None = Field(
        default=None,
        description="file, relative to the recipe; its ending gives the format; streamed, also a glob of files",
    )
    hub: str | None = Field(default=None, description="data set name on the hub")
    config: str | None = Field(default=None, description="hub configuration name")
    split: str | None = Field(default=None, description="hub split name; default: this split's own name")
    revision: str | None = Field(default=None, description="hub revision")
    limit: int | None = Field(default=None, ge=1, description="keep the first N rows or queries")
    streaming: bool = Field(default=False, description="read train rows during training, in constant memory")
    buffer: int = Field(default=16384, ge=1, description="rows that are shuffled together in a streamed split")

    @model_validator(mode="after")
    def check_one_source(self) -> SplitConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("path and hub exclude each other: give exactly one of them")
        for key in ("config", "split", "revision"):
            if self.path is not None and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to hub, not to path")
        if "buffer" in self.model_fields_set and not self.streaming:
            raise ValueError("buffer belongs to streaming: true")
        return self


Split = Annotated[SplitConfig, Short("path")]


class Columns(BaseModel):
    """The column of each field; the defaults are the names of the fields."""

    model_config = STRICT

    text: str = Field(default="text", description="text of classification and regression")
    text_pair: str | None = Field(default=None, description="second text of classification and regression")
    image: str = Field(default="image", description="image: pixels in a .npz, else the path of an image file")
    label: str = Field(default="label", description="class, score or grade; in the row or in each candidate")
    query: str = Field(default="query", description="query of relevance and retrieval")
    passage: str = Field(default="text", description="passage column, in the row or in each candidate")
    group: str | None = Field(default=None, description="query id that ties rows into a group; default: the query text")
    candidates: str | None = Field(default=None, description="list of candidates nested in a row of relevance data")


class Augment(BaseModel):
    """Random changes of training images; evaluation uses the images as they are."""

    model_config = STRICT

    shift: int = Field(default=0, ge=0, description="largest shift of an image in pixels, in each direction")
    flip: bool = Field(default=False, description="mirror half of the images left to right")


class DataConfig(BaseModel):
    """The three splits; dev is measured after every stage, test once at the end."""

    model_config = STRICT

    train: Split = Field(description="rows to learn from; a bare text is its path")
    dev: Split = Field(description="rows measured after every stage")
    test: Split | None = Field(default=None, description="rows measured once, at the end; default: dev")
    columns: Columns = Field(default=Columns(), description="names of the columns")
    augment: Augment | None = Field(default=None, description="random changes of training images; default: none")
