"""One row of `sqat inspect`: what happened to one linear layer, read from a checkpoint or an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What is known of one layer; None where the file does not say.

    Attributes:
        shape: [out, in] of the weight.
        pattern: the N:M pattern found in the weight, or ``dense``.
        zeros: share of zero weights, 0..1.
        weight_scale: smallest and largest scale over the output channels.
        input_amax: symmetric bound of the layer's input.
        sqnr_db: signal to quantization noise of the weight, dB.
        saturated: share of calibration inputs beyond ``input_amax``.
        reason: why the layer was left dense or float; empty where it was treated.
        runs: how an engine would compute it (``sparse int8``, ``dense int8``, ``sparse fp16``, ``float``,
            ``refused``), with ``?`` where that is in doubt; empty for a checkpoint.
        why: why it does not run as the target could, or may not; empty where it does.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    zeros: float
    weight_scale: tuple[float, float] | None
    input_amax: float | None
    sqnr_db: float | None
    saturated: float | None
    reason: str
    runs: str = ""
    why: str = ""
