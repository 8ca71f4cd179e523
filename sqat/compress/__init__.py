"""Compress a model: the layer that stages, api and analyze share.

Prune: `patterns` and `masks` choose masks, from `statistics`; `permute` reorders channels that `channels` finds.
Reconstruct: `reconstruct` trains block after block, by `partial_runs`.
Quantize: `calibrate` chooses an amax for each site, `quantize` inserts masks and fake quantizers.
Distil: `distil` puts the loss of training together.
"""
