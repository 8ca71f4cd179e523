"""Activation sites: where activations can be quantized, and which see the same tensor.

Sites that see one tensor (q, k and v inputs; a block's input and its skip connection) share one quantizer: the tensor
is quantized once, and stays equal for all its readers. A module that runs several times has one scale for all runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain

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


def choose_sites(keys: Mapping[Site, Sequence[TensorKey]], activation_inputs: Set[StorageVersion]) -> Sites:
    """Drop sites that another one covers, and group those that see one tensor.

    Args:
        keys: site -> keys of the tensors that it sees, one for each run of its module.
        activation_inputs: storages that an activation function reads and that stay float, all of them or (a gated
            unit's half) in part.
    """
    products = {key for site, seen in keys.items() if site.role in PRODUCT_ROLES for key in seen}
    skipped: dict[str, str] = {}
    outputs = set[TensorKey]()
    for site, seen in keys.items():
        if site.role != "output":
            continue
        if products.issuperset(seen):
            skipped[site] = "quantized where the attention product reads it"
        elif any(version in activation_inputs for version, _, _ in seen):
            skipped[site] = "input of an activation function (rule B8)"
        else:
            outputs.update(seen)
    for site, seen in keys.items():
        if site.is_add and outputs.issuperset(seen):
            skipped[site] = "quantized at the linear's output"
    shared_with, owners = share_tensors({site: frozenset(seen) for site, seen in keys.items() if site not in skipped})
    # What a quantized output and another site see in some runs would be rounded twice, on two grids.
    overlaps = (tuple(sites) for sites in owners.values() if any(site.role == "output" for site in sites[1:] and sites))
    groups = [*attention_groups(keys, shared_with), *output_groups(shared_with), *overlaps]
    return Sites(shared_with, merge_groups(groups), skipped)


def share_tensors(
    keys: Mapping[Site, frozenset[TensorKey]],
) -> tuple[dict[Site, Site], dict[TensorKey, list[Site]]]:
    """Return for each site the first one that sees all its tensors, itself for most; and these of each tensor."""
    owners: dict[TensorKey, list[Site]] = defaultdict(list)
    shared_with: dict[Site, Site] = {}
    for site, seen in keys.items():
        candidates = owners[next(iter(seen))]
        shared_with[site] = next((owner for owner in candidates if seen <= keys[owner]), site)
        if shared_with[site] == site:
            for key in seen:
                owners[key].append(site)
    return shared_with, owners


def merge_groups(groups: Iterable[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
    """Join groups that have a site in common; the others stay as they are."""
    merged: list[tuple[Site, ...]] = []
    for group in groups:
        joined = [other for other in merged if set(other) & set(group)]
        merged = [other for other in merged if other not in joined]
        merged.append(tuple(dict.fromkeys(chain(*joined, group))))
    return merged


def attention_groups(
    keys: Mapping[Site, Sequence[TensorKey]], shared_with: Mapping[Site, Site]
) -> list[tuple[Site, ...]]:
    """Return q, k and v of each attention, with the quantized output of a fused q, k, v linear.

    With one amax for all of them, the second quantization of the fused output changes nothing.
    """
    groups = []
    for name in dict.fromkeys(site.module for site in shared_with if site.role == "query"):
        operands = [shared_with[Site.of(name, role)] for role in ("query", "key", "value")]
        storages = {version for version, _, _ in keys[Site.of(name, "value")]}
        fused = [
            site
            for site, first in shared_with.items()
            if site == first and site.role == "output" and storages & {version for version, _, _ in keys[site]}
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
