"""The model card that goes beside exported files."""

from __future__ import annotations

from collections.abc import Mapping

from sqat.checkpoint.manifest import Manifest
from sqat.export.targets import load_target
from sqat.recipe.targets import TARGETS

ONNX_USAGE = """```python
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


def model_card(manifest: Manifest, sizes: Mapping[str, int], kind: str, output: str) -> str:
    """Write the model card in Markdown: files with sizes and dev metrics, what was done, and how to run them.

    Args:
        sizes: target -> bytes of its file or folder.
        kind: name of the architecture.
        output: name of an ONNX file's output.
    """
    pruned = [name for name, record in manifest.layers.items() if record.pattern]
    quantized = [name for name, record in manifest.layers.items() if record.quantized]
    lines = ["---", f"base_model: {manifest.base_model}", "library_name: onnx", "---", "", "# Model card", ""]
    lines += [f"Made by sqat {manifest.versions.get('sqat', '')} from `{manifest.base_model}`, seed {manifest.seed}, "
              f"fingerprint `{manifest.fingerprint}`.", ""]  # fmt: skip
    lines += ["| target | file | MB | dev metrics |", "|---|---|---|---|"]
    for target, size in sizes.items():
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in manifest.metrics[f"dev {target}"].items())
        lines.append(f"| {target} | {TARGETS[target].file} | {size / 1e6:.1f} | {metrics} |")
    lines += ["", f"{len(pruned)} of {len(manifest.layers)} linear layers and convolutions are pruned, "
              f"{len(quantized)} are int8; embeddings and the other layers are float.", ""]  # fmt: skip
    lines += [*(f"- {note}" for note in manifest.notes), "", "## Use", ""]
    for target in sizes:
        lines += [
            f"### {target}",
            "",
            load_target(target).USAGE.format(
                file=TARGETS[target].file, inputs=INPUTS[kind], output=output, loader=CLASSES.get(kind, "")
            ),
        ]
    return "\n".join(lines)
