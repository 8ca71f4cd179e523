"""Checks of losses, gradients, learned scales and layers while a model trains.

NaN or Inf in a loss or gradient stops the stage before the optimizer step, so that no weight and no saved state is
spoiled. Weak layers and saturated sites are reported, each kind once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sqat.checkpoint.manifest import Manifest
from sqat.distributed import first_nonempty
from sqat.errors import SqatError
from sqat.modules.activation_quantizers import QUANTIZERS, Quantizers
from sqat.training.fsdp import full_tensor

MAX_GROWTH = 100.0  # of a learned amax over the calibrated one
SATURATED = 0.1  # share of the values beyond amax
NUM_NAMES = 3  # names in one line
LOWER = "lower learning_rate, or look at the data"


def check_losses(losses: Mapping[str, float], model: nn.Module, rerun: Callable[[], object], step: int) -> None:
    """Refuse a loss of NaN or Inf, and name the first layer whose output has one.

    Args:
        losses: the same on all ranks, all of which must call this.
        rerun: runs the forward passes of the step again.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            layer = first_nonempty(find_first_broken(model, rerun))
            where = f"; the first layer to put out NaN or infinity is {layer}" if layer else ""
            raise SqatError(f"the {name} loss is {value} at step {step}{where}", LOWER, code="non-finite")


def find_first_broken(model: nn.Module, rerun: Callable[[], object]) -> str:
    """Return the name of the first innermost module whose output has NaN or Inf; empty where none does."""
    broken: list[str] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def check(module: nn.Module, args: object, output: object) -> None:
            if not broken and not all(bool(torch.isfinite(tensor).all()) for tensor in float_tensors(output)):
                broken.append(layer_name(name) or type(module).__name__)

        return check

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else ""


def float_tensors(output: object) -> Iterator[Tensor]:
    """Yield the float tensors in a module's output."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    for part in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ():
        yield from float_tensors(part)


def layer_name(name: str) -> str:
    """Return a layer's own name, without its parametrizations."""
    return name.partition(".parametrizations")[0]


def check_gradients(model: nn.Module, step: int) -> Tensor:
    """Return the norm of all gradients.

    Raises:
        SqatError: it is NaN or Inf. The error names the layer nearest to the loss with such a gradient; a learned
            scale, by its site, only where there is no such layer.
    """
    scales = {f"{QUANTIZERS}.values.{i}": f"the scale of {site}" for i, site in enumerate(learned_amax(model))}
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    gradients.sort(key=lambda each: each[0] not in scales)
    norm = total_norm([gradient for _, gradient in gradients])
    if math.isfinite(norm):
        return norm
    gradients = [(name, full_tensor(gradient)) for name, gradient in gradients]
    broken = [name for name, gradient in gradients if not bool(torch.isfinite(gradient).all())]
    worst = broken[-1] if broken else max(gradients, key=lambda each: float(each[1].abs().max()))[0]
    layer = scales.get(worst, layer_name(worst.removesuffix(".weight").removesuffix(".bias")))
    what = "NaN or infinite" if broken else "too large for a number"
    problem = f"the gradient of {layer} is {what} at step {step} ({len(broken)} of {len(gradients)} tensors)"
    raise SqatError(problem, LOWER, code="non-finite")


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, sharded ones and whole ones."""
    kinds = [[each for each in gradients if isinstance(each, DTensor) is sharded] for sharded in (False, True)]
    norms = [full_tensor(nn.utils.get_total_norm(some)) for some in kinds if some]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def learned_amax(model: nn.Module) -> dict[str, Tensor]:
    """Return the learned amax of each activation site; empty where they are fixed."""
    quantizers = dict(model.named_children()).get(QUANTIZERS)
    if not isinstance(quantizers, Quantizers) or not quantizers.learned:
        return {}
    return dict(zip(quantizers.index, quantizers.values, strict=True))


def check_scales(amax: Mapping[str, Tensor], start: Mapping[str, float], step: int) -> None:
    """Refuse a learned amax that is NaN, or far above its value at the start."""
    if not amax:
        return
    now = torch.stack([value.detach() for value in amax.values()]).tolist()
    for site, value in zip(amax, now, strict=True):
        if not value <= MAX_GROWTH * start[site]:
            problem = f"the scale of {site} has run away: amax was {start[site]:.3g} and is {value:.3g} at step {step}"
            raise SqatError(problem, "lower learning_rate, or set activation_scales: fixed", code="non-finite")


@torch.no_grad()
def find_weak_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the linears and convolutions whose weights are all zero, and those with rows of zeros."""
    dead, with_zero_rows = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nonzero = module.weight.flatten(1).any(dim=1)
            if not bool(nonzero.any()):
                dead.append(name)
            elif not bool(nonzero.all()):
                with_zero_rows.append(f"{name} ({int((~nonzero).sum())} of {len(nonzero)})")
    return dead, with_zero_rows


def weak_layer_warnings(model: nn.Module, step: int) -> dict[str, str]:
    """Return a line for each kind of weak layers that the model has."""
    dead, rows = find_weak_layers(model)
    lines = {}
    if dead:
        lines["dead"] = f"{len(dead)} dead layers at step {step}, all of whose weights are zero: {first_names(dead)}"
    if rows:
        lines["rows"] = f"{len(rows)} layers with rows of zeros at step {step}: {first_names(rows)}"
    return lines


def saturation_warnings(manifest: Manifest) -> list[str]:
    """Return a line that names the activation sites with many values beyond amax."""
    sites = [f"{site} ({record.saturated:.0%})" for site, record in manifest.sites.items()
             if record.saturated is not None and record.saturated > SATURATED]  # fmt: skip
    return [f"{len(sites)} saturated sites, which clip what they see: {first_names(sites)}"] if sites else []


def first_names(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:NUM_NAMES]) + (" and others" if len(names) > NUM_NAMES else "")
