"""Linear-sum-assignment refinement: hand one place of all groups out anew, in the best way there is."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .._native import pairwise_max_sum
from .patterns import NM
from .sums import BLOCK


def refine_place(planes: torch.Tensor, place: int, nm: NM) -> tuple[torch.Tensor, float]:
    r"""Find which group each channel at ``place`` should go to, all other channels staying.

    With ``t_1 >= ... >= t_(m-1)`` the scores of the other channels of group g in row r, a group that receives channel
    j retains

    .. math:: \textstyle\sum_r \bigl(\sum_{k<n} t_k + \max(t_n, s_{rj})\bigr)
              = \text{const}_g + \sum_r \max(t_n[r,g], s_{rj}) = \text{const}_g + G_{gj}

    so no group is ever sorted, and the best hand-out is the assignment that maximises the sum of ``G``. The
    objective is that of Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models", linear sum assignment; the closed form of the gain is ours.

    Args:
        planes: float32 ``[m, R, K]``: scores by place, row and group.
        place: 0 to m-1.
        nm: the pattern.

    Returns:
        int64 ``[K]``, for each group the group whose channel at ``place`` it receives; and by how much the summed
        retained score grows. No growth beyond float32 rounding gives the identity and 0.0.
    """
    gain = _gain(planes, place, nm)
    # A constant taken off a row or a column moves the sum of every assignment alike, so the best one stays the best.
    # On centred gains the solver's search paths stay short, and it is done several times sooner.
    centred = gain - gain.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    groups, sources = linear_sum_assignment(centred, maximize=True)
    stay = float(np.trace(gain))
    growth = float(gain[groups, sources].sum()) - stay
    if growth <= np.finfo(np.float32).eps * stay:
        return torch.arange(planes.shape[2]), 0.0
    return torch.from_numpy(sources.astype(np.int64)), growth


def _gain(planes: torch.Tensor, place: int, nm: NM) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``G`` of `refine_place`, ``[K, K]``; rows in blocks, so that ``t_n`` is never held for all of them."""
    _, rows, groups = planes.shape
    gain = np.zeros((groups, groups))
    step = max(1, BLOCK // groups)
    for start in range(0, rows, step):
        block = planes[:, start : start + step]
        others = [block[other] for other in range(nm.m) if other != place]
        gain += pairwise_max_sum(_nth_largest(others, nm.n).numpy(), block[place].numpy())
    return gain


def _nth_largest(planes: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """The ``n``-th largest (from 1) of equally shaped tensors at each position, by a ladder of maxima and minima.

    The n-th largest of L is the (L+1-n)-th smallest; the shorter ladder is taken.
    """
    depth, up, down = n, torch.maximum, torch.minimum
    if len(planes) + 1 - n < n:
        depth, up, down = len(planes) + 1 - n, torch.minimum, torch.maximum
    ladder: list[torch.Tensor] = []
    for plane in planes:
        loser = plane
        for rung, best in enumerate(ladder):
            ladder[rung], loser = up(best, loser), down(best, loser)
        if len(ladder) < depth:
            ladder.append(loser)
    return ladder[-1]
