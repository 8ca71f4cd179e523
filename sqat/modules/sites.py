"""Activation sites: where activations can be quantized, and which sites see the same tensor.

Sites that see one tensor (q, k and v inputs; a block's input and its skip connection) share one quantizer: the tensor
is quantized once, and stays equal for all its readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

StorageVersion = tuple[int, int]  # address of a tensor's storage, and how often it was written into
TensorKey = tuple[StorageVersion, int, int]  # the same, offset and number of values
PRODUCT_ROLES = ("query", "key", "softmax", "value")


class Site(str):
    """A place where an activation can be quantized, written ``module:role`` in checkpoints and manifests.

    The roles:
        input, output               of a linear or a convolution (the output after the bias)
        query, key, softmax, value  operands of the two attention products
        add{j}.left, add{j}.right   operands of the j-th residual add that runs directly in the module
    """

    __slots__ = ()

    @classmethod
    def of(cls, module: str, role: str) -> Site:
        """Return the site of a module's role."""
        return cls(f"{module}:{role}")

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.rpartition(":")[0]

    @property
    def role(self) -> str:
        """What the tensor is to the module."""
        return self.rpartition(":")[2]

    @property
    def is_add(self) -> bool:
        """Whether the tensor is an operand of a residual add."""
        return self.role.startswith("add")


@dataclass(frozen=True)
class Sites:
    """Sites to quantize.

    Attributes:
        shared_with: site -> the first site that sees the same tensor, itself for most.
        shared_amax_groups: groups of such first sites that use one amax, the largest of theirs: q, k and v of one
            attention, and outputs of linears that may be merged into one.
        skipped: site -> why it stays float.
        rectifier_limits: outputs that only rectifiers read -> the largest value that these pass.
    """

    shared_with: dict[Site, Site]
    shared_amax_groups: list[tuple[Site, ...]]
    skipped: dict[str, str]
    rectifier_limits: Mapping[str, float] = field(default_factory=dict)


def choose_sites(keys: Mapping[Site, TensorKey], activation_inputs: Set[StorageVersion]) -> Sites:
    """Drop sites that another one covers, and group those that see one tensor.

    Args:
        keys: site -> key of the tensor that it sees.
        activation_inputs: storages that an activation function reads and that stay float, all of them or (a gated
            unit's half) in part.
    """
    products = {key for site, key in keys.items() if site.role in PRODUCT_ROLES}
    skipped: dict[str, str] = {}
    outputs = set()
    for site, key in keys.items():
        if site.role != "output":
            continue
        if key in products:
            skipped[site] = "quantized where the attention product reads it"
        elif key[0] in activation_inputs:
            skipped[site] = "input of an activation function (rule B8)"
        else:
            outputs.add(key)
    for site, key in keys.items():
        if site.is_add and key in outputs:
            skipped[site] = "quantized at the linear's output"
    first: dict[TensorKey, Site] = {}
    shared_with = {site: first.setdefault(key, site) for site, key in keys.items() if site not in skipped}
    groups = [*attention_groups(keys, shared_with), *output_groups(shared_with)]
    return Sites(shared_with, groups, skipped)


def attention_groups(keys: Mapping[Site, TensorKey], shared_with: Mapping[Site, Site]) -> list[tuple[Site, ...]]:
    """Return q, k and v of each attention, with the quantized output of a fused q, k, v linear.

    With one amax for all of them, the second quantization of the fused output changes nothing.
    """
    groups = []
    for name in dict.fromkeys(site.module for site in shared_with if site.role == "query"):
        operands = [shared_with[Site.of(name, role)] for role in ("query", "key", "value")]
        storage = keys[Site.of(name, "value")][0]
        fused = [
            site
            for site, first in shared_with.items()
            if site == first and site.role == "output" and keys[site][0] == storage
        ]
        groups.append((*operands, *fused))
    return groups


def output_groups(shared_with: Mapping[Site, Site]) -> list[tuple[Site, ...]]:
    """Return outputs of linears of one module that read one tensor, which may be merged into one linear (rule T16)."""
    groups: dict[tuple[str, Site], list[Site]] = {}
    for site, first in shared_with.items():
        if site.role == "output":
            parent = site.module.rpartition(".")[0]
            groups.setdefault((parent, shared_with[Site.of(site.module, "input")]), []).append(first)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def align_positions(site: Site, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring a site's tensor and the real (unpadded) positions into one shape.

    Args:
        x: [B,T,H], or [B,h,T,d] at attention operands, or [B,h,T,S] at softmax.
        attention_mask: [B,T], 1 = real; None where nothing is padded (images).

    Returns:
        The tensor with positions leading, and a bool mask of the leading dimensions. A tensor without tokens (what a
        pooler reads, relative positions) counts as a whole.
    """
    if attention_mask is None:
        return x, x.new_ones(x.shape[:-1], dtype=torch.bool)
    real = attention_mask.bool()
    if x.dim() < 4 and x.shape[:-1] != real.shape:
        return x, real.new_ones(x.shape[:-1])
    if site.role == "softmax":
        return x.permute(0, 2, 3, 1), real[:, :, None] & real[:, None, :]
    if x.dim() == 4:
        return x.transpose(1, 2), real
    return x, real
