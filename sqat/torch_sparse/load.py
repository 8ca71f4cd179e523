"""Putting a packed folder into a transformers model, and taking it out again.

What a user gets by default is the model that was trained and measured: packed layers run sparse, and the activation
sites that no packed layer quantizes itself (attention products, residual adds and outputs of the placements tensorrt*,
inputs of layers that had to stay dense) keep their fake quantizers. Those cost time and save none in torch; with
``sites="linears"`` only inputs of linears are rounded, which is faster and nearer to the float model, but is not
what was measured.

With taps at attention products or adds, one model serves one thread at a time; without them, several may share it.
Left out: moving a loaded model to another kind of device, where another backend may be the right one: load it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sqat.data.batch import Processor
from sqat.errors import SqatError
from sqat.export.packed_folder import TYPES, Packed, read_folder
from sqat.models.attention import current_attention, use_attention, use_hooked_attention
from sqat.models.layer_selection import encoder_blocks
from sqat.models.loading import assemble, load_weights
from sqat.modules.activation_quantizers import Insertion, Quantizers, insert_quantizers_, remove_quantizers_
from sqat.modules.sites import PRODUCT_ROLES, Site
from sqat.torch_sparse.backends import AUTO, Backend, Choice
from sqat.torch_sparse.linear import SparseLinear, insert_sparse_, remove_sparse_
from sqat.torch_sparse.plans import PlanStatistics

Kept = Literal["all", "linears"]


@dataclass(frozen=True)
class Loaded:
    """What `load_sparse_` did to a model.

    Attributes:
        backends: packed layer -> the backend that runs it.
        dense: linears that are not packed -> why.
        unusable: backend -> why ``auto`` could not use it on the model's device.
    """

    backends: dict[str, Backend]
    dense: dict[str, str]
    unusable: dict[str, str]
    insertion: Insertion | None = field(repr=False)
    attention: str | None = field(repr=False)

    @property
    def plans(self) -> dict[str, PlanStatistics]:
        """Statistics of the plan cache of each backend in use."""
        return {backend.name: backend.plans.statistics for backend in self.backends.values()}


def load_model(
    folder: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
    sites: Kept = "all",
) -> tuple[nn.Module, Processor]:
    """Model (eval mode) and processor of a folder.

    Args:
        device: where it will run; None takes a GPU where torch sees one.
        dtype: of all that is not packed; sparse kernels are fastest between layers of float16 or bfloat16.
        backend, sites: as `load_sparse_` takes them.

    Raises:
        SqatError: as `load_sparse_`.
    """
    packed = read_folder(Path(folder))
    model, processor = assemble(packed.files, str(folder))
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    insert_packed_(model, packed, backend, sites)
    return model, processor


def load_sparse_(model: nn.Module, folder: Path | str, backend: str = AUTO, sites: Kept = "all") -> Loaded:
    """Fill a model from the folder of the target torch-semi-structured, its pruned linears becoming sparse ones.

    Args:
        model: built from the folder's config, on the device and of the type that it will run in; all its weights
            are replaced.
        backend: ``cusparselt``, ``cutlass``, ``reference``, or ``auto``: for each layer the first that can run it.
        sites: ``all`` activation sites are rounded as in training, or just the inputs of ``linears``.

    Returns:
        What was done, which `densify_` undoes.

    Raises:
        SqatError: a folder that is damaged or not this model's, or a backend that cannot run here; the model's
            layers are then as they were.
    """
    return insert_packed_(model, read_folder(Path(folder)), backend, sites)


def insert_packed_(model: nn.Module, packed: Packed, backend: str = AUTO, sites: Kept = "all") -> Loaded:
    """Do as `load_sparse_` with a folder that is in memory."""
    plain = {name: plain_linear(model, name, layer.shape, packed.place) for name, layer in packed.layers.items()}
    choice = Choice(backend, next(model.parameters()).device)
    backends = {name: choice.of(name, layer.shape, TYPES[layer.type]) for name, layer in packed.manifest.layers.items()}
    blocks = encoder_blocks(model)
    kept = {
        site: leader for site, leader in packed.manifest.sites.items() if sites == "all" or Site(site).role == "input"
    }
    load_weights(model, packed.dense | {f"{name}.weight": layer.weight for name, layer in plain.items()}, packed.place)
    attention = switch_attention_(model, kept)
    insert_sparse_(model, {name: sparse_linear(packed, name, plain[name], backends[name]) for name in plain})
    insertion = insert_taps_(model, packed, kept, blocks)
    return Loaded(backends, packed.manifest.dense, choice.unusable, insertion, attention)


def densify_(model: nn.Module, loaded: Loaded) -> None:
    """Take sparse linears and fake quantizers out: a plain model with the weights as they were served."""
    if loaded.insertion is not None:
        remove_quantizers_(model, loaded.insertion)
    remove_sparse_(model, loaded.backends)
    if loaded.attention is not None:
        use_attention(model, loaded.attention)


def plain_linear(model: nn.Module, name: str, shape: tuple[int, int], place: str) -> nn.Linear:
    """The model's linear of a packed layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise SqatError(f"the model has no layer {name}", "build it from the folder's config.json", place) from error
    if isinstance(module, SparseLinear):
        raise SqatError(f"{name} is sparse already", "build the model anew, or densify_ it first", place)
    if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
        got = list(module.weight.shape) if isinstance(module, nn.Linear) else type(module).__name__
        raise SqatError(f"{name} is {got} in the model, {list(shape)} in the folder",
                        "build it from the folder's config.json", place)  # fmt: skip
    return module


def sparse_linear(packed: Packed, name: str, plain: nn.Linear, backend: Backend) -> SparseLinear:
    """The sparse form of a layer, with the bias that was loaded into the plain one."""
    bias = packed.dense.get(f"{name}.bias")
    return SparseLinear(packed.layers[name], backend, packed.scales.get(name), bias).to(plain.weight.device)


def switch_attention_(model: nn.Module, sites: Mapping[str, str]) -> str | None:
    """Make attention products reachable where sites are there; returns the implementation that was in use."""
    if not any(Site(site).role in PRODUCT_ROLES for site in sites):
        return None
    before = current_attention(model)
    return before if use_hooked_attention(model) else None


def insert_taps_(model: nn.Module, packed: Packed, sites: Mapping[str, str], blocks: list[str]) -> Insertion | None:
    """Fake quantizers at the sites; None where there are none."""
    if not sites:
        return None
    amax: dict[str, Tensor] = {leader: packed.amax[leader] for leader in dict.fromkeys(sites.values())}
    return insert_quantizers_(model, Quantizers(amax, sites), blocks)
