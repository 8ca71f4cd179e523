"""What the kernels of target `cpu-sparse` compute, in torch and bit for bit, while a model is in eval mode.

A value whose last bit differs may fall on another int8 step, which later layers multiply. The order of every operation
is that of ``sqat/runtime/source``.

Shapes: B batch, h heads, T queries, S keys, d head width, H channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.errors import SqatError
from sqat.modules.hooks import Hooks, is_activation
from sqat.modules.parametrize import original_weight
from sqat.modules.sites import Site
from sqat.quantization.fake_quant import HIGH, quantize_weight
from sqat.sparsity.masks import apply_mask

ATTENTION_STEP = "sqat_attention_step"
LANES = 16  # partial sums of a row
EXACT = 2**24  # up to here every integer is a float32
LARGEST_BYTE = 255
# 255 * 2^x for x from -1/2 to 1/2, lowest power first
POWER = (255.0, 176.752479, 61.2567173, 14.154371, 2.46623577, 0.338250544)
LOG2_E = 1.44269504
LOWEST_POWER = -40.0
Step = Callable[[str], Tensor]  # site (or role of an attention operand) -> distance of its quantized values, 0-d


def compute_as_kernels(
    model: nn.Module, sites: Collection[str], step: Step, blocks: Sequence[str], hooks: Hooks
) -> None:
    """Let a model compute as the kernels do, in eval mode, until the hooks are removed.

    This concerns linears with an input among the sites, attention with a query among them, layer norms of the blocks
    and of the embeddings, and activation functions of the blocks.

    Raises:
        SqatError: the model is not float32, as the kernels are.
    """
    check_float32(model)
    replace_gelus(model, blocks, hooks)
    within = tuple(f"{block}." for block in blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (site := Site.of(name, "input")) in sites:
            replace_forward(module, partial(multiply_as_kernels, partial(step, site)), hooks)
        elif isinstance(module, nn.LayerNorm) and (name.startswith(within) or name.endswith("embeddings.LayerNorm")):
            replace_forward(module, normalize_as_kernels, hooks)
        elif Site.of(name, "query") in sites:
            hooks.set_attribute(module, ATTENTION_STEP, partial(step_of_role, step, name))


def check_float32(model: nn.Module) -> None:
    """Raise SqatError for weights of another type, whose sums would be rounded in other places."""
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise SqatError(
                f"placement cpu computes in float32, and {name} is {weight.dtype}",
                "call model.float() first",
                code="unsupported-model",
            )


def step_of_role(step: Step, attention: str, role: str) -> Tensor:
    """Return the step of an attention's operand."""
    return step(Site.of(attention, role))


def replace_forward(module: nn.Module, served: Callable[[Any, Tensor], Tensor], hooks: Hooks) -> None:
    """Replace a module's forward by ``served(module, x)`` in eval mode."""
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = own(x) if module.training else served(module, x)
        return y

    hooks.set_attribute(module, "forward", forward)


