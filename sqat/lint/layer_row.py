"""One row of a layer table, read from a checkpoint or an ONNX file; `sqat inspect`, `engine` and `report` share it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRow:
    """What a checkpoint or a file says of one layer; None where it says nothing.

    Attributes:
        shape: [out, in] of the weight.
        pattern: N:M pattern of the weight, or ``dense``.
        zeros: share of zero weights, 0..1.
        weight_scale: smallest and largest scale over the output channels.
        input_amax: largest absolute input that int8 represents.
        sqnr_db: signal to quantization noise of the weight, dB.
        saturated: share of calibration inputs beyond ``input_amax``.
        method: how calibration chose ``input_amax``; empty where it had no choice.
        reason: of a checkpoint, why the layer is dense or float; of a graph, what keeps it from running as the target
            could; empty where nothing does.
        runs: how an engine would compute it (``sparse int8``, ``dense int8``, ``sparse fp16``, ``float``,
            ``refused``), with ``?`` where that is in doubt; empty for a checkpoint.
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
    method: str = ""
