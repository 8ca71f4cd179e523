"""The refusals that are expected, each with its reason; any other refusal is a failure, and so is one that is gone."""

from __future__ import annotations

from dataclasses import dataclass

from sqat.errors import ErrorCode

ALL = ("*",)


@dataclass(frozen=True)
class Refusal:
    """A refusal that is right, and why.

    Attributes:
        placement: of the recipe, or ``*``; ``qat`` for the default distillation.
        targets: of the export, or ``*``.
        families: names, or ``*``.
        but: families that it does not hold for.
    """

    placement: str
    targets: tuple[str, ...]
    families: tuple[str, ...]
    code: ErrorCode
    reason: str
    but: tuple[str, ...] = ()

    def holds(self, name: str, placement: str, target: str) -> bool:
        """Say whether it is expected of a family, with a placement and a target."""
        is_distillation = placement == "qat"
        if self.placement != placement and (self.placement != "*" or is_distillation):
            return False
        fits_target = self.targets == ALL or target in self.targets
        return fits_target and (self.families == ALL or name in self.families) and name not in self.but


def expected_refusal(name: str, placement: str, target: str) -> Refusal | None:
    """Return the refusal that is expected; None where the family must work."""
    return next((refusal for refusal in REFUSALS if refusal.holds(name, placement, target)), None)


MODEL: ErrorCode = "unsupported-model"
TARGET: ErrorCode = "unsupported-target"
SERVED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
NETS = ("resnet", "convnext", "convnextv2", "mobilenet_v1", "mobilenet_v2", "efficientnet", "regnet", "poolformer")
HYBRIDS = ("cvt", "levit", "mobilevit", "pvt", "segformer")  # attention between convolutions
FEW_LINEARS = ("resnet", "mobilenet_v1", "mobilenet_v2", "efficientnet", "regnet", "poolformer")
GRAPHS = ("onnx-int8", "onnx-fp32", "onnx-fp16", "tensorrt")
PACKED = ("torch-semi-structured",)
REFUSALS = (
    Refusal("*", ALL, ("bit",), "no-layer", "its convolutions compute with standardized weights, and no zero stays"),
    Refusal("*", ALL, ("ibert", "squeezebert"), MODEL, "its blocks hold no linears of torch"),
    Refusal("cpu", ALL, ALL, MODEL, f"the kernels of `cpu-sparse` compute {', '.join(SERVED)}", SERVED),
    Refusal("qat", ALL, (*NETS, *HYBRIDS), MODEL, "with more than two convolutions a model counts as a net of them, "
            "and MiniLM compares q, k and v"),
    Refusal("qat", ALL, ("deberta", "bloom"), MODEL, "q, k and v are one linear in an order of the family's own"),
    Refusal("qat", ALL, ("t5", "umt5", "bart", "mbart"), MODEL, "the last block has two attentions; "
            "`distill.qkv` can name one"),
    Refusal("qat", ALL, ("xlm", "flaubert"), MODEL, "attentions and feed-forwards stand in two lists, of which sqat "
            "treats the larger; `distill.qkv` can name q, k and v"),
    Refusal("qat", ALL, ("funnel",), MODEL, "q, k and v have unusual names; `distill.qkv` can name them"),
    Refusal("qat", ALL, ("xlnet",), MODEL, "q, k and v are no linears"),
    Refusal("qat", ALL, ("fnet",), MODEL, "it has no attention"),
    Refusal("qat", ALL, ("perceiver", "canine"), MODEL, "its last block reads latents or groups, not tokens"),
    Refusal("*", GRAPHS, ("longformer", "xlnet", "gpt_oss"), MODEL, "torch cannot export it as ONNX"),
    Refusal("*", GRAPHS, ("funnel", "canine"), MODEL, "torch exports it for texts of one length only"),
    Refusal("*", ("compressed-tensors",), ("gpt2",), TARGET, "its layers are Conv1D, and the format stores linears"),
    Refusal("*", ("compressed-tensors",), (*NETS, *HYBRIDS), TARGET, "quantized layers of it are convolutions, and the "
            "format stores linears"),
    Refusal("tensorrt", ("tensorrt",), ("convnextv2",), "broken-rule", "a norm reads what its activation functions "
            "compute, so that linears before these have no int8 output; `placement: tensorrt-full` gives them one"),
    Refusal("*", PACKED, FEW_LINEARS, TARGET, "it has no linears that the kernels take"),
)  # fmt: skip
