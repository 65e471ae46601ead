"""Prune rows by rank, with a gradient for how many weights each row loses.

The order in which a row loses its weights is fixed before learning starts (BESA, Xu et al. 2024, "BESA: Pruning Large
Language Models with Blockwise Parameter-Efficient Sparsity Allocation", section 3.2): only the count is learned, so a
row is its ranks, and a mask is one comparison. While learning a weight costs at most 12 bytes beside itself: 2 or 4
for its rank, 4 for its masked value, 4 for the gradient of that. Probabilities are never stored.
"""

from typing import Any

import torch
from torch import Tensor

from .masks import check_score
from .rates import staircase
from .sums import BLOCK


def ranks(score: Tensor) -> Tensor:
    """The place of every weight in the order in which its row is pruned.

    Args:
        score: ``[out_features, in_features]``, any float dtype; larger means keep. Compared in float32; of equal
            scores the higher index is pruned first, as in `masks.fraction_keep_mask`.

    Returns:
        ``[out_features, in_features]``, int16 up to 32,767 columns and int32 beyond: 0 is pruned first.

    Raises:
        ValueError: the score is not a matrix, or holds NaN.
    """
    check_score(score)
    rows, columns = score.shape
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    result = torch.empty(rows, columns, dtype=dtype)
    places = torch.arange(columns, dtype=dtype)
    size = max(1, BLOCK // max(1, columns))
    for part, out in zip(torch.split(score.detach(), size), torch.split(result, size), strict=True):
        order = columns - 1 - part.float().flip(1).argsort(dim=1, stable=True)
        out.scatter_(1, order, places.expand(len(part), -1))
    return result


def keep_mask(rank: Tensor, counts: Tensor) -> Tensor:
    """Prune the ``counts[i]`` first weights of row i.

    Args:
        rank: ``[out_features, in_features]`` of `ranks`.
        counts: integer ``[out_features]`` or ``[1]``, 0 to in_features.

    Returns:
        Bool ``[out_features, in_features]``.
    """
    return rank >= counts.to(rank.dtype)[:, None]  # the same dtype, or the ranks would be copied to the wider one


def prune(weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
    r"""Prune ``counts`` weights of every row, as if each were pruned with the probability that ``beta`` gives it.

    With ranks r the weight ij is pruned with probability ``q``; the mask is hard, its gradient that of ``1 - q``
    (straight-through):

    .. math:: q_{ij} = \textstyle\sum_d \beta_{id} \, [r_{ij} < T_d], \quad
              y_{ij} = W_{ij} \, [r_{ij} \ge n_i], \quad
              \frac{\partial L}{\partial \beta_{id}} = -\sum_{j: r_{ij} < T_d} \frac{\partial L}{\partial y_{ij}} W_{ij}

    with the `rates.staircase` T. BESA, eq. 3 to 6, with the hard mask by count as in the published code; the paper's
    text prunes where ``q >= alpha``. The weight gets the gradient of what is kept.

    Args:
        weight: float ``[R, C]``.
        rank: ``[R, C]`` of `ranks`.
        beta: float ``[R, D]`` or ``[1, D]`` for all rows, D candidates.
        counts: integer ``[R]`` or ``[1]``; usually ``mean_rate(beta) * C``, rounded.

    Returns:
        Float ``[R, C]``.
    """
    result: Tensor = _Prune.apply(weight, rank, beta, counts)  # type: ignore[no-untyped-call]
    return result


class _Prune(torch.autograd.Function):
    """`prune`: keeps the weight and the ranks, which exist anyway, and nothing else of their size."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, rank, counts)
        ctx.candidates, ctx.dtype = beta.shape, beta.dtype
        return torch.where(keep_mask(rank, counts), weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (grad,) = grads
        weight, rank, counts = ctx.saved_tensors
        for_weight = torch.where(keep_mask(rank, counts), grad, 0.0) if ctx.needs_input_grad[0] else None
        for_beta = _for_beta(weight, rank, grad, ctx.candidates).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return for_weight, None, for_beta, None


def _for_beta(weight: Tensor, rank: Tensor, grad: Tensor, candidates: tuple[int, int]) -> Tensor:
    """``dL/dbeta`` of `prune`: products summed by stair, then over the stairs below each candidate.

    Rows go in blocks, so that the stair of every weight, which torch wants as int64, exists for one block only.
    """
    rows, columns = weight.shape
    groups, count = candidates
    edges = staircase(columns, count - 1)
    stair = torch.bucketize(torch.arange(columns), edges, right=True)  # the first candidate that prunes this rank
    size = max(1, BLOCK // max(1, columns))
    found = []
    for w, r, g in zip(*(torch.split(t, size) for t in (weight, rank, grad)), strict=True):
        sums = torch.zeros(len(w), count)
        sums.scatter_add_(1, stair[r.int()], g * w)
        found.append(sums)
    sums = torch.cat(found) if rows else torch.zeros(0, count)
    if groups == 1:
        sums = sums.sum(dim=0, keepdim=True, dtype=torch.float64)
    return -sums.cumsum(dim=1)
