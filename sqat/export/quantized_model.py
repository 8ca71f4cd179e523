"""A calibrated model in int8: computed once per export and handed to every target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sqat.checkpoint.store import Checkpoint, quantized_layers
from sqat.quantization.fake_quant import quantize_weight


@dataclass(frozen=True)
class QuantizedModel:
    """Int8 weights and activation amax, under the model's own names.

    Attributes:
        weights: layer -> (int8 [N,K] or [N,C,h,w] in [-127,127], float32 scale [N]).
        amax: activation site -> largest absolute value, > 0.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    amax: Mapping[str, float]

    def keep_sites(self, sites: Iterable[str]) -> QuantizedModel:
        """Drop all other activation sites."""
        return replace(self, amax={site: self.amax[site] for site in sites})


def quantize_model(checkpoint: Checkpoint) -> QuantizedModel:
    """Round the weights of a calibrated checkpoint to int8."""
    weights = {name: quantize_weight(checkpoint.weights[f"{name}.weight"].cpu())
               for name in quantized_layers(checkpoint) if f"{name}.weight" in checkpoint.weights}  # fmt: skip
    sites = checkpoint.manifest.sites.items()
    return QuantizedModel(weights, {site: float(checkpoint.amax[record.shared_with]) for site, record in sites})
