"""Choose one N:M pattern for each weight, learned like BESA's rates.

2:4 everywhere leaves nothing to allocate. So each linear gets a distribution over a few patterns, dense among them,
in the place of BESA's candidate rates (`rates.py`), and the target is one for the total.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .masks import nm_keep_mask
from .patterns import NM


def sparsities(patterns: Sequence[NM | None]) -> list[float]:
    """The fraction of zeros of every pattern; None is dense."""
    return [0.0 if pattern is None else pattern.sparsity for pattern in patterns]


def usable(patterns: Sequence[NM | None], in_features: int) -> list[NM | None]:
    """The patterns that a linear can have; None is dense."""
    return [pattern for pattern in patterns if pattern is None or in_features % pattern.m == 0]


def start_near(patterns: Sequence[NM | None], rate: float, *, width: float = 0.25) -> Tensor:
    """Logits that are highest where a pattern's sparsity is next to ``rate``, float32 ``[1, D]``: a bell."""
    return -0.5 * ((torch.tensor([sparsities(patterns)]) - rate) / width) ** 2


def keep_codes(score: Tensor, patterns: Sequence[NM | None]) -> Tensor:
    """All masks in one: bit d of a weight says whether pattern d keeps it.

    Args:
        score: ``[R, C]``, C a multiple of every m; larger means keep.
        patterns: at most 8.

    Returns:
        uint8 ``[R, C]``.

    Raises:
        ValueError: there are more than 8 patterns, or `masks.nm_keep_mask` refuses.
    """
    if len(patterns) > 8:
        raise ValueError(f"at most 8 patterns can be chosen from, got {len(patterns)}")
    codes = torch.zeros(score.shape, dtype=torch.uint8)
    for d, pattern in enumerate(patterns):
        codes |= (1 if pattern is None else nm_keep_mask(score, pattern).to(torch.uint8)) << d
    return codes


def kept(codes: Tensor, d: int) -> Tensor:
    """The keep mask of pattern ``d``: bool, the shape of ``codes``."""
    return (codes & (1 << d)).bool()


def prune(weight: Tensor, codes: Tensor, beta: Tensor) -> Tensor:
    r"""Prune by the likeliest pattern, as if the patterns were mixed by ``beta``.

    .. math:: y_{ij} = W_{ij} M^{(\arg\max \beta)}_{ij}, \qquad
              \frac{\partial L}{\partial \beta_d} = \sum_{ij} \frac{\partial L}{\partial y_{ij}} W_{ij} M^{(d)}_{ij}

    Straight-through as in `ranked.prune`, with the masks M of the patterns for the stairs.

    Args:
        weight: float ``[R, C]``.
        codes: uint8 ``[R, C]`` of `keep_codes`.
        beta: float ``[1, D]``.

    Returns:
        Float ``[R, C]``.
    """
    result: Tensor = _Prune.apply(weight, codes, beta)  # type: ignore[no-untyped-call]
    return result


class _Prune(torch.autograd.Function):
    """`prune`: keeps the weight and one byte a weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codes: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(weight, codes, beta)
        return torch.where(kept(codes, int(beta[0].argmax())), weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,) = grads
        weight, codes, beta = ctx.saved_tensors
        best = kept(codes, int(beta[0].argmax()))
        for_weight = torch.where(best, grad, 0.0) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return for_weight, None, None
        product = grad * weight
        sums = [torch.where(kept(codes, d), product, 0.0).sum(dtype=torch.float64) for d in range(beta.shape[1])]
        return for_weight, None, torch.stack(sums)[None].to(beta.dtype)


def choose(likelihood: Sequence[Sequence[float]], prunes: Sequence[Sequence[int]], target: int) -> list[int]:
    """The likeliest pattern for every weight among the choices that together prune ``target`` or more.

    Args:
        likelihood: for each weight the logarithm of each pattern's probability.
        prunes: for each weight how many of its elements each pattern prunes.
        target: how many are to be pruned at least.

    Returns:
        For each weight the number of its pattern. Of equal choices the one that prunes less, then that of the
        patterns named first.

    Raises:
        ValueError: a likelihood is NaN, or no choice prunes that many.
    """
    if any(math.isnan(value) for row in likelihood for value in row):
        raise ValueError("the learned probabilities hold NaN")
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # the likeliest choice for every total so far
    for values, counts in zip(likelihood, prunes, strict=True):
        wider: dict[int, tuple[float, list[int]]] = {}
        for total, (value, picks) in best.items():
            for d, (gain, count) in enumerate(zip(values, counts, strict=True)):
                found = wider.get(total + count)
                if found is None or value + gain > found[0]:
                    wider[total + count] = (value + gain, [*picks, d])
        best = wider
    enough = [(value, -total, picks) for total, (value, picks) in best.items() if total >= target]
    if not enough:
        raise ValueError(f"no choice of patterns prunes {target} weights; the most is {max(best)}")
    return max(enough, key=lambda entry: entry[:2])[2]
