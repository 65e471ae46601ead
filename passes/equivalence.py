"""What "close" means, for the product and for its tests: the only tolerances in the project.

A result may be a small multiple as wrong as the plain expression is in the same dtype. The plain
expression's own error is measured against float64, so no tolerance is ever guessed.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FACTOR = 8.0
"""How many times as wrong as float32 torch a whole model may be.

torch adds up a product in 16 or more partial sums, a kernel may add one term after another: over K terms that grows as
sqrt(K) where 16 sums grow as sqrt(K / 16), which makes 4; and the order of a sum is luck on both sides, which makes 2.
(SmolLM2 at 2:4 in float32: kernels 6.5 times as wrong as torch, ONNX Runtime's own products 1.4 times.)
"""

FLOOR = 32.0
"""Rounding steps of float32 at the size of a model's output that are always allowed; in 16 bits, two of its own.

The error of a baseline is a sample: where a model returns few numbers it may be zero by luck, and a multiple of it then
asks for a miracle. One dot product of K terms that end at the size of the result has an error of about sqrt(K) / 2
steps in any order (Higham, Accuracy and Stability, 2.8: random signs), which is 32 at K = 4096; a wrong weight or a
wrong wire moves an output by 1e-3 of its size and more, 260 times as much.
"""

CEILING = 0.25
"""No error above this share of the largest output is ever within a budget, however wrong the baseline is."""

PIECE = 1 << 20
"""How many numbers are compared at a time."""

UNPROVEN = 1024.0
"""Rounding steps of float32 (in 16 bits: 32 of its own) that are allowed where float32 stands in for the truth: 1.2e-4.

Two float32 runs that sum in different orders are each as far from the truth as the baseline; how far that is cannot be
measured without it. After L layers it is about sqrt(L) times that of one (FLOOR): L = 1000.
"""


@dataclass(frozen=True)
class Closeness:
    """How far a result is from the truth, and how far it may be.

    Attributes:
        error: max ``|got - exact|``; ``inf`` if the result holds a NaN or an infinity.
        budget: the largest error allowed; not finite if the baseline or the truth is not, and then nothing is.
    """

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its budget; never true where a NaN or an infinity is involved."""
        return self.error <= self.budget < math.inf

    def __str__(self) -> str:
        return f"max error {self.error:.3e}, allowed {self.budget:.3e}"


def compare(got: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0) -> Closeness:
    r"""Measure ``got`` against ``exact``, allowing ``factor`` times the error of ``baseline``.

    .. math:: \max|got - exact| \le factor \cdot \max|baseline - exact| + \epsilon \max|exact|

    The last term is one rounding step of got's dtype at the size of the result, so that a baseline
    that happens to be exact does not ask for a miracle.

    Args:
        got: the result under test, any float dtype.
        baseline: the plain expression evaluated in got's dtype; it sets the budget.
        exact: the same expression in float64.
        factor: how many times as wrong as the baseline the result may be.

    Returns:
        The closeness. Not ok if ``got`` has a NaN or infinity anywhere, whatever ``exact`` has there.

    Raises:
        ValueError: the three shapes differ.
    """
    if not got.shape == baseline.shape == exact.shape:
        shapes = [tuple(t.shape) for t in (got, baseline, exact)]
        raise ValueError(f"shapes differ: got {shapes[0]}, baseline {shapes[1]}, exact {shapes[2]}")
    error, wrong, size = _largest([(got, baseline, exact)])
    return Closeness(error=error, budget=factor * wrong + torch.finfo(got.dtype).eps * size)


def compare_model(got: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> Closeness:
    r"""As ``compare``, for what a whole model or a layer returns: with a floor and a ceiling.

    .. math:: \max|got - exact| \le
        \min(\max(8 \max|baseline - exact| + \epsilon s, 32 \epsilon s), s / 4), \quad s = \max|exact|

    Where the budget is cut by the ceiling, ``baseline`` itself may be outside: then nothing can be said about ``got``
    by these numbers, and it is not ok.

    Raises:
        ValueError: the three shapes differ.
    """
    close = compare(got, baseline, exact, factor=FACTOR)
    return _within(close, exact.double().abs().max().item() if exact.numel() else 0.0, got.dtype)


def compare_outputs(
    got: Sequence[Sequence[torch.Tensor]],
    baseline: Sequence[Sequence[torch.Tensor]],
    exact: Sequence[Sequence[torch.Tensor]],
    *,
    rounded: bool = False,
) -> Closeness:
    """Compare what a model returns for several batches, every output divided by its largest number in all of them.

    Everything is judged together by ``compare_model``: the largest error of one small output is a matter of luck on
    both sides, the largest of many is not.

    Args:
        got: for every batch, the float outputs.
        baseline: the same in got's dtype.
        exact: the same in float64.
        rounded: whether activations are rounded on purpose, to 16 bits or less. Where they are not, an error above
            half of the digits (the root of the rounding step) is never within a budget.

    Returns:
        The closeness, relative to the largest numbers; never ok where no number is compared.

    Raises:
        ValueError: shapes differ.
    """
    triples: list[tuple[torch.Tensor, ...]] = []
    scales: list[float] = []
    for outputs in zip(*(zip(*side, strict=True) for side in (got, baseline, exact)), strict=True):
        if any(len({batch.shape for batch in batches}) != 1 for batches in zip(*outputs, strict=True)):
            raise ValueError(f"shapes differ: {[[tuple(batch.shape) for batch in side] for side in outputs]}")
        triples += zip(*outputs, strict=True)
        scale = max((batch.abs().max().item() for batch in outputs[2] if batch.numel()), default=0.0)
        scales += [scale or 1.0] * len(outputs[0])
    if not sum(own.numel() for own, *_ in triples):
        return Closeness(math.inf, 0.0)
    error, wrong, size = _largest(triples, scales)
    dtype = functools.reduce(torch.promote_types, [own.dtype for own, *_ in triples])
    close = Closeness(error, FACTOR * wrong + torch.finfo(dtype).eps * size)
    close = _within(close, size, dtype)
    exact_enough = rounded or not math.isfinite(close.budget)
    if exact_enough:
        return close
    coarsest = max((x.dtype for x in triples[0][:2]), key=lambda dtype: torch.finfo(dtype).eps)  # got may be widened
    return Closeness(close.error, min(close.budget, _half(coarsest)))


def _largest(
    triples: Sequence[tuple[torch.Tensor, ...]], scales: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """The largest error of ``got`` and of ``baseline`` and the largest number of ``exact``, over all ``triples``.

    Some numbers at a time, each divided by the scale of its triple: logits of many tokens are larger than a model.
    """
    largest = [torch.zeros(3, dtype=torch.float64)]
    for triple, scale in zip(triples, scales or [1.0] * len(triples), strict=True):
        for parts in zip(*(torch.split(x.flatten(), PIECE) for x in triple), strict=True):
            own, base, true = (x / scale if scales else x for x in parts)
            if own.numel():
                its = true.double()
                error = (own.double() - its).abs().max() if bool(own.isfinite().all()) else its.new_tensor(math.inf)
                largest.append(torch.stack([error, (base.double() - its).abs().max(), its.abs().max()]).cpu())
    error, wrong, size = torch.stack(largest).amax(dim=0).tolist()
    return error, wrong, size


def _within(close: Closeness, scale: float, dtype: torch.dtype) -> Closeness:
    """With the floor and the ceiling of a whole model whose largest number is ``scale``."""
    if not math.isfinite(close.budget):
        return close
    return Closeness(close.error, min(max(close.budget, _steps(FLOOR, 2.0, dtype) * scale), CEILING * scale))


def _half(dtype: torch.dtype) -> float:
    """Half of the digits of a dtype, as a share of the result: what is less right than that says nothing."""
    return math.sqrt(torch.finfo(dtype).eps)


def grid_step(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The largest step that a grid of ``bits`` takes in each row, whose largest entry it must reach: ``[N, 1]``."""
    step: torch.Tensor = weight.abs().amax(dim=1, keepdim=True).double() / (2 ** (bits - 1) - 1)
    return step


def on_grid(rounded: torch.Tensor, weight: torch.Tensor, bits: int) -> bool:
    """Whether no entry of a quantised weight is further from the weight than one step of the coarsest grid of its row.

    Args:
        rounded: ``[out_features, in_features]``, what the codes and scales say.
        weight: the same before it was quantised.
        bits: of a code.
    """
    return bool(((rounded.double() - weight.double()).abs() <= grid_step(weight, bits)).all())


def compare_unproven(got: torch.Tensor, other: torch.Tensor) -> Closeness:
    """Compare two results of which neither is the truth, both rounded in the same places; see ``UNPROVEN``.

    Raises:
        ValueError: the shapes differ.
    """
    close = compare(got, other, other)
    scale = other.double().abs().max().item() if other.numel() else 0.0
    if not math.isfinite(close.budget):
        return close
    return Closeness(close.error, min(_steps(UNPROVEN, 32.0, got.dtype), CEILING) * scale)


def _steps(single: float, short: float, dtype: torch.dtype) -> float:
    """So many rounding steps of float32, or of a shorter type where that is more."""
    return max(single * torch.finfo(torch.float32).eps, short * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0)
