"""How much a row loses, as a learnable distribution over candidate rates.

BESA (Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation",
section 3.2) gives every group of rows one logit for each candidate rate ``p_d = d / steps``, d = 0 to ``steps``. The
candidates hold 0 and 1, as in the published code. In `ranked.py` the distribution becomes a mask.
"""

import torch
from torch import Tensor


def initial_logits(groups: int, rate: float, *, steps: int = 100, width: float | None = None) -> Tensor:
    r"""Logits to start from: a bell around ``rate``, or uniform.

    .. math:: z_d = -\tfrac12 \bigl((p_d - \text{rate}) / \text{width}\bigr)^2

    BESA starts from zeros, all rates equally likely, whose mean is 0.5 whatever is asked for, and whose gradient
    counts weights far from any that could change sides. The bell starts at the target and looks near it.

    Args:
        groups: how many distributions: one a row, or one for all rows.
        rate: mean of the bell, 0 to 1.
        steps: candidates less one.
        width: standard deviation of the bell; None for zeros.

    Returns:
        float32 ``[groups, steps + 1]``.

    Raises:
        ValueError: ``rate`` is outside 0 to 1, or ``width`` or ``steps`` is not positive.
    """
    if not (0 <= rate <= 1 and steps >= 1 and (width is None or width > 0)):
        raise ValueError(
            f"want a rate between 0 and 1 and positive steps and width, got rate {rate}, steps {steps}, width {width}"
        )
    if width is None:
        return torch.zeros(groups, steps + 1)
    rates = torch.arange(steps + 1) / steps
    return (-0.5 * ((rates - rate) / width) ** 2).expand(groups, -1).clone()


def distribution(logits: Tensor, *, bounded: bool = False) -> Tensor:
    r"""Probabilities of the candidate rates.

    .. math:: \beta = \operatorname{softmax}(z) \quad\text{or, bounded,}\quad
              \beta = \operatorname{softmax}(\sigma(z))

    The second is what BESA's published code does unless told otherwise. The sigmoid holds the logits within 0 to 1, so
    with 101 candidates no mean rate below 0.376 or above 0.624 can be reached.

    Args:
        logits: float ``[groups, steps + 1]``.
        bounded: put the logits through a sigmoid first.

    Returns:
        Float ``[groups, steps + 1]``, rows that sum to 1; differentiable.
    """
    return torch.softmax(logits.sigmoid() if bounded else logits, dim=-1)


def reachable(steps: int = 100) -> tuple[float, float]:
    """The lowest and highest mean rate that bounded logits can express.

    The extremes put sigmoids of 0 on one end and of 1 on the other; every split between them is tried.
    """
    rates = torch.arange(steps + 1, dtype=torch.float64) / steps
    highest = 0.0
    for split in range(steps + 2):
        logits = torch.zeros(steps + 1, dtype=torch.float64)
        logits[split:] = 1
        highest = max(highest, float(torch.softmax(logits, dim=0) @ rates))
    return 1 - highest, highest


def mean_rate(beta: Tensor) -> Tensor:
    r"""The expected rate of every group.

    .. math:: \alpha = \textstyle\sum_d \beta_d p_d

    Args:
        beta: float ``[groups, steps + 1]`` of `distribution`.

    Returns:
        Float ``[groups]``; differentiable.
    """
    steps = beta.shape[-1] - 1
    rates = (torch.arange(steps + 1, device=beta.device) / steps).to(beta.dtype)
    return (beta * rates).sum(dim=-1)  # no product by BLAS, whose sums depend on the number of threads


def staircase(in_features: int, steps: int) -> Tensor:
    """How many weights of a row each candidate prunes: ``floor(d * in_features / steps)``, int64 ``[steps + 1]``."""
    return torch.arange(steps + 1) * in_features // steps
