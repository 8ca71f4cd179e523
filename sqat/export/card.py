"""The model card that goes beside exported files."""

from __future__ import annotations

from collections.abc import Mapping

from sqat.checkpoint import Manifest

USE = """## Use

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("{file}")
inputs = tokenizer(["first text"], ["second text"], padding=True, return_tensors="np")
names = [entry.name for entry in session.get_inputs()]
logits = session.run(["logits"], {{name: inputs[name] for name in names}})[0]
```

TensorRT takes the int8 file as it is: `trtexec --onnx=model.int8.onnx --sparsity=enable --stronglyTyped`.
On x86 processors without VNNI, set the session option `session.x64quantprecision` to `1`: ONNX Runtime's
default int8 kernel saturates there.
"""


def model_card(manifest: Manifest, files: Mapping[str, int]) -> str:
    """Markdown: files with sizes, dev metrics, what was pruned and quantized, how to run it.

    Args:
        files: ONNX file name -> bytes.
    """
    pruned = [name for name, record in manifest.layers.items() if record.pattern]
    quantized = [name for name, record in manifest.layers.items() if record.quantized]
    lines = ["---", f"base_model: {manifest.base_model}", "library_name: onnx", "---", "", "# Model card", ""]
    lines += [f"Made by sqat {manifest.versions.get('sqat', '')} from `{manifest.base_model}`, seed {manifest.seed}, "
              f"stage key `{manifest.key}`.", ""]  # fmt: skip
    lines += ["| file | MB | dev metrics |", "|---|---|---|"]
    for name, size in files.items():
        target = f"dev onnx-{name.split('.')[1]}"
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in manifest.metrics[target].items())
        lines.append(f"| {name} | {size / 1e6:.1f} | {metrics} |")
    lines += ["", f"{len(pruned)} of {len(manifest.layers)} linear layers are pruned, {len(quantized)} are int8; "
              "embeddings and the other layers are float.", ""]  # fmt: skip
    lines += [*(f"- {note}" for note in manifest.notes), "", USE.format(file=next(iter(files)))]
    return "\n".join(lines)
