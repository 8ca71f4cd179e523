"""Sizes from which on a layer gains (rule B8); numbers only, so that any module may read them.

Quantizing costs two more operators a layer, which narrow ones do not earn back; sparse kernels take inputs in 16s and
outputs in 8s. From 32 on both sides no kernel has to pad.
"""

from __future__ import annotations

SMALLEST_SIDE, GOOD_SIDE = 16, 32
SPARSE_INPUTS, SPARSE_OUTPUTS = 16, 8
