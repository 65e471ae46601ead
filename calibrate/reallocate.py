"""Heuristic channel reallocation: give every group one channel of each importance."""

import torch

from .patterns import NM
from .sums import column_sums


def reallocate(score: torch.Tensor, nm: NM) -> torch.Tensor:
    """Deal the channels, sorted by importance, to the groups in a snake.

    The channels are sorted by their summed score, ascending, and cut into ``m`` runs of ``C/m``. Run 0 gives the
    first channel of groups 0, 1, 2, ..., run 1 the second channel of the groups from the last to the first, and so on
    alternating, so that a group that drew the low end of one run draws the high end of the next.

    Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", heuristic
    channel reallocation.

    Args:
        score: ``[R, C]``, C a multiple of ``nm.m``.
        nm: the pattern.

    Returns:
        int64 ``[m, C/m]``: the channel at each place of each group.
    """
    importance = column_sums(score).float()  # rounded, so that the order of addition cannot decide a tie
    runs = importance.argsort(stable=True).reshape(nm.m, -1)
    runs[1::2] = runs[1::2].flip(1)
    return runs
