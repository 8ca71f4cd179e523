"""Image classifiers through every stage and ONNX target: two convolutional nets and a ViT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForImageClassification

from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.cli import main
from sqat.models.loading import build
from sqat.pipeline.runner import run
from sqat.recipe.loader import load_recipe
from sqat.runtime.sessions import find_float_products, optimized_graph
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern
from tests.onnx_graphs import count_operators
from tests.pipeline.shipped import RECIPES, run_shipped
from tests.tiny import Recorder

pytestmark = pytest.mark.pipeline
SIDE = 16
NETS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
               "downsample_in_first_stage": False},
    "mobilenet_v1": {"depth_multiplier": 0.25, "tf_padding": False},
    "vit": {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64},
}  # fmt: skip
OUTPUTS_ONLY = "{minilm_weight: 0, output_weight: 1}"
DISTILL = {"resnet": OUTPUTS_ONLY, "mobilenet_v1": OUTPUTS_ONLY, "vit": "{loss: minilm-v2}"}
RECIPE = """model: {config: CONFIG}
task: image-classification
data: {train: train.npz, dev: dev.npz, test: test.npz, columns: {image: x, label: y}, augment: {shift: 1}}
stages:
  train: {steps: 30, learning_rate: 5.0e-3}
  prune: {steps: 12, learning_rate: 2.0e-3, distill: DISTILL}
  calibrate: {samples: 64}
  qat: {steps: 4, learning_rate: 1.0e-4, distill: DISTILL}
  export: {targets: [onnx-int8, onnx-fp32, onnx-fp16], max_disagreement: 0.05}
results: {dense: train, sparse int8: export/onnx-int8}
"""


def write_images(path: Path, count: int, seed: int, side: int = SIDE, channels: int = 3) -> None:
    """Noise with a bright bar: at the left (0), at the right (1) or across (2)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, side, side, channels)).astype(np.uint8)
    third = side // 3
    images[labels == 0, :, :third] = 250
    images[labels == 1, :, -third:] = 250
    images[labels == 2, third : 2 * third] = 250
    np.savez(path, x=images, y=labels)


