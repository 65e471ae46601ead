"""ADMM: weights and mask found together, the zeros coming gradually."""

import torch
from torch import Tensor

from . import ranked
from .masks import count_keep_mask, keep_mask, nm_keep_mask
from .matmul import product
from .patterns import NM, Group, Pattern, RowCounts

ITERATIONS, GRADUAL = 20, 15  # Boza 2024, section 3: 20 iterations, of which 15 may still change the mask


def admm(
    weight: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    target: Pattern | RowCounts | Tensor,
    *,
    per: Group = "matrix",
    iterations: int = ITERATIONS,
    gradual: int = GRADUAL,
) -> tuple[Tensor, Tensor]:
    r"""Minimise the layer's error over weights with zeros, by alternating directions.

    With the dual variable U, penalty 1, and P the mask, from W = W_0 and U = 0:

    .. math::
        Z &= P \odot (W + U) \\
        U &\leftarrow U + W - Z \\
        W &\leftarrow \bigl(W_0 H + Z - U\bigr) (H + I)^{-1}

    and the result is ``Z`` of one step more. For the first iterations the mask is chosen anew from :math:`|W + U|`,
    pruning the fraction

    .. math:: s_t = s \Bigl(1 - \bigl(1 - \tfrac{t + 1}{T}\bigr)^3\Bigr)

    N:M keeps the n best of every group in any case and prunes the lowest of the others. Rows with counts of their own
    prune that fraction of them.

    Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", with gradual support; and Boyd et
    al. 2011 for ADMM itself.

    Args:
        weight: ``[R, C]`` float32, scaled by the norms of its inputs.
        hessian: ``[C, C]`` float32, scaled to a diagonal of ones and damped.
        inverse: ``[C, C]`` float32, of the Hessian plus the identity.
        target: the pattern, how many every row prunes, or a bool keep mask ``[R, C]`` to hold on to.
        per: the weights that compete under an unstructured pattern.
        iterations: how many.
        gradual: T, how many of them choose the mask; 1 or more.

    Returns:
        The new scaled weight, +0.0 where pruned; and the keep mask.
    """
    pull = product(weight, hessian)
    w, dual = weight, torch.zeros_like(weight)
    keep = target if isinstance(target, Tensor) else torch.ones(weight.shape, dtype=torch.bool)
    for step in range(iterations):
        raised = w + dual
        if not isinstance(target, Tensor) and step < gradual:
            keep = select(raised.abs(), target, per, part=1 - (1 - (step + 1) / gradual) ** 3)
        kept = torch.where(keep, raised, 0.0)
        dual = raised - kept
        w = product(pull + kept - dual, inverse)
    return torch.where(keep, w + dual, 0.0), keep


def select(score: Tensor, target: Pattern | RowCounts, per: Group, *, part: float = 1.0) -> Tensor:
    """The keep mask of the best scores, with a part of the zeros of a pattern or all of them.

    Args:
        score: ``[R, C]``; larger means keep.
        target: the pattern, or how many every row prunes.
        per: the weights that compete under an unstructured pattern.
        part: how much of the zeros, above 0 to 1; of N:M the best n of a group stay in any case.
    """
    if isinstance(target, RowCounts):
        return ranked.keep_mask(ranked.ranks(score), (target.pruned * part).long())
    if part == 1:
        return keep_mask(score, target, per)
    if isinstance(target, NM):
        score = score.masked_fill(nm_keep_mask(score, target), torch.inf)
    competing = score.shape[1] if per == "row" and not isinstance(target, NM) else score.numel()
    pruned = int(target.sparsity * part * competing)
    return count_keep_mask(score, pruned, "matrix" if isinstance(target, NM) else per)
