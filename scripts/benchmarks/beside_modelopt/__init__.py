"""sqat beside NVIDIA Model Optimizer: the same dense teacher, data, batches, steps and optimizer.

    scripts/benchmarks/compare_modelopt --sst2 FOLDER --json recipes/modelopt.json
    scripts/benchmarks/compare_modelopt --table recipes/modelopt.json

Both chains use sqat's training loop, treat the linears of the encoder and observe the same rows. The first seed chooses
settings on dev by five tries for each chain; test decides nothing. The file is written after each chain.
"""

# Chains from a fine-tuned dense model to a 2:4 sparse int8 one:
# sqat: SparseGPT's masks, training by MiniLM and logit distillation, calibration, QAT with that loss.
# modelopt-sparsegpt, modelopt-magnitude: `mts.sparsify`, training by `mtd`'s logit distillation, `mtq.quantize`, QAT
# with the same distillation, as its own BERT example chains them.
