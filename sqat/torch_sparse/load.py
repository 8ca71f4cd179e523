"""Load a packed folder into a transformers model, and undo it.

By default the model computes what was trained and measured: activation sites that no packed layer quantizes itself keep
their fake quantizers, at some cost. With hooks at attention products or adds, one model serves one thread at a time.
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
from sqat.modules.batch_norm import fold_batch_norms_
from sqat.modules.sites import PRODUCT_ROLES, Site
from sqat.torch_sparse.backends import AUTO, Backend, BackendChooser
from sqat.torch_sparse.linear import SparseLinear, insert_sparse_, remove_sparse_
from sqat.torch_sparse.plans import PlanStatistics

KeptSites = Literal["all", "linears"]


@dataclass(frozen=True)
class LoadResult:
    """What `load_sparse_` did to a model.

    Attributes:
        backends: packed layer -> the backend that runs it.
        dense: linear that is not packed -> the reason.
        unusable: backend -> why ``auto`` cannot use it on the model's device.
    """

    backends: dict[str, Backend]
    dense: dict[str, str]
    unusable: dict[str, str]
    insertion: Insertion | None = field(repr=False)
    attention: str | None = field(repr=False)

    @property
    def plans(self) -> dict[str, PlanStatistics]:
        """Statistics of each backend's plan cache."""
        return {backend.name: backend.plans.statistics for backend in self.backends.values()}


def load_model(
    folder: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
    sites: KeptSites = "all",
) -> tuple[nn.Module, Processor]:
    """Load model (in eval mode) and processor from a folder.

    Args:
        device: where the model runs; None takes a GPU if torch sees one.
        dtype: of all that is not packed; sparse kernels are fastest between layers of float16 or bfloat16.
        backend: see `load_sparse_`.
        sites: see `load_sparse_`.

    Raises:
        SqatError: as `load_sparse_`.
    """
    packed = read_folder(Path(folder))
    model, processor = assemble(packed.files, str(folder))
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    insert_packed_(model, packed, backend, sites)
    return model, processor


def load_sparse_(model: nn.Module, folder: Path | str, backend: str = AUTO, sites: KeptSites = "all") -> LoadResult:
    """Load a folder of target torch-semi-structured into a model; its pruned linears become sparse ones.

    Args:
        model: built from the folder's config, on the device and in the type that it runs in; all its weights are
            replaced. To run on another kind of device, load it there.
        backend: ``cusparselt``, ``cutlass``, ``reference``, or ``auto``: for each layer the first that can run it.
        sites: round ``all`` activation sites as in training, or only the inputs of ``linears``, which is faster.

    Returns:
        What `densify_` needs to undo it.

    Raises:
        SqatError: the folder is damaged or not this model's, or the backend cannot run here. The model's layers stay.
    """
    return insert_packed_(model, read_folder(Path(folder)), backend, sites)


def insert_packed_(model: nn.Module, packed: Packed, backend: str = AUTO, sites: KeptSites = "all") -> LoadResult:
    """Do what `load_sparse_` does with a folder that is read already."""
    plain = {name: plain_linear(model, name, layer.shape, packed.place) for name, layer in packed.layers.items()}
    chooser = BackendChooser(backend, next(model.parameters()).device)
    described = packed.manifest.layers.items()
    backends = {name: chooser.choose(name, layer.shape, TYPES[layer.type]) for name, layer in described}
    blocks = encoder_blocks(model)
    sites_in_use = {site: shared_with for site, shared_with in packed.manifest.sites.items()
            if sites == "all" or Site(site).role == "input"}  # fmt: skip
    load_weights(model, packed.dense | {f"{name}.weight": layer.weight for name, layer in plain.items()}, packed.place)
    if sites_in_use:
        fold_batch_norms_(model)  # a convolution's output site is behind its norm
    attention = switch_attention_(model, sites_in_use)
    insert_sparse_(model, {name: sparse_linear(packed, name, plain[name], backends[name]) for name in plain})
    insertion = insert_site_quantizers_(model, packed, sites_in_use, blocks)
    return LoadResult(backends, packed.manifest.dense, chooser.unusable, insertion, attention)


def densify_(model: nn.Module, result: LoadResult) -> None:
    """Undo loading: plain linears with the same weights, no fake quantizers, the attention of before."""
    if result.insertion is not None:
        remove_quantizers_(model, result.insertion)
    remove_sparse_(model, result.backends)
    if result.attention is not None:
        use_attention(model, result.attention)


def plain_linear(model: nn.Module, name: str, shape: tuple[int, int], place: str) -> nn.Linear:
    """Get the model's linear of a packed layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise SqatError(f"the model has no layer {name}", "build it from the folder's config.json", place,
                        code="model-mismatch") from error  # fmt: skip
    if isinstance(module, SparseLinear):
        raise SqatError(f"{name} is sparse already", "build the model again, or densify_ it first", place,
                        code="model-mismatch")  # fmt: skip
    if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
        got = list(module.weight.shape) if isinstance(module, nn.Linear) else type(module).__name__
        raise SqatError(f"{name} is {got} in the model, {list(shape)} in the folder",
                        "build it from the folder's config.json", place, code="model-mismatch")  # fmt: skip
    return module


def sparse_linear(packed: Packed, name: str, plain: nn.Linear, backend: Backend) -> SparseLinear:
    """Make the sparse form of a layer with the folder's bias."""
    bias = packed.dense.get(f"{name}.bias")
    return SparseLinear(packed.layers[name], backend, packed.scales.get(name), bias).to(plain.weight.device)


def switch_attention_(model: nn.Module, sites: Mapping[str, str]) -> str | None:
    """Hook the attention products if they are sites; return the attention implementation that was in use."""
    if not any(Site(site).role in PRODUCT_ROLES for site in sites):
        return None
    before = current_attention(model)
    return before if use_hooked_attention(model) else None


def insert_site_quantizers_(
    model: nn.Module, packed: Packed, sites: Mapping[str, str], blocks: list[str]
) -> Insertion | None:
    """Insert fake quantizers at the sites; return None where there are none."""
    if not sites:
        return None
    amax: dict[str, Tensor] = {site: packed.amax[site] for site in dict.fromkeys(sites.values())}
    return insert_quantizers_(model, Quantizers(amax, sites), blocks)
