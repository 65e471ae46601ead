"""From learned rates to counts whose total is exactly the target."""

from collections.abc import Sequence

import torch
from torch import Tensor


def exact_counts(rates: Sequence[Tensor], in_features: Sequence[int], target: int) -> list[Tensor]:
    r"""Round learned rates so that ``target`` weights are pruned in all, to the weight.

    All rates move by one common shift c, and the counts are rounded:

    .. math:: n_i = \operatorname{round}(C_i \, (\alpha_i + c)), \quad 0 \le n_i \le C_i, \quad
              \textstyle\sum_i n_i = \text{target}

    so the counts whose rate lies nearest to the next integer move first. Where several reach it at the same shift,
    rows that come first move first.

    Args:
        rates: for each matrix the rate of every row, ``[R]``, 0 to 1.
        in_features: for each matrix the weights of a row, C.
        target: weights to prune.

    Returns:
        For each matrix int64 ``[R]``. The arithmetic is float64, element by element: the same for any number of
        threads.

    Raises:
        ValueError: a rate is NaN, or the target is negative or more than all weights.
    """
    alpha = torch.cat([r.detach().double() for r in rates])
    widths = torch.cat([torch.full((len(r),), c) for r, c in zip(rates, in_features, strict=True)])
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError("the learned rates hold NaN or lie outside 0 to 1")
    everything = int(widths.sum())
    if not 0 <= target <= everything:
        raise ValueError(f"cannot prune {target} of {everything} weights")

    def rounded(shift: float) -> Tensor:
        wanted = (widths * (alpha + shift) + 0.5).floor()
        return torch.minimum(wanted.clamp_min(0).long(), widths)

    low, high = -2.0, 2.0  # at the first nothing is pruned, at the second everything
    counts = rounded(low)
    while int(counts.sum()) != target:
        middle = (low + high) / 2
        if middle in (low, high):  # several counts reach the next integer at the same shift
            late = (rounded(high) > counts).nonzero()[:, 0]
            counts[late[: target - int(counts.sum())]] += 1
        elif int((tried := rounded(middle)).sum()) <= target:
            low, counts = middle, tried
        else:
            high = middle
    return list(torch.split(counts, [len(r) for r in rates]))
