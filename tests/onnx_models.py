"""Tiny encoders of six families, each exported once, and an explicit fake-quantized reference of each.

The reference shares nothing with the package: torch's own fake-quantize ops, forward hooks for the linears, an
attention function of its own for the products, and a function mode that sees the residual adds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import pytest
import torch
import transformers
from onnx import ModelProto
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sqat.export.quantized_model import QuantizedModel
from tests.traces import traced

VOCABULARY = 90
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.2, "num_labels": 3}
ROTARY = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SHAPED = {**SHAPE, **SPECIAL, "attn_implementation": "eager"}
SHALLOW = {**SHAPED, "num_hidden_layers": 1}
DISTIL = {"n_layers": 1, "dim": 32, "n_heads": 2, "hidden_dim": 64, **SPECIAL, "attn_implementation": "eager"}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPED)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SHALLOW)),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(embedding_size=16, **SHALLOW)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**DISTIL)),
    "mpnet": lambda: transformers.MPNetForSequenceClassification(
        transformers.MPNetConfig(**{**SHAPE, "num_hidden_layers": 1}, **SPECIAL)
    ),
    "modernbert": lambda: transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(local_attention=8, **ROTARY, **SHAPED)
    ),
}
LAYERS = {"distilbert": "distilbert.transformer.layer.", "modernbert": "model.layers.", "vit": "vit.layers."}
TYPED = ("bert", "electra")
ATTENTION = ("query", "key", "softmax", "value")


class Sites:
    """Every activation site of a model on its way through: observed first, fake-quantized afterwards."""

    def __init__(self, model: nn.Module, layers: str) -> None:
        self.model = model
        self.layers = layers
        self.names = {module: name for name, module in model.named_modules()}
        self.amax: dict[str, float] = {}
        self.observing = True
        self.noise = 0.0

    def visit(self, site: str, x: Tensor) -> Tensor:
        if self.observing:
            self.amax[site] = max(self.amax.get(site, 0.0), float(x.abs().max()) * 0.9)
            return x
        if site not in self.amax:
            return x
        scale = torch.tensor(self.amax[site], dtype=torch.float32) / 127
        x = x * (1 + self.noise * torch.randn_like(x)) if self.noise else x
        return torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor(0, dtype=torch.int32), -128, 127)

    def linears(self) -> dict[str, nn.Linear]:
        return {
            name: module
            for module, name in self.names.items()
            if isinstance(module, nn.Linear) and name.startswith(self.layers)
        }

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """All sites on their way through `visit`."""
        handles = []
        for name, linear in self.linears().items():
            before = lambda _, args, name=name: (self.visit(f"{name}:input", args[0]),)  # noqa: E731
            after = lambda _, __, y, name=name: self.visit(f"{name}:output", y)  # noqa: E731
            handles += [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]
        adds = ResidualAdds(self)
        for module in self.names:
            handles += [module.register_forward_pre_hook(adds.enter), module.register_forward_hook(adds.leave)]
        ALL_ATTENTION_FUNCTIONS.register("reference", self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("reference", eager_mask)
        before_name = self.model.config._attn_implementation
        self.model.config._attn_implementation = "reference" if before_name != "mpnet" else before_name
        try:
            with adds:
                yield
        finally:
            self.model.config._attn_implementation = before_name
            for handle in handles:
                handle.remove()

    def attend(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        name = self.names[module]
        query, key, value = (
            self.visit(f"{name}:{role}", x) for role, x in (("query", query), ("key", key), ("value", value))
        )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if attention_mask is None else scores + attention_mask
        probabilities = self.visit(f"{name}:softmax", scores.softmax(-1))
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class ResidualAdds(TorchFunctionMode):
    """Counts and visits x + y of rank 3 and equal shape in the modules of the encoder layers."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.stack: list[str] = []
        self.count: dict[str, int] = defaultdict(int)

    def enter(self, module: nn.Module, args: object) -> None:
        self.stack.append(self.sites.names[module])
        self.count[self.stack[-1]] = 0

    def leave(self, *_: object) -> None:
        self.stack.pop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        module = self.stack[-1] if self.stack else ""
        named = getattr(function, "__name__", "") in ("add", "__add__", "__radd__")
        inside = named and f"{module}.".startswith(self.sites.layers)
        if inside and all(isinstance(x, Tensor) and x.dim() == 3 for x in args) and args[0].shape == args[1].shape:
            number = self.count[module]
            self.count[module] += 1
            left = self.sites.visit(f"{module}:add{number}.left", args[0])
            right = self.sites.visit(f"{module}:add{number}.right", args[1])
            return torch.add(left, right)
        return function(*args, **(kwargs or {}))


