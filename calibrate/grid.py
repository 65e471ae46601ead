"""The grid that stored integer weights lie on: whole codes times a scale that neighbouring columns share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRENGTHS = tuple(1 - 0.03 * step for step in range(20))
"""What `search_strengths` tries."""


@dataclass(frozen=True)
class Grid:
    """Codes from ``-limit`` to ``limit``, symmetric around 0, so that what is pruned is on every grid.

    Attributes:
        limit: the largest code: 7 of 4 bits, 127 of 8.
        group: columns that share a scale; 0 for all of a row.
        dtype: what scales are stored as.
    """

    limit: int
    group: int
    dtype: torch.dtype


def largest(weight: Tensor, grid: Grid) -> Tensor:
    """The largest magnitude of every group, float32 ``[R, G]``; the last group of a row may be short.

    Args:
        weight: ``[R, C]``, taken as float32.
        grid: the grid.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    found = _groups(weight.detach().float().abs(), grid).amax(dim=-1)
    if not bool(found.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    return found


def scales(largest: Tensor, strengths: Tensor, grid: Grid) -> Tensor:
    r"""The scale of every group, as it is stored.

    .. math:: s = \gamma \max |w| / q_{\max}

    Shao et al. 2024, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", eq. 2, for a
    symmetric grid: with a clipping strength below 1 the largest weights are clipped and all others get finer steps. At
    1 these are the scales that packing finds by itself: rounded to the dtype, and where the group is not all zero at
    least its smallest positive number. The rounding is straight-through.

    Args:
        largest: ``[R, G]`` of `largest`.
        strengths: ``[R, G]``, above 0.
        grid: the grid.

    Returns:
        float32 ``[R, G]``; differentiable in ``strengths``. 0 for a group of zeros.

    Raises:
        ValueError: a scale is too large for the dtype.
    """
    exact = strengths * largest / grid.limit
    stored = exact.detach().to(grid.dtype)
    if not bool(stored.isfinite().all()):
        raise ValueError(f"a scale of {float(exact.max()):g} does not fit {str(grid.dtype).removeprefix('torch.')}")
    smallest = torch.finfo(grid.dtype).smallest_normal * torch.finfo(grid.dtype).eps
    stored = stored.float().clamp_min(smallest) * (largest > 0)
    return stored + (exact - exact.detach())


def spread(scale: Tensor, columns: int, grid: Grid) -> Tensor:
    """The scale of every weight, ``[R, columns]``, from that of every group, ``[R, G]``."""
    if not grid.group:
        return scale.expand(-1, columns)
    return scale.repeat_interleave(grid.group, dim=1)[:, :columns]


def quantise(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    r"""The nearest weights on the grid.

    .. math:: Q(w) = s \cdot \operatorname{clamp}(\lfloor w / s \rceil, -q_{\max}, q_{\max})

    Ties go to even codes, as in packing. The gradient is straight-through (Bengio et al. 2013): that of ``w`` passes
    where it is not clipped, and that of ``s`` is :math:`\lfloor w / s \rceil - w / s`, or the code where it is clipped.

    Args:
        weight: float32 of any shape.
        scale: that of every weight, as of `spread`, of the same shape; 0 makes 0.
        grid: the grid.

    Returns:
        As ``weight``; differentiable in both. Zeros stay +0.0.
    """
    result: Tensor = _Quantise.apply(weight, scale, grid.limit)  # type: ignore[no-untyped-call]
    return result


class _Quantise(torch.autograd.Function):
    """`quantise`: keeps the weight and its scales, and makes the codes anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, limit: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.limit = limit
        codes = (weight / torch.where(scale > 0, scale, 1.0)).round().clamp(-limit, limit)
        return codes * scale + 0.0  # + 0.0 turns -0.0 into 0.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        steps = weight / torch.where(scale > 0, scale, 1.0)
        inside = steps.abs() <= ctx.limit
        off = steps.round().clamp(-ctx.limit, ctx.limit) - torch.where(inside, steps, 0.0)
        return torch.where(inside & (scale > 0), grad, 0.0), grad * off, None


def search_strengths(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    r"""The clipping strengths with the least error of every group, among `STRENGTHS`.

    .. math:: \min_\gamma \sum_j d_j \bigl(Q_\gamma(w_j) - w_j\bigr)^2

    With the diagonal of the Hessian for d this is the layer's error if its inputs were not correlated.

    Args:
        weight: ``[R, C]`` float32.
        importance: d, ``[C]``.
        grid: the grid.

    Returns:
        float32 ``[R, G]``; 1 for a group of zeros, and of equals the largest.

    Raises:
        ValueError: as `largest` and `scales`.
    """
    top = largest(weight, grid)
    best, least = torch.ones_like(top), torch.full_like(top, torch.inf)
    for strength in STRENGTHS:
        tried = spread(scales(top, torch.full_like(top, strength), grid), weight.shape[1], grid)
        wrong = (quantise(weight, tried, grid) - weight).square() * importance
        error = _groups(wrong, grid).sum(dim=-1, dtype=torch.float64).float()
        best = torch.where(error < least, strength, best)
        least = torch.minimum(error, least)
    return best


def _groups(weight: Tensor, grid: Grid) -> Tensor:
    """``[R, G, group]``, the last group filled up with zeros."""
    rows, columns = weight.shape
    group = grid.group or max(1, columns)
    return torch.nn.functional.pad(weight, (0, -columns % group)).reshape(rows, -1, group)
