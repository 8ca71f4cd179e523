"""Names, parts with their own code, wrong arguments, and the public names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sqat
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relations import QKV
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.histogram import Histogram
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules.sr_ste import SrSte
from tests.api.conftest import Batches
from tests.errors import raises_code
from tests.tiny import MakeModel


class OwnPercentile(Percentile):
    def __call__(self, histogram: Histogram) -> float:
        return 1.0


class OwnWanda(Wanda):
    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        return weight


class OwnRelations(MiniLMv2):
    def __call__(self, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        return student.query.sum()


def test_subclasses_of_our_parts_run_their_own_code(model: Any, make_model: MakeModel, batches: Batches) -> None:
    assert {float(amax) for amax in sqat.calibrate(model, batches, method=OwnPercentile()).amax.values()} == {1.0}
    with sqat.distillation_loss(model, make_model().eval(), OwnRelations()) as loss:
        model(**batches[0])
        assert loss(batches[0]).isfinite()
    dense = copy.deepcopy(model)
    for name, mask in sqat.prune(model, criterion=OwnWanda(), batches=batches).kept.items():
        assert torch.equal(mask, nm_mask(dense.get_submodule(name).weight.detach(), parse_pattern("2:4")))


def test_wrong_arguments_are_refused(model: Any, make_model: MakeModel, batches: Batches) -> None:
    masks = sqat.prune(model)
    for wrong in (
        lambda: sqat.prune(model, criterion="magnitud"),  # type: ignore[arg-type]
        lambda: sqat.Pruner(model, 4, schedule="per-groups"),  # type: ignore[arg-type]
        lambda: sqat.calibrate(model, batches, method="percentil"),  # type: ignore[arg-type]
        lambda: sqat.calibrate(model, batches, placement="linea"),  # type: ignore[arg-type]
    ):
        with raises_code("unknown-name", "; did you mean '(magnitude|per-group|percentile|linear)'"):
            wrong()
    for schedule in (SrSte(), "sr-ste"):
        with raises_code("usage"):
            sqat.Pruner(model, 4, schedule=schedule)  # type: ignore[arg-type]
    with raises_code("usage"):
        sqat.prune(model, criterion=3)  # type: ignore[arg-type]
    with raises_code("usage"):
        sqat.calibrate(model, batches, method=None)  # type: ignore[arg-type]
    with raises_code("no-rows"):
        sqat.calibrate(model, [])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sqat.Pruner(model, 0)
    with pytest.raises(ValueError, match="recovery_fraction must lie in"):
        sqat.Pruner(model, 4, recovery_fraction=1.0)
    other = make_model("distilbert")
    with raises_code("model-mismatch"), sqat.masked(other, masks):
        pass
    with (
        raises_code("model-mismatch"),
        sqat.quantized(other, None, sqat.calibrate(model, batches)),
    ):
        pass
    with (
        raises_code("model-mismatch"),
        sqat.masked(make_model(hidden_size=48), masks),
    ):
        pass


@pytest.mark.parametrize("name", sqat.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(sqat, name).__doc__ or "").strip()
    assert name in dir(sqat)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        sqat.prnue  # type: ignore[attr-defined]  # noqa: B018
