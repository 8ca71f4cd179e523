"""Sizes from which a layer gains (rule B8), for recipes and linters without torch.

Quantization adds two operators a layer, which cost more than a narrow layer gains. Sparse kernels take inputs in 16s
and outputs in 8s. From 32 on both sides no kernel pads.
"""

from __future__ import annotations

SMALLEST_SIDE, GOOD_SIDE = 16, 32
SPARSE_INPUTS, SPARSE_OUTPUTS = 16, 8
