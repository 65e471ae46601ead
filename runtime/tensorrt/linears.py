"""Which linears of an ONNX file TensorRT may run by its sparse tactics, and why the others not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ...calibrate.patterns import NM, largest_group_count
from ...passes.errors import VerificationError
from ...passes.onnx.plugin import PLUGINS
from ..inspection import weights

FEWEST = 256
"""K and N below which a sparse tactic is rarely the faster one, by NVIDIA's word (NVIDIA/TensorRT#3849 and #4065)."""

Eligible: TypeAlias = Literal["yes", "maybe", "no"]


@dataclass(frozen=True)
class PlanLinear:
    """One linear with a constant weight.

    Attributes:
        name: of its node; the module path, several joined where linears of the same input are one product.
        k: in_features, the axis of the pattern.
        n: out_features.
        pattern: the pattern of its zeros along K, or None.
        eligible: whether a sparse tactic is possible: by shape, pattern and dtype.
        reason: why not, or why not surely; "" for ``yes``.
        plugin: the plugin that runs it; "" for none.
        bits: of a stored weight; with 8 its product is between QuantizeLinear and DequantizeLinear.
    """

    name: str
    k: int
    n: int
    pattern: str | None
    eligible: Eligible
    reason: str
    plugin: str = ""
    bits: int = 16


def plan_linears(path: Path) -> list[PlanLinear]:
    """Every linear of an ONNX file that was written for TensorRT.

    Raises:
        VerificationError: a weight holds -0.0, which sparse kernels may not take for a zero.
    """
    found = []
    for info, weight in weights(path):
        if bool(((weight == 0) & weight.signbit()).any()):
            raise VerificationError(f"{info.path} holds -0.0, which sparse kernels do not take for a zero")
        n, k = info.shape
        if info.op in PLUGINS:
            found.append(PlanLinear(info.path, k, n, info.pattern, "no", f"the plugin {info.op} runs it", info.op))
            continue
        two_of_four = k % 4 == 0 and info.pattern is not None and largest_group_count(weight != 0, 4) <= 2
        eligible, reason = eligibility(k, n, two_of_four=two_of_four, bits=info.bits)
        pattern = str(NM(2, 4)) if two_of_four else info.pattern
        found.append(PlanLinear(info.path, k, n, pattern, eligible, reason, bits=info.bits))
    return found


def eligibility(k: int, n: int, *, two_of_four: bool, bits: int) -> tuple[Eligible, str]:
    """Whether sparse tensor cores may run a product with a weight ``[K, N]``, and the reason if not surely.

    The sizes are those below which no sparse kernel was found to run (PyTorch's table of minimum shapes for cuSPARSELt
    and CUTLASS; ASP and Model Optimizer prune nothing smaller than 16 by 8). Products of 8 bits and small ones are
    never sure.
    """
    least_k, least_n = (32, 32) if bits == 8 else (16, 8)
    if not two_of_four:
        return "no", "the weight is not 2:4"
    if k % least_k:
        return "no", f"K = {k} is not a multiple of {least_k}"
    if n % least_n:
        return "no", f"N = {n} is not a multiple of {least_n}"
    if bits > 16:
        return "no", "2:4 tensor cores need 16 bits or less"
    if bits == 8:
        return "maybe", "TensorRT may run a product between Q and DQ dense (NVIDIA/TensorRT#4694)"
    for name, size in (("K", k), ("N", n)):
        if size < FEWEST:
            return "maybe", f"{name} = {size} is below {FEWEST}, where sparse tactics rarely win"
    if k % 64 or n % 32:
        return "maybe", f"K = {k} is not a multiple of 64" if k % 64 else f"N = {n} is not a multiple of 32"
    return "yes", ""