def multiply_as_kernels(input_step: Callable[[], Tensor], module: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear [..., in] -> [..., out] of a quantized input: an exact sum of integers * scale + bias.

    Args:
        x: multiples of the step, at most 127.
    """
    step = input_step()
    integers, scale = quantize_weight(mask_weight(module))
    sums = multiply_exactly(to_integers(x, step), integers.float().t())
    y = sums * (scale * step)
    return y if module.bias is None else y + module.bias


def mask_weight(module: nn.Linear) -> Tensor:
    """Return the weight before it is quantized, pruned entries 0."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    transforms: Any = module.parametrizations
    mask: Tensor | None = transforms.weight[0].mask
    weight = original_weight(module)
    return weight if mask is None else apply_mask(weight, mask)


def to_integers(x: Tensor, step: Tensor) -> Tensor:
    """Return the integers of multiples of a step, as floats."""
    return (x.float() * (1 / step)).round()


def multiply_exactly(left: Tensor, right: Tensor, largest: int = HIGH * HIGH) -> Tensor:
    """Return the product [..., M,N] of integers [..., M,K] and [..., K,N], each sum rounded to float32 once.

    Args:
        largest: value of a product of two entries.
    """
    most = EXACT // largest  # summands whose sum is exact
    with torch.autocast(left.device.type, enabled=False):  # a narrower type would not hold the sums
        if left.shape[-1] <= most:
            return left @ right
        parts = zip(left.split(most, -1), right.split(most, -2), strict=True)
        return torch.stack([(a @ b).int() for a, b in parts]).sum(0).float()  # int64: some devices have no float64


def normalize_as_kernels(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Compute a layer norm over the last dimension."""
    channels = x.shape[-1]
    centred = x - sum_rows(x) / channels
    variance = sum_rows(centred * centred) / channels + module.eps
    deviation = 1 / exact_sqrt(variance)
    y: Tensor = centred * deviation * module.weight + module.bias
    return y


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the float32 nearest to a square root, which torch's own is not always."""
    # Some devices have no float64.
    wide = x.cpu() if x.device.type == "mps" else x
    return wide.double().sqrt().float().to(x.device)


def sum_rows(x: Tensor) -> Tensor:
    """Return sums [..., 1] of rows [..., H]: channel c goes into part c % 16, and a tree adds the parts."""
    lanes = nn.functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    sums: Tensor = lanes[..., 0, :]
    for part in lanes.unbind(-2)[1:]:
        sums = sums + part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums


def attend_as_kernels(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, step: Step
) -> tuple[Tensor, Tensor]:
    """Return attention [B,T,h,d] and probabilities [B,h,T,S]; a query without any key gets zeros.

    Args:
        query: [B,h,T,d], like key and value [B,h,S,d] multiples of their steps.
        step: role (``query``, ``key``, ``value``) -> step.
    """
    steps = [step(role) for role in ("query", "key", "value")]
    queries, keys, values = (to_integers(x, s) for x, s in zip((query, key, value), steps, strict=True))
    scores = multiply_exactly(queries, keys.transpose(2, 3))
    kept = torch.ones_like(scores, dtype=torch.bool) if attention_mask is None else ~is_masked(attention_mask)
    scores = scores.masked_fill(~kept, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    scale = torch.tensor(float(steps[0]) * float(steps[1]) * scaling)  # rounded once, as an attribute is
    bytes_ = power_of_two((scores - largest).masked_fill(~kept, 0.0) * (scale * LOG2_E)).round()
    bytes_ = bytes_.masked_fill(~kept, 0.0)
    total = bytes_.sum(-1, keepdim=True).clamp(min=1)
    output = multiply_exactly(bytes_, values, LARGEST_BYTE * HIGH) / total * steps[2]
    return output.transpose(1, 2).contiguous(), bytes_ / total


def is_masked(attention_mask: Tensor) -> Tensor:
    """Return where a mask that is added to scores hides a key: far below 0, for its type."""
    return attention_mask <= torch.finfo(attention_mask.dtype).min / 2


def power_of_two(x: Tensor) -> Tensor:
    """Return 255 * 2^x of x <= 0, by a polynomial between integer powers."""
    inside = x.clamp(min=LOWEST_POWER)
    integer = inside.round()
    fraction = inside - integer
    square = fraction * fraction
    low = (fraction * POWER[1] + POWER[0]) + (fraction * POWER[3] + POWER[2]) * square
    total = low + (fraction * POWER[5] + POWER[4]) * (square * square)
    powers = torch.tensor([2.0**-n for n in range(1 - int(LOWEST_POWER))], device=x.device)
    return total * powers[(-integer).long()]


class Polynomial(NamedTuple):
    """GELU as x (1/2 + x P(x^2)), off by at most 6e-5.

    Attributes:
        coefficients: of P, the lowest power first; those of ``sqat/runtime/source/vector_math.h``.
        limit: the |x| from which on the result is x or 0.
    """

    coefficients: tuple[float, ...]
    limit: float

    def gelu(self, x: Tensor) -> Tensor:
        """Return the activation of a float32 tensor, each product and sum rounded in the kernel's order."""
        c0, c1, c2, c3, c4, c5, c6, c7, c8 = self.coefficients
        inside = x.clamp(-self.limit, self.limit)
        t = inside * inside
        t2 = t * t
        t4 = t2 * t2
        low = (t * c1 + c0) + (t * c3 + c2) * t2
        high = (t * c5 + c4) + (t * c7 + c6) * t2
        half = inside * (low + (t4 * c8 + high) * t4)
        return x * (half + 0.5).clamp(0.0, 1.0)


def replace_gelus(model: nn.Module, blocks: Sequence[str], hooks: Hooks) -> None:
    """Replace the outputs of GELUs inside the blocks in eval mode."""
    for block in blocks:
        for module in model.get_submodule(block).modules():
            if is_activation(module) and (polynomial := POLYNOMIALS.get(type(module).__name__)):
                hooks.handles.append(module.register_forward_hook(partial(replace_gelu, polynomial)))


def replace_gelu(polynomial: Polynomial, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the polynomial's value in eval mode (a forward hook)."""
    return output if module.training else polynomial.gelu(args[0].float()).to(output.dtype)


# fmt: off
ERF = Polynomial((0.398711711, -0.0659830123, 0.00958418939, -0.00103729276, 8.13770312e-05, -4.44724492e-06,
                  1.58859123e-07, -3.3077634e-09, 3.02824085e-11), 4.5)
TANH = Polynomial((0.398851544, -0.0665272027, 0.00993551128, -0.00113463902, 9.60572506e-05, -5.74656497e-06,
                   2.26307421e-07, -5.20880272e-09, 5.27343239e-11), 4.3)
# fmt: on
POLYNOMIALS = {
    "GELUActivation": ERF,
    "NewGELUActivation": TANH,
    "FastGELUActivation": TANH,
    "GELUTanh": TANH,
}