@dataclass
class Family:
    """A tiny model, its float graph, the bounds of all its sites and its int8 weights."""

    name: str
    model: nn.Module
    graph: ModelProto
    amax: dict[str, float]
    weights: dict[str, tuple[Tensor, Tensor]]

    def inputs(self, batch: int, sequence: int, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
        """Random tokens; every row but the first padded on a side to a length of its own."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
        lengths = torch.randint(max(1, sequence // 2), sequence + 1, (batch,), generator=generator)
        lengths[0] = sequence
        mask = (torch.arange(sequence) < lengths[:, None]).long()
        mask = mask.flip(1) if side == "left" else mask
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        return inputs | ({"token_type_ids": (ids % 2) * mask} if self.name in TYPED else {})

    def quantization(self, *roles: str) -> QuantizedModel:
        """Int8 weights and linear inputs, and sites of some roles (``add`` stands for all residual adds)."""
        kinds = ("input", *roles)
        return QuantizedModel(
            self.weights, {site: a for site, a in self.amax.items() if site.rpartition(":")[2].startswith(kinds)}
        )

    def roles(self, *roles: str) -> tuple[str, ...]:
        """Those roles that the family's reference can reach; MPNet has no attention interface."""
        return tuple(role for role in roles if self.name != "mpnet" or role not in ATTENTION)

    def sites(self, amax: dict[str, float]) -> Sites:
        sites = Sites(self.model, LAYERS.get(self.name, f"{self.name}.encoder.layer."))
        sites.amax, sites.observing = amax, False
        return sites

    def reference(self, quantization: QuantizedModel, inputs: dict[str, Tensor], noise: float = 0.0) -> Tensor:
        """Logits of the torch model in which exactly these sites and weights are fake-quantized.

        ``noise`` is a relative error put on every site, to see what float rounding alone can do.
        """
        sites = self.sites(dict(quantization.amax))
        sites.noise = noise
        linears = {name: linear for name, linear in sites.linears().items() if name in quantization.weights}
        floats = {name: linear.weight.data for name, linear in linears.items()}
        for linear in linears.values():
            scale = linear.weight.data.abs().amax(1).clamp(min=2.0**-40) / 127
            zero = torch.zeros(len(scale), dtype=torch.int32)
            linear.weight.data = torch.fake_quantize_per_channel_affine(linear.weight.data, scale, zero, 0, -127, 127)
        try:
            with torch.no_grad(), sites.hooked():
                return self.model(**inputs).logits
        finally:
            for name, linear in linears.items():
                linear.weight.data = floats[name]


class ImageFamily(Family):
    """A family that reads images instead of tokens: its sequence is the image's 16 patches and one more."""

    def inputs(self, batch: int, sequence: int = 17, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


@cache
def build_vit() -> ImageFamily:
    """A tiny ViT, prepared as the families of `FAMILIES` are."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, initializer_range=0.2, num_labels=3, attn_implementation="eager", **SHAPE
    )
    model = transformers.ViTForImageClassification(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    family = prepare("vit", model, ImageFamily)
    family.graph = traced(model, family.inputs(2))
    return family


@cache
def build_family(name: str) -> Family:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    family = prepare(name, model)
    family.graph = traced(model, family.inputs(2, 8))
    return family


def prepare(name: str, model: nn.Module, kind: type[Family] = Family) -> Family:
    """Prune every encoder linear to 2:4 with one output dead, and take the bounds from random inputs."""
    family = kind(name, model, ModelProto(), {}, {})
    sites = family.sites({})
    with torch.no_grad():
        for linear in sites.linears().values():
            linear.weight.mul_(two_of_four(linear.weight))
            linear.weight[3] = 0.0
            linear.weight.add_(0.0)
    sites.observing = True
    with torch.no_grad(), sites.hooked():
        for seed in range(3):
            model(**family.inputs(4, 20, seed=seed))
    family.amax = sites.amax
    for layer, linear in sites.linears().items():
        scale = linear.weight.detach().abs().amax(1).clamp(min=2.0**-40) / 127
        family.weights[layer] = ((linear.weight.detach() * (1 / scale[:, None])).round().to(torch.int8), scale)
    return family


def two_of_four(weight: Tensor) -> Tensor:
    """A mask that keeps the two largest of every four inputs."""
    order = weight.abs().unflatten(1, (-1, 4)).argsort(2, descending=True).argsort(2)
    return (order < 2).flatten(1).float()


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return build_family(request.param)


@pytest.fixture(scope="module")
def bert() -> Family:
    return build_family("bert")


@pytest.fixture(scope="module")
def vit() -> ImageFamily:
    return build_vit()


class RtxLog:
    """Makes a logger of TensorRT-RTX that keeps its lines; only tests that use the package import it."""

    def __init__(self, rtx: ModuleType) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Logger(rtx.ILogger):
            def log(self, severity, message):
                lines.append(f"{str(severity).rpartition('.')[2]} {message}")

        self.logger = Logger()


def rtx_weight_bytes(model: ModelProto) -> int:
    """Build a strongly typed engine ahead of time with TensorRT-RTX; returns the bytes of weights it holds."""
    rtx = pytest.importorskip("tensorrt_rtx")
    log = RtxLog(rtx)
    builder = rtx.Builder(log.logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log.logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.set_flag(rtx.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        profile.set_shape(value.name, *[[size if size > 0 else free for size in value.shape] for free in (2, 8, 32)])
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.lines[-3:]
    assert not [line for line in log.lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    matches = [re.search(r"Total Weights Memory: (\d+) bytes", line) for line in log.lines]
    return max(int(match[1]) for match in matches if match)
