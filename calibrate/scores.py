"""How much each weight matters; larger means keep. All scores are float32: ratios underflow in half precision."""

from typing import Final

import torch

from .patterns import Group
from .sums import column_sums, row_sums

MAGNITUDE_GROUP: Final[Group] = "matrix"
WANDA_GROUP: Final[Group] = "row"
"""Sun et al. 2024, section 3: the weights of one output compete."""
RIA_GROUP: Final[Group] = "matrix"
"""Zhang et al. 2024: the shares of row and column make all weights of a matrix comparable."""


HESSIAN_GROUP: Final[Group] = "row"
"""The rows of a linear share one Hessian and are pruned independently of each other."""
HESSIAN_DAMPING: Final = 0.01


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    r"""Score by absolute value.

    .. math:: S_{ij} = |W_{ij}|

    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Args:
        weight: ``[out_features, in_features]``, any float dtype.

    Returns:
        A new ``[out_features, in_features]`` float32.

    Raises:
        ValueError: the weight is not a matrix, or holds NaN or an infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight wants shape [out_features, in_features], got {tuple(weight.shape)}")
    score = weight.detach().float().abs()
    if score.numel() and not bool(score.max().isfinite()):  # max passes NaN on
        raise ValueError("weight holds NaN or infinity")
    return score


def wanda(weight: torch.Tensor, act_norm: torch.Tensor) -> torch.Tensor:
    r"""Score by weights and activations.

    .. math:: S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1. A feature that is
    always zero gives its column the score 0.

    Args:
        weight: ``[out_features, in_features]``, any float dtype.
        act_norm: ``[in_features]``, L2 norm of each input feature over all tokens (not squared, not a mean).

    Returns:
        A new ``[out_features, in_features]`` float32.

    Raises:
        ValueError: as for `magnitude`; or ``act_norm`` has the wrong shape, or a NaN, infinite or negative entry.
    """
    score = magnitude(weight)
    return score.mul_(_checked(act_norm, weight))


def ria(weight: torch.Tensor, act_norm: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    r"""Score by relative importance and activations.

    .. math:: S_{ij} = \Bigl(\frac{|W_{ij}|}{\sum_k |W_{kj}|} + \frac{|W_{ij}|}{\sum_k |W_{ik}|}\Bigr)
              \cdot \lVert X_j \rVert_2^{a}

    Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models"; ``a``
    is ``power``. The column sum runs over one linear's outputs: split a fused q, k, v first. A row or column of zeros
    scores 0.

    Args:
        weight: ``[out_features, in_features]``, any float dtype.
        act_norm: ``[in_features]``, L2 norm of each input feature over all tokens (not squared, not a mean).
        power: exponent of the norms, 0 or more; 0 ignores the activations, even those that are always zero.

    Returns:
        A new ``[out_features, in_features]`` float32.

    Raises:
        ValueError: as for `wanda`; or ``power`` is negative.
    """
    if not power >= 0:
        raise ValueError(f"power wants 0 or more, got {power}")
    score = magnitude(weight)
    by_column = _reciprocal(column_sums(score))
    by_row = _reciprocal(row_sums(score))
    share = by_row[:, None] + by_column
    return score.mul_(share).mul_(_checked(act_norm, weight) ** power)


def hessian(weight: torch.Tensor, inverse_diagonal: torch.Tensor) -> torch.Tensor:
    r"""Score by what the layer's squared error grows by when one weight goes and the others make up for it.

    .. math:: S_{ij} = W_{ij}^2 / [H^{-1}]_{jj}

    Hassibi & Stork 1992, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", eq. 5, up to a
    factor; one of the orders of BESA's published code.

    Args:
        weight: ``[out_features, in_features]``, any float dtype.
        inverse_diagonal: ``[in_features]``, the diagonal of the inverse of the damped Hessian.

    Returns:
        A new ``[out_features, in_features]`` float32.

    Raises:
        ValueError: as for `magnitude`; or the diagonal has the wrong shape or an entry that is not positive and finite.
    """
    if inverse_diagonal.shape != weight.shape[1:]:
        raise ValueError(
            f"inverse_diagonal wants shape ({weight.shape[1]},) for this weight, got {tuple(inverse_diagonal.shape)}"
        )
    if not bool((inverse_diagonal.isfinite() & (inverse_diagonal > 0)).all()):
        raise ValueError("inverse_diagonal holds an entry that is not positive and finite")
    scale = inverse_diagonal.double().rsqrt().float().to(weight.device)
    return magnitude(weight).mul_(scale).square_()


def _reciprocal(sums: torch.Tensor) -> torch.Tensor:
    """``1 / sums`` in float32; finite where a sum is 0, because the weights there are 0 as well."""
    return sums.clamp_min(torch.finfo(torch.float32).tiny).reciprocal().float()


def _checked(act_norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``act_norm`` in float32 on the weight's device, after the checks that `wanda` lists."""
    if act_norm.shape != weight.shape[1:]:
        raise ValueError(f"act_norm wants shape ({weight.shape[1]},) for this weight, got {tuple(act_norm.shape)}")
    if not bool((act_norm.isfinite() & (act_norm >= 0)).all()):
        raise ValueError("act_norm holds a NaN, infinite or negative norm")
    return act_norm.to(weight.device, torch.float32)
