"""What "close" means, for the product and for its tests: the only tolerances in the project.

A result may be a small multiple as wrong as the plain expression is in the same dtype. The plain
expression's own error is measured against float64, so no tolerance is ever guessed.
"""

import math
from dataclasses import dataclass

import torch


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
    if got.numel() == 0:
        return Closeness(error=0.0, budget=0.0)
    exact = exact.double()
    eps = torch.finfo(got.dtype).eps
    budget = factor * (baseline.double() - exact).abs().max().item() + eps * exact.abs().max().item()
    error = (got.double() - exact).abs().max().item() if bool(got.isfinite().all()) else float("inf")
    return Closeness(error=error, budget=budget)
