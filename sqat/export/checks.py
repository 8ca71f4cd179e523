"""The gate an exported file must pass: ONNX's own checks, the graph rules, and N:M on the stored values.

What: `find` collects findings, each naming its rule and node; `verify` fails on those that make the file wrong
and hands back those that only cost speed. Left out: parity with the torch model, which the export stage
measures in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import ModelProto

from sqat.errors import GateError
from sqat.export.graph import module_of
from sqat.export.rules import RULES, Problem
from sqat.export.wiring import Wiring
from sqat.sparsity.masks import count_violations, parse_pattern


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: ``B1`` .. ``B15``, ``checker`` or ``shapes``.
        node: name of the node, empty for the whole model.
        problem: what is wrong, one line.
        warning: costs speed, not correctness.
    """

    rule: str
    node: str
    problem: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.rule} {self.node}: {self.problem}" if self.node else f"{self.rule}: {self.problem}"


def verify(model: ModelProto, pruned: Mapping[str, str] | None = None) -> list[Finding]:
    """Fail on a model that breaks a rule.

    Args:
        pruned: layer -> pattern (``2:4``) that its weight must have.

    Returns:
        What only costs speed.

    Raises:
        GateError: naming the first broken rule and its node.
    """
    found = find(model, pruned)
    broken = [finding for finding in found if not finding.warning]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise GateError(f"the exported graph breaks rule {broken[0]}{more}")
    return found


def find(model: ModelProto, pruned: Mapping[str, str] | None = None) -> list[Finding]:
    """All findings about a model, the ONNX checker's first; arguments as for `verify`."""
    invalid = list(check_format(model))
    if invalid:
        return invalid
    wiring = Wiring(model)
    found = [Finding(rule, *problem) for rule, check in RULES.items() for problem in check(wiring)]
    return found + [Finding("B6", *problem) for problem in patterns(wiring, pruned or {})]


def check_format(model: ModelProto) -> Iterator[Finding]:
    """ONNX checker and strict shape inference."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        yield Finding("checker", "", " ".join(str(error).split()))
        return
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        yield Finding("shapes", "", " ".join(str(error).split()))


def patterns(wiring: Wiring, pruned: Mapping[str, str]) -> Iterator[Problem]:
    """Layers said to be pruned: N:M on the stored values along the sum, in sizes that sparse kernels take."""
    found = {layer: weight for weight in wiring.weights for layer in [module_of(weight.node)]}
    for layer, text in pruned.items():
        weight, pattern = found.get(layer), parse_pattern(text)
        if weight is None:
            yield Problem(layer, f"said to be {text}, is not in the graph")
            continue
        if weight.size[0] % pattern.m:
            yield Problem(weight.node.name, f"{weight.size[0]} inputs are not a multiple of {pattern.m}")
            continue
        if weight.size[1] % 8 or weight.size[0] % 16:
            yield Problem(weight.node.name, f"{weight.size} [in, out] are not multiples of 16 and 8", warning=True)
        broken = count_violations(torch.from_numpy(np.array(weight.values)), pattern, weight.reduction)
        if broken:
            yield Problem(weight.node.name, f"{broken} groups hold more than {pattern.n} of {pattern.m} weights")