class ImageRun:
    """The finished run of one network."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        for seed, (split, count) in enumerate((("train", 240), ("dev", 60), ("test", 60))):
            write_images(folder / f"{split}.npz", count, seed)
        config = json.dumps({"model_type": name, "image_size": SIDE, "num_channels": 3, **NETS[name]})
        recipe = folder / "tiny.yaml"
        recipe.write_text(RECIPE.replace("CONFIG", config).replace("DISTILL", DISTILL[name]))
        self.rows = run(load_recipe(recipe, [f"output={folder / 'runs'}"]), Recorder())
        self.stages = {path.name[3:]: path for path in (folder / "runs/tiny").glob("??-*")}

    def checkpoint(self, stage: str) -> Checkpoint:
        return load_checkpoint(self.stages[stage])

    @property
    def int8(self) -> Path:
        return self.stages["export"] / "model.int8.onnx"


@pytest.fixture(scope="module", params=NETS)
def image_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageRun:
    """Run the recipe; its export stage compares each file with the torch model."""
    torch.set_num_threads(1)
    return ImageRun(request.param, tmp_path_factory.mktemp(request.param))


def test_the_task_is_learned(image_run: ImageRun) -> None:
    if image_run.name != "mobilenet_v1":  # thirty steps are too few for its 27 layers
        assert image_run.checkpoint("train").manifest.metrics["dev"]["accuracy"] > 0.5  # one in three by chance
    metrics = image_run.checkpoint("export").manifest.metrics
    assert set(metrics) >= {"dev onnx-int8", "dev onnx-fp32", "dev onnx-fp16"}


def test_every_quantized_convolution_is_int8_in_onnx_runtime(image_run: ImageRun) -> None:
    graph = optimized_graph(image_run.int8)
    layers = image_run.checkpoint("export").manifest.layers
    quantized = [name for name, record in layers.items() if record.quantized]
    assert find_float_products(graph) == []
    if image_run.name == "vit":
        assert len(quantized) == 12
    else:
        assert count_operators(graph)["QLinearConv"] == len(quantized) > 3


def test_int8_weights_are_sparse_along_the_input_channels(image_run: ImageRun) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(image_run.int8).graph.initializer}
    layers = image_run.checkpoint("export").manifest.layers
    pruned = [name for name, record in layers.items() if record.pattern]
    assert pruned
    for name in pruned:
        weight = torch.from_numpy(stored[f"{name}.weight_int8"].copy()).float()
        weight = weight if image_run.name != "vit" else weight.t()
        assert not count_violations(weight, parse_pattern("2:4")), name


STEMS = {
    "resnet": ("resnet.embedder.embedder.convolution", "first or last layer of the network"),
    "mobilenet_v1": ("mobilenet_v1.conv_stem.convolution", "first or last layer of the network"),
    "vit": ("vit.embeddings.patch_embeddings.projection", "outside the encoder blocks"),
}


def test_untreated_layers_have_a_reason(image_run: ImageRun, capsys: pytest.CaptureFixture[str]) -> None:
    records = image_run.checkpoint("export").manifest.layers
    reasons = {name: (record.dense_because, record.float_because) for name, record in records.items()}
    stem, reason = STEMS[image_run.name]
    assert all(text.startswith(reason) for text in reasons[stem])
    grouped = [name for name, texts in reasons.items() if all(text.startswith("grouped conv") for text in texts)]
    assert len(grouped) == (13 if image_run.name == "mobilenet_v1" else 0)
    assert main(["inspect", str(image_run.stages["prune"])]) == 0
    assert ("grouped convolution" in " ".join(capsys.readouterr().out.split())) == bool(grouped)


@pytest.mark.parametrize("stage", ["prune", "qat"])
def test_transformers_loads_the_checkpoint_and_computes_the_same(image_run: ImageRun, stage: str) -> None:
    theirs = AutoModelForImageClassification.from_pretrained(image_run.stages[stage]).eval()
    ours, _ = build(image_run.checkpoint(stage))
    x = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(pixel_values=x).logits, ours(pixel_values=x).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    names = {type(module).__name__ for module in ours.modules()}
    assert ("FoldedNorm" in names) == (stage == "qat" and image_run.name != "vit")


def test_inspect_says_how_the_file_runs(image_run: ImageRun, capsys: pytest.CaptureFixture[str]) -> None:
    layers = image_run.checkpoint("export").manifest.layers.values()
    assert main(["inspect", str(image_run.int8), "--target", "onnx-int8"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    count = sum(record.quantized for record in layers)
    total = len(layers)
    assert f"{count} of {total} layers will run in int8" in output


@pytest.mark.parametrize("recipe", ["digits", "emoji-vit"])
def test_shipped_image_recipes_run(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe as shipped but for the data files, the depth of a transformer and the number of steps."""
    torch.set_num_threads(1)
    loaded = load_recipe(RECIPES[recipe]).recipe
    assert loaded.model.config is not None
    overrides = ["model.config.num_hidden_layers=1"] if "num_hidden_layers" in loaded.model.config else []
    for seed, split in enumerate(("train", "dev", "test")):
        file = tmp_path / f"{split}.npz"
        write_images(file, 48, seed, loaded.model.config["image_size"], loaded.model.config["num_channels"])
        with np.load(file) as arrays:
            names = {"x": arrays["x"].squeeze(), loaded.data.columns.label: arrays["y"]}
        np.savez(file, **names)
        overrides.append(f"data.{split}.path={file}")
    rows = run_shipped(recipe, tmp_path, overrides, capsys, max_disagreement=0.5)
    assert all(0 <= row["metrics"]["accuracy"] <= 1 for row in rows)
