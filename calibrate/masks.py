"""From scores to keep masks with exact counts; and how much of the score a mask keeps.

Ties always keep the lower index. Work goes in blocks, so a mask costs little more memory than itself and, for a
whole-matrix target, one copy of the score.
"""

import math

import numpy as np
import torch

from .patterns import NM, Group, Pattern, Unstructured
from .sums import BLOCK, blocks, row_sums, total


def keep_mask(score: torch.Tensor, pattern: Pattern, per: Group) -> torch.Tensor:
    """Keep the best weights under a pattern: `nm_keep_mask`, or `fraction_keep_mask` among the weights of ``per``."""
    if isinstance(pattern, NM):
        return nm_keep_mask(score, pattern)
    return fraction_keep_mask(score, pattern.sparsity, per)


def nm_keep_mask(score: torch.Tensor, nm: NM) -> torch.Tensor:
    """Keep the ``n`` best of every ``m`` neighbours along in_features.

    Args:
        score: ``[out_features, in_features]``, any float dtype; larger means keep.
        nm: the pattern.

    Returns:
        Bool ``[out_features, in_features]``, exactly ``n`` True in every aligned group.

    Raises:
        ValueError: in_features is not a multiple of ``m``, or the score holds NaN.
    """
    check_score(score)
    if score.shape[1] % nm.m:
        raise ValueError(f"in_features {score.shape[1]} is not a multiple of {nm.m}, as {nm} wants")
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    groups = (score.shape[1] // nm.m, nm.m)
    for part, out in zip(blocks(score), blocks(keep), strict=True):
        # One contiguous plane per place in the group. A place's rank is the number of places that beat it, and of two
        # equal places the earlier one wins, so the ranks of a group are 0 to m-1 without a sort.
        planes = part.reshape(len(part), *groups).movedim(2, 0).contiguous()
        rank = torch.zeros_like(planes, dtype=torch.int8)
        for late in range(1, nm.m):
            for early in range(late):
                early_wins = planes[early] >= planes[late]
                rank[late] += early_wins
                rank[early] += ~early_wins
        out.view(len(part), *groups).copy_((rank < nm.n).movedim(0, 2))
    return keep


def fraction_keep_mask(score: torch.Tensor, sparsity: float, per: Group) -> torch.Tensor:
    """Prune the given fraction of the lowest scores of every row, or of the matrix.

    Of ``count`` weights that compete, exactly ``floor(sparsity * count + 0.5)`` are pruned. Scores are compared in
    float32.

    Args:
        score: ``[out_features, in_features]``, any float dtype; larger means keep.
        sparsity: fraction to prune, between 0 and 1, both excluded.
        per: ``"row"`` or ``"matrix"``; see ``WANDA_GROUP`` and ``RIA_GROUP`` for what each score was made for.

    Returns:
        Bool ``[out_features, in_features]``. Of equal scores, those first in the row (or row by row) are kept.

    Raises:
        ValueError: ``sparsity`` is out of range, or the score holds NaN.
    """
    sparsity = Unstructured(sparsity).sparsity
    count = score.shape[-1] if per == "row" else score.numel()
    return count_keep_mask(score, math.floor(sparsity * count + 0.5), per)


def count_keep_mask(score: torch.Tensor, pruned: int, per: Group) -> torch.Tensor:
    """As `fraction_keep_mask`, with the number of weights to prune of those that compete.

    Raises:
        ValueError: the score holds NaN.
    """
    check_score(score)
    groups = score.detach().float() if per == "row" else score.detach().float().reshape(1, -1)
    count = groups.shape[1]
    keep = torch.full_like(groups, pruned < count, dtype=torch.bool)
    if 0 < pruned < count:
        for part, out in zip(blocks(groups), blocks(keep), strict=True):
            _prune_lowest(part, out, pruned)
    return keep.reshape(score.shape)


def _prune_lowest(groups: torch.Tensor, keep: torch.Tensor, pruned: int) -> None:
    """Write into ``keep`` (``[G, L]``) False for the ``pruned`` lowest of each row of ``groups``, True elsewhere."""
    # Partitioning a copy needs that one copy; torch.kthvalue would need three.
    threshold = torch.from_numpy(np.partition(groups.cpu().numpy(), pruned - 1, axis=1)[:, pruned - 1, None])
    threshold = threshold.to(groups.device)
    pieces = torch.split(groups, BLOCK, dim=1)  # several where one group is the whole matrix
    ties_to_keep = torch.full_like(threshold, groups.shape[1] - pruned, dtype=torch.int64)
    for piece in pieces:
        ties_to_keep -= (piece > threshold).sum(dim=1, keepdim=True)
    for piece, out in zip(pieces, torch.split(keep, BLOCK, dim=1), strict=True):
        tie = piece == threshold
        rank = tie.cumsum(dim=1)
        out.copy_((piece > threshold) | (tie & (rank <= ties_to_keep)))
        ties_to_keep -= rank[:, -1:]


def retained(score: torch.Tensor, keep: torch.Tensor) -> float:
    """The score kept over all the score, summed in float64; 1.0 when there is no score to lose.

    Args:
        score: ``[out_features, in_features]``, nowhere negative.
        keep: bool mask of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if score.shape != keep.shape:
        raise ValueError(f"keep wants the score's shape {tuple(score.shape)}, got {tuple(keep.shape)}")
    parts = zip(blocks(score), blocks(keep), strict=True)
    kept = math.fsum(value for part, mask in parts for value in row_sums(part.masked_fill(~mask, 0)).tolist())
    everything = total(score)
    return kept / everything if everything else 1.0


def check_score(score: torch.Tensor) -> None:
    """Refuse what cannot be ranked.

    Raises:
        ValueError: the score is not a matrix, or holds NaN.
    """
    if score.dim() != 2:
        raise ValueError(f"score wants shape [out_features, in_features], got {tuple(score.shape)}")
    if score.numel() and bool(score.max().isnan()):  # max passes NaN on, without a mask as large as the score
        raise ValueError("score holds NaN; look for NaN in the weight and in the calibration activations")
