"""GELU as the kernels of target `cpu-sparse` compute it: x (1/2 + x P(x^2)), a polynomial off by at most 6e-5.

Why it is modelled: rounded to int8 behind it, one value in a few hundred falls on the other side than with torch's own
function, and later layers multiply such steps: logits would differ as much as between any two roundings of the model,
and with them a few decisions. In training mode nothing is replaced: there the difference means nothing, and the
polynomial is slower. The coefficients are those of ``sqat/runtime/source/vector_math.h``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from sqat.modules.hooks import Taps
from sqat.modules.sites import is_activation


class Polynomial(NamedTuple):
    """P, its lowest power first, and the |x| from which on x or 0 comes out."""

    coefficients: tuple[float, ...]
    bound: float

    def gelu(self, x: Tensor) -> Tensor:
        """The activation function of a float32 tensor, each product and sum rounded in the kernel's order."""
        c0, c1, c2, c3, c4, c5, c6, c7, c8 = self.coefficients
        inside = x.clamp(-self.bound, self.bound)
        t = inside * inside
        t2 = t * t
        t4 = t2 * t2
        low = (t * c1 + c0) + (t * c3 + c2) * t2
        high = (t * c5 + c4) + (t * c7 + c6) * t2
        half = inside * (low + (t4 * c8 + high) * t4)
        return x * (half + 0.5).clamp(0.0, 1.0)


def tap_activations(model: nn.Module, blocks: Iterable[str], taps: Taps) -> None:
    """Replace what the activation functions inside the blocks put out in eval mode."""
    for block in blocks:
        for module in model.get_submodule(block).modules():
            if is_activation(module) and (polynomial := POLYNOMIALS.get(type(module).__name__)):
                taps.handles.append(module.register_forward_hook(partial(replaced, polynomial)))


def replaced(polynomial: Polynomial, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: the polynomial's value in eval mode."""
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
