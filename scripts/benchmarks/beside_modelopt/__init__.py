"""sqat beside NVIDIA Model Optimizer: the same dense teacher, data, batches, steps and optimizer, two chains of tools.

    python scripts/data/wikiqa.py --source FOLDER --output runs/wikiqa
    scripts/benchmarks/compare_modelopt --sst2 FOLDER --json recipes/modelopt.json
    scripts/benchmarks/compare_modelopt --table recipes/modelopt.json

Chains from a fine-tuned dense model to a 2:4 sparse int8 one:

- ``sqat``: SparseGPT's masks and weights, training by MiniLM and logit distillation, calibration, QAT with that loss.
- ``modelopt-sparsegpt``, ``modelopt-magnitude``: `mts.sparsify`, training by `mtd`'s logit distillation,
  `mtq.quantize`, QAT with the same distillation, as its own BERT example chains them (chained_optimizations: the
  teacher's logits alone, 256 samples to calibrate, a tenth of the learning rate for QAT).

What both share: the training loop (`sqat.training.loop.fit`), so AdamW, warm-up, clipping, order of batches and random
numbers too; bf16 autocast while training, float32 when measured; which layers are treated (the encoder's linears, by
their weights and inputs); the rows that are observed. The first seed chooses settings on dev, by five tries for each
chain, which are all in the JSON file; test decides nothing.

What came of each chain and seed is written at once, and what the file has is not done again. Left out: latency (both
chains end in the same 2:4 int8 layers), folding SmoothQuant's factors, which an engine would have to.
"""
