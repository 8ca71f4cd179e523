"""The modifiers of SparseML and llm-compressor: what each does, and which of its arguments are translated.

A modifier without a counterpart has a line that says what to do. What is in no table is named as unknown.
"""

from __future__ import annotations

TIMES = ("start_epoch", "end_epoch", "start", "end")
SPARSITIES = ("init_sparsity", "final_sparsity", "sparsity", "compression_sparsity", "forward_sparsity")
# Modifier -> criterion of the prune stage.
PRUNING = {
    **dict.fromkeys(("GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier"), "magnitude"),
    **dict.fromkeys(("ACDCPruningModifier", "RigLPruningModifier", "TopKASTPruningModifier"), "magnitude"),
    "ConstantPruningModifier": "magnitude",
    **dict.fromkeys(("MFACPruningModifier", "OBSPruningModifier", "SparseGPTModifier"), "sparsegpt"),
    "WandaPruningModifier": "wanda",
    "MovementPruningModifier": "taylor",
}
ONE_SHOT = ("ConstantPruningModifier", "SparseGPTModifier", "WandaPruningModifier")
QUANTIZING = ("QuantizationModifier", "LegacyQuantizationModifier", "GPTQModifier", "AutoRoundModifier")
DISTILLING = ("DistillationModifier", "PerLayerDistillationModifier", "OutputDistillationModifier")
KEEPS_MASKS = "ConstantPruningModifier"
CHOOSES_LAYERS = ("targets", "ignore", "submodules", "exclude_module_types", "scheme", "config_groups")
RATES = ("SetLearningRateModifier", "LearningRateModifier", "LearningRateFunctionModifier")
DECAY = "SetWeightDecayModifier"
SCHEMES = ("scheme", "config_groups", "num_bits", "strategy")
# Modifier -> the arguments that are translated.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PRUNING, (*TIMES, *SPARSITIES, *("params", "targets", "ignore", "mask_type", "mask_structure"),
                              "update_frequency")),
    **dict.fromkeys((*QUANTIZING, "AWQModifier"), (*TIMES, *SCHEMES, *CHOOSES_LAYERS)),
    **dict.fromkeys(RATES, (*TIMES, "learning_rate", "init_lr", "lr_func", "lr_class")),
    DECAY: (*TIMES, "weight_decay"),
    "DistillationModifier": (*TIMES, "hardness", "temperature"),
    **dict.fromkeys(("PerLayerDistillationModifier", "OutputDistillationModifier"), TIMES),
    "EpochRangeModifier": TIMES,
}  # fmt: skip
# Modifier -> what to do instead.
WITHOUT_COUNTERPART = {
    "LayerPruningModifier": "it removes whole layers: remove them from the model before",
    "LayerThinningModifier": "it removes whole channels: do so before, and start from that model",
    "StructuredPruningModifier": "it removes whole channels or heads: do so before, and start from that model",
    "REAPPruningModifier": "it removes whole experts: do so before, and start from that model",
    "TrainableParamsModifier": "sqat trains all weights",
    "SetParamModifier": "set the weights before, and start from that model",
    "GradualParamModifier": "sqat sets no weights on a schedule",
    "ASRegModifier": "sqat has no penalty on activations",
    "PowerpropagationModifier": "sqat trains weights as they are",
    "SmoothQuantModifier": "smooth the model before, and start from that model",
    "LogarithmicEqualizationModifier": "equalize the model before, and start from that model",
    "AWQModifier": "scale the model before, and start from that model",  # with a scheme it also quantizes
    "QuIPModifier": "rotate the model before, and start from that model",
    "SpinQuantModifier": "rotate the model before, and start from that model",
    **dict.fromkeys(("SparsificationLoggingModifier", "LogTrackingModifier"), "sqat logs every stage"),
}
