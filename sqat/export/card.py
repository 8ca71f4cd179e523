"""The model card that goes beside exported files."""

from __future__ import annotations

from collections.abc import Mapping

from sqat.checkpoint.manifest import Manifest

ONNX_USE = """```python
import onnxruntime
{inputs}
session = onnxruntime.InferenceSession("{file}")
names = [entry.name for entry in session.get_inputs()]
(output,) = session.run(None, {{name: inputs[name] for name in names}})  # {output}
```
"""
TEXTS = """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer(["first text"], {second}padding=True, return_tensors="np")"""
IMAGES = """import numpy as np
from PIL import Image
from transformers import AutoImageProcessor

images = AutoImageProcessor.from_pretrained(".")
inputs = images(Image.open("image.png"), return_tensors="np")"""
NOISE = """
inputs = ...  # by name: a noisy picture, its time and the caption's embedding, as sqat.models.rectified_flow says"""
INPUTS = {
    "texts": TEXTS.format(second='["second text"], '),
    "sentences": TEXTS.format(second=""),
    "images": IMAGES,
    "diffusion": NOISE,
}
CLASSES = {
    "texts": "AutoModelForSequenceClassification",
    "sentences": "AutoModel",
    "images": "AutoModelForImageClassification",
}
KERNEL_USE = """```python
import sqat.runtime
{inputs}
session = sqat.runtime.session("{file}")  # an onnxruntime.InferenceSession with sqat's kernels
names = [entry.name for entry in session.get_inputs()]
(output,) = session.run(None, {{name: inputs[name] for name in names}})  # {output}
```
"""
SATURATION = """On x86 processors without VNNI, set the session option `session.x64quantprecision` to `1`: ONNX
Runtime's default int8 kernel saturates there. So do OpenVINO's, and they have no such option.
"""
TENSORRT_USE = """`bash build_engine.sh` (trtexec) or `python build_engine.py` builds the engine with sparse weights
enabled and the optimization profile of the recipe; `sqat engine {file}` also tells which layers chose a sparse kernel.
"""
PACKED_USE = """```python
from sqat.torch_sparse.load import load_model

model, processor = load_model("{file}")  # sparse kernels on an Ampere GPU or later, a reference elsewhere
```
"""
COMPRESSED_USE = """```python
from transformers import {loader}  # with compressed-tensors installed

model = {loader}.from_pretrained("{file}")
```
"""
USES = {
    "onnx-int8": ONNX_USE + SATURATION,
    "onnx-fp32": ONNX_USE,
    "onnx-fp16": ONNX_USE,
    "tensorrt": TENSORRT_USE,
    "cpu-sparse": KERNEL_USE,
    "torch-semi-structured": PACKED_USE,
    "compressed-tensors": COMPRESSED_USE,
}


def model_card(manifest: Manifest, artifacts: Mapping[str, tuple[str, int]], kind: str, output: str) -> str:
    """Markdown: what was written with sizes, dev metrics, what was pruned and quantized, how to run it.

    Args:
        artifacts: target -> (file or folder, its bytes).
        kind: of the architecture.
        output: what an ONNX file's output is called.
    """
    pruned = [name for name, record in manifest.layers.items() if record.pattern]
    quantized = [name for name, record in manifest.layers.items() if record.quantized]
    lines = ["---", f"base_model: {manifest.base_model}", "library_name: onnx", "---", "", "# Model card", ""]
    lines += [f"Made by sqat {manifest.versions.get('sqat', '')} from `{manifest.base_model}`, seed {manifest.seed}, "
              f"stage key `{manifest.key}`.", ""]  # fmt: skip
    lines += ["| target | file | MB | dev metrics |", "|---|---|---|---|"]
    for target, (name, size) in artifacts.items():
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in manifest.metrics[f"dev {target}"].items())
        lines.append(f"| {target} | {name} | {size / 1e6:.1f} | {metrics} |")
    lines += ["", f"{len(pruned)} of {len(manifest.layers)} linear layers and convolutions are pruned, "
              f"{len(quantized)} are int8; embeddings and the other layers are float.", ""]  # fmt: skip
    lines += [*(f"- {note}" for note in manifest.notes), "", "## Use", ""]
    for target, (name, _) in artifacts.items():
        lines += [
            f"### {target}",
            "",
            USES[target].format(file=name, inputs=INPUTS[kind], output=output, loader=CLASSES.get(kind, "")),
        ]
    return "\n".join(lines)
